"""What a type checker must say of a user's program: nothing, and an error where one is expected (checked too)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
import trio

import triojobs


@dataclass(frozen=True)
class SendEmail:
    to: str


@dataclass(frozen=True)
class Receipt:
    number: int


emails = triojobs.Queue("emails", SendEmail, result=Receipt)
activity = triojobs.Queue("activity", str)


async def send_email(job: triojobs.Job[SendEmail]) -> Receipt:
    def work(conn: psycopg.Connection[Any]) -> Receipt:
        triojobs.enqueue_on(conn, activity, "email_sent", priority=3)
        triojobs.enqueue_on(conn, activity, 3)  # type: ignore[misc]
        return Receipt(len(job.payload.to))

    return await job.commit(work)


async def log_activity(job: triojobs.Job[str]) -> None:
    print(job.payload.upper())


async def produce(client: triojobs.Client) -> None:
    job_id: int = await client.enqueue(emails, SendEmail("ada"), delay=60.0, priority=5, key="welcome:42")
    ids = await client.enqueue_many(emails, [SendEmail("ada"), triojobs.NewJob(SendEmail("bob"), priority=9)])
    ids += await client.enqueue_many(emails, [SendEmail("ada")])
    ids += await client.enqueue_many(emails, (triojobs.NewJob(SendEmail(to)) for to in ("ada", "bob")))
    await client.enqueue_many(emails, ["ada"])  # type: ignore[list-item]
    await client.enqueue(emails, "ada")  # type: ignore[misc]
    await client.enqueue(emails, SendEmail("ada"), priority="high")  # type: ignore[arg-type]
    await client.enqueue(emails, SendEmail("ada"), prio=3)  # type: ignore[call-arg]
    entry = await client.try_enqueue(emails, SendEmail("ada"), key="k", on_conflict="replace")
    print(entry.id, entry.created, entry.replaced)
    info = await client.get(job_id)
    assert info is not None
    print(info.payload["to"])
    receipt: Receipt = await client.result(job_id, emails)
    print(receipt.number)
    async with client.as_completed(ids) as completions:
        async for anything in completions:
            print(anything.payload["to"])
    async with client.as_completed(ids, emails) as completions:
        async for typed in completions:
            print(typed.payload.to)
            print(typed.payload.nobody)  # type: ignore[attr-defined]
    await trio.to_thread.run_sync(
        lambda: client.enqueue_from_thread(emails, SendEmail("ada"), timeout=5.0, job_timeout=30.0)
    )


def produce_without_trio(conninfo: str) -> None:
    with triojobs.SyncClient(conninfo) as client:
        client.enqueue_many(emails, [SendEmail("ada"), triojobs.NewJob(SendEmail("bob"), priority=9)])
    with psycopg.connect(conninfo) as conn, conn.transaction():
        triojobs.enqueue_many_on(conn, emails, [SendEmail("ada"), triojobs.NewJob(SendEmail("bob"), delay=3)])


async def work(conninfo: str) -> None:
    workers = [triojobs.Worker(emails, send_email, concurrency=16), triojobs.Worker(activity, log_activity)]
    triojobs.Worker(activity, send_email)  # type: ignore[arg-type]
    async with triojobs.open_worker_group(conninfo, workers, name="web-1") as group:
        await group.wait_stopped()
    report = await triojobs.serve(conninfo, workers, grace_period=3.0)
    print(report.settled["done"])
    await triojobs.serve(conninfo, workers, grace="long")  # type: ignore[call-arg]
    async with trio.open_nursery() as nursery:
        started: triojobs.WorkerGroup = await nursery.start(triojobs.serve, conninfo, workers)
        started.stop()
