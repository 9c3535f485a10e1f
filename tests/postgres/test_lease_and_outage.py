"""Leases, lost claims and outages: what a group does when the database or its own loop fails it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from triojobs._sql import groups

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
SHORT_LEASE: dict[str, Any] = {
    "lease_duration": 2.0,
    "lease_margin": 0.5,
    "beat_interval": 0.3,
    "call_timeout": 1.0,
    "poll_interval": 0.2,
}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


def rows(conninfo: str, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        return conn.execute(query, parameters or None).fetchall()


async def until(conninfo: str, query: str, *, seconds: float = 15.0) -> Any:
    """Poll until the query's first value is true; a bound, not an order."""
    with trio.fail_after(seconds), psycopg.connect(conninfo, autocommit=True) as conn:
        while True:
            row = conn.execute(query).fetchone()
            if row and row[0]:
                return row[0]
            await trio.sleep(0.02)


def outcomes(conninfo: str) -> list[tuple[Any, ...]]:
    return rows(conninfo, "SELECT attempt, status FROM triojobs.outcomes ORDER BY no")


BLOCKED_CLAIM = """
SELECT max(pid) FROM pg_stat_activity
WHERE application_name = 'triojobs claim' AND wait_event_type = 'Lock' AND datname = current_database()
"""


@contextmanager
def blocked_claims(conninfo: str, job_id: int) -> Iterator[psycopg.Connection[Any]]:
    """Make any claim of this job wait inside its statement, holding its lock on the group's row."""
    with psycopg.connect(conninfo) as gate:
        gate.execute(
            "INSERT INTO triojobs.leases (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at)"
            " VALUES (%s, 0, gen_random_uuid(), 1, 1, 'gate', 0, now())",
            [job_id],
        )
        yield gate
        gate.rollback()


async def test_a_claim_whose_reply_was_lost_is_given_back_while_the_group_lives(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    async def handler(job: triojobs.Job[Any]) -> None:
        attempts.append(job.attempt)

    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
    with blocked_claims(conninfo, job_id) as gate:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
            pid = await until(conninfo, BLOCKED_CLAIM)
            rows(conninfo, "SELECT pg_terminate_backend(%s)", pid)
            gate.rollback()
            with trio.fail_after(15):
                await group.client.result(job_id)
    assert attempts == [1]
    assert outcomes(conninfo) == [(1, "done")]
    [compared] = [r for r in caplog.records if getattr(r, "event", "") == "compared"]
    assert (compared.job_ids, compared.released) == ([], 0)  # its transaction was undone
    assert rows(conninfo, "SELECT epoch > 1 FROM triojobs.worker_groups") == [(True,)]


async def test_a_claim_that_commits_after_its_client_gave_up_is_given_back(conninfo: str) -> None:
    """The backend is stopped inside the claim; the breaker ends the call; then the backend goes on."""
    attempts = []

    async def handler(job: triojobs.Job[Any]) -> None:
        attempts.append(job.attempt)

    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
    with blocked_claims(conninfo, job_id) as gate:
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(plain, handler)], call_timeout=0.5
        ) as group:
            pid = await until(conninfo, BLOCKED_CLAIM)
            os.kill(pid, signal.SIGSTOP)
            try:
                await until(
                    conninfo,
                    "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE '%FOR UPDATE'"
                    " AND wait_event_type = 'Lock' AND datname = current_database()",
                )
                gate.rollback()
            finally:
                os.kill(pid, signal.SIGCONT)
            with trio.fail_after(20):
                await group.client.result(job_id)
    assert attempts == [1]
    assert outcomes(conninfo) == [(1, "done")]


async def test_a_short_outage_costs_no_attempt(conninfo: str) -> None:
    started = trio.Event()
    attempts = []

    async def handler(job: triojobs.Job[Any]) -> None:
        attempts.append(job.attempt)
        if len(attempts) == 1:
            started.set()
            await trio.sleep_forever()

    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_worker_group(
            through, [triojobs.Worker(plain, handler)], **SHORT_LEASE
        ) as group:
            job_id = await group.client.enqueue(plain, None, max_attempts=1)
            await started.wait()
            proxy.cut()
            with trio.fail_after(10):
                while group.statistics().running:  # cancelled when the lease can no longer be proven
                    await trio.sleep(0.02)
            assert not rows(conninfo, "SELECT 1 FROM triojobs.outcomes")
            proxy.heal()
            with trio.fail_after(15):
                while group.statistics().registrations == 1:
                    await trio.sleep(0.02)
                await group.client.result(job_id)
    assert attempts == [1, 1]
    assert outcomes(conninfo) == [(1, "done")]
    assert len(group.report.group_ids) == 2
    assert group.report.released == 1


async def test_a_group_that_was_rescued_cancels_its_handlers_and_registers_again(conninfo: str) -> None:
    started = trio.Event()
    attempts = []
    cancelled = []

    async def handler(job: triojobs.Job[Any]) -> None:
        attempts.append(job.attempt)
        if job.attempt == 1:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.append(job.id)

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], beat_interval=0.2
    ) as group:
        first = group.group_id
        job_id = await group.client.enqueue(plain, None)
        await started.wait()
        # What a rescuer does, at once instead of after the lease.
        with psycopg.connect(conninfo) as conn:
            conn.execute("UPDATE triojobs.worker_groups SET lease_until = now() - interval '1 hour'")
            assert groups.rescue(conn, "triojobs").jobs == 1
        with trio.fail_after(15):
            await group.client.result(job_id)
        assert group.group_id != first
    assert cancelled == [job_id]
    assert attempts == [1, 2]
    assert outcomes(conninfo) == [(1, "failed"), (2, "done")]
    assert group.statistics().stale == 1


async def test_a_blocked_loop_loses_neither_its_lease_nor_its_healthy_handlers(conninfo: str) -> None:
    healthy_started = trio.Event()
    go_on = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        if job.payload == "blocks":
            await healthy_started.wait()
            time.sleep(2.5)  # longer than the lease: what this test is about
            go_on.set()
            return "blocked"
        healthy_started.set()
        await go_on.wait()
        return "healthy"

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], **SHORT_LEASE
    ) as group:
        ids = await group.client.enqueue_many(plain, ["healthy", "blocks"])
        with trio.fail_after(15):
            assert [await group.client.result(i) for i in ids] == ["healthy", "blocked"]
        assert group.statistics().registrations == 1
    assert sorted(outcomes(conninfo)) == [(1, "done"), (1, "done")]


async def test_a_beat_that_is_under_way_when_the_group_closes_is_no_lease_loss(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    with psycopg.connect(conninfo) as gate, trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], beat_interval=0.1):
            gate.execute("SELECT FROM triojobs.worker_groups FOR UPDATE")
            await until(
                conninfo,
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'triojobs heartbeat'"
                " AND wait_event_type = 'Lock' AND datname = current_database()",
            )
            scope.cancel()
            gate.rollback()
            await trio.lowlevel.checkpoint()
    assert not any(getattr(r, "event", "") in ("lease_lost", "registered_again") for r in caplog.records)
    assert rows(conninfo, "SELECT count(*), bool_and(closed_at IS NOT NULL) FROM triojobs.worker_groups") == [
        (1, True)
    ]


async def test_an_unreachable_database_at_the_end_leaves_the_rows_to_rescue_and_names_them(
    conninfo: str,
) -> None:
    started = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        started.set()
        await trio.sleep_forever()

    with fault_proxy(conninfo) as (proxy, through):
        began = 0.0
        with trio.CancelScope() as scope:
            async with triojobs.open_worker_group(
                through, [triojobs.Worker(plain, handler)], close_timeout=1.0, call_timeout=1.0
            ) as group:
                job_id = await group.client.enqueue(plain, None)
                await started.wait()
                proxy.stall()
                began = trio.current_time()
                scope.cancel()
        assert group.report.abandoned == (job_id,)
        assert group.report.released == 0
        # grace does not count: it was cancelled. A bound that hangs would miss, not a measurement.
        assert trio.current_time() - began < 1.0 + 1.0 + 1.0 + 4.0
    assert rows(conninfo, "SELECT id FROM triojobs.leases") == [(job_id,)]


WORKER_PROGRAM = """
import sys, trio, triojobs
plain = triojobs.Queue("plain")
async def handler(job):
    print("started", job.attempt, flush=True)
    await trio.sleep_forever()
async def main():
    await triojobs.serve(sys.argv[1], [triojobs.Worker(plain, handler)], grace_period=float(sys.argv[2]),
        lease_duration=1.5, lease_margin=0.3, beat_interval=0.3)
    print("left", flush=True)
trio.run(main)
"""


@contextmanager
def worker_process(conninfo: str, grace_period: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WORKER_PROGRAM, conninfo, str(grace_period)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def start_one_job(conninfo: str, process: subprocess.Popen[str]) -> int:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
    assert process.stdout is not None
    line = await trio.to_thread.run_sync(process.stdout.readline)
    assert line == "started 1\n"
    return job_id


async def test_jobs_of_a_killed_process_are_rescued_when_its_lease_ends(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> int:
        return job.attempt

    with worker_process(conninfo, 0.0) as process:
        job_id = await start_one_job(conninfo, process)
        process.kill()
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(plain, handler)], **SHORT_LEASE
        ) as group:
            with trio.fail_after(15):
                assert await group.client.result(job_id) == 2
            assert group.statistics().rescued == 1
    assert outcomes(conninfo) == [(1, "failed"), (2, "done")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_stops_gracefully_and_the_rows_go_back(conninfo: str, number: int) -> None:
    with worker_process(conninfo, 0.1) as process:
        job_id = await start_one_job(conninfo, process)
        process.send_signal(number)
        output = await trio.to_thread.run_sync(process.communicate)
    assert (process.returncode, output[0]) == (0, "left\n")
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


async def test_the_second_signal_cancels_without_waiting_for_the_grace_period(conninfo: str) -> None:
    with worker_process(conninfo, 3600.0) as process:
        job_id = await start_one_job(conninfo, process)
        process.send_signal(signal.SIGTERM)
        # The first has been obeyed when nothing is claimed any more.
        async with triojobs.open_client(conninfo) as client:
            await client.enqueue(plain, "second")
        process.send_signal(signal.SIGTERM)
        with trio.fail_after(15):
            output = await trio.to_thread.run_sync(process.communicate)
    assert process.returncode == 0
    assert output[0].endswith("left\n")
    assert (job_id, 0) in rows(conninfo, "SELECT id, attempts FROM triojobs.ready")
    assert rows(conninfo, "SELECT count(*) FROM triojobs.leases") == [(0,)]


async def test_no_server_at_start_is_a_transient_error_and_leaves_nothing_behind() -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    with pytest.raises(triojobs.DatabaseError) as caught, trio.fail_after(10):
        async with triojobs.open_worker_group(
            "host=127.0.0.1 port=1 user=nobody dbname=none", [triojobs.Worker(plain, handler)]
        ):
            raise AssertionError("must not open")
    assert caught.value.transient
    assert "while connecting" in str(caught.value)


async def test_a_missing_schema_is_told_with_the_command(empty_database: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    with pytest.raises(triojobs.SchemaError, match="triojobs migrate"):
        async with triojobs.open_worker_group(empty_database, [triojobs.Worker(plain, handler)]):
            raise AssertionError("must not open")
