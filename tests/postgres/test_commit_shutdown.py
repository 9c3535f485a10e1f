"""`job.commit` in a group that is cancelled, loses its lease, or meets Ctrl-C: all or nothing, and in time."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.commit_proxy import CommitProxy
from tests.tools.committing import WORKS, Committer, one_job, sleep, the_report_equals_the_rows
from tests.tools.looking import places, rows, until, value
from tests.tools.running import NOTES, notes, outcomes, plain, retire_groups
from tests.tools.shots import Shot
from triojobs._bridge import Breaker


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


# Shutdown.


async def test_a_group_cancelled_while_work_runs_cancels_its_statement_on_the_server(conninfo: str) -> None:
    broken_off: list[BaseException] = []

    def be_broken_off(conn: psycopg.Connection[Any]) -> None:
        try:
            sleep(conn)
        except psycopg.Error as exc:
            broken_off.append(exc)
            raise

    committer = Committer()
    committer.before_work = be_broken_off
    with trio.CancelScope() as scope:
        async with one_job(conninfo, committer.handler, grace_period=0.0) as (group, job_id):
            await until(conninfo, WORKS)
            scope.cancel()
    assert [type(exc) for exc in broken_off] == [psycopg.errors.QueryCanceled]
    assert isinstance(committer.ends[0], trio.Cancelled)
    assert rows(conninfo, WORKS) == []
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]
    assert notes(conninfo) == []
    assert group.report.released == 1


async def test_a_backend_that_does_not_hear_is_left_by_shutting_the_socket(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    """Stopped, it obeys no cancel; without the breaker the group would wait for it for ever."""
    committer = Committer()
    committer.before_work = sleep
    pid = 0
    try:
        with trio.CancelScope() as scope:
            async with one_job(conninfo, committer.handler, grace_period=0.0) as (group, job_id):
                pid = await until(conninfo, WORKS)
                os.kill(pid, signal.SIGSTOP)
                scope.cancel()
        assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]
        assert group.report.released == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    await until(conninfo, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)", pid)
    assert notes(conninfo) == []


async def test_work_that_swallows_the_broken_off_statement_commits_nothing(conninfo: str) -> None:
    def swallow(conn: psycopg.Connection[Any]) -> None:
        with pytest.raises(psycopg.errors.QueryCanceled):
            sleep(conn)

    committer = Committer()
    committer.before_work = swallow
    with trio.CancelScope() as scope:
        async with one_job(conninfo, committer.handler, grace_period=0.0) as (_, job_id):
            await until(conninfo, WORKS)
            scope.cancel()
    assert isinstance(committer.ends[0], trio.Cancelled)
    assert notes(conninfo) == []
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


async def test_a_lost_lease_breaks_work_off(conninfo: str) -> None:
    def sleep_once(conn: psycopg.Connection[Any]) -> None:
        if committer.works == 1:
            sleep(conn)

    committer = Committer()
    committer.before_work = sleep_once
    async with one_job(conninfo, committer.handler, beat_interval=0.1) as (group, job_id):
        await until(conninfo, WORKS)
        assert retire_groups(conninfo) == 1
        assert await group.client.result(job_id) == "attempt 2"
    assert isinstance(committer.ends[0], trio.Cancelled)
    assert notes(conninfo) == ["attempt 2"]


@pytest.mark.parametrize("method", ["commit", "transact"])
async def test_a_group_cancelled_between_commit_and_return_keeps_what_was_committed(
    conninfo: str, proxied: tuple[CommitProxy, str], method: str
) -> None:
    proxy, through = proxied
    committer = Committer(method)
    gate = proxy.gate("after")
    with trio.CancelScope() as scope:
        async with one_job(through, committer.handler, grace_period=0.0) as (group, job_id):
            await gate.reached()
            scope.cancel()

            async def open_gate() -> None:
                await trio.testing.wait_all_tasks_blocked()
                gate.let_pass()

            trio.lowlevel.spawn_system_task(open_gate)
    assert committer.ends == ["attempt 1"]
    assert notes(conninfo) == ["attempt 1"]
    assert group.statistics().stale == 0
    if method == "commit":
        assert (group.report.settled["done"], group.report.released) == (1, 0)
        assert places(conninfo) == {"jobs": 1, "outcomes": 1}
    else:
        assert (group.report.settled["done"], group.report.released) == (0, 1)
        assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


async def test_a_group_cancelled_before_the_server_sees_commit_waits_for_it(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("before")
    with trio.CancelScope() as scope:
        async with one_job(through, committer.handler, grace_period=0.0) as (group, job_id):
            await gate.reached()
            scope.cancel()

            async def open_gate() -> None:
                await trio.testing.wait_all_tasks_blocked()
                gate.let_pass()

            trio.lowlevel.spawn_system_task(open_gate)
    assert committer.ends == ["attempt 1"]
    assert outcomes(conninfo, job_id) == [(1, "done")]
    the_report_equals_the_rows(conninfo, group)


# Ctrl-C and the end of the program.


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
async def test_what_ends_the_program_may_come_out_of_work(conninfo: str, error: BaseException) -> None:
    def end(conn: psycopg.Connection[Any]) -> None:
        raise error

    committer = Committer()
    committer.before_work = end
    with pytest.raises(type(error)) as caught:
        async with one_job(conninfo, committer.handler) as (group, job_id):
            await trio.sleep_forever()
    assert caught.value is error
    assert notes(conninfo) == []
    if isinstance(error, KeyboardInterrupt):
        assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]
        assert group.report.released == 1
    else:
        assert outcomes(conninfo, job_id) == [(1, "failed")]
        assert group.report.settled["failed"] == 1


def commit_under_fire(conninfo: str, k: int) -> tuple[bool, triojobs.WorkerGroup, Committer]:
    """Run one job that commits, with a Ctrl-C before step k. Returns whether it came so far."""
    shot = Shot(k)
    groups: list[triojobs.WorkerGroup] = []
    committers: list[Committer] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        shot.armed = True
        await committers[0].handler(job)
        shot.armed = False

    async def main() -> None:
        committers.append(Committer())
        workers = [triojobs.Worker(plain, handler)]
        with trio.fail_after(30):
            async with triojobs.open_worker_group(conninfo, workers) as group:
                groups.append(group)
                await group.client.result(await group.client.enqueue(plain, None))

    try:
        trio.run(main, instruments=[shot])
    except KeyboardInterrupt:
        assert shot.fired
    return shot.fired, groups[0], committers[0]


def test_ctrl_c_at_any_step_of_a_commit_leaves_all_or_nothing(conninfo: str) -> None:
    fired, k, committed = True, 0, []
    while fired:
        rows(conninfo, "TRUNCATE notes, triojobs.jobs, triojobs.ready, triojobs.outcomes")
        fired, group, committer = commit_under_fire(conninfo, k)
        the_report_equals_the_rows(conninfo, group)
        done = group.report.settled["done"]
        assert len(notes(conninfo)) == done
        assert value(conninfo, "SELECT count(*) FROM triojobs.ready WHERE attempts = 0") == 1 - done
        # A claim on its way may take the job that was just given back, and gives it back again.
        assert (min(1, group.report.released), group.statistics().stale) == (1 - done, 0)
        if committer.ends and not isinstance(committer.ends[0], BaseException):
            assert done
        committed.append(done)
        k += 1
    assert {0, 1} <= set(committed)  # it struck before the commit, and after
    assert k > 5


def test_ctrl_c_while_a_cancel_is_being_obeyed_does_not_spare_the_work(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It strikes in our own code inside the handler's task, just before the breaker is told."""
    break_off = Breaker.break_off

    def struck(breaker: Breaker, call: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        break_off(breaker, call)

    monkeypatch.setattr(Breaker, "break_off", struck)
    committer = Committer()
    committer.before_work = sleep

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with one_job(conninfo, committer.handler, grace_period=0.0):
                await until(conninfo, WORKS)
                scope.cancel()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert time.monotonic() - began < 20  # pg_sleep would last longer
    assert notes(conninfo) == []
