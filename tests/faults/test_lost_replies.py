"""Rows 8 to 10c, 42, 48: the reply never comes, comes late, or belongs to a claim that is over."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest
import trio
from psycopg import sql

import triojobs
from tests.postgres.tools import Group, open_session, place, put_one
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, places, rows, until, value
from triojobs._model import Outcome
from triojobs._sql import groups as groups_sql
from triojobs._sql import session

from .rig import (
    CLAIM,
    GATE,
    SETTLE,
    SHORT,
    Figures,
    Journal,
    background_group,
    call_bound,
    committed_claims,
    exit_bound,
    keep_claims,
    logged,
    outcomes,
    plain,
    rescue_bound,
    running,
    wait_until,
    waiting,
)


@pytest.fixture
def hanging_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our sessions without the server's timeouts, as in a backend that hangs in its disk or a signal."""
    changed = session.PREPARE
    for line in ("('statement_timeout', %(statement_timeout)s)", "('lock_timeout', %(lock_timeout)s)"):
        name = line.split("'")[1]
        assert line in changed
        changed = changed.replace(line, f"('{name}', '0')")
    monkeypatch.setattr(session, "PREPARE", changed)


@pytest.fixture
def repeatable_read(conninfo: str) -> Iterator[None]:
    """The role's default isolation here is one in which closing and rescue would miss rows."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        role = sql.SQL("ALTER ROLE CURRENT_USER IN DATABASE {} ").format(sql.Identifier(conn.info.dbname))
        conn.execute(role + sql.SQL("SET default_transaction_isolation = 'repeatable read'"))
        yield
        conn.execute(role + sql.SQL("RESET default_transaction_isolation"))


async def enqueue_one(conninfo: str, payload: str = "return", **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        return await client.enqueue(plain, payload, **options)


async def test_row_08_the_reply_of_a_claim_is_lost(
    conninfo: str, caplog: pytest.LogCaptureFixture, figures: Figures
) -> None:
    keep_claims(conninfo)
    job_id = await enqueue_one(conninfo)
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        lost = proxy.lose_reply(CLAIM)
        began = trio.current_time()
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT) as group:
            with trio.fail_after(30):
                await group.client.result(job_id)
            figures.note("job done after", trio.current_time() - began, at_most=2 * call_bound(SHORT))
            assert group.statistics().registrations == 1
    assert lost.answered.is_set()
    assert committed_claims(conninfo) == [(1, 1), (2, 1)]  # swept by owner, and refunded
    (compared,) = logged(caplog, "compared")
    assert compared.released == 1  # type: ignore[attr-defined]
    assert value(conninfo, "SELECT epoch FROM triojobs.worker_groups") == 2
    assert journal.began == [(job_id, 1)]
    assert outcomes(conninfo) == [(1, "done")]
    assert group.report.unknown_claims == 0


async def test_row_09_the_reply_of_a_settlement_is_lost(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = await enqueue_one(conninfo)
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        lost = proxy.lose_reply(SETTLE)
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT) as group:
            await wait_until(lambda: group.statistics().settled)
    assert lost.answered.is_set()
    assert len(logged(caplog, "settle_failed")) == 1
    assert journal.returned == [(job_id, 1)]
    assert outcomes(conninfo) == [(1, "done")]
    # The second settlement matched nothing, and that is neither an error nor a stale claim.
    assert group.report.settled["done"] == 1
    assert group.statistics().stale == 0
    assert not logged(caplog, "stale")


@pytest.mark.usefixtures("hanging_server")
@pytest.mark.parametrize("late", ["still executing", "not yet arrived"])
async def test_row_10_a_claim_commits_after_its_client_has_left(
    conninfo: str, figures: Figures, late: str
) -> None:
    """The claim's link falls silent, cancels get lost, and the group is cancelled and closes."""
    keep_claims(conninfo)
    job_id = await enqueue_one(conninfo)
    if late == "still executing":
        await close_waits_for_the_claim(conninfo, job_id, figures)
    else:
        await late_claim_matches_nothing(conninfo, figures)
    assert running(conninfo) == 0
    assert waiting(conninfo) == {job_id: 0}


async def close_waits_for_the_claim(conninfo: str, job_id: int, figures: Figures) -> None:
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through), locked(conninfo, GATE, job_id) as gate:
        async with background_group(through, [journal.worker()]) as (scope, groups):
            await blocked(conninfo, "claim")
            assert proxy.freeze("claim") == 1
            began = trio.current_time()
            scope.cancel()
            await blocked(conninfo, "settle")
            gate.rollback()
        figures.note("exit", trio.current_time() - began, at_most=exit_bound(SHORT))
    assert committed_claims(conninfo) == [(1, 1)]
    assert journal.began == []
    assert (groups[0].statistics().claimed, groups[0].report.released) == (0, 1)
    assert groups[0].report.unknown_claims == 0


async def late_claim_matches_nothing(conninfo: str, figures: Figures) -> None:
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        late = proxy.hold(CLAIM)
        async with background_group(through, [journal.worker()]) as (scope, groups):
            await wait_until(late.sent.is_set)
            began = trio.current_time()
            scope.cancel()
        figures.note("exit", trio.current_time() - began, at_most=exit_bound(SHORT))
        assert not late.answered.is_set()
        proxy.thaw("claim")
        await wait_until(late.answered.is_set)
    assert committed_claims(conninfo) == []
    assert (groups[0].report.released, groups[0].report.unknown_claims) == (0, 0)


SWEEP_WAITS: LiteralString = """
SELECT count(*) > 0 FROM pg_stat_activity
WHERE application_name = 'triojobs claim' AND datname = current_database()
  AND query LIKE 'SELECT epoch%%FOR UPDATE' AND wait_event_type = 'Lock'
"""


@pytest.mark.usefixtures("hanging_server")
async def test_row_10b_a_claim_commits_after_its_client_gave_up_and_the_group_lives(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The claim's backend is stopped; the breaker ends the call; then the backend goes on."""
    keep_claims(conninfo)
    job_id = await enqueue_one(conninfo)
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through), locked(conninfo, GATE, job_id) as gate:
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT) as group:
            backend = await blocked(conninfo, "claim")
            os.kill(backend, signal.SIGSTOP)
            try:
                proxy.freeze("claim")  # its cancel gets lost, too
                await until(conninfo, SWEEP_WAITS)
                gate.rollback()
            finally:
                os.kill(backend, signal.SIGCONT)
            with trio.fail_after(30):
                await group.client.result(job_id)
            assert group.statistics().claimed == 1
            assert group.statistics().registrations == 1
    (late, kept) = committed_claims(conninfo)
    assert (late, kept[1]) == ((1, 1), 1)
    assert value(conninfo, "SELECT epoch FROM triojobs.worker_groups") == 2
    (compared,) = logged(caplog, "compared")
    assert compared.released == 1  # type: ignore[attr-defined]
    assert journal.began == [(job_id, 1)]
    assert outcomes(conninfo) == [(1, "done")]


@pytest.mark.usefixtures("hanging_server", "repeatable_read")
@pytest.mark.parametrize("taker", ["close", "rescue"])
async def test_row_10c_close_and_rescue_meet_a_claim_that_holds_its_lock(
    conninfo: str, figures: Figures, monkeypatch: pytest.MonkeyPatch, taker: str
) -> None:
    assert value(conninfo, "SHOW transaction_isolation") == "repeatable read"
    keep_claims(conninfo)
    job_id = await enqueue_one(conninfo)
    if taker == "close":
        await close_waits_for_the_claim(conninfo, job_id, figures)
        assert waiting(conninfo) == {job_id: 0}
    else:
        await rescue_passes_over_the_claim(conninfo, job_id, figures, monkeypatch)
        assert outcomes(conninfo) == [(1, "failed"), (2, "done")]
    assert running(conninfo) == 0


async def rescue_passes_over_the_claim(
    conninfo: str, job_id: int, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group is cut off with a claim on its way; another one looks for lapsed groups meanwhile."""
    rounds: list[groups_sql.Rescue] = []
    rescue = groups_sql.rescue

    def rescue_and_count(*args: Any) -> groups_sql.Rescue:
        rounds.append(rescue(*args))
        return rounds[-1]

    monkeypatch.setattr(groups_sql, "rescue", rescue_and_count)
    options = SHORT | {"lease_duration": 1.5, "lease_margin": 0.5, "beat_interval": 0.3}
    cut_off, rescuer = Journal(), Journal()
    lapsed: LiteralString = """
        SELECT count(*) > 0 FROM triojobs.worker_groups
        WHERE closed_at IS NULL AND lease_until < now() - %s * interval '1 s'
    """
    with fault_proxy(conninfo) as (proxy, through), locked(conninfo, GATE, job_id) as gate:
        async with background_group(through, [cut_off.worker()], **options) as (scope, _):
            await blocked(conninfo, "claim")
            proxy.stall()
            async with triojobs.open_worker_group(conninfo, [rescuer.worker()], **options) as group:
                await until(conninfo, lapsed, 0)
                over = len(rounds)
                await wait_until(lambda: len(rounds) >= over + 2)  # they do not wait for the claim's lock
                assert group.statistics().rescued == 0
                closed = "SELECT count(*) FROM triojobs.worker_groups WHERE closed_at IS NOT NULL"
                assert value(conninfo, closed) == 0  # they would have closed it without its jobs
                gate.rollback()
                began = trio.current_time()
                with trio.fail_after(30):
                    await group.client.result(job_id)
                figures.note("rescued after", trio.current_time() - began, at_most=rescue_bound(options))
                assert group.statistics().rescued == 1
            proxy.heal()
            scope.cancel()
    assert committed_claims(conninfo)[0] == (1, 1)
    assert cut_off.began == []
    assert rescuer.began == [(job_id, 2)]


@pytest.mark.parametrize("by", ["job_id", "key"])
async def test_row_42_the_reply_of_an_enqueue_is_lost_and_it_is_repeated(conninfo: str, by: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through) as client:
            given: dict[str, Any] = {"key": "once"} if by == "key" else {"job_id": await client.new_job_id()}
            lost = proxy.lose_reply(b"COMMIT\0")
            with pytest.raises(triojobs.DatabaseError) as caught:
                await client.enqueue(plain, "return", **given)
            assert lost.answered.is_set()
            assert (caught.value.committed, caught.value.transient) == (None, True)
            assert places(conninfo)["jobs"] == 1  # never repeated behind the caller's back
            again = await client.try_enqueue(plain, "return", **given)
            assert not again.created
            assert again.id == given.get("job_id", again.id)
    assert rows(conninfo, "SELECT id FROM triojobs.jobs") == [(again.id,)]
    assert waiting(conninfo) == {again.id: 0}


@pytest.mark.parametrize("outcome", list(Outcome))
def test_row_48_a_stale_settlement_of_an_older_claim_by_the_same_worker(
    conninfo: str, outcome: Outcome
) -> None:
    """Released and claimed again by the same group at once: the attempt's number is the same."""
    with open_session(conninfo) as conn:
        group = Group(conn)
        for _ in range(20):
            job_id = put_one(conn)
            old = group.claim_one(conn)
            group.settle(conn, old, Outcome.RELEASED)
            new = group.claim_one(conn)
            assert (new.job_id, new.attempt) == (old.job_id, old.attempt)
            assert group.settle(conn, old, outcome) == []
            assert place(conn, job_id) == ("leases", 1)
            assert len(group.settle(conn, new, Outcome.DONE)) == 1
    assert outcomes(conninfo) == [(1, "done")] * 20
    assert running(conninfo) == 0
