"""Rows 26, 27, 29, 30, 35, 46: processes that die, stand still or leave, and what becomes of their jobs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.looking import rows, value

from .processes import WorkerProcess
from .rig import SHORT, Figures, Journal, exit_bound, plain, rescue_bound, running, wait_until, waiting

Start = Callable[..., WorkerProcess]
BRIEF: dict[str, Any] = SHORT | {"lease_duration": 1.5, "lease_margin": 0.5, "beat_interval": 0.3}


async def enqueue(conninfo: str, *payloads: str, **options: Any) -> list[int]:
    async with triojobs.open_client(conninfo) as client:
        return await client.enqueue_many(plain, [triojobs.NewJob(p, **options) for p in payloads])


def history(conninfo: str, job_id: int) -> list[tuple[Any, ...]]:
    """Return attempt and status of every outcome of a job."""
    return rows(
        conninfo, "SELECT attempt, status FROM triojobs.outcomes WHERE job_id = %s ORDER BY no", job_id
    )


def first_rescue(conninfo: str) -> float:
    """Return the server's time of the first rescued job; the server has the machine's clock."""
    found = value(
        conninfo,
        "SELECT extract(epoch FROM min(finished_at))::float8 FROM triojobs.outcomes WHERE error LIKE 'rescued%'",
    )
    assert isinstance(found, float)
    return found


async def began(process: WorkerProcess, *ids: int, attempt: int = 1) -> None:
    """Wait until the process has begun these jobs."""

    def wait() -> None:
        for job_id in ids:
            process.wait_for("began", job=job_id, attempt=attempt)

    await trio.to_thread.run_sync(wait)


async def ended(process: WorkerProcess, seconds: float = 30.0) -> int:
    """Wait until the process has ended; return its exit code."""
    return await trio.to_thread.run_sync(process.wait, seconds)


async def results(group: triojobs.WorkerGroup, ids: list[int]) -> list[Any]:
    """Wait for the results of jobs."""
    with trio.fail_after(30):
        return [await group.client.result(job_id) for job_id in ids]


async def test_row_26_a_worker_killed_by_sigkill(conninfo: str, worker: Start, figures: Figures) -> None:
    ids = await enqueue(conninfo, "wait", "wait", "wait")
    dying = worker(conninfo, options=BRIEF)
    await began(dying, *ids)
    journal = Journal()
    journal.go_on.set()
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **BRIEF) as group:
        killed_at = time.time()
        dying.send(signal.SIGKILL)
        assert await results(group, ids) == [2, 2, 2]
        assert group.statistics().rescued == 3
    figures.note("jobs back after", first_rescue(conninfo) - killed_at, at_most=rescue_bound(BRIEF))
    assert [history(conninfo, job_id) for job_id in ids] == [[(1, "failed"), (2, "done")]] * 3
    assert running(conninfo) == 0


async def test_row_27_a_job_that_kills_its_process_every_time(conninfo: str, worker: Start) -> None:
    """By os._exit first, by a segmentation fault then. A job in flight beside it pays an attempt each time."""
    (poison,) = await enqueue(conninfo, "die", max_attempts=2)
    (beside,) = await enqueue(conninfo, "wait", max_attempts=9)
    codes = []
    for attempt in (1, 2):
        process = worker(conninfo, options=BRIEF)  # a restart does not wait for the predecessor's lease
        await began(process, poison, beside, attempt=attempt)
        codes.append(await ended(process))
    assert codes == [9, -signal.SIGSEGV]
    journal = Journal()
    journal.go_on.set()
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **BRIEF) as group:
        assert await results(group, [beside]) == [3]
        reason = "rescued: the lease of worker group"
        with trio.fail_after(30), pytest.raises(triojobs.JobFailedError, match=reason) as caught:
            await group.client.result(poison)
        assert caught.value.attempts == 2
    assert journal.began == [(beside, 3)]
    assert history(conninfo, poison) == [(1, "failed"), (2, "killed")]
    assert history(conninfo, beside) == [(1, "failed"), (2, "failed"), (3, "done")]
    assert running(conninfo) == 0


async def test_row_29_c_code_holds_the_gil_longer_than_the_lease(
    conninfo: str, worker: Start, figures: Figures
) -> None:
    """Nothing of Python runs there meanwhile, no beat either: the job is run twice, and both know it."""
    (job_id,) = await enqueue(conninfo, "hold_gil 3")
    stuck = worker(conninfo, options=BRIEF)
    await began(stuck, job_id)
    rival: list[tuple[int, int]] = []
    go_on = trio.Event()

    async def hold(job: triojobs.Job[Any]) -> int:
        rival.append((job.id, job.attempt))
        await go_on.wait()
        return job.attempt

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, hold, concurrency=1)], **BRIEF
    ) as group:
        await wait_until(lambda: rival == [(job_id, 2)])
        assert stuck.all("cancelled") == []
        cancelled = await trio.to_thread.run_sync(lambda: stuck.wait_for("cancelled", job=job_id, attempt=1))
        begun = stuck.wait_for("began")
        figures.note("cancelled after the lock was free", cancelled["at"] - begun["at"] - 3.0, at_most=2.0)
        # It goes on under a new registration; what it wrote under the old one did not disturb the rival.
        (next_id,) = await enqueue(conninfo, "return")
        await trio.to_thread.run_sync(lambda: stuck.wait_for("log", name="registered_again"))
        await began(stuck, next_id)
        go_on.set()
        assert await results(group, [job_id]) == [2]
    assert rival == [(job_id, 2)]
    stuck.send(signal.SIGINT)
    await ended(stuck)
    (report,) = stuck.all("report")
    assert (report["registrations"], report["stale"]) == (2, 1)
    assert history(conninfo, job_id) == [(1, "failed"), (2, "done")]
    assert running(conninfo) == 0


async def test_row_30_a_process_stopped_longer_than_its_lease(
    conninfo: str, worker: Start, figures: Figures
) -> None:
    ids = await enqueue(conninfo, "wait", "wait", "sleep 1", "sleep 1.5", "checkpoints")
    stopped = worker(conninfo, options=SHORT)
    await began(stopped, *ids)
    (registered,) = stopped.all("open")
    rival = Journal()
    stopped.send(signal.SIGSTOP)
    try:
        async with triojobs.open_worker_group(conninfo, [rival.worker()], **SHORT) as group:
            await rival.wait_for_beginnings(len(ids))
            continued = stopped.send(signal.SIGCONT)
            passed = await trio.to_thread.run_sync(lambda: stopped.wait_for("passed"))
            assert passed["checkpoints"] == 0
            cancelled = await trio.to_thread.run_sync(
                lambda: [stopped.wait_for("cancelled", job=job_id) for job_id in ids[:2]]
            )
            figures.note("cancelled after waking", max(c["at"] for c in cancelled) - continued, at_most=2.0)
            # What it makes of its jobs arrives while the rival still works at two of them.
            await trio.to_thread.run_sync(lambda: stopped.wait_for("log", name="registered_again"))
            rival.go_on.set()
            assert await results(group, ids) == [2] * len(ids)
    finally:
        stopped.send(signal.SIGCONT)
    stopped.send(signal.SIGINT)
    await ended(stopped)
    (report,) = stopped.all("report")
    # Whatever they made of it, nothing of the first registration was written.
    assert (report["registrations"], report["stale"]) == (2, len(ids))
    assert sum(report["settled"].values()) == 0
    written = "SELECT DISTINCT status FROM triojobs.outcomes WHERE group_id = %s"
    assert rows(conninfo, written, registered["group"]) == [("failed",)]
    assert [history(conninfo, job_id) for job_id in ids] == [[(1, "failed"), (2, "done")]] * len(ids)
    assert running(conninfo) == 0


async def test_row_35_a_handler_raises_system_exit(conninfo: str, worker: Start, figures: Figures) -> None:
    (other,) = await enqueue(conninfo, "wait")
    process = worker(conninfo, options=BRIEF, serve=True)
    await began(process, other)
    sent = time.monotonic()
    (job_id,) = await enqueue(conninfo, "system_exit")
    assert await ended(process) == 3
    figures.note("exit", time.monotonic() - sent, at_most=exit_bound(BRIEF))
    assert history(conninfo, job_id) == [(1, "failed")]  # or it would be run again for ever
    assert waiting(conninfo) == {job_id: 1, other: 0}
    assert running(conninfo) == 0


async def test_row_46_two_processes_of_one_name(conninfo: str, worker: Start) -> None:
    options = BRIEF | {"name": "same"}
    (first_job,) = await enqueue(conninfo, "wait")
    first = worker(conninfo, options=options, concurrency=1)
    await began(first, first_job)
    (second_job,) = await enqueue(conninfo, "wait")
    second = worker(conninfo, options=options, concurrency=2)
    await began(second, second_job)
    assert rows(conninfo, "SELECT name FROM triojobs.worker_groups") == [("same",), ("same",)]
    first.send(signal.SIGKILL)
    await began(second, first_job, attempt=2)
    assert second.all("began", job=second_job) == [second.wait_for("began")]  # undisturbed
    assert second.all("cancelled") == []
    second.send(signal.SIGINT)
    await ended(second)
    assert history(conninfo, first_job) == [(1, "failed")]
    assert waiting(conninfo) == {first_job: 1, second_job: 0}
    assert running(conninfo) == 0
