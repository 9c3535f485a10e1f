"""What is known after an error: `committed` is False, or None when the reply to a COMMIT was lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import trio
from forms import plain

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.gates import ThreadGate
from tests.tools.looking import anybody_blocked, locked, places, rows, terminate, until, value
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import enqueue_each, exchange, session

LONG: dict[str, Any] = {"call_timeout": 60.0}  # only a hang needs it
Call = Callable[[str], Awaitable[Any]]


async def one(conninfo: str, **options: Any) -> Any:
    async with triojobs.open_client(conninfo, **LONG) as client:
        return await client.enqueue(plain, "once", **options)


async def one_keyed(conninfo: str) -> Any:
    return await one(conninfo, key="k")


async def many(conninfo: str) -> Any:
    async with triojobs.open_client(conninfo, **LONG) as client:
        return await client.enqueue_many(plain, range(25))


async def from_thread(conninfo: str) -> Any:
    async with triojobs.open_client(conninfo, **LONG) as client:
        return await trio.to_thread.run_sync(lambda: client.enqueue_from_thread(plain, "once", timeout=50.0))


async def sync_client(conninfo: str) -> Any:
    def call() -> int:
        with triojobs.SyncClient(conninfo, **LONG) as client:
            return client.enqueue(plain, "once")

    return await trio.to_thread.run_sync(call)


async def sync_client_many(conninfo: str) -> Any:
    def call() -> list[int]:
        with triojobs.SyncClient(conninfo, **LONG) as client:
            return client.enqueue_many(plain, range(25))

    return await trio.to_thread.run_sync(call)


async def outbox_in_autocommit(conninfo: str) -> Any:
    def call() -> int:
        with psycopg.connect(conninfo, autocommit=True) as conn:
            return triojobs.enqueue_on(conn, plain, "once")

    return await trio.to_thread.run_sync(call)


async def outbox(conninfo: str) -> Any:
    def call() -> int:
        with psycopg.connect(conninfo) as conn:
            return triojobs.enqueue_on(conn, plain, "once")

    return await trio.to_thread.run_sync(call)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 rows are three statements; and a lock is waited for until the test lets go."""
    monkeypatch.setattr(enqueue_sql, "CHUNK", 10)
    monkeypatch.setattr(session, "LOCK_TIMEOUT", 60.0)


def stop(monkeypatch: pytest.MonkeyPatch, where: str) -> ThreadGate:
    """Stop the call in its thread: before a statement that commits by itself, or before a COMMIT."""
    gate = ThreadGate()
    monkeypatch.setattr(exchange, "ROWS", 0)  # by statements of psycopg, before which a gate may stand
    send_one = enqueue_sql.SpecialRows.enqueue
    match where:
        case "shared statement":
            monkeypatch.setattr(enqueue_each, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
        case "statement":
            monkeypatch.setattr(enqueue_sql, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
        case "second chunk":
            monkeypatch.setattr(enqueue_sql, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain, call=2))
        case "commit of three chunks":
            monkeypatch.setattr(enqueue_sql, "enqueue_plain", gate.after(enqueue_sql.enqueue_plain, call=3))
        case "commit":
            monkeypatch.setattr(enqueue_sql, "enqueue_plain", gate.after(enqueue_sql.enqueue_plain))
        case "commit of a key":
            gated = gate.after(send_one)
            monkeypatch.setattr(enqueue_sql.SpecialRows, "enqueue", lambda *a, **k: gated(*a, **k))
        case "key":
            gated = gate.before(send_one)
            monkeypatch.setattr(enqueue_sql.SpecialRows, "enqueue", lambda *a, **k: gated(*a, **k))
    return gate


@pytest.mark.parametrize(
    ("call", "where", "jobs"),
    [
        (one, "shared statement", 1),
        (from_thread, "shared statement", 1),
        (one_keyed, "commit of a key", 1),
        (many, "commit of three chunks", 25),
        (sync_client, "statement", 1),
        (sync_client_many, "commit of three chunks", 25),
        (outbox_in_autocommit, "commit", 1),
    ],
)
async def test_a_lost_reply_leaves_committed_unknown_and_is_never_repeated(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, call: Call, where: str, jobs: int
) -> None:
    gate = stop(monkeypatch, where)
    with fault_proxy(conninfo) as (proxy, through):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def lose_the_reply() -> None:
                await gate.reached()
                proxy.lose_replies()
                gate.open()
                await until(conninfo, "SELECT count(*) > 0 FROM triojobs.jobs")
                proxy.cut()
                proxy.heal()

            with pytest.raises(triojobs.DatabaseError) as caught:
                await call(through)
    assert caught.value.committed is None
    assert caught.value.transient
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    assert value(conninfo, "SELECT count(*) FROM triojobs.jobs") == jobs


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (one_keyed, "key"),
        (many, "second chunk"),
        (sync_client_many, "second chunk"),
        (outbox_in_autocommit, "statement"),
        (outbox, "statement"),
    ],
)
async def test_a_connection_that_breaks_before_the_commit_has_committed_nothing(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, call: Call, where: str
) -> None:
    gate = stop(monkeypatch, where)
    with fault_proxy(conninfo) as (proxy, through):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def break_the_connection() -> None:
                await gate.reached()
                proxy.cut()
                gate.open()

            with pytest.raises(triojobs.DatabaseError) as caught:
                await call(through)
    assert (caught.value.committed, caught.value.transient) == (False, True)
    assert places(conninfo) == {}


@pytest.mark.parametrize("committed", [False, True])
async def test_a_repetition_with_the_same_job_id_is_safe_after_a_lost_reply(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    gate = stop(monkeypatch, "commit of a key")
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through, **LONG) as client:
            job_id = await client.new_job_id()
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def break_it() -> None:
                    await gate.reached()
                    if committed:
                        proxy.lose_replies()
                    else:
                        proxy.cut()
                    gate.open()
                    if committed:
                        await until(conninfo, "SELECT count(*) > 0 FROM triojobs.jobs")
                        proxy.cut()

                with pytest.raises(triojobs.DatabaseError) as caught:
                    await client.enqueue(plain, "once", job_id=job_id)
            proxy.heal()
            assert caught.value.committed is None
            again = await client.try_enqueue(plain, "once", job_id=job_id)
            assert again == triojobs.Enqueued(job_id, created=not committed)
            assert await client.enqueue(plain, "once", job_id=job_id) == job_id
    assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_a_backend_that_ends_within_the_statement_leaves_it_unknown(conninfo: str) -> None:
    with locked(conninfo, "LOCK TABLE triojobs.jobs IN SHARE MODE"):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def end_it() -> None:
                terminate(conninfo, await anybody_blocked(conninfo))

            with pytest.raises(triojobs.DatabaseError) as caught:
                await one(conninfo)
    assert (caught.value.committed, caught.value.transient) == (None, True)
    assert places(conninfo) == {}


async def test_a_silent_server_leaves_a_single_statement_unknown(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = stop(monkeypatch, "shared statement")
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through, call_timeout=1.0) as client, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def fall_silent() -> None:
                await gate.reached()
                proxy.stall()
                gate.open()

            with trio.fail_after(30), pytest.raises(triojobs.DatabaseError) as caught:
                await client.enqueue(plain, "once")
            assert caught.value.committed is None
            proxy.cut()
    assert value(conninfo, "SELECT count(*) <= 1 FROM triojobs.jobs")


async def test_a_server_that_refuses_has_not_committed_and_says_why(conninfo: str) -> None:
    rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.DatabaseError) as caught:
            await client.enqueue(plain, None, priority=7)
        assert (caught.value.committed, caught.value.transient, caught.value.sqlstate) == (
            False,
            False,
            "23514",
        )
        assert "no_seven" in str(caught.value)
        await client.enqueue(plain, None)
    assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_a_lock_that_is_not_released_in_time_has_committed_nothing(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LOCK_TIMEOUT", 0.1)
    async with triojobs.open_client(conninfo) as client:
        gate = locked(conninfo, "LOCK TABLE triojobs.jobs IN SHARE MODE")
        with gate, pytest.raises(triojobs.DatabaseError) as caught:
            await client.enqueue(plain, None)
        assert (caught.value.committed, caught.value.transient, caught.value.sqlstate) == (
            False,
            True,
            "55P03",
        )
        await client.enqueue(plain, None)
    assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_no_server_is_a_transient_error_that_committed_nothing(conninfo: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through) as client:
            await client.enqueue(plain, 1)
            proxy.cut()
            for call in (
                lambda: client.enqueue(plain, 2),
                lambda: client.enqueue(plain, 2, key="k"),
                lambda: client.enqueue_many(plain, [2, 3]),
            ):
                with pytest.raises(triojobs.DatabaseError) as caught:
                    await call()
                assert (caught.value.committed, caught.value.transient) == (False, True)
            proxy.heal()
            await client.enqueue(plain, "the connection has healed")
    assert places(conninfo) == {"jobs": 2, "ready": 2}
