"""Rows 15, 24, 25: the server is there, but this call hangs, loses against somebody, or is refused."""

from __future__ import annotations

import os
import signal
import time
from typing import LiteralString

import psycopg
import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, terminate, until

from .rig import (
    CLAIM,
    GATE,
    SETTLE,
    SHORT,
    Figures,
    Journal,
    exit_bound,
    logged,
    outcomes,
    plain,
    rescue_bound,
    running,
    wait_until,
    waiting,
)


async def test_row_15_the_backend_is_stopped_in_a_claim(
    conninfo: str, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds its lock on the group's row as long as it lives, so nobody can close the group."""
    journal, later = Journal(), Journal()
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, "return")
    backend = 0
    try:
        with locked(conninfo, GATE, job_id), trio.CancelScope() as scope:
            async with triojobs.open_worker_group(conninfo, [journal.worker()], **SHORT) as group:
                backend = await blocked(conninfo, "claim")
                os.kill(backend, signal.SIGSTOP)
                began = trio.current_time()
                scope.cancel()
        figures.note("exit", trio.current_time() - began, at_most=exit_bound(SHORT))
        assert logged(caplog, "call_broken_off")
        assert group.report.unknown_claims == 1  # it may still commit: cannot be named, is counted
        assert group.report.abandoned == ()
        terminate(conninfo, backend)
    finally:
        if backend:
            os.kill(backend, signal.SIGCONT)
    later.go_on.set()
    async with triojobs.open_worker_group(conninfo, [later.worker()], **SHORT) as rescuer:
        began = trio.current_time()
        with trio.fail_after(30):
            await rescuer.client.result(job_id)
        figures.note("job back", trio.current_time() - began, at_most=rescue_bound(SHORT) + 1.0)
    assert journal.began == []
    assert len(later.returned) == 1
    assert running(conninfo) == 0


async def test_row_24_calls_that_lose_a_race_in_the_server_are_repeated(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    await a_deadlock(conninfo)
    await a_lock_that_lasts(conninfo)
    await a_serialization_failure(conninfo)
    assert set(outcomes(conninfo)) == {(1, "done")}
    assert running(conninfo) == 0
    assert not logged(caplog, "settle_failed")  # not even a failed call: repeated where it failed


async def a_deadlock(conninfo: str) -> None:
    """A settlement of three jobs runs into a session that wants the same leases in another order."""
    journal = Journal()
    deadlocks: LiteralString = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **SHORT) as group:
        low, middle, high = await group.client.enqueue_many(plain, ["wait"] * 3)
        await journal.wait_for_beginnings(3)
        lease: LiteralString = "SELECT FROM triojobs.leases WHERE id = %s FOR UPDATE"
        with psycopg.connect(conninfo) as gate, psycopg.connect(conninfo) as rival:
            rival.execute("SET deadlock_timeout = '1h'")  # ours is the one that finds it
            rival.execute(lease, [high])
            gate.execute(lease, [middle])
            journal.go_on.set()
            await blocked(conninfo, "settle")  # it has the low one
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, lambda: rival.execute(lease, [low]))
                await until(
                    conninfo,
                    "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s",
                    rival.info.backend_pid,
                )
                gate.rollback()  # now it wants the high one
            rival.rollback()
        await wait_until(lambda: group.statistics().settled == 3)
    assert await until(conninfo, deadlocks) == 1
    assert group.report.settled["done"] == 3


async def a_lock_that_lasts(conninfo: str) -> None:
    """Somebody keeps a lease locked for longer than our sessions wait for a lock."""
    journal = Journal()
    async with triojobs.open_worker_group(
        conninfo, [journal.worker()], **SHORT | {"call_timeout": 4.0}
    ) as group:
        await group.client.enqueue(plain, "wait")
        await journal.wait_for_beginnings(1)
        with locked(conninfo, "SELECT FROM triojobs.leases FOR UPDATE"):
            journal.go_on.set()
            first = await blocked(conninfo, "settle")
            query: LiteralString = """
                SELECT now() - query_start < interval '1 s' FROM pg_stat_activity
                WHERE pid = %s AND wait_event_type = 'Lock'
            """
            await until(conninfo, "SELECT now() - query_start > interval '1500 ms' FROM pg_stat_activity"
                        " WHERE pid = %s AND wait_event_type = 'Lock'", first)  # fmt: skip
            await until(conninfo, query, first)  # it has given up and waits again
        await wait_until(lambda: group.statistics().settled == 1)


async def a_serialization_failure(conninfo: str) -> None:
    """Our isolation has none; the proxy says it in the server's name."""
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        refused = [proxy.refuse(text, "40001", times=2) for text in (CLAIM, SETTLE)]
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT) as group:
            job_id = await group.client.enqueue(plain, "return")
            await wait_until(lambda: group.statistics().settled == 1)
    assert [len(times) for times in refused] == [2, 2]
    assert journal.began == [(job_id, 1)]


async def test_row_25_claims_are_refused_for_a_while(conninfo: str, caplog: pytest.LogCaptureFixture) -> None:
    """The disk is full, the statement takes too long, memory is short: said by the proxy for the server."""
    codes = ("53100", "57014", "53200")
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT) as group:
            refused = proxy.refuse(CLAIM, *codes)
            job_id = await group.client.enqueue(plain, "return")
            other = await group.client.enqueue(plain, "wait")
            await wait_until(lambda: refused and time.monotonic() - refused[0] > 3.0)
            assert len(refused) >= len(codes)
            assert len(refused) / 3.0 < 5.0  # calls per second: no spin
            proxy.heal()
            journal.go_on.set()
            with trio.fail_after(30):
                await group.client.result(job_id)
                await group.client.result(other)
            assert group.statistics().registrations == 1
    records = logged(caplog, "claim_failed")
    assert len(records) == len(refused)
    assert {getattr(record, "sqlstate", None) for record in records} == set(codes)
    assert sorted(journal.began) == [(job_id, 1), (other, 1)]
    assert outcomes(conninfo) == [(1, "done")] * 2
    assert running(conninfo) == 0
    assert waiting(conninfo) == {}
