"""A task that enqueues alone: one round trip on the event loop, without a thread, with the same answers."""

from __future__ import annotations

import datetime as dt
import logging
from typing import Any

import psycopg
import pytest
import trio
from forms import plain

import triojobs
from bench.enqueue import somebody_waits
from bench.server import Database
from tests.tools.gates import PATIENCE
from tests.tools.looking import rows, until, value
from triojobs import _sync_store
from triojobs._bridge import Line


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function after which a call in a thread is an error."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a call crossed to a thread")

    return lambda: monkeypatch.setattr(Line, "call", refuse)


async def test_the_connection_is_opened_in_a_thread_and_then_no_thread_is_needed(
    conninfo: str, no_threads: Any
) -> None:
    deadline = dt.datetime(2100, 1, 1, 1, 2, 3, 4, tzinfo=dt.UTC)
    options: dict[str, Any] = {"priority": 7, "max_attempts": 3, "timeout": 0.5, "deadline": deadline}
    async with triojobs.open_client(conninfo) as client:
        first = await client.enqueue(plain, "ü", metadata={"a": "ü\\"}, **options)
        no_threads()
        second = await client.enqueue(plain, "ü", metadata={"a": "ü\\"}, **options)
        assert second > first
    query = "SELECT queue, payload, encoding, metadata, priority, max_attempts, timeout, deadline FROM triojobs.jobs"
    stored = rows(conninfo, query)
    assert stored[0] == stored[1]
    assert stored[0][4:] == (7, 3, 0.5, deadline)


async def test_who_waits_is_notified(conninfo: str, no_threads: Any) -> None:
    queue: triojobs.Queue[int, Any] = triojobs.Queue("bench", int)
    somebody_waits(Database(conninfo))
    with psycopg.connect(conninfo, autocommit=True) as ear:
        ear.execute("LISTEN triojobs")
        async with triojobs.open_client(conninfo) as client:
            await client.enqueue(queue, 1)
            no_threads()
            await client.enqueue(queue, 2)
            await client.enqueue(triojobs.Queue('nob"o\\dy'), 3)
        heard = list(ear.notifies(timeout=PATIENCE, stop_after=2))
    assert [notification.payload for notification in heard] == ["bench", "bench"]


async def test_what_the_server_refuses_is_an_error_and_the_client_goes_on(conninfo: str) -> None:
    rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, 1)
        with pytest.raises(triojobs.DatabaseError, match="no_seven") as caught:
            await client.enqueue(plain, 2, priority=7)
        assert (caught.value.sqlstate, caught.value.committed) == ("23514", False)
        await client.enqueue(plain, 3)
    assert value(conninfo, "SELECT count(*) FROM triojobs.jobs") == 2


async def test_a_notification_that_fails_does_not_fail_the_enqueue(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="triojobs")
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, 1)
        rows(conninfo, "ALTER TABLE triojobs.waiting RENAME TO elsewhere")
        ids = [await client.enqueue(plain, n) for n in range(2)]
    assert value(conninfo, "SELECT count(*) FROM triojobs.jobs") == 1 + len(set(ids))
    assert any("a notification was not sent" in record.getMessage() for record in caplog.records)


async def test_a_connection_that_is_lost_leaves_the_fate_unknown_and_the_next_call_has_another(
    conninfo: str,
) -> None:
    ends: list[BaseException] = []

    async def enqueue(client: triojobs.Client) -> None:
        try:
            await client.enqueue(plain, 2)
        except triojobs.DatabaseError as exc:
            ends.append(exc)

    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, 1)
        with psycopg.connect(conninfo) as holder:
            holder.execute("LOCK TABLE triojobs.jobs IN ACCESS EXCLUSIVE MODE")
            waits = "wait_event_type = 'Lock' AND application_name = 'triojobs enqueue'"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enqueue, client)
                await until(conninfo, f"SELECT count(*) = 1 FROM pg_stat_activity WHERE {waits}")  # type: ignore[arg-type]
                holder.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {waits}")  # type: ignore[arg-type]
        [lost] = ends
        assert isinstance(lost, triojobs.DatabaseError)
        assert (lost.committed, lost.transient) == (None, True)
        await client.enqueue(plain, 3)
    assert value(conninfo, "SELECT count(*) FROM triojobs.jobs") == 2


def test_a_client_without_trio_goes_the_same_way(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("not in one round trip")

    monkeypatch.setattr(_sync_store, "enqueue_in_transaction", refuse)
    with triojobs.SyncClient(conninfo) as client:
        first = client.enqueue(plain, 1)
        with pytest.raises(triojobs.DatabaseError, match="no_seven") as caught:
            client.enqueue(plain, 2, priority=7)
        assert caught.value.committed is False
        assert client.enqueue(plain, 3) > first
    assert value(conninfo, "SELECT count(*) FROM triojobs.jobs") == 2
