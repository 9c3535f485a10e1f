"""`job.commit` against rescue, cancel and timeout: exactly one of two wins.

The gate is a proxy that stops a COMMIT before the server sees it, or its reply before the client does.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.commit_proxy import CommitProxy
from tests.tools.committing import Committer, one_job, sleep, the_report_equals_the_rows
from tests.tools.looking import blocked, rows
from tests.tools.running import NOTES, notes, outcomes, retire_groups


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


# Rescue.


async def test_work_that_is_overtaken_by_a_rescue_writes_nothing(conninfo: str) -> None:
    def be_overtaken(conn: psycopg.Connection[Any]) -> None:
        if committer.works == 1:
            assert retire_groups(conninfo) == 1

    committer = Committer()
    committer.before_work = be_overtaken
    async with one_job(conninfo, committer.handler, beat_interval=0.1) as (group, job_id):
        assert await group.client.result(job_id) == "attempt 2"
    first, second = committer.ends
    assert isinstance(first, triojobs.StaleClaimError)
    assert second == "attempt 2"
    assert notes(conninfo) == ["attempt 2"]
    assert outcomes(conninfo, job_id) == [(1, "failed"), (2, "done")]
    the_report_equals_the_rows(conninfo, group)


@pytest.mark.parametrize("method", ["commit", "transact"])
async def test_a_rescue_passes_over_a_commit_under_way(
    conninfo: str, proxied: tuple[CommitProxy, str], method: str
) -> None:
    proxy, through = proxied
    committer = Committer(method)
    gate = proxy.gate("before")
    async with one_job(through, committer.handler) as (group, job_id):
        await gate.reached()
        assert retire_groups(conninfo) == 0
        gate.let_pass()
        if method == "commit":
            assert await group.client.result(job_id) == "attempt 1"
            assert retire_groups(conninfo) == 0
        else:
            with trio.fail_after(15):
                while not committer.ends:
                    await trio.sleep(0.005)
    assert committer.ends == ["attempt 1"]
    assert notes(conninfo) == ["attempt 1"]


async def test_a_rescue_takes_the_job_of_a_commit_that_never_came(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("before")
    async with one_job(through, committer.handler, beat_interval=0.1) as (group, job_id):
        await gate.reached()
        assert retire_groups(conninfo) == 0
        gate.cut()
        with trio.fail_after(15):
            while not retire_groups(conninfo):
                await trio.sleep(0.01)
        assert await group.client.result(job_id) == "attempt 2"
    assert isinstance(committer.ends[0], triojobs.TriojobsError)
    assert notes(conninfo) == ["attempt 2"]
    assert outcomes(conninfo, job_id) == [(1, "failed"), (2, "done")]


# Cancel.


async def test_a_cancel_while_work_runs_breaks_it_off(conninfo: str) -> None:
    committer = Committer()
    committer.before_work = sleep
    async with one_job(conninfo, committer.handler) as (group, job_id):
        await committer.in_work.wait()
        assert await group.client.cancel(job_id, reason="not wanted")
        with pytest.raises(triojobs.JobCancelledError, match="not wanted"):
            await group.client.result(job_id)
    assert isinstance(committer.ends[0], trio.Cancelled)
    assert notes(conninfo) == []
    assert outcomes(conninfo, job_id) == [(1, "cancelled")]
    the_report_equals_the_rows(conninfo, group)


@pytest.mark.parametrize("method", ["commit", "transact"])
@pytest.mark.parametrize("how", ["cancel", "timeout", "scope"])
async def test_a_cancel_while_work_is_between_two_statements_undoes_it(
    conninfo: str, how: str, method: str
) -> None:
    """There is nothing that the server could break off: work returns as if nothing had happened."""
    go_on = threading.Event()
    committer = Committer(method)
    committer.before_work = lambda conn: hold_up(go_on)
    jobs: list[triojobs.Job[Any]] = []
    scopes: list[trio.CancelScope] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        jobs.append(job)
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await committer.handler(job)
        raise triojobs.Kill("its own scope was cancelled")

    job = {"timeout": 0.5} if how == "timeout" else {}
    async with one_job(conninfo, handler, job | {"max_attempts": 1}) as (group, job_id):
        try:
            await committer.in_work.wait()
            if how == "cancel":
                assert await group.client.cancel(job_id, reason="not wanted")
                with trio.fail_after(15):
                    while jobs[0].cancel_reason is None:
                        await trio.sleep(0.005)
            elif how == "scope":
                scopes[0].cancel()
            else:
                await trio.sleep(0.6)  # the time itself is under test
            await trio.testing.wait_all_tasks_blocked()
        finally:
            go_on.set()
        with pytest.raises((triojobs.JobCancelledError, triojobs.JobFailedError)):
            await group.client.result(job_id)
    assert isinstance(committer.ends[0], trio.Cancelled)
    assert notes(conninfo) == []
    assert outcomes(conninfo, job_id) == [(1, "cancelled" if how == "cancel" else "killed")]
    the_report_equals_the_rows(conninfo, group)


def hold_up(go_on: threading.Event) -> None:
    assert go_on.wait(15)


async def test_a_cancel_that_waits_for_a_commit_comes_too_late(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("before")
    async with one_job(through, committer.handler) as (group, job_id), trio.open_nursery() as nursery:
        await gate.reached()
        answers: list[bool] = []

        @nursery.start_soon
        async def cancel() -> None:
            answers.append(await group.client.cancel(job_id, reason="too late"))

        await blocked(conninfo, "client")
        gate.let_pass()
        assert await group.client.result(job_id) == "attempt 1"
    assert answers == [False]
    assert committer.ends == ["attempt 1"]


async def test_a_cancel_between_commit_and_return_finds_the_job_ended(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after")
    async with one_job(through, committer.handler) as (group, job_id):
        await gate.reached()
        assert not await group.client.cancel(job_id, reason="too late")
        gate.let_pass()
        assert await group.client.result(job_id) == "attempt 1"
    assert committer.ends == ["attempt 1"]
    the_report_equals_the_rows(conninfo, group)


async def test_a_cancel_that_reaches_the_handler_during_its_commit_changes_nothing_and_is_no_error(
    conninfo: str, proxied: tuple[CommitProxy, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The request was on the lease before the fence; its notification was lost, and a beat brings it."""

    def be_asked(conn: psycopg.Connection[Any]) -> None:
        rows(conninfo, "UPDATE triojobs.leases SET cancel_reason = 'too late'")

    proxy, through = proxied
    committer = Committer()
    committer.before_work = be_asked
    gate = proxy.gate("before")
    jobs: list[triojobs.Job[Any]] = []
    reasons: list[str | None] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        jobs.append(job)
        try:
            await committer.handler(job)
        finally:
            reasons.append(job.cancel_reason)

    async with one_job(through, handler, beat_interval=0.1) as (group, job_id):
        await gate.reached()
        with trio.fail_after(15):
            while jobs[0].cancel_reason is None:
                await trio.sleep(0.01)
        gate.let_pass()
        assert await group.client.result(job_id) == "attempt 1"
    assert committer.ends == ["attempt 1"]
    assert reasons == ["too late"]
    assert outcomes(conninfo, job_id) == [(1, "done")]
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    the_report_equals_the_rows(conninfo, group)


# Timeout and other scopes around the call.


@pytest.mark.parametrize("what", ["timeout", "scope"])
async def test_a_timeout_between_commit_and_return_loses(
    conninfo: str, proxied: tuple[CommitProxy, str], what: str
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after")
    deadlines: list[float] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        with trio.CancelScope() as scope:
            if what == "scope":
                scope.deadline = trio.current_time() + 3.0
            deadlines.append(trio.current_effective_deadline())
            await committer.handler(job)

    job = {"timeout": 3.0} if what == "timeout" else {}
    async with one_job(through, handler, job | {"max_attempts": 1}) as (group, job_id):
        await gate.reached()
        await trio.sleep_until(deadlines[0])  # the time itself is under test
        await trio.testing.wait_all_tasks_blocked()
        assert committer.ends == []
        gate.let_pass()
        assert await group.client.result(job_id) == "attempt 1"
    assert committer.ends == ["attempt 1"]
    assert outcomes(conninfo, job_id) == [(1, "done")]
    assert group.statistics().stale == 0
    the_report_equals_the_rows(conninfo, group)


# What must happen once.


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03"])
async def test_work_is_never_repeated_by_us(conninfo: str, code: str) -> None:
    def lose(conn: psycopg.Connection[Any]) -> None:
        if committer.works == 1:
            conn.execute(f"DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '{code}'; END $$")  # type: ignore[arg-type]

    committer = Committer()
    committer.before_work = lose
    async with one_job(conninfo, committer.handler) as (group, job_id):
        assert await group.client.result(job_id) == "attempt 2"
    lost, _ = committer.ends
    assert isinstance(lost, psycopg.Error)
    assert lost.sqlstate == code
    assert outcomes(conninfo, job_id) == [(1, "failed"), (2, "done")]
