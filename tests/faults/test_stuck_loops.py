"""Rows 28, 30b, 31: an event loop that does not turn, and a group that others thought dead."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from triojobs._sql import groups

from .processes import WorkerProcess
from .rig import SHORT, Figures, Journal, logged, outcomes, plain, running, wait_until, waiting

Start = Callable[..., WorkerProcess]
BRIEF: dict[str, Any] = SHORT | {"lease_duration": 2.0, "lease_margin": 0.5, "beat_interval": 0.3}
WARNED = 1.5 + BRIEF["call_timeout"]  # seconds; its thread may be in a call when it is time to look


@pytest.mark.parametrize("seconds", [1.3, 3.4], ids=["shorter than the lease", "longer than the lease"])
async def test_row_28_a_handler_blocks_the_loop(
    conninfo: str, worker: Start, figures: Figures, seconds: float
) -> None:
    """Another group stands by and looks for dead ones. The beats go on, and the log says who blocks."""
    rival = Journal()
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, f"block_loop {seconds}", max_attempts=1)
        process = worker(conninfo, options=BRIEF)
        began = await trio.to_thread.run_sync(lambda: process.wait_for("began"))
        async with triojobs.open_worker_group(conninfo, [rival.worker()], **BRIEF) as group:
            warned = await trio.to_thread.run_sync(lambda: process.wait_for("log", name="loop_blocked"))
            figures.note("warned", warned["at"] - began["at"], at_most=WARNED)
            assert "in do\n    time.sleep(seconds)" in warned["text"]  # the line, while it blocks
            with trio.fail_after(30):
                assert await client.result(job_id) == "block_loop"
            assert group.statistics().rescued == 0
    process.send(signal.SIGINT)
    await trio.to_thread.run_sync(process.wait)
    (report,) = process.all("report")
    assert (report["registrations"], report["stale"], report["settled"]["done"]) == (1, 0, 1)
    assert rival.began == []
    assert outcomes(conninfo) == [(1, "done")]


async def test_row_30b_healthy_handlers_beside_one_that_blocks_the_loop_longer_than_the_lease(
    conninfo: str, worker: Start
) -> None:
    async with triojobs.open_client(conninfo) as client:
        ids = await client.enqueue_many(plain, ["wait", "sleep 0.2", "sleep 3"])
        process = worker(conninfo, options=BRIEF)
        await trio.to_thread.run_sync(lambda: process.wait_for("began", count=3))
        blocks = await client.enqueue(plain, "block_loop 2.6")
        with trio.fail_after(30):
            assert await client.result(blocks) == "block_loop"
            assert [await client.result(job_id) for job_id in ids[1:]] == ["sleep", "sleep"]
    assert process.all("cancelled") == []
    assert process.all("log", name="lease_lost") == []
    process.send(signal.SIGINT)
    await trio.to_thread.run_sync(process.wait)
    (report,) = process.all("report")
    assert (report["registrations"], report["stale"]) == (1, 0)
    assert outcomes(conninfo) == [(1, "done")] * 3
    assert waiting(conninfo) == {ids[0]: 0}


async def test_row_31_a_group_is_retired_while_it_is_alive(
    conninfo: str, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody whose clock or patience is wrong: its handlers are cancelled, and it is back soon."""
    journal = Journal()
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **SHORT) as group:
        first = group.group_id
        job_id = await group.client.enqueue(plain, "wait", max_attempts=2)
        await journal.wait_for_beginnings(1)
        with psycopg.connect(conninfo) as conn:
            conn.execute("UPDATE triojobs.worker_groups SET lease_until = now() - interval '1 hour'")
            assert groups.rescue(conn, "triojobs").jobs == 1
        retired = trio.current_time()
        await wait_until(lambda: journal.cancelled)
        figures.note("handler cancelled", trio.current_time() - retired,
                     at_most=2 * SHORT["beat_interval"] + SHORT["call_timeout"])  # fmt: skip
        await journal.wait_for_beginnings(2)
        figures.note("claimed again", trio.current_time() - retired,
                     at_most=2 * SHORT["beat_interval"] + SHORT["call_timeout"])  # fmt: skip
        journal.go_on.set()
        with trio.fail_after(30):
            assert await group.client.result(job_id) == 2
        assert group.group_id != first
        assert group.statistics().registrations == 2
        assert group.statistics().stale == 1
    assert journal.cancelled == [(job_id, 1)]
    assert journal.overlaps == []
    assert outcomes(conninfo) == [(1, "failed"), (2, "done")]
    assert len(logged(caplog, "registered_again")) == 1
    assert running(conninfo) == 0
