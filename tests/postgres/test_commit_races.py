"""`job.commit` against rescue, cancel, timeout, shutdown and lost replies: exactly one of two wins.

The gate is a proxy that stops a COMMIT before the server sees it, or its reply before the client does.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.commit_proxy import CommitProxy, commit_proxy
from tests.tools.looking import blocked, locked, places, rows, until, value
from tests.tools.running import NOTES, note, notes, outcomes, plain, retire_groups
from triojobs._bridge import Breaker
from triojobs._commit import CommitAttempt

HANG = 45.0  # seconds; whatever takes longer hangs
LONG = 3600  # seconds that work would take if nobody broke it off
WORKS = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%' AND state = 'active'"


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


@pytest.fixture
def proxied(conninfo: str) -> Iterator[tuple[CommitProxy, str]]:
    """A proxy, and the conninfo that leads through it."""
    with commit_proxy(conninfo) as found:
        yield found


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


def sleep(conn: psycopg.Connection[Any]) -> None:
    """Stay in a statement until it is broken off."""
    conn.execute("SELECT pg_sleep(%s)", [LONG])


class Committer:
    """A handler that commits a note, and remembers how that ended: the value, or what was raised."""

    def __init__(self, method: str = "commit") -> None:
        self.method = method
        self.ends: list[Any] = []
        self.works = 0
        self.before_work: Callable[[psycopg.Connection[Any]], None] = lambda conn: None
        self.in_work = trio.Event()

    async def handler(self, job: triojobs.Job[Any]) -> Any:
        def work(conn: psycopg.Connection[Any]) -> str:
            self.works += 1
            note(conn, job, f"attempt {job.attempt}")
            trio.from_thread.run_sync(self.in_work.set)
            self.before_work(conn)
            return f"attempt {job.attempt}"

        try:
            value = await getattr(job, self.method)(work)
        except BaseException as exc:
            self.ends.append(exc)
            raise
        self.ends.append(value)
        await trio.lowlevel.checkpoint()
        return value


@asynccontextmanager
async def one_job(
    conninfo: str, handler: Any, job: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[triojobs.WorkerGroup, int]]:
    """Open a group and give it one job; a hang is a failure."""
    worker = triojobs.Worker(plain, handler, retry=triojobs.Backoff(first=0.0, jitter=0.0))
    with trio.fail_after(HANG):
        async with triojobs.open_worker_group(conninfo, [worker], **options) as group:
            yield group, await group.client.enqueue(plain, None, **(job or {}))


def the_report_equals_the_rows(conninfo: str, group: triojobs.WorkerGroup) -> None:
    """Outcomes written under the group's ids are those that it reports; none of its leases is left."""
    written = dict(
        rows(
            conninfo,
            "SELECT status, count(*)::int FROM triojobs.outcomes WHERE group_id = ANY (%s)"
            " AND (error IS NULL OR error NOT LIKE 'rescued:%%') GROUP BY 1",
            list(group.report.group_ids),
        )
    )
    reported = {outcome: n for outcome, n in group.report.settled.items() if n and outcome != "snoozed"}
    assert reported == written
    assert value(conninfo, "SELECT count(*) FROM triojobs.leases") == len(group.report.abandoned)


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
                scope.deadline = trio.current_time() + 1.0
            deadlines.append(trio.current_effective_deadline())
            await committer.handler(job)

    job = {"timeout": 1.0} if what == "timeout" else {}
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


# Shutdown.


async def test_a_group_cancelled_while_work_runs_cancels_its_statement_on_the_server(conninfo: str) -> None:
    committer = Committer()
    committer.before_work = sleep
    with trio.CancelScope() as scope:
        async with one_job(conninfo, committer.handler, grace_period=0.0) as (group, job_id):
            await until(conninfo, WORKS)
            scope.cancel()
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


# A COMMIT whose reply is lost.


async def test_a_commit_without_reply_that_happened_is_found(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after")
    async with one_job(through, committer.handler, {"max_attempts": 1}) as (group, job_id):
        await gate.reached()
        gate.cut()
        assert await group.client.result(job_id) == "attempt 1"
    assert committer.ends == ["attempt 1"]
    assert committer.works == 1
    assert group.statistics().stale == 0
    the_report_equals_the_rows(conninfo, group)


@pytest.mark.parametrize("how", ["cut", "silence"])
async def test_a_commit_without_reply_that_did_not_happen_says_so(
    conninfo: str, proxied: tuple[CommitProxy, str], how: str
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("before")
    async with one_job(through, committer.handler, call_timeout=1.0) as (group, job_id):
        await gate.reached()
        getattr(gate, how)()
        assert await group.client.result(job_id) == "attempt 2"
    lost, value = committer.ends
    assert isinstance(lost, triojobs.DatabaseError)
    assert lost.committed is False
    assert value == "attempt 2"
    assert notes(conninfo) == ["attempt 2"]
    assert outcomes(conninfo, job_id) == [(1, "failed"), (2, "done")]
    the_report_equals_the_rows(conninfo, group)


async def test_a_look_for_the_outcome_waits_for_a_commit_that_is_still_under_way(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    """The connection breaks while the server is inside COMMIT, where a deferred trigger holds it."""
    rows(
        conninfo,
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'",
    )
    rows(
        conninfo,
        "CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION hold()",
    )
    proxy, through = proxied
    committer = Committer()
    # It would notice within a second that its client is gone, and abort: then there is no race.
    committer.before_work = lambda conn: conn.execute("SET client_connection_check_interval = 0") and None
    with locked(conninfo, "SELECT pg_advisory_xact_lock(1)") as trigger:
        async with one_job(through, committer.handler) as (group, job_id):
            await blocked(conninfo, "job")
            proxy.cut_job_connections()
            await blocked(conninfo, "settle")
            trigger.rollback()
            assert await group.client.result(job_id) == "attempt 1"
    assert committer.ends == ["attempt 1"]
    the_report_equals_the_rows(conninfo, group)


async def test_a_job_that_was_rescued_after_a_commit_without_reply_is_stale(
    conninfo: str, proxied: tuple[CommitProxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = CommitAttempt.look

    def rescued_first(attempt: CommitAttempt, call: Any) -> Any:
        while not retire_groups(conninfo):
            pass  # until the server has noticed that the connection of the commit is gone
        return look(attempt, call)

    monkeypatch.setattr(CommitAttempt, "look", rescued_first)
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("before")
    async with one_job(through, committer.handler, beat_interval=0.1) as (group, job_id):
        await gate.reached()
        gate.cut()
        assert await group.client.result(job_id) == "attempt 2"
    assert isinstance(committer.ends[0], triojobs.StaleClaimError)
    assert notes(conninfo) == ["attempt 2"]


@pytest.mark.parametrize("happened", [True, False])
async def test_when_nobody_answers_the_handler_is_told_that_it_is_not_known(
    conninfo: str, proxied: tuple[CommitProxy, str], happened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triojobs._commit.LOOK_TIME", 0.5)
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after" if happened else "before")
    async with one_job(through, committer.handler) as (group, job_id):
        await gate.reached()
        proxy.cut()
        gate.cut()
        with trio.fail_after(15):
            while not committer.ends:
                await trio.sleep(0.01)
        proxy.heal()
        expected = 1 if happened else 2
        assert await group.client.result(job_id) == f"attempt {expected}"
    lost = committer.ends[0]
    assert isinstance(lost, triojobs.DatabaseError)
    assert lost.committed is None
    assert committer.works == expected  # never repeated by us
    assert notes(conninfo) == [f"attempt {expected}"]
    the_report_equals_the_rows(conninfo, group)


@pytest.mark.parametrize("happened", [True, False])
async def test_the_fate_of_a_transact_without_reply_is_not_known(
    conninfo: str, proxied: tuple[CommitProxy, str], happened: bool
) -> None:
    """There is no outcome to look for; the handler, who knows its own rows, is told."""
    proxy, through = proxied
    committer = Committer("transact")
    gate = proxy.gate("after" if happened else "before")
    async with one_job(through, committer.handler, {"max_attempts": 1}) as (group, job_id):
        await gate.reached()
        gate.cut()
        with pytest.raises(triojobs.JobFailedError):
            await group.client.result(job_id)
    (lost,) = committer.ends
    assert isinstance(lost, triojobs.DatabaseError)
    assert (lost.committed, lost.transient) == (None, True)
    assert notes(conninfo) == (["attempt 1"] if happened else [])
    the_report_equals_the_rows(conninfo, group)


@pytest.mark.parametrize("happened", [True, False])
async def test_a_cancelled_group_counts_a_commit_without_reply_as_the_rows_do(
    conninfo: str, proxied: tuple[CommitProxy, str], happened: bool
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after" if happened else "before")
    with trio.CancelScope() as scope:
        async with one_job(through, committer.handler, grace_period=0.0) as (group, job_id):
            await gate.reached()
            scope.cancel()

            async def cut() -> None:
                await trio.testing.wait_all_tasks_blocked()
                gate.cut()

            trio.lowlevel.spawn_system_task(cut)
    if happened:
        assert committer.ends == ["attempt 1"]
        assert outcomes(conninfo, job_id) == [(1, "done")]
    else:
        assert isinstance(committer.ends[0], trio.Cancelled)
        assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]
    the_report_equals_the_rows(conninfo, group)
    assert group.report.released == (0 if happened else 1)


async def test_a_cancelled_commit_in_a_black_hole_ends_when_any_call_of_ours_would(
    conninfo: str, proxied: tuple[CommitProxy, str]
) -> None:
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after")
    cancelled_at = math.inf
    ended_at: list[float] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        try:
            await committer.handler(job)
        finally:
            ended_at.append(trio.current_time())

    with trio.CancelScope() as scope:
        async with one_job(through, handler, grace_period=0.0, call_timeout=2.0, close_timeout=1.0) as (
            _,
            job_id,
        ):
            await gate.reached()
            proxy.stall()
            gate.silence()
            cancelled_at = trio.current_time()
            scope.cancel()
    # call_timeout, a second for the cancel on the server, and something for a busy machine; a look
    # for the outcome would take another three.
    assert ended_at[0] - cancelled_at < 2.0 + 1.0 + 1.8
    assert isinstance(committer.ends[0], trio.Cancelled)
    proxy.heal()
    assert outcomes(conninfo, job_id) == [(1, "done")]
    assert notes(conninfo) == ["attempt 1"]


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


class Shot(trio.abc.Instrument):
    """SIGINT before step number `k`, counted from the beginning of the handler."""

    def __init__(self, k: int) -> None:
        self._left = k
        self.armed = False
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.armed and not self.fired:
            self._left -= 1
            if self._left < 0:
                self.fired = True
                signal.raise_signal(signal.SIGINT)


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
        assert (group.report.released, group.statistics().stale) == (1 - done, 0)
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
