"""Enqueue from threads on a real database: any thread, while the client or the group is open."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
from forms import other, plain

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.gates import PATIENCE, ThreadGate
from tests.tools.looking import places, rows, until, value
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import enqueue_each, exchange

SHORT: dict[str, Any] = {"grace_period": 0.2, "close_timeout": 1.0, "call_timeout": 1.0}
SLACK = 10.0  # seconds beside a bound of two or three: only a hang needs it


class Caller(threading.Thread):
    """A thread that Trio does not know; `end` is what its call gave."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.end: Any = None
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            self.end = self._call()
        except BaseException as exc:
            self.end = exc


async def joined(*callers: Caller) -> list[Any]:
    """Wait for threads; return what their calls gave."""
    with trio.fail_after(PATIENCE):
        while any(caller.is_alive() for caller in callers):
            await trio.sleep(0.005)
    return [caller.end for caller in callers]


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each commit made in a thread, where a gate may stop it; on the loop it would stop everybody."""
    monkeypatch.setattr(exchange, "ROWS", 0)


async def test_threads_of_every_kind_and_tasks_share_a_client(conninfo: str) -> None:
    ids: list[int] = []

    async with triojobs.open_client(conninfo) as client:

        def in_thread(name: str) -> None:
            for n in range(5):
                ids.append(client.enqueue_from_thread(plain, f"{name} {n}"))

        async def in_task(name: str) -> None:
            for n in range(5):
                ids.append(await client.enqueue(plain, f"{name} {n}"))

        callers = [Caller(partial(in_thread, f"plain {n}")) for n in range(20)]
        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(trio.to_thread.run_sync, in_thread, f"worker {n}")
                nursery.start_soon(in_task, f"task {n}")
        await joined(*callers)
    assert len(set(ids)) == 300
    assert value(conninfo, "SELECT count(DISTINCT payload) FROM triojobs.jobs") == 300
    assert places(conninfo) == {"jobs": 300, "ready": 300}
    assert value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs") < 300


@pytest.mark.usefixtures("in_threads")
async def test_each_thread_gets_an_answer_of_its_own(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
    async with triojobs.open_client(conninfo, call_timeout=60.0) as client:
        holder = await client.enqueue(plain, None, key="taken")
        call = partial(client.enqueue_from_thread, plain)
        gates = ThreadGate(), ThreadGate()  # one commit of each lane is in flight, so that the others gather
        gated = gates[0].before(enqueue_sql.SpecialRows.enqueue)
        monkeypatch.setattr(enqueue_sql.SpecialRows, "enqueue", lambda *a, **k: gated(*a, **k))
        monkeypatch.setattr(enqueue_each, "enqueue_plain", gates[1].before(enqueue_sql.enqueue_plain))
        first = Caller(partial(call, "first", key="first")), Caller(partial(call, "first"))
        for gate in gates:
            await gate.reached()
        good = [Caller(partial(call, n)) for n in range(3)]
        refused = Caller(partial(call, "refused", priority=7))
        keyed = Caller(partial(call, "keyed", key="free"))
        taken = Caller(partial(call, "taken", key="taken"))
        unknown = Caller(partial(call, "unknown", job_id=10**9))
        too_large = Caller(partial(call, "x" * 2**21))
        await joined(too_large)  # refused at the call
        with trio.fail_after(PATIENCE):
            while client._flusher.waiting < 7:
                await trio.sleep(0.005)
        for gate in gates:
            gate.open()
        await joined(*first, *good, refused, keyed, taken, unknown)
    assert all(isinstance(caller.end, int) for caller in (*first, *good, keyed))
    assert isinstance(refused.end, triojobs.DatabaseError)
    assert (refused.end.sqlstate, refused.end.committed) == ("23514", False)
    assert isinstance(taken.end, triojobs.DuplicateJobError)
    assert (taken.end.job_id, taken.end.index) == (holder, None)
    assert isinstance(unknown.end, triojobs.OptionError)
    assert unknown.end.field == "job_id"
    assert isinstance(too_large.end, triojobs.OptionError)
    assert places(conninfo) == {"jobs": 7, "ready": 7, "keys": 3}


async def test_a_full_default_limiter_is_no_deadlock(conninfo: str) -> None:
    threads = int(trio.to_thread.current_default_thread_limiter().total_tokens)
    together = threading.Barrier(threads)

    async with triojobs.open_client(conninfo) as client:

        def work() -> None:
            together.wait(PATIENCE)
            client.enqueue_from_thread(plain, None)

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for _ in range(threads):
                    nursery.start_soon(trio.to_thread.run_sync, work)
    assert places(conninfo) == {"jobs": threads, "ready": threads}


async def test_a_handlers_thread_enqueues_follow_ups(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> int:
        return await trio.to_thread.run_sync(
            partial(group.client.enqueue_from_thread, other, f"after {job.payload}")
        )

    async def follow_up(job: triojobs.Job[Any]) -> Any:
        return job.payload

    workers = [triojobs.Worker(plain, handler), triojobs.Worker(other, follow_up)]
    async with triojobs.open_worker_group(conninfo, workers) as group:
        with trio.fail_after(PATIENCE):
            first = await group.client.enqueue(plain, "first")
            assert await group.client.result(await group.client.result(first)) == "after first"


# Closing.


@pytest.mark.usefixtures("in_threads")
async def test_leaving_a_client_commits_what_waits_and_refuses_what_comes_later(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ThreadGate()
    monkeypatch.setattr(enqueue_each, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
    async with triojobs.open_client(conninfo) as client:
        call = partial(client.enqueue_from_thread, plain)
        in_flight = Caller(partial(call, 0))
        await gate.reached()
        waiting = [Caller(partial(call, n)) for n in range(1, 6)]
        with trio.fail_after(PATIENCE):
            while client._flusher.waiting < 5:
                await trio.sleep(0.005)
        gate.open()
    assert all(isinstance(end, int) for end in await joined(in_flight, *waiting))
    assert isinstance((await joined(Caller(partial(call, "later"))))[0], trio.ClosedResourceError)
    assert places(conninfo) == {"jobs": 6, "ready": 6}


@pytest.mark.parametrize("how", ["leaving", "cancel"])
@pytest.mark.usefixtures("in_threads")
async def test_closing_a_client_answers_everybody_in_front_of_a_black_hole(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    gate = ThreadGate()
    monkeypatch.setattr("triojobs._open.CLIENT_CLOSE_TIMEOUT", 1.0)
    monkeypatch.setattr(enqueue_each, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
    with fault_proxy(conninfo) as (proxy, through):
        with trio.CancelScope() as scope:
            async with triojobs.open_client(through, call_timeout=60.0) as client:
                call = partial(client.enqueue_from_thread, plain)
                in_flight = Caller(partial(call, "in flight"))
                await gate.reached()
                waiting = [Caller(partial(call, n)) for n in range(5)]
                with trio.fail_after(PATIENCE):
                    while client._flusher.waiting < 5:
                        await trio.sleep(0.005)
                proxy.stall()
                gate.open()
                began = trio.current_time()
                if how == "cancel":
                    scope.cancel()
        assert trio.current_time() - began < 1.0 + SLACK
        ends = await joined(in_flight, *waiting)
        proxy.cut()
    assert isinstance(ends[0], triojobs.DatabaseError)
    assert ends[0].committed is None
    assert all(isinstance(end, trio.ClosedResourceError) for end in ends[1:])


@pytest.mark.usefixtures("in_threads")
async def test_leaving_a_group_answers_waiting_and_later_threads(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ThreadGate()
    monkeypatch.setattr(enqueue_each, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))

    async def handler(job: triojobs.Job[Any]) -> None: ...

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(other, handler)]) as group:
        call = partial(group.client.enqueue_from_thread, plain)
        in_flight = Caller(partial(call, 0))
        await gate.reached()
        waiting = [Caller(partial(call, n)) for n in range(1, 6)]
        with trio.fail_after(PATIENCE):
            while group.client._flusher.waiting < 5:
                await trio.sleep(0.005)
        group.stop()
        gate.open()
        await group.wait_stopped()
        assert isinstance((await joined(Caller(partial(call, "later"))))[0], trio.ClosedResourceError)
    assert all(isinstance(end, int) for end in await joined(in_flight, *waiting))
    assert isinstance((await joined(Caller(partial(call, "later"))))[0], trio.ClosedResourceError)
    assert places(conninfo) == {"jobs": 6, "ready": 6}


async def in_a_worker_thread(enqueue: Callable[[], int]) -> Any:
    return await trio.to_thread.run_sync(enqueue)


async def in_a_thread_that_is_joined(enqueue: Callable[[], int]) -> Any:
    caller = Caller(enqueue)
    await trio.to_thread.run_sync(caller.join)  # cannot be cancelled
    if isinstance(caller.end, BaseException):
        raise caller.end
    return caller.end


async def test_a_thread_whose_task_was_cancelled_enqueues_nothing_more(conninfo: str) -> None:
    """However quick the answers are: no wait of the enqueue is long enough to notice the cancel."""
    cancelled = threading.Event()
    ids: list[int] = []

    def go_on_enqueueing(client: triojobs.Client) -> None:
        ids.append(client.enqueue_from_thread(plain, "before"))
        trio.from_thread.run_sync(scope.cancel)
        cancelled.set()
        ids.append(client.enqueue_from_thread(plain, "after"))

    async with triojobs.open_client(conninfo) as client:
        with trio.CancelScope() as scope:
            await trio.to_thread.run_sync(go_on_enqueueing, client)
    assert cancelled.is_set()
    assert scope.cancelled_caught
    assert rows(conninfo, "SELECT id FROM triojobs.jobs") == [(ids[0],)]
    assert len(ids) == 1


HANDLERS = pytest.mark.parametrize("kind", [in_a_worker_thread, in_a_thread_that_is_joined])


@HANDLERS
@pytest.mark.usefixtures("in_threads")
async def test_a_handlers_thread_that_waits_is_answered_when_the_group_is_cancelled(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    gate = ThreadGate()
    answers: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        answers.append(await kind(partial(group.client.enqueue_from_thread, other, "follow-up")))

    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
            job_id = await group.client.enqueue(plain, None)
            monkeypatch.setattr(enqueue_each, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
            await gate.reached()  # handed off
            scope.cancel()
            gate.open()
    assert scope.cancelled_caught
    # It was committed, and the handler returned: so its job is done.
    assert len(answers) == 1
    assert rows(conninfo, "SELECT id FROM triojobs.jobs WHERE queue = 'other'") == [(answers[0],)]
    assert rows(conninfo, "SELECT job_id, status FROM triojobs.outcomes") == [(job_id, "done")]


@HANDLERS
@pytest.mark.usefixtures("in_threads")
async def test_a_handlers_thread_in_front_of_a_black_hole_does_not_hang_the_group(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    gate = ThreadGate()
    ends: dict[Any, Any] = {}

    async def handler(job: triojobs.Job[Any]) -> None:
        try:
            ends[job.payload] = await kind(partial(group.client.enqueue_from_thread, other, job.payload))
        except BaseException as exc:
            ends[job.payload] = exc
            raise

    with fault_proxy(conninfo) as (proxy, through):
        with trio.CancelScope() as scope:
            workers = [triojobs.Worker(plain, handler, concurrency=2)]
            async with triojobs.open_worker_group(through, workers, **SHORT) as group:
                await group.client.enqueue(plain, "in flight")
                monkeypatch.setattr(enqueue_each, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain))
                await gate.reached()
                async with triojobs.open_client(conninfo) as elsewhere:
                    await elsewhere.enqueue(plain, "waiting")
                with trio.fail_after(PATIENCE):
                    while group.client._flusher.waiting < 1:
                        await trio.sleep(0.005)
                proxy.stall()
                gate.open()
                began = trio.current_time()
                scope.cancel()
        assert scope.cancelled_caught
        assert trio.current_time() - began < 0.2 + 1.0 + 1.0 + 1.0 + SLACK
        proxy.cut()
    assert isinstance(ends["in flight"], triojobs.DatabaseError)
    assert ends["in flight"].committed is None
    if kind is in_a_worker_thread:
        assert isinstance(ends["waiting"], trio.Cancelled)  # withdrawn before it was begun
    else:
        assert isinstance(ends["waiting"], triojobs.DatabaseError | trio.ClosedResourceError)


def test_a_thread_that_calls_after_the_end_of_the_program_is_refused(conninfo: str) -> None:
    async def main() -> triojobs.Client:
        async with triojobs.open_client(conninfo) as client:
            return client

    client = trio.run(main)
    with pytest.raises(trio.ClosedResourceError):
        client.enqueue_from_thread(plain, None)


# Forks.

FORKING_PROGRAM = """
import os, sys, threading, trio, triojobs

plain = triojobs.Queue("plain")
conninfo = sys.argv[1]


def child_says(*calls):
    # Each call in a child of its own; a child that hangs is ended by its alarm.
    for name, call in calls:
        pid = os.fork()
        if pid == 0:
            import signal
            signal.alarm(30)
            try:
                call()
                print(name, "went through", flush=True)
            except triojobs.TriojobsError as exc:
                print(name, "refused:", "after the fork" in str(exc), flush=True)
            os._exit(0)
        print(name, "status", os.waitpid(pid, 0)[1], flush=True)


def in_thread(client):
    client.enqueue_from_thread(plain, 1)
    child_says(("from_thread", lambda: client.enqueue_from_thread(plain, 2)))
    client.enqueue_from_thread(plain, 3)


async def main():
    async with triojobs.open_client(conninfo) as client:
        await trio.to_thread.run_sync(in_thread, client)

        async def enqueue_on_the_loop():
            await client.enqueue(plain, 4)

        def step():  # a child of the loop cannot run it, but it can begin a call
            enqueue_on_the_loop().send(None)

        child_says(("on_the_loop", step))
        await client.enqueue(plain, 5)

trio.run(main)

with triojobs.SyncClient(conninfo) as sync:
    sync.enqueue(plain, 6)
    sync._store._lock.acquire()  # as a thread in the middle of a call would have it
    child_says(("sync", lambda: sync.enqueue(plain, 7)), ("sync_close", sync.close))
    sync._store._lock.release()
    sync.enqueue(plain, 8)
"""


async def test_a_forked_child_is_refused_and_its_parent_goes_on(conninfo: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING_PROGRAM, conninfo]
    with trio.fail_after(2 * PATIENCE):
        done = await trio.run_process(command, capture_stdout=True, stdin=subprocess.DEVNULL)
    assert done.stdout.decode().splitlines() == [
        "from_thread refused: True",
        "from_thread status 0",
        "on_the_loop refused: True",
        "on_the_loop status 0",
        "sync refused: True",
        "sync status 0",
        "sync_close went through",
        "sync_close status 0",
    ]
    async with triojobs.open_client(conninfo) as client:
        found = [await client.get(n) for (n,) in rows(conninfo, "SELECT id FROM triojobs.jobs ORDER BY id")]
    assert [info.payload for info in found if info] == [1, 3, 5, 6, 8]


async def test_jobs_of_threads_are_seen_by_a_sleeping_group(conninfo: str) -> None:
    seen = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        seen.set()

    worker = triojobs.Worker(plain, handler)
    async with (
        triojobs.open_worker_group(conninfo, [worker], listening_poll_interval=3600.0),
        triojobs.open_client(conninfo) as client,
    ):
        await until(conninfo, "SELECT count(*) > 0 FROM triojobs.waiting", seconds=PATIENCE)
        await trio.to_thread.run_sync(client.enqueue_from_thread, plain, None)
        with trio.fail_after(PATIENCE):
            await seen.wait()
