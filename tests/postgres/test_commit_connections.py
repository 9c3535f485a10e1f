"""The connections of `job.commit`: how many, when opened, in what state, and how long they may work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
import pytest
import trio
from psycopg.rows import dict_row

import triojobs
from tests.tools.looking import blocked, locked, rows, until, value
from tests.tools.running import NOTES, note, notes, outcomes, plain, run_job
from triojobs._bridge import Call

JOB_SESSIONS: LiteralString = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'triojobs job' AND datname = current_database()
"""


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


class Door:
    """Work that stays inside its transaction until it is let out; a cancelled group lets it out too."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.entered = trio.Event()
        self.exit = trio.Event()
        self._lock = threading.Lock()

    def work(self, conn: psycopg.Connection[Any]) -> None:
        conn.execute("SELECT 1")
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        trio.from_thread.run_sync(self.entered.set)
        trio.from_thread.run(self.exit.wait)
        with self._lock:
            self.inside -= 1

    async def holds(self, n: int) -> None:
        with trio.fail_after(15):
            while self.inside < n:
                await trio.sleep(0.005)


@pytest.mark.parametrize(("options", "most"), [({}, 4), ({"job_connections": 2}, 2)])
async def test_as_many_commit_at_once_as_there_are_connections(
    conninfo: str, options: dict[str, Any], most: int
) -> None:
    door = Door()
    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, lambda job: job.commit(door.work), concurrency=6)], **options
    ) as group:
        assert value(conninfo, JOB_SESSIONS) == 0  # opened when the first is needed
        ids = await group.client.enqueue_many(plain, range(6))
        await door.holds(most)
        with trio.fail_after(15):
            while group.statistics().running < 6:
                await trio.sleep(0.005)
        await trio.testing.wait_all_tasks_blocked()
        assert (door.inside, value(conninfo, JOB_SESSIONS)) == (most, most)
        door.exit.set()
        with trio.fail_after(15):
            for job_id in ids:
                await group.client.result(job_id)
    assert door.most == most
    await until(
        conninfo, f"SELECT n = 0 FROM ({JOB_SESSIONS}) AS s(n)"
    )  # a server's process outlives its socket


async def test_one_slot_has_one_connection(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> int:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(job.transact, lambda conn: conn.execute("SELECT 1").fetchone())
        return value(conninfo, JOB_SESSIONS)

    ended = await run_job(conninfo, handler, worker={"concurrency": 1})
    assert ended.info.result == 1


async def test_waiting_for_a_connection_can_be_cancelled(conninfo: str) -> None:
    door = Door()
    worked: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        if job.payload == "holds":
            await job.commit(door.work)
        else:
            await door.entered.wait()
            await job.commit(lambda conn: worked.append(job.id))

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], job_connections=1
    ) as group:
        holds = await group.client.enqueue(plain, "holds")
        waits = await group.client.enqueue(plain, "waits", timeout=0.5, max_attempts=1)
        with trio.fail_after(15), pytest.raises(triojobs.JobFailedError, match="timed out"):
            await group.client.result(waits)
        assert door.inside == 1
        door.exit.set()
        with trio.fail_after(15):
            await group.client.result(holds)
    assert worked == []


async def test_a_connection_that_died_idle_is_replaced(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        for n in range(3):
            await job.transact(lambda conn, n=n: note(conn, job, str(n)))
            (pid,) = rows(conninfo, f"SELECT pid {JOB_SESSIONS[JOB_SESSIONS.index('FROM') :]}")[0]  # type: ignore[arg-type]
            rows(conninfo, "SELECT pg_terminate_backend(%s)", pid)
            await until(conninfo, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)", pid)

    ended = await run_job(conninfo, handler)
    assert outcomes(conninfo, ended.info.id) == [(1, "done")]
    assert notes(conninfo) == ["0", "1", "2"]


async def test_work_reads_committed_whatever_the_databases_default(conninfo: str) -> None:
    name = value(conninfo, "SELECT current_database()")
    rows(conninfo, f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")  # type: ignore[arg-type]

    async def handler(job: triojobs.Job[Any]) -> Any:
        return await job.commit(lambda conn: conn.execute("SHOW transaction_isolation").fetchone())

    assert (await run_job(conninfo, handler)).info.result == ["read committed"]


# What one work leaves behind, and what the next one finds.


def change_factories(conn: psycopg.Connection[Any]) -> None:
    conn.row_factory = dict_row  # type: ignore[assignment]
    conn.cursor_factory = psycopg.ClientCursor
    conn.prepare_threshold = 0


def look_at_factories(conn: psycopg.Connection[Any]) -> None:
    assert conn.execute("SELECT 1").fetchone() == (1,)
    assert type(conn.cursor()) is psycopg.Cursor
    assert conn.prepare_threshold == 2


def change_session(conn: psycopg.Connection[Any]) -> None:
    conn.execute("SET search_path = pg_catalog")
    conn.execute("SET statement_timeout = '5min'")
    conn.execute("CREATE TEMP TABLE staging (n int)")
    conn.execute("SELECT pg_advisory_lock(7)")
    conn.execute("LISTEN somebody")
    conn.execute("DECLARE kept CURSOR WITH HOLD FOR SELECT 1")


def look_at_session(conn: psycopg.Connection[Any]) -> None:
    def shown(query: LiteralString) -> Any:
        return conn.execute(query).fetchall()

    assert shown("SHOW search_path") != [("pg_catalog",)]
    assert shown("SHOW statement_timeout") == [("0",)]
    assert shown("SELECT to_regclass('staging')") == [(None,)]
    assert shown("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
    assert shown("SELECT pg_listening_channels()") == []
    assert shown("SELECT name FROM pg_cursors") == []
    assert shown("SHOW default_transaction_isolation") == [("read committed",)]


@pytest.mark.parametrize("ends", ["returns", "raises"])
@pytest.mark.parametrize(
    ("change", "look"),
    [(change_factories, look_at_factories), (change_session, look_at_session)],
    ids=["connection", "session"],
)
async def test_the_next_work_finds_the_connection_as_it_was_opened(
    conninfo: str, change: Callable[..., None], look: Callable[..., None], ends: str
) -> None:
    async def handler(job: triojobs.Job[Any]) -> list[int]:
        pids: list[int] = []

        def first(conn: psycopg.Connection[Any]) -> None:
            pids.append(conn.info.backend_pid)
            change(conn)
            if ends == "raises":
                raise ZeroDivisionError

        def second(conn: psycopg.Connection[Any]) -> None:
            pids.append(conn.info.backend_pid)
            look(conn)

        try:
            await job.transact(first)
        except ZeroDivisionError:
            assert ends == "raises"
        await job.commit(second)
        return pids

    ended = await run_job(conninfo, handler, job={"max_attempts": 1})
    assert ended.info.error is None


# How long it may take.


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("where", ["in the server", "in Python", "between statements"])
async def test_call_timeout_does_not_bound_work(conninfo: str, where: str, pooled: bool) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            if where == "in the server":
                conn.execute("SELECT pg_sleep(3.0)")
            elif where == "in Python":
                time.sleep(3.0)
            else:
                conn.execute("SELECT 1")
                time.sleep(3.0)
            note(conn, job)

        await job.commit(work)

    ended = await run_job(conninfo, handler, job={"max_attempts": 1}, call_timeout=1.5, pooled=pooled)
    assert (ended.info.status, ended.info.error) == ("done", None)
    assert notes(conninfo) == ["work"]


@pytest.mark.parametrize("bound", ["timeout", "deadline"])
async def test_the_jobs_own_bound_breaks_work_off(conninfo: str, bound: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            conn.execute("SELECT pg_sleep(3600)")

        await job.commit(work)

    soon: Any = 1.0
    if bound == "deadline":
        soon = value(conninfo, "SELECT now() + interval '2 s'")
    ended = await run_job(conninfo, handler, job={"max_attempts": 1, bound: soon})
    assert ended.info.status == "killed"
    assert ended.info.error == ("timed out after 1 s" if bound == "timeout" else "past its deadline")
    assert notes(conninfo) == []


async def test_a_fence_that_must_wait_too_long_is_broken_off_by_call_timeout(conninfo: str) -> None:
    gate: list[psycopg.Connection[Any]] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        if job.attempt > 1:
            return "second"

        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            gate[0].execute("SELECT FROM triojobs.leases FOR UPDATE")

        with pytest.raises(triojobs.DatabaseError) as caught:
            await job.commit(work)
        gate[0].rollback()
        assert (caught.value.sqlstate, caught.value.committed) == ("57014", False)
        raise ValueError("again")

    with psycopg.connect(conninfo) as conn:
        gate.append(conn)
        ended = await run_job(conninfo, handler, call_timeout=0.5)
    assert ended.info.result == "second"
    assert notes(conninfo) == []


async def test_a_cancel_that_comes_late_does_not_hit_the_next_work(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is to cancel a statement of job one; it ends by itself; then job two works."""
    asked, send_cancel, sent = threading.Event(), threading.Event(), threading.Event()
    cancel_on_server = Call.cancel_on_server

    def late(call: Call) -> None:
        asked.set()
        send_cancel.wait(15)
        cancel_on_server(call)
        sent.set()

    monkeypatch.setattr(Call, "cancel_on_server", late)

    async def handler(job: triojobs.Job[Any]) -> None:
        if job.payload == "first":
            with first_job:
                await job.transact(lambda conn: conn.execute("SELECT pg_advisory_xact_lock(1)"))
            return

        def work(conn: psycopg.Connection[Any]) -> None:
            send_cancel.set()
            conn.execute("SELECT pg_sleep(0.3)")
            assert sent.wait(15)
            conn.execute("SELECT pg_sleep(0.3)")

        await job.commit(work)

    first_job = trio.CancelScope()
    workers = [triojobs.Worker(plain, handler, concurrency=1)]
    with locked(conninfo, "SELECT pg_advisory_xact_lock(1)") as gate:
        async with triojobs.open_worker_group(conninfo, workers) as group:
            ids = await group.client.enqueue_many(plain, ["first", triojobs.NewJob("second", max_attempts=1)])
            await blocked(conninfo, "job")
            first_job.cancel()
            with trio.fail_after(15):
                while not asked.is_set():
                    await trio.sleep(0.005)
            gate.rollback()  # its statement ends before the cancel is on its way
            with trio.fail_after(30):
                for job_id in ids:
                    await group.client.result(job_id)
