"""Rows 1 to 4, 7, 49: cancels at any step, twice, while the group closes, while threads work or wait."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, rows

from .gates import CLAIM, SETTLE, StatementGate
from .rig import (
    SHORT,
    Figures,
    Journal,
    background_group,
    exit_bound,
    logged,
    outcomes,
    plain,
    running,
    wait_until,
    waiting,
)
from .steps import Boom, Run, disturbed


def test_row_01_the_outer_scope_is_cancelled_at_any_step(conninfo: str, figures: Figures) -> None:
    runs = disturbed(conninfo, lambda run: run.scope.cancel())
    assert [run.error for run in runs if run.error] == []
    assert any(run.group is not None and run.group.report.released for run in runs)
    figures.note("exit", max(run.left_in for run in runs), at_most=exit_bound(SHORT))


def test_row_02_a_sibling_task_raises(conninfo: str, figures: Figures) -> None:
    runs = disturbed(conninfo, lambda run: run.boom.set())
    check_errors(runs, Boom)
    figures.note("exit", max(run.left_in for run in runs), at_most=exit_bound(SHORT))


def check_errors(runs: list[Run], kind: type[BaseException]) -> None:
    """What was raised comes out, alone, but where it was raised when all was over."""
    errors = [run.error for run in runs if run.error is not None]
    assert len(errors) > len(runs) / 2
    for error in errors:  # in a group, as the program itself has a nursery
        assert isinstance(error, kind) or (
            isinstance(error, BaseExceptionGroup) and error.split(kind)[1] is None
        )


def test_row_03_cancelled_twice_and_while_it_closes(conninfo: str) -> None:
    runs = disturbed(conninfo, lambda run: run.scope.cancel(), twice=True)
    assert [run.error for run in runs if run.error] == []
    trio.run(cancel_while_it_closes, conninfo)


async def cancel_while_it_closes(conninfo: str) -> None:
    outer, inner = trio.CancelScope(), trio.CancelScope()
    journal = Journal()

    async def live() -> None:
        with outer, inner:
            async with triojobs.open_worker_group(conninfo, [journal.worker()], **SHORT) as group:
                await group.client.enqueue(plain, "wait")
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await journal.wait_for_beginnings(1)
        with locked(conninfo, "SELECT FROM triojobs.leases FOR UPDATE") as gate:
            inner.cancel()
            await blocked(conninfo, "settle")  # the closing waits for the lease
            outer.cancel()
            await trio.lowlevel.checkpoint()
            gate.rollback()
    ((job_id, _),) = journal.cancelled
    assert running(conninfo) == 0
    assert waiting(conninfo) == {job_id: 0}


def test_row_04_sigint_at_any_step(conninfo: str, figures: Figures) -> None:
    runs = disturbed(conninfo, lambda run: signal.raise_signal(signal.SIGINT))
    check_errors(runs, KeyboardInterrupt)
    figures.note("exit", max(run.left_in for run in runs), at_most=exit_bound(SHORT))
    with pytest.raises(KeyboardInterrupt):
        trio.run(strike_inside_a_handler, conninfo)
    assert running(conninfo) == 0
    assert set(waiting(conninfo).values()) == {0}
    assert outcomes(conninfo) == []


async def strike_inside_a_handler(conninfo: str) -> None:
    """Where Ctrl-C finds unprotected code: in the first one to run while all of them are in hand."""
    begun: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        begun.append(job.id)
        await wait_until(lambda: len(begun) == 3)
        signal.raise_signal(signal.SIGINT)

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], **SHORT) as group:
        await group.client.enqueue_many(plain, ["job"] * 3)
        await trio.sleep_forever()


@pytest.mark.parametrize("point", ["before the statement", "committed", "before its return"])
@pytest.mark.parametrize("statement", ["claim", "settle"])
@pytest.mark.parametrize("how", ["cancel", "stop"])
async def test_row_07_cancelled_while_a_statement_stands_at_a_point(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, how: str, statement: str, point: str
) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, "return")
    journal = Journal()
    gate = StatementGate(monkeypatch, *{"claim": CLAIM, "settle": SETTLE}[statement], point=point)
    async with background_group(conninfo, [journal.worker()]) as (scope, groups):
        await wait_until(gate.reached.is_set)
        if how == "cancel":
            scope.cancel()
        else:
            groups[0].stop()
        for _ in range(20):
            await trio.lowlevel.checkpoint()  # the loop never comes to rest while one stands there
        live = groups[0]._registrations[0]
        # A call is never abandoned: whose it is, is still there.
        assert live.fetching.value if statement == "claim" else live.settling.value
        gate.open.set()
        await groups[0].wait_stopped()
        scope.cancel()
    (group,) = groups
    assert running(conninfo) == 0
    if statement == "claim":  # claimed or not: given back, and never begun
        assert journal.began == []
        assert waiting(conninfo) == {job_id: 0}
        assert group.report.released == group.statistics().claimed
    else:
        assert journal.returned == [(job_id, 1)]
        assert outcomes(conninfo) == [(1, "done")]
        assert group.report.settled["done"] == 1


async def test_row_49_cancelled_while_waiting_for_a_limiter_or_a_reconnect(
    conninfo: str, caplog: pytest.LogCaptureFixture, figures: Figures
) -> None:
    figures.note("exit from a limiter", await cancel_at_the_limiter(conninfo), at_most=exit_bound(SHORT))
    rows(conninfo, "DELETE FROM triojobs.ready")
    figures.note("exit from a backoff", await cancel_in_backoff(conninfo, caplog), at_most=exit_bound(SHORT))


async def cancel_at_the_limiter(conninfo: str) -> float:
    """Two jobs want the one connection for `commit`; one holds it while its work waits for a lock."""
    rows(conninfo, "CREATE TABLE writes (job bigint)")
    holding: list[int] = []

    async def commit(job: triojobs.Job[Any]) -> None:
        def work(conn: Any) -> None:
            holding.append(job.id)
            conn.execute("INSERT INTO writes VALUES (%s)", [job.id])

        await job.commit(work)

    worker = triojobs.Worker(plain, commit)
    with locked(conninfo, "LOCK TABLE writes"), trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [worker], job_connections=1, **SHORT) as group:
            ids = await group.client.enqueue_many(plain, ["first", "second"])
            await wait_until(lambda: group.statistics().running == 2)
            await blocked(conninfo, "job")
            began = trio.current_time()
            scope.cancel()
    assert len(holding) == 1
    assert running(conninfo) == 0
    assert waiting(conninfo) == dict.fromkeys(ids, 0)
    assert rows(conninfo, "SELECT * FROM writes") == []
    return trio.current_time() - began


async def cancel_in_backoff(conninfo: str, caplog: pytest.LogCaptureFixture) -> float:
    """Everybody who needs the server waits to try again; the server is back at the instant of the cancel."""
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through), trio.CancelScope() as scope:
        async with triojobs.open_worker_group(
            through, [journal.worker()], **SHORT | {"lease_duration": 30.0}
        ) as group:
            kept, returned = await group.client.enqueue_many(plain, ["wait", "return"])
            await wait_until(lambda: len(journal.began) == 2)
            await wait_until(lambda: group.statistics().settled == 1)
            other = await group.client.enqueue(plain, "wait", max_attempts=2)
            await journal.wait_for_beginnings(3)
            proxy.cut()
            # The fetcher, or who compares for it after a claim that was cut off.
            failures = ("claim_failed", "compare_failed")
            await wait_until(lambda: sum(len(logged(caplog, event)) for event in failures) >= 3)
            began = trio.current_time()
            proxy.heal()
            scope.cancel()
    assert sorted(journal.cancelled) == sorted([(kept, 1), (other, 1)])
    assert running(conninfo) == 0
    assert waiting(conninfo) == {kept: 0, other: 0}
    assert outcomes(conninfo) == [(1, "done")]
    assert returned not in waiting(conninfo)
    assert group.report.abandoned == ()
    return trio.current_time() - began
