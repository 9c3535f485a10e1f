"""Claimed jobs start as soon as their claim has returned, whatever the fetcher does next.

It wakes their slots when the next claim is on its way. Each test makes what comes next slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

import triojobs
from tests.tools.mutants import code, noticed
from triojobs._fetcher import Fetcher
from triojobs._group import GroupContext, with_workers
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._options import GroupOptions
from triojobs._queue import NewJob, new_row

T = TypeVar("T")
NAPS: triojobs.Queue[float, None] = triojobs.Queue("naps", float)  # a payload is how long it takes


class Slow:
    """A way to the database on which some operations take a second."""

    def __init__(self, *operations: str) -> None:
        self._operations = operations

    async def __call__(self, operation: str, fn: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        result = fn()
        if operation in self._operations:
            with trio.CancelScope(shield=True):
                await trio.sleep(1.0)
        return result


async def starts_of(naps: list[float], slow: Slow, *, enqueued_after: float = 0.0) -> list[float]:
    """Run these jobs in two slots; return when each began, from their enqueueing."""
    database = MemoryDatabase()
    rows = [new_row(NAPS, NewJob(nap)) for nap in naps]
    if not enqueued_after:
        await MemoryStore(database).enqueue(rows)
    starts: list[float] = []
    enqueued_at = trio.current_time() + enqueued_after
    all_begun = trio.Event()

    async def nap(job: triojobs.Job[float]) -> None:
        starts.append(trio.current_time())
        if len(starts) == len(naps):
            all_begun.set()
        await trio.sleep(job.payload)

    workers: list[triojobs.Worker[Any, Any]] = [triojobs.Worker(NAPS, nap, concurrency=2)]
    chosen = with_workers(GroupOptions(name="test"), workers)
    async with GroupContext(lambda: MemoryStore(database, crossing=slow), workers, chosen):
        if enqueued_after:
            await trio.sleep(enqueued_after)
            await MemoryStore(database).enqueue(rows)
        await all_begun.wait()
    return [round(at - enqueued_at, 3) for at in starts]


async def test_a_job_does_not_wait_for_the_reply_to_the_next_claim(autojump_clock: Any) -> None:
    # A slot is free at 1.5 and the claim for it returns at 2.5; by then the other slot is free, too, and
    # its claim returns at 3.5.
    assert await starts_of([0.5, 1.0, 9.0, 9.0], Slow("claim")) == [1.0, 1.0, 2.5, 3.5]


async def test_jobs_do_not_wait_until_their_group_has_said_that_it_waits_no_more(autojump_clock: Any) -> None:
    assert await starts_of([9.0, 9.0], Slow("mark_waiting"), enqueued_after=3.0) == [0.0, 0.0]


MUTANTS = {
    "slots wake when the next claim has returned": (
        code(Fetcher, "_claim", (", under_way=self._wake_slots", "")),
        test_a_job_does_not_wait_for_the_reply_to_the_next_claim,
    ),
    "slots wake when the group has said that it waits no more": (
        code(Fetcher, "_draw_conclusions", ("if short or self._marked:", "if False:")),
        test_jobs_do_not_wait_until_their_group_has_said_that_it_waits_no_more,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mutant_is_noticed(mutant: str, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, test = MUTANTS[mutant]
    patch(monkeypatch)
    await noticed(test, autojump_clock=autojump_clock)
