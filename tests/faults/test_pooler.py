"""Rows 20 and 21: notifications that do not arrive, and a pooler in between."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import rows, until, value
from tests.tools.pooler import Pooler

from .processes import WorkerProcess
from .rig import SHORT, Figures, Journal, logged, outcomes, plain, rescue_bound, running, waiting


async def start_latency(group: triojobs.WorkerGroup) -> float:
    """Enqueue a job; return how long after its commit it was claimed, by the server's clock."""
    with trio.fail_after(30):
        job_id = await group.client.enqueue(plain, "return")
        await group.client.result(job_id)
        info = await group.client.get(job_id)
    assert info is not None
    assert info.claimed_at is not None
    return (info.claimed_at - info.enqueued_at).total_seconds()


async def test_row_20_notifications_get_lost_or_cannot_be_heard(
    conninfo: str, bouncer: Pooler, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    """On a link that drops them, and behind a pooler, where LISTEN hears nothing."""
    journal = Journal()
    options = SHORT | {"poll_interval": 60.0, "listening_poll_interval": 0.8}
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_worker_group(through, [journal.worker()], **options) as group:
            await until(conninfo, "SELECT count(*) FROM triojobs.waiting")
            proxy.drop_notifications()
            latencies = [await start_latency(group) for _ in range(3)]
    figures.note("started by the poll beside LISTEN", max(latencies),
                 at_most=options["listening_poll_interval"] + options["call_timeout"])  # fmt: skip
    assert max(latencies) > 0.05  # they were lost indeed: a notification takes a millisecond
    options |= {"poll_interval": 0.4, "listening_poll_interval": 60.0}
    async with triojobs.open_worker_group(
        bouncer.conninfo, [journal.worker()], pooled=True, **options
    ) as group:
        latencies = [await start_latency(group) for _ in range(3)]
    figures.note("started by the poll behind a pooler", max(latencies),
                 at_most=options["poll_interval"] + options["call_timeout"])  # fmt: skip
    assert len(logged(caplog, "cannot_listen")) == 1
    assert outcomes(conninfo) == [(1, "done")] * 6


async def test_row_21_whole_processes_work_through_pgbouncer_in_transaction_mode(
    conninfo: str, bouncer: Pooler, worker: Callable[..., WorkerProcess], figures: Figures
) -> None:
    """Two worker processes and a client share three sessions; one process is killed, one stops by itself."""
    options: dict[str, Any] = SHORT | {"lease_duration": 2.0, "lease_margin": 0.5, "pooled": True}
    first = worker(bouncer.conninfo, options=options, concurrency=2)
    await trio.to_thread.run_sync(lambda: first.wait_for("open"))
    async with triojobs.open_client(bouncer.conninfo, pooled=True) as client:
        ids = await client.enqueue_many(plain, [triojobs.NewJob(p) for p in ("wait", "wait")])
        await trio.to_thread.run_sync(lambda: first.wait_for("began", count=2))
        second = worker(bouncer.conninfo, options=options, concurrency=20)
        await trio.to_thread.run_sync(lambda: second.wait_for("open"))
        keyed = await client.enqueue(plain, "return", key="k", delay=0.1)
        again = await client.try_enqueue(plain, "other", key="k")
        assert (again.id, again.created) == (keyed, False)
        quick = await client.enqueue_many(plain, ["return"] * 40)
        with trio.fail_after(30):
            assert {await client.result(job_id) for job_id in [*quick, keyed]} == {"returned"}
        first.send(signal.SIGKILL)
        killed_at = value(conninfo, "SELECT extract(epoch FROM clock_timestamp())::float8")
        await trio.to_thread.run_sync(
            lambda: [second.wait_for("began", job=job_id, attempt=2) for job_id in ids]
        )
        query = "SELECT extract(epoch FROM max(finished_at))::float8 FROM triojobs.outcomes WHERE status = 'failed'"
        figures.note("jobs back", value(conninfo, query) - killed_at, at_most=rescue_bound(options))
        assert await client.cancel(ids[0], reason="enough")
        with trio.fail_after(30), pytest.raises(triojobs.JobCancelledError, match="enough"):
            await client.result(ids[0])
    second.send(signal.SIGINT)
    await trio.to_thread.run_sync(second.wait)
    (report,) = second.all("report")
    assert (report["stale"], report["registrations"]) == (0, 1)
    assert waiting(conninfo) == {ids[1]: 1}
    assert running(conninfo) == 0
    history = "SELECT status, count(*) FROM triojobs.outcomes GROUP BY 1"
    assert dict(rows(conninfo, history)) == {"done": 41, "failed": 2, "cancelled": 1}
    trouble = [line for line in second.all("log") if line["level"] != "INFO" and line["name"] != "rescued"]
    assert [line["name"] for line in trouble] == ["cannot_listen"]
    assert left_in_sessions(bouncer) == [(0, 0)] * 3  # they are shared: nothing of ours stays in one


def left_in_sessions(bouncer: Pooler) -> list[tuple[Any, ...]]:
    """Count prepared statements and changed settings of each session that the pooler has."""
    query = """
        SELECT (SELECT count(*) FROM pg_prepared_statements),
               (SELECT count(*) FROM pg_settings
                WHERE source = 'session' AND setting IS DISTINCT FROM reset_val
                  AND name NOT IN ('application_name', 'client_encoding'))
    """
    found: list[tuple[Any, ...]] = []
    with ExitStack() as stack:  # an open transaction keeps a session to itself
        for _ in range(3):
            conn = stack.enter_context(psycopg.connect(bouncer.conninfo, prepare_threshold=None))
            found += conn.execute(query).fetchall()
    return found
