"""SyncClient: a process without Trio, any of its threads."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from forms import SendEmail, emails, plain

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.gates import PATIENCE, ThreadGate
from tests.tools.looking import places, rows, until, value
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import exchange

CONNECTIONS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'triojobs sync client'"
)


@asynccontextmanager
async def working(conninfo: str) -> AsyncIterator[None]:
    """Run jobs of both queues while the block runs; payloads decide what becomes of them."""

    async def handler(job: triojobs.Job[Any]) -> Any:
        if job.payload == "fail":
            raise triojobs.Kill("as asked")
        return f"done {job.payload}"

    async def send(job: triojobs.Job[SendEmail]) -> str:
        return f"sent to {job.payload.to}"

    workers: list[triojobs.Worker[Any, Any]] = [
        triojobs.Worker(plain, handler),
        triojobs.Worker(emails, send),
    ]
    async with triojobs.open_worker_group(conninfo, workers):
        yield


async def in_thread(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with trio.fail_after(PATIENCE):
        return await trio.to_thread.run_sync(partial(fn, *args, **options))


# Enqueue: see test_enqueue_forms, which goes through every form.


def test_many_are_one_transaction_and_each_try_says_what_it_did(conninfo: str) -> None:
    with triojobs.SyncClient(conninfo) as client:
        first = client.enqueue(plain, 1, key="k")
        entries = client.try_enqueue_many(
            plain, [2, triojobs.NewJob(3, key="k", on_conflict="replace"), triojobs.NewJob(4, key="free")]
        )
        with pytest.raises(triojobs.DuplicateJobError) as caught:
            client.enqueue_many(plain, [5, triojobs.NewJob(6, key="k")])
    assert [(entry.created, entry.replaced) for entry in entries] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert entries[1].id == first
    assert (caught.value.index, caught.value.job_id) == (1, first)
    assert places(conninfo) == {"jobs": 3, "ready": 3, "keys": 2}
    assert (
        value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs WHERE key IS DISTINCT FROM 'k'")
        == 1
    )


def test_an_enqueue_is_repeated_safely_by_its_job_id(conninfo: str) -> None:
    with triojobs.SyncClient(conninfo) as client:
        job_id = client.new_job_id()
        assert client.try_enqueue(plain, 1, job_id=job_id) == triojobs.Enqueued(job_id, created=True)
        assert client.try_enqueue(plain, 2, job_id=job_id) == triojobs.Enqueued(job_id, created=False)
        info = client.get(job_id)
    assert info is not None
    assert info.payload == 1


async def test_a_sleeping_group_is_woken(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        return job.payload

    def enqueue() -> int:
        with triojobs.SyncClient(conninfo) as client:
            return client.enqueue(plain, "wake up")

    worker = triojobs.Worker(plain, handler)
    async with triojobs.open_worker_group(conninfo, [worker], listening_poll_interval=3600.0) as group:
        await until(conninfo, "SELECT count(*) > 0 FROM triojobs.waiting", seconds=PATIENCE)
        job_id = await in_thread(enqueue)
        with trio.fail_after(PATIENCE):
            assert await group.client.result(job_id) == "wake up"


# Look, wait, cancel.


async def test_results_are_typed_by_their_queue_and_plain_without(conninfo: str) -> None:
    def work() -> None:
        with triojobs.SyncClient(conninfo) as client:
            job_id = client.enqueue(emails, SendEmail("ada"))
            assert client.result(job_id, emails, timeout=PATIENCE) == "sent to ada"
            assert client.result(job_id, timeout=0) == "sent to ada"
            typed, raw = client.get(job_id, emails), client.get(job_id)
            assert typed is not None
            assert raw is not None
            assert (typed.payload, raw.payload) == (SendEmail("ada"), {"to": "ada"})
            assert (typed.status, typed.result) == ("done", "sent to ada")
            with pytest.raises(triojobs.OptionError, match="queue"):
                client.get(job_id, plain)
            with pytest.raises(triojobs.OptionError, match="queue"):
                client.result(job_id, plain)

    async with working(conninfo):
        await in_thread(work)


async def test_what_became_of_a_job_is_raised(conninfo: str) -> None:
    def work() -> None:
        with triojobs.SyncClient(conninfo) as client:
            with pytest.raises(triojobs.JobFailedError, match="as asked"):
                client.result(client.enqueue(plain, "fail"), timeout=PATIENCE)
            later = client.enqueue(plain, "later", delay=3600.0)
            assert client.cancel(later, reason="not needed")
            assert not client.cancel(later)
            with pytest.raises(triojobs.JobCancelledError, match="not needed"):
                client.result(later)
            for call in (client.result, client.cancel):
                with pytest.raises(triojobs.JobNotFoundError):
                    call(10**9)
            assert client.get(10**9) is None

    async with working(conninfo):
        await in_thread(work)


def test_a_time_limit_is_kept(conninfo: str) -> None:
    with triojobs.SyncClient(conninfo) as client:
        job_id = client.enqueue(plain, None)
        for timeout in (0, 0.05):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=f"job {job_id} had not ended after {timeout:g} s"):
                client.result(job_id, timeout=timeout)
            assert time.monotonic() - began >= timeout
        for wrong in (-1, float("nan"), "5"):
            with pytest.raises(triojobs.OptionError, match="timeout"):
                client.result(job_id, timeout=wrong)  # type: ignore[arg-type]
    assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_a_result_is_waited_for_across_an_outage(conninfo: str) -> None:
    results: list[Any] = []
    with fault_proxy(conninfo) as (proxy, through):
        client = triojobs.SyncClient(through)
        job_id = await in_thread(client.enqueue, plain, "x")
        proxy.cut()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait() -> None:
                results.append(await in_thread(client.result, job_id, timeout=PATIENCE))

            async with working(conninfo):
                await until(conninfo, "SELECT count(*) > 0 FROM triojobs.outcomes", seconds=PATIENCE)
            proxy.heal()
        await in_thread(client.close)
    assert results == ["done x"]


# Threads.


def test_threads_share_a_client(conninfo: str) -> None:
    ids: list[int] = []
    with triojobs.SyncClient(conninfo) as client:

        def work(name: int) -> None:
            ids.append(client.enqueue(plain, name))
            ids.extend(client.enqueue_many(plain, [name] * 9))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert value(conninfo, CONNECTIONS) == 1
    assert len(set(ids)) == 80
    assert places(conninfo) == {"jobs": 80, "ready": 80}


async def test_a_thread_that_waits_for_its_turn_finds_the_client_closed(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ThreadGate()
    monkeypatch.setattr(exchange, "ROWS", 0)  # by a statement of psycopg, before which the gate stands
    monkeypatch.setattr(enqueue_sql, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
    client = triojobs.SyncClient(conninfo)
    ends: dict[str, Any] = {}

    def enqueue(who: str) -> None:
        try:
            ends[who] = client.enqueue(plain, None)
        except Exception as exc:
            ends[who] = exc

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, enqueue, "first")
        await gate.reached()
        nursery.start_soon(in_thread, client.close)
        nursery.start_soon(in_thread, enqueue, "second")
        nursery.start_soon(in_thread, enqueue, "third")
        gate.open()
    # Whoever had its turn before the closing is committed; nobody opens a connection after it.
    assert isinstance(ends["first"], int)
    assert all(isinstance(end, int | trio.ClosedResourceError) for end in ends.values())
    assert len(ends) == 3
    assert value(conninfo, "SELECT count(*) FROM triojobs.jobs") == sum(
        isinstance(end, int) for end in ends.values()
    )
    with pytest.raises(trio.ClosedResourceError):
        await in_thread(client._store.enqueue, [])
    await until(conninfo, f"SELECT ({CONNECTIONS}) = 0", seconds=PATIENCE)  # type: ignore[arg-type]


# Opening and closing.


def test_a_closed_client_says_so_and_closing_twice_is_fine(conninfo: str) -> None:
    with triojobs.SyncClient(conninfo) as client:
        client.enqueue(plain, None)
    client.close()
    calls: list[Callable[[], Any]] = [
        lambda: client.enqueue(plain, None),
        lambda: client.enqueue_many(plain, []),
        lambda: client.new_job_id(),
        lambda: client.get(1),
        lambda: client.result(1),
        lambda: client.cancel(1),
        lambda: client.__enter__(),
    ]
    for call in calls:
        with pytest.raises(trio.ClosedResourceError):
            call()


def test_it_is_usable_without_a_block(conninfo: str) -> None:
    client = triojobs.SyncClient(conninfo)
    try:
        client.enqueue(plain, None)
    finally:
        client.close()
    assert places(conninfo) == {"jobs": 1, "ready": 1}


def test_a_server_that_is_not_there_is_told_on_entry() -> None:
    with (
        pytest.raises(triojobs.DatabaseError) as caught,
        triojobs.SyncClient("host=127.0.0.1 port=1 dbname=x"),
    ):
        pass
    assert (caught.value.committed, caught.value.transient) == (False, True)


def test_a_missing_schema_is_told_on_entry(empty_database: str) -> None:
    with pytest.raises(triojobs.SchemaError, match="triojobs migrate"), triojobs.SyncClient(empty_database):
        pass
    deadline = time.monotonic() + PATIENCE
    while value(empty_database, CONNECTIONS):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("conninfo", {"conninfo": None}),
        ("conninfo", {"conninfo": "dbname=x\0"}),
        ("schema", {"schema": "No Schema"}),
        ("call_timeout", {"call_timeout": 0}),
        ("call_timeout", {"call_timeout": float("inf")}),
    ],
)
def test_options_out_of_range_are_refused(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        triojobs.SyncClient(**{"conninfo": "", **options})
    assert caught.value.field == field


def test_a_lost_connection_is_replaced(conninfo: str) -> None:
    with triojobs.SyncClient(conninfo) as client:
        client.enqueue(plain, 1)
        rows(conninfo, CONNECTIONS.replace("count(*)", "pg_terminate_backend(pid, 10000)"))  # type: ignore[arg-type]
        client.enqueue(plain, 2)
    assert places(conninfo) == {"jobs": 2, "ready": 2}


async def test_a_silent_server_is_given_up_after_the_call_timeout(conninfo: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        client = triojobs.SyncClient(through, call_timeout=0.5)
        await in_thread(client.enqueue, plain, 1)
        proxy.stall()
        with pytest.raises(triojobs.DatabaseError) as caught:
            await in_thread(client.enqueue, plain, 2)
        assert (caught.value.committed, caught.value.transient) == (None, True)
        proxy.cut()
        proxy.heal()
        await in_thread(client.enqueue, plain, 3)
        await in_thread(client.close)
