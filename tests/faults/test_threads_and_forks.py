"""Rows 38 to 41, 40b, 43: full limiters, held pools, calls from the wrong place, forks."""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import blocked, locked, places, rows, until, value

from .rig import (
    PATIENCE,
    SHORT,
    Figures,
    Journal,
    background_group,
    exit_bound,
    outcomes,
    plain,
    running,
    wait_until,
)

THREADS = 60  # Trio's default limiter has 40
other: triojobs.Queue[Any, Any] = triojobs.Queue("other")


async def test_row_38_the_default_thread_limiter_is_saturated(conninfo: str) -> None:
    """Sixty handlers block in threads; claims, settlements, commits and beats have limiters of their own."""
    let_go = threading.Event()
    lease = "SELECT lease_until FROM triojobs.worker_groups"

    async def blocking(job: triojobs.Job[Any]) -> None:
        await trio.to_thread.run_sync(let_go.wait, PATIENCE)

    async def committing(job: triojobs.Job[Any]) -> str:
        await trio.lowlevel.checkpoint()
        return await job.commit(lambda conn: "committed")

    workers = [
        triojobs.Worker(plain, blocking, concurrency=THREADS),
        triojobs.Worker(other, committing, concurrency=5),
    ]
    limiter = trio.to_thread.current_default_thread_limiter()
    async with triojobs.open_worker_group(conninfo, workers, **SHORT) as group:
        try:
            ids = await group.client.enqueue_many(plain, range(THREADS))
            await wait_until(lambda: limiter.statistics().tasks_waiting == THREADS - limiter.total_tokens)
            before = value(conninfo, lease)
            for n in range(10):
                job_id = await group.client.enqueue(other, n)
                with trio.fail_after(PATIENCE):
                    assert await group.client.result(job_id) == "committed"
            await until(conninfo, f"SELECT lease_until > %s + 2 * interval '{SHORT['beat_interval']} s'"  # type: ignore[arg-type]
                        " FROM triojobs.worker_groups", before)  # fmt: skip
            assert limiter.statistics().tasks_waiting == THREADS - limiter.total_tokens  # still
        finally:
            let_go.set()
        with trio.fail_after(PATIENCE):
            await group.wait_idle()
        assert group.statistics().registrations == 1
    assert outcomes(conninfo) == [(1, "done")] * (10 + len(ids))


class Pool:
    """An application's pool of two connections."""

    def __init__(self, conninfo: str) -> None:
        self._free: queue.Queue[psycopg.Connection[Any]] = queue.Queue()
        self.all = [psycopg.connect(conninfo) for _ in range(2)]
        for conn in self.all:
            self._free.put(conn)

    @contextmanager
    def connection(self, timeout: float = PATIENCE) -> Iterator[psycopg.Connection[Any]]:
        conn = self._free.get(timeout=timeout)
        try:
            with conn.transaction():
                yield conn
        finally:
            self._free.put(conn)


async def test_row_39_the_applications_pool_is_exhausted(conninfo: str) -> None:
    """Handlers hold all of it, in open transactions in which they enqueue; the group has connections of its own."""
    pool = Pool(conninfo)
    holding = threading.Semaphore(0)
    let_go = threading.Event()

    def hold(job_id: int) -> int:
        with pool.connection() as conn:
            follow_up = triojobs.enqueue_on(conn, other, job_id)
            holding.release()
            assert let_go.wait(PATIENCE)
        return follow_up

    async def handler(job: triojobs.Job[Any]) -> int:
        if job.payload == "holds":
            return await trio.to_thread.run_sync(hold, job.id)
        await trio.lowlevel.checkpoint()
        return 0

    journal = Journal()
    workers = [triojobs.Worker(plain, handler), triojobs.Worker(other, journal.handle)]
    try:
        async with triojobs.open_worker_group(conninfo, workers, **SHORT) as group:
            try:
                holders = await group.client.enqueue_many(plain, ["holds", "holds"])
                await trio.to_thread.run_sync(lambda: [holding.acquire(timeout=PATIENCE) for _ in range(2)])
                with pytest.raises(queue.Empty), pool.connection(timeout=0.01):
                    raise AssertionError("the pool must be exhausted")
                quick = await group.client.enqueue_many(plain, ["quick"] * 20)
                with trio.fail_after(PATIENCE):
                    assert [await group.client.result(job_id) for job_id in quick] == [0] * 20
                before = value(conninfo, "SELECT lease_until FROM triojobs.worker_groups")
                await until(conninfo, "SELECT lease_until > %s FROM triojobs.worker_groups", before)
                assert journal.began == []  # what they enqueued is not committed yet
            finally:
                let_go.set()
            with trio.fail_after(PATIENCE):
                follow_ups = [await group.client.result(job_id) for job_id in holders]
                assert [await group.client.result(job_id) for job_id in follow_ups] == [1, 1]
    finally:
        for conn in pool.all:
            conn.close()
    assert running(conninfo) == 0


async def test_row_40_threads_enqueue_on_a_full_limiter(conninfo: str) -> None:
    """More threads than the default limiter has, all of them waiting for their enqueue at once."""
    tokens = int(trio.to_thread.current_default_thread_limiter().total_tokens)
    gate = threading.Barrier(tokens)
    ids: list[int] = []

    def enqueue(client: triojobs.Client, n: int) -> None:
        if n < tokens:
            gate.wait(PATIENCE)  # every token is taken by a thread that is about to enqueue
        ids.append(client.enqueue_from_thread(plain, n, timeout=PATIENCE))

    async with triojobs.open_client(conninfo) as client:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for n in range(THREADS):
                    nursery.start_soon(trio.to_thread.run_sync, enqueue, client, n)
    assert len(set(ids)) == THREADS
    assert places(conninfo) == {"jobs": THREADS, "ready": THREADS}


@pytest.mark.parametrize("commits", [True, False], ids=["and is committed", "and never is"])
async def test_row_40b_a_group_is_cancelled_while_a_handlers_thread_waits_for_its_enqueue(
    conninfo: str, figures: Figures, commits: bool
) -> None:
    """The thread gets an answer in any case, and the group waits for it no longer than it may."""
    answers: list[Any] = []

    def enqueue(client: triojobs.Client) -> None:
        try:
            answers.append(client.enqueue_from_thread(other, "follow-up"))
        except triojobs.DatabaseError as exc:
            answers.append(exc)

    async def handler(job: triojobs.Job[Any]) -> None:
        await trio.to_thread.run_sync(enqueue, groups[0].client)

    async with background_group(conninfo, [triojobs.Worker(plain, handler)]) as (scope, groups):
        await groups[0].client.enqueue(plain, None, delay=0.3)
        # Commits of bodies wait; claims and settlements only read them.
        with locked(conninfo, "LOCK TABLE triojobs.jobs IN SHARE MODE") as gate:
            await blocked(conninfo, "enqueue")
            cancelled_at = trio.current_time()
            scope.cancel()
            if commits:
                gate.rollback()
            await wait_until(lambda: answers)
    figures.note("exit", trio.current_time() - cancelled_at, at_most=exit_bound(SHORT))
    (answer,) = answers
    enqueued = rows(conninfo, "SELECT id FROM triojobs.jobs WHERE queue = 'other'")
    if commits:
        assert enqueued == [(answer,)]
    else:
        assert isinstance(answer, triojobs.DatabaseError)
        assert answer.committed is not True
        assert enqueued == []
    assert running(conninfo) == 0


async def test_row_41_a_blocking_enqueue_is_called_on_the_loop(conninfo: str) -> None:
    sync = await trio.to_thread.run_sync(lambda: triojobs.SyncClient(conninfo).__enter__())
    try:
        async with triojobs.open_client(conninfo) as client:
            with pytest.raises(triojobs.TriojobsError, match=r"await client\.enqueue") as caught:
                client.enqueue_from_thread(plain, None)
            assert "wrong place" in str(caught.value)
            for call in (
                lambda: sync.enqueue(plain, None),
                lambda: sync.enqueue_many(plain, [None]),
                lambda: sync.get(1),
                lambda: sync.cancel(1),
                lambda: triojobs.SyncClient(conninfo).__enter__(),
            ):
                with pytest.raises(triojobs.TriojobsError, match=r"wrong place.*in a Trio task use"):
                    call()
            # The other way round: async methods outside the loop, at the call and not when awaited.
            with pytest.raises(triojobs.TriojobsError, match="enqueue_from_thread"):
                await trio.to_thread.run_sync(client.enqueue, plain, None)
    finally:
        await trio.to_thread.run_sync(sync.close)
    assert places(conninfo) == {}


def in_a_fork(do: Callable[[], str]) -> str:
    """Fork; return what `do` returned in the child, or the error that it raised."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the fault
        pid = os.fork()
    if pid == 0:
        try:
            said = do()
        except BaseException as exc:
            said = f"{type(exc).__name__}: {exc}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return said


async def test_row_43_a_fork_after_connections_were_opened(conninfo: str) -> None:
    """The child is refused its parent's connections, may open its own, and says no goodbye on the others."""

    def fork_beside_a_sync_client() -> str:
        with triojobs.SyncClient(conninfo) as client:
            client.enqueue(plain, "parent")

            def use() -> str:
                return str(client.enqueue(plain, "child"))

            def close_and_open_own() -> str:
                client.close()  # not in the parent's name
                with triojobs.SyncClient(conninfo) as own:
                    return str(own.enqueue(plain, "child's own"))

            said = in_a_fork(use)
            assert client.get(int(in_a_fork(close_and_open_own))) is not None
            client.enqueue(plain, "parent again")
        return said

    said = await trio.to_thread.run_sync(fork_beside_a_sync_client)
    assert said.startswith("TriojobsError: while ")
    assert "after the fork" in said
    journal = Journal()
    sessions = ("SELECT count(DISTINCT pid) FROM pg_stat_activity WHERE application_name LIKE 'triojobs %%'"
                " AND datname = current_database()")  # fmt: skip
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **SHORT) as group:
        await wait_until(lambda: group.statistics().settled == 3)
        before = value(conninfo, sessions)

        def use_group() -> str:
            return str(group.client.enqueue_from_thread(plain, "child"))

        said = await trio.to_thread.run_sync(in_a_fork, use_group)
        assert "after the fork" in said
        assert value(conninfo, sessions) == before
        job_id = await group.client.enqueue(plain, "return")
        with trio.fail_after(PATIENCE):
            await group.client.result(job_id)
        assert group.statistics().registrations == 1
    assert outcomes(conninfo) == [(1, "done")] * 4
