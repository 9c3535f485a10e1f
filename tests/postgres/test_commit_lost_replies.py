"""A COMMIT whose reply is lost: found out where anybody can tell, said to be unknown where nobody can."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.commit_proxy import CommitProxy
from tests.tools.committing import Committer, one_job, the_report_equals_the_rows
from tests.tools.looking import blocked, locked, rows
from tests.tools.running import NOTES, notes, outcomes, retire_groups
from triojobs._commit import CommitAttempt


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


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
    async with one_job(through, committer.handler, call_timeout=2.0) as (group, job_id):
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


async def test_a_cancelled_commit_in_a_black_hole_does_not_look_when_its_time_is_used_up(
    conninfo: str, proxied: tuple[CommitProxy, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Leaving a group has a bound: COMMIT and look together take no longer than any call of ours."""
    proxy, through = proxied
    committer = Committer()
    gate = proxy.gate("after")
    with trio.CancelScope() as scope:
        async with one_job(
            through, committer.handler, grace_period=0.0, call_timeout=2.0, close_timeout=1.0
        ) as (group, job_id):
            await gate.reached()
            proxy.stall()
            gate.silence()
            scope.cancel()
    assert isinstance(committer.ends[0], trio.Cancelled)
    assert "look_failed" not in [getattr(record, "event", "") for record in caplog.records]
    assert group.report.abandoned == (job_id,)  # nobody could be asked
    proxy.heal()
    assert outcomes(conninfo, job_id) == [(1, "done")]
    assert notes(conninfo) == ["attempt 1"]
