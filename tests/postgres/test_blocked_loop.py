"""A handler blocks the event loop: it is named, counted, survived, and in the end given up."""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.looking import rows

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
PATIENCE = 30.0
SHORT_LEASE: dict[str, Any] = {
    "lease_duration": 2.0,
    "lease_margin": 0.5,
    "beat_interval": 0.3,
    "poll_interval": 0.2,
}


class Heard(logging.Handler):
    """Keeps the records of one event, and lets a thread wait for them."""

    def __init__(self, event: str) -> None:
        super().__init__()
        self._event = event
        self._changed = threading.Condition()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) == self._event:
            with self._changed:
                self.records.append(record)
                self._changed.notify_all()

    def block_until_they_came(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.records) >= count, PATIENCE)

    def __enter__(self) -> Heard:
        logging.getLogger("triojobs").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("triojobs").removeHandler(self)


async def test_the_line_that_blocks_the_loop_is_named_while_it_blocks(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> float:
        began = time.monotonic()
        lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
        heard.block_until_they_came(1)
        return time.monotonic() - began

    lines: list[int] = []
    with Heard("loop_blocked") as heard:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
            job_id = await group.client.enqueue(plain, None)
            took = await group.client.result(job_id)
            # A second; what a busy machine adds is not under test.
            assert 0.5 <= took < 10.0
            statistics = group.statistics()
    [record] = heard.records
    assert statistics.loop_blocked == 1
    assert statistics.registrations == 1
    assert record.levelno == logging.WARNING
    assert record.seconds >= 0.75
    assert record.group_id == str(group.group_id)
    # The innermost frame stands in the library whose call blocks; the handler's line is in the stack.
    assert "threading.py" in record.place
    assert f'{__file__}", line {lines[0]}, in handler' in record.getMessage()


async def test_a_loop_without_jobs_gives_no_sign_of_life_and_nobody_looks(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += "show_signs_of_life" in task.name

    async def handler(job: triojobs.Job[Any]) -> None: ...

    steps, looks = Steps(), []
    next_look = triojobs._beacon.Beacon.next_look  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "triojobs._beacon.Beacon.next_look",
        lambda beacon, now: looks.append(at := next_look(beacon, now)) or at,
    )
    trio.lowlevel.add_instrument(steps)
    try:
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(plain, handler)], beat_interval=0.05
        ) as group:
            await group.client.result(await group.client.enqueue(plain, None))
            with trio.fail_after(PATIENCE):
                while group._registrations[0].beacon.lit:
                    await trio.sleep(0.05)
            assert steps.count > 0
            steps.count = 0
            looks.clear()
            with trio.fail_after(PATIENCE):
                while len(looks) < 10:  # after each of ten beats it asked whether to look, and was told no
                    await trio.sleep(0.05)
            assert steps.count == 0
            assert set(looks) == {math.inf}
    finally:
        trio.lowlevel.remove_instrument(steps)


@contextmanager
def rival(conninfo: str, handler: Any) -> Iterator[Callable[[], None]]:
    """Yield a function that opens another group, in a thread and event loop of its own; end it at the end."""
    stopped = threading.Event()
    threads: list[threading.Thread] = []

    async def main() -> None:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], **SHORT_LEASE):
            await trio.to_thread.run_sync(stopped.wait, PATIENCE)

    def start() -> None:
        threads.append(threading.Thread(target=trio.run, args=[main], name="rival"))
        threads[0].start()

    try:
        yield start
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


async def test_a_loop_that_does_not_come_back_loses_its_jobs_to_others(conninfo: str) -> None:
    """Actor one blocks its loop inside a handler; actor two runs the job; then the loop comes back."""
    rescued = threading.Event()
    runs: list[tuple[str, int]] = []
    stops: list[tuple[triojobs.HardStop, str]] = []

    def hard_stop(why: triojobs.HardStop) -> None:
        stops.append((why, threading.current_thread().name))
        raise SystemExit(70)  # must end neither the thread nor the group

    async def blocking(job: triojobs.Job[Any]) -> str:
        runs.append(("blocking", job.attempt))
        open_rival()
        assert rescued.wait(PATIENCE)
        return "blocking"

    async def rescuing(job: triojobs.Job[Any]) -> str:
        runs.append(("rescuing", job.attempt))
        rescued.set()
        return "rescuing"

    with Heard("loop_dead") as heard, rival(conninfo, rescuing) as open_rival:
        async with triojobs.open_worker_group(
            conninfo,
            [triojobs.Worker(plain, blocking)],
            loop_dead_after=2.0,
            hard_stop=hard_stop,
            **SHORT_LEASE,
        ) as group:
            job_id = await group.client.enqueue(plain, None)
            with trio.fail_after(PATIENCE):
                assert await group.client.result(job_id) == "rescuing"
                while group.statistics().registrations == 1:
                    await trio.sleep(0.02)
            assert group.statistics().stale == 1
    [record] = heard.records
    assert (record.levelno, record.group_id) == (logging.ERROR, str(group.report.group_ids[0]))
    assert record.seconds >= 2.0
    [(why, thread)] = stops
    assert (why.reason, why.group_id, why.job_ids) == ("loop", group.report.group_ids[0], (job_id,))
    assert "in blocking" in why.stack
    assert thread != threading.current_thread().name
    assert runs == [("blocking", 1), ("rescuing", 2)]
    assert rows(conninfo, "SELECT attempt, status FROM triojobs.outcomes ORDER BY no") == [
        (1, "failed"),
        (2, "done"),
    ]


async def test_without_a_limit_a_blocked_loop_keeps_its_jobs(conninfo: str) -> None:
    """It is blocked for longer than the lease and than the least limit; another group stands by."""

    async def blocking(job: triojobs.Job[Any]) -> int:
        open_rival()
        heard.block_until_they_came(3)  # after 0.75, 1.5 and 3 s
        return job.attempt

    async def rescuing(job: triojobs.Job[Any]) -> int:
        return -1

    with Heard("loop_blocked") as heard, rival(conninfo, rescuing) as open_rival:
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(plain, blocking)], loop_dead_after=math.inf, **SHORT_LEASE
        ) as group:
            job_id = await group.client.enqueue(plain, None)
            with trio.fail_after(PATIENCE):
                assert await group.client.result(job_id) == 1
            assert (group.statistics().registrations, group.statistics().loop_blocked) == (1, 1)
    assert heard.records[2].seconds >= 3.0
