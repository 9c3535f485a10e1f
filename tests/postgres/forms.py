"""Every way in: each form enqueues one job through one entrance and returns its id."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import trio

import triojobs
from tests.tools.looking import value

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
other: triojobs.Queue[Any, Any] = triojobs.Queue("other")


@dataclass(frozen=True)
class SendEmail:
    to: str


emails = triojobs.Queue("emails", SendEmail, result=str)

# (conninfo, queue, payload, **options) -> id
Form = Callable[..., Awaitable[int]]


async def by_client(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        return await client.enqueue(queue, payload, **options)


async def by_client_try(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        return (await client.try_enqueue(queue, payload, **options)).id


async def by_client_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        (job_id,) = await client.enqueue_many(queue, [triojobs.NewJob(payload, **options)])
        return job_id


async def by_client_stream(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async def one() -> AsyncIterator[Any]:
        yield triojobs.NewJob(payload, **options)

    async with triojobs.open_client(conninfo) as client:
        assert await client.enqueue_stream(queue, one()) == 1
    return value(conninfo, "SELECT max(id) FROM triojobs.jobs")


async def by_thread(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    if "timeout" in options:
        options["job_timeout"] = options.pop("timeout")
    async with triojobs.open_client(conninfo) as client:
        return await trio.to_thread.run_sync(lambda: client.enqueue_from_thread(queue, payload, **options))


async def by_sync_client(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            return client.enqueue(queue, payload, **options)

    return await trio.to_thread.run_sync(call)


async def by_sync_client_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            (job_id,) = client.enqueue_many(queue, [triojobs.NewJob(payload, **options)])
            return job_id

    return await trio.to_thread.run_sync(call)


async def by_sync_client_try(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            return client.try_enqueue(queue, payload, **options).id

    return await trio.to_thread.run_sync(call)


async def by_outbox(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        return triojobs.enqueue_on(conn, queue, payload, **options)


async def by_outbox_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        (job_id,) = triojobs.enqueue_many_on(conn, queue, [triojobs.NewJob(payload, **options)])
        return job_id


async def by_outbox_try(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        return triojobs.try_enqueue_on(conn, queue, payload, **options).id


async def by_client_try_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        (entry,) = await client.try_enqueue_many(queue, [triojobs.NewJob(payload, **options)])
        return entry.id


async def by_sync_client_try_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            (entry,) = client.try_enqueue_many(queue, [triojobs.NewJob(payload, **options)])
            return entry.id

    return await trio.to_thread.run_sync(call)


async def by_outbox_try_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        (entry,) = triojobs.try_enqueue_many_on(conn, queue, [triojobs.NewJob(payload, **options)])
        return entry.id


FORMS: list[Form] = [
    by_client,
    by_client_try,
    by_client_many,
    by_client_stream,
    by_thread,
    by_sync_client,
    by_sync_client_many,
    by_sync_client_try,
    by_outbox,
    by_outbox_many,
    by_outbox_try,
    by_client_try_many,
    by_sync_client_try_many,
    by_outbox_try_many,
]


def named(form: Any) -> str:
    return str(form.__name__)
