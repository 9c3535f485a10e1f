"""After the database may have lost commits: lost claims are given up, unknown rows go back, then work goes on."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import outcome
import pytest
import trio
import trio.testing

import triojobs
from triojobs._comparison import LOST
from triojobs._group import GroupContext, with_workers
from triojobs._handling import Slots
from triojobs._lease import Lease
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._memory_tables import Snapshot
from triojobs._model import Claim, Registration
from triojobs._options import GroupOptions
from triojobs._registration import LiveRegistration

T = TypeVar("T")
NUMBERS: triojobs.Queue[int, Any] = triojobs.Queue("numbers", int)


class Watched(MemoryStore):
    """A MemoryStore that notes what crosses.

    Attributes:
        seen: the operations, and for claims how many rows they got.
        unclaimed: all rows as they were before the first claim that got something.
    """

    def __init__(self, database: MemoryDatabase) -> None:
        super().__init__(database, crossing=self._watch)
        self.seen: list[str] = []
        self.unclaimed: Snapshot = {}

    async def _watch(self, operation: str, fn: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        before = self.database.snapshot()
        result = outcome.capture(fn)
        if operation == "claim":
            got = len(self.database.tables.leases) - len(before["leases"])
            operation = f"claim {got}"
            if got and not self.unclaimed:
                self.unclaimed = before
        self.seen.append(operation)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result.unwrap()


class Handler:
    """Notes each start and end; the first run of a job sleeps until it is cancelled."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, str | None]] = []
        self.runs: Counter[int] = Counter()
        self.started = trio.Event()

    async def __call__(self, job: triojobs.Job[int]) -> int:
        self.runs[job.id] += 1
        run = self.runs[job.id]
        self.log.append((f"start {run}", job.attempt, job.cancel_reason))
        if run == 1:
            self.started.set()
            try:
                await trio.sleep_forever()
            finally:
                self.log.append((f"end {run}", job.attempt, job.cancel_reason))
        return run


LOST_AND_RUN_AGAIN = [("start 1", 1, None), ("end 1", 1, LOST), ("start 2", 1, None)]


def open_group(
    database: MemoryDatabase, handler: Callable[[triojobs.Job[int]], Any], **options: Any
) -> tuple[GroupContext, Watched]:
    workers: list[triojobs.Worker[Any, Any]] = [triojobs.Worker(NUMBERS, handler, concurrency=1)]
    store = Watched(database)
    return GroupContext(
        lambda: store, workers, with_workers(GroupOptions(name="test", **options), workers)
    ), store


@pytest.mark.parametrize("notify", [True, False])
async def test_a_handler_whose_claim_was_lost_is_cancelled_and_its_job_runs_again(
    notify: bool, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no free slot, so no claim could bring the news: the listener or the next beat does."""
    database, handler = MemoryDatabase(), Handler()
    context, store = open_group(database, handler, notify=notify)
    async with context as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        crashed_at = trio.current_time()
        database.crash(store.unclaimed)
        assert await group.client.result(job_id, NUMBERS) == 2
        # A new connection of the listener needs a tenth of a second, a beat comes each six seconds.
        assert trio.current_time() - crashed_at < (0.5 if notify else 6.5)
        assert group.statistics().stale == 1
    assert handler.log == LOST_AND_RUN_AGAIN
    assert [row.status for row in database.outcomes_of(job_id)] == ["done"]
    [compared] = [r for r in caplog.records if getattr(r, "event", "") == "compared"]
    assert (compared.job_ids, compared.released, compared.levelno) == ([job_id], 0, logging.WARNING)
    database.check_invariants()


async def test_between_a_crash_and_the_comparison_nothing_is_claimed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The slot is free and work is due, so the group claims; the database refuses."""
    database, handler = MemoryDatabase(), Handler()
    context, store = open_group(database, handler, notify=False)
    async with context as group:
        await trio.sleep(0.5)
        database.crash(database.snapshot())
        store.seen.clear()
        await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
    claims = [each for each in store.seen if each.startswith(("claim", "compare"))]
    assert claims[:3] == ["claim 0", "compare", "claim 1"]


async def test_rows_that_came_back_are_given_back(autojump_clock: trio.testing.MockClock) -> None:
    """The crash loses a settlement: the row is leased again, and no ledger knows it."""
    database = MemoryDatabase()
    runs: list[int] = []

    async def handler(job: triojobs.Job[int]) -> int:
        runs.append(job.attempt)
        if len(runs) == 1:
            leased.append(database.snapshot())
        return len(runs)

    leased: list[Any] = []
    context, _ = open_group(database, handler)
    async with context as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        assert await group.client.result(job_id, NUMBERS) == 1
        database.crash(leased[0])
        assert await group.client.result(job_id, NUMBERS) == 2
        assert (group.statistics().stale, group.statistics().registrations) == (0, 1)
    assert runs == [1, 1]
    assert group.report.released == 1
    database.check_invariants()


async def test_a_handler_whose_claim_survived_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    database, compared, started = MemoryDatabase(), trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[int]) -> str:
        started.set()
        await compared.wait()
        return "undisturbed"

    context, store = open_group(database, handler)
    async with context as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        await started.wait()
        database.crash(database.snapshot())
        while "compare" not in store.seen:
            await trio.sleep(0.1)
        compared.set()
        assert await group.client.result(job_id, NUMBERS) == "undisturbed"


async def test_while_a_group_stops_its_lost_handlers_are_cancelled_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    database, handler = MemoryDatabase(), Handler()
    context, store = open_group(database, handler, grace_period=3600.0)
    async with context as group:
        await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        group.stop()
        await trio.sleep(1.0)
        database.crash(store.unclaimed)
        stopped_at = trio.current_time()
        await group.wait_stopped()
        assert trio.current_time() - stopped_at < 10.0  # not the hour of grace
    assert handler.log == LOST_AND_RUN_AGAIN[:2]
    assert group.report.released == 0


async def test_a_group_whose_registration_was_lost_registers_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    database, handler = MemoryDatabase(), Handler()
    context, store = open_group(database, handler)
    async with context as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        store.unclaimed["groups"].clear()
        database.crash(store.unclaimed)
        assert await group.client.result(job_id, NUMBERS) == 2
        assert group.statistics().registrations == 2
    database.check_invariants()


async def test_a_sleeping_group_marks_itself_again(autojump_clock: trio.testing.MockClock) -> None:
    database, handler = MemoryDatabase(), Handler()
    context, _ = open_group(database, handler)
    async with context as group:
        await trio.sleep(1.0)
        mark = {("numbers", group.group_id)}
        assert database.tables.waiting == mark
        database.crash(database.snapshot())
        assert database.tables.waiting == set()
        await trio.sleep(1.0)
        assert database.tables.waiting == mark


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_comparison_that_fails_is_repeated(
    when: Literal["before", "after"], autojump_clock: trio.testing.MockClock
) -> None:
    database, handler = MemoryDatabase(), Handler()
    failures = 0

    def fault(operation: str, at: str) -> None:
        nonlocal failures
        if operation == "compare" and at == when and failures < 3:
            failures += 1
            raise triojobs.DatabaseError("away", transient=True, committed=None if when == "after" else False)

    context, store = open_group(database, handler)
    store._fault = fault
    async with context as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        database.crash(store.unclaimed)
        assert await group.client.result(job_id, NUMBERS) == 2
    assert failures == 3
    assert handler.log == LOST_AND_RUN_AGAIN


async def test_a_claim_that_was_lost_before_its_handler_began_is_not_started() -> None:
    calls: list[int] = []

    async def handler(job: triojobs.Job[int]) -> None:
        calls.append(job.payload)

    live = LiveRegistration(
        Registration(uuid.uuid4(), "g", "h", 1, "0", 30.0), Lease(duration=30.0, margin=5.0, interval=6.0)
    )
    slots = Slots(
        triojobs.Worker(NUMBERS, handler, concurrency=1),
        live,
        MemoryStore(),
        busy_ids=set(),
        on_free=lambda: None,
    )
    lost, kept = (
        Claim(
            n,
            1,
            live.group_id,
            "numbers",
            1,
            5,
            0,
            0.0,
            0.0,
            NUMBERS.encode_payload(n),
            b"cbor",
            None,
            None,
            0.0,
            *[None] * 3,
        )
        for n in (1, 2)
    )
    live.ledger.book([lost, kept])
    assert live.ledger.lose([(1, 1)]) == [(1, 1)]
    slots.hand_in([lost, kept], 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slots.slot)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert calls == [2]
    assert slots.free == 1
