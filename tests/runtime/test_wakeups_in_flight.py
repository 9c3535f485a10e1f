"""A wake-up that arrives while a claim is in flight is not lost: its job starts at once, not with the poll."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import pytest
import trio
import trio.testing

import triojobs
from triojobs._demand import Demand
from triojobs._group import GroupContext, with_workers
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._options import GroupOptions
from triojobs._queue import NewJob, new_row

T = TypeVar("T")
NUMBERS: triojobs.Queue[int, None] = triojobs.Queue("numbers", int)


class SlowReply:
    """Holds the reply of the claim that follows the mark until somebody else has enqueued and notified."""

    def __init__(self, database: MemoryDatabase, delay: float) -> None:
        self._database = database
        self._producer = MemoryStore(database)
        self._delay = delay
        self._held = False
        self.enqueued_at = 0.0

    async def __call__(self, operation: str, fn: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        result = outcome.capture(fn)
        if operation == "claim" and self._database.tables.waiting and not self._held:
            self._held = True
            with trio.CancelScope(shield=True):
                await self._producer.enqueue([new_row(NUMBERS, NewJob(1, delay=self._delay))])
                self.enqueued_at = trio.current_time()
                await trio.testing.wait_all_tasks_blocked()  # the notification is delivered
        return result.unwrap()


@pytest.mark.parametrize("delay", [0.0, 0.5])
async def test_a_job_that_comes_while_a_claim_is_in_flight_starts_when_it_is_due(
    delay: float, autojump_clock: trio.testing.MockClock
) -> None:
    database = MemoryDatabase()
    slow = SlowReply(database, delay)
    started: list[float] = []
    done = trio.Event()

    async def handle(job: triojobs.Job[int]) -> None:
        started.append(trio.current_time())
        done.set()

    workers: list[triojobs.Worker[Any, Any]] = [triojobs.Worker(NUMBERS, handle, concurrency=2)]
    options = with_workers(GroupOptions(name="test"), workers)
    async with GroupContext(lambda: MemoryStore(database, crossing=slow), workers, options):
        await done.wait()
    assert started[0] - slow.enqueued_at == pytest.approx(delay, abs=0.01)


def test_hunger_outlives_a_short_claim_that_was_sent_before_the_wake_up() -> None:
    demand = Demand({"a": 2, "b": 2}, linger=0.0, cap=None)
    free = {"a": 2, "b": 2}
    assert demand.next_claim(free, 0.0)[0] == free
    demand.woken(["a"])
    demand.satisfied("a")
    demand.satisfied("b")
    assert demand.next_claim(free, 1.0)[0] == {"a": 2}
    demand.satisfied("a")
    assert demand.next_claim(free, 2.0)[0] == {}
