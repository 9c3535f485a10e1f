"""The database crashes before any step of any task and loses its last transactions: what must hold all the same.

No handler of a job begins while another one of this process still has it, none goes on for long after its
claim was lost, every job is done in the end,
the rows are as only correct transitions leave them, and the group lives under at most two registrations.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import pytest
import trio
import trio.testing

import triojobs
from triojobs._group import GroupContext, with_workers
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._memory_tables import Snapshot
from triojobs._model import JobStatus
from triojobs._options import GroupOptions
from triojobs._queue import NewJob, new_row

T = TypeVar("T")
NUMBERS: triojobs.Queue[int, Any] = triojobs.Queue("numbers", int)
JOBS = 6
LATENCY = 8  # most steps that a call takes before and after its effect, drawn anew for each call
NOTICED_WITHIN = 1.0  # seconds: the listener connects again within a fifth, and a beat asks
STRIDE = 5  # every fifth step, each seed beginning at another one; 800 runs in ten seconds of one core


class Crash(trio.abc.Instrument):
    """Crashes the database before step `at` (None: never), back to what it was `depth` steps earlier."""

    def __init__(self, database: MemoryDatabase, at: int | None, depth: int) -> None:
        self.steps = 0
        self.over = at is None
        self.crashed_at = math.inf
        self._database = database
        self._at = at
        self._past: deque[Snapshot] = deque(maxlen=depth)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.over:
            return
        self._past.append(self._database.snapshot())
        if self.steps == self._at:
            self._database.crash(self._past[0])
            self.over = True
            self.crashed_at = trio.current_time()


class Handler:
    """Takes longer than any comparison, commits, or ends at once; notes who runs, and who should not have."""

    def __init__(self, database: MemoryDatabase, crash: Crash) -> None:
        self.running: set[int] = set()
        self.overlaps: list[int] = []
        self.strayed: list[int] = []
        self._tables = database.tables
        self._crash = crash

    async def __call__(self, job: triojobs.Job[int]) -> int:
        if job.id in self.running:
            self.overlaps.append(job.id)
        self.running.add(job.id)
        try:
            if job.payload % 3 == 0:
                await trio.sleep(30.0)
                group_id, claim_no = job.fence
                lost = self._tables.fenced(group_id, job.id, claim_no) is None
                if lost and trio.current_time() > self._crash.crashed_at + NOTICED_WITHIN:
                    self.strayed.append(job.id)  # it should have been cancelled
            elif job.payload % 3 == 1:
                return await job.commit(lambda transaction: job.payload)
        finally:
            self.running.discard(job.id)
        return job.payload


class SlowStore(MemoryStore):
    """A MemoryStore whose calls take their time, as threads do."""

    def __init__(self, database: MemoryDatabase, seed: int) -> None:
        super().__init__(database, crossing=self._cross)
        self._own = random.Random(seed)

    async def _cross(self, operation: str, fn: Callable[[], T], /) -> T:
        before, after = self._own.randrange(LATENCY + 1), self._own.randrange(LATENCY + 1)
        await trio.lowlevel.checkpoint()
        for _ in range(before):
            await trio.lowlevel.cancel_shielded_checkpoint()
        result = outcome.capture(fn)
        for _ in range(after):
            await trio.lowlevel.cancel_shielded_checkpoint()
        return result.unwrap()


def run(at: int | None, depth: int, seed: int) -> int:
    """Run all jobs with one crash; return how many steps it took."""

    async def main() -> int:
        database = MemoryDatabase()
        crash = Crash(database, at, depth)
        handler = Handler(database, crash)
        store = MemoryStore(database)
        ids = [job.id for job in await store.enqueue([new_row(NUMBERS, NewJob(n)) for n in range(JOBS)])]
        workers: list[triojobs.Worker[Any, Any]] = [triojobs.Worker(NUMBERS, handler, concurrency=2)]
        trio.lowlevel.add_instrument(crash)
        options = with_workers(GroupOptions(name="test"), workers)
        async with GroupContext(lambda: SlowStore(database, seed), workers, options) as group:
            with trio.fail_after(600.0):
                while not crash.over or [database.status_of(i) for i in ids] != [JobStatus.DONE] * JOBS:
                    await trio.sleep(0.5)
            assert group.statistics().registrations <= 2
            assert group.statistics().unsettled == 0
        trio.lowlevel.remove_instrument(crash)
        assert (handler.overlaps, handler.strayed) == ([], [])
        assert [database.status_of(i) for i in ids] == [JobStatus.DONE] * JOBS
        assert database.tables.leases == {}
        database.check_invariants()
        return crash.steps

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("depth", [1, 10, 60, 10_000])
def test_a_crash_at_any_step_is_survived(depth: int, seed: int) -> None:
    steps = run(None, depth, seed)
    assert steps > 200
    for at in range(1 + seed, steps, STRIDE):
        try:
            run(at, depth, seed)
        except BaseException as exc:
            exc.add_note(f"crashed before step {at} of {steps}, back by {depth}, seed {seed}")
            raise
