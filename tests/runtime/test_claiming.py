"""When a group claims: at once, within the linger, within the rescan interval, and never beyond its cap."""

from __future__ import annotations

import datetime as dt
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from triojobs import _positions, testing
from triojobs._group import GroupContext, with_workers
from triojobs._memory import MemoryStore
from triojobs._options import GroupOptions
from triojobs._queue import NewJob, new_row

NAPS: triojobs.Queue[float, None] = triojobs.Queue("naps", float)  # a payload is how long it takes
OTHER: triojobs.Queue[float, None] = triojobs.Queue("other", float)
FOR_EVER = 1e6


class Naps:
    """A handler that takes as long as its payload says; remembers starts and the most at once."""

    def __init__(self) -> None:
        self.starts: list[tuple[float, float]] = []
        self.running = 0
        self.most = 0
        self.done: Counter[str] = Counter()

    async def __call__(self, job: triojobs.Job[float]) -> None:
        self.starts.append((round(trio.current_time(), 4), job.payload))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(job.payload)
            self.done[job.queue] += 1
        finally:
            self.running -= 1

    def starts_of(self, payload: float) -> list[float]:
        return [at for at, found in self.starts if found == payload]


def open_group(
    store: MemoryStore, handler: Callable[[triojobs.Job[float]], Any], slots: dict[str, int], **options: Any
) -> GroupContext:
    queues = {"naps": NAPS, "other": OTHER}
    workers: list[triojobs.Worker[Any, Any]] = [
        triojobs.Worker(queues[name], handler, concurrency=n) for name, n in slots.items()
    ]
    chosen = GroupOptions(name="test", grace_period=0.0, **options)
    return GroupContext(lambda: store, workers, with_workers(chosen, workers))


def store_row(payload: float, *, queue: str = "naps", **options: Any) -> Any:
    return new_row({"naps": NAPS, "other": OTHER}[queue], NewJob(payload, **options))


async def store_jobs(store: MemoryStore, payloads: list[float], *, queue: str = "naps") -> None:
    await store.enqueue([store_row(payload, queue=queue) for payload in payloads])


async def test_one_free_slot_beside_long_jobs_is_filled_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, naps = MemoryStore(), Naps()
    await store_jobs(store, [FOR_EVER] * 3 + [1.0] + [5.0])
    async with open_group(store, naps, {"naps": 4}):
        await trio.sleep(10.0)
    [began], [followed] = naps.starts_of(1.0), naps.starts_of(5.0)
    assert 0.0 <= followed - (began + 1.0) <= 0.005


async def test_slots_that_become_free_within_the_linger_share_a_claim(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, naps = MemoryStore(), Naps()
    await store_jobs(store, [FOR_EVER] * 5 + [1.0, 1.03, 1.06] + [7.0] * 3)
    async with open_group(store, naps, {"naps": 8}, claim_linger=0.1) as group:
        await trio.sleep(5.0)
        assert group.statistics().claimed == 11
    [began] = naps.starts_of(1.0)
    # The first waits for nobody: the last claim is long ago. The next two wait for its linger to pass.
    assert [round(at - began, 3) for at in naps.starts_of(7.0)] == [1.0, 1.1, 1.1]


async def test_half_of_the_slots_do_not_wait_for_the_linger(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, naps = MemoryStore(), Naps()
    await store_jobs(store, [FOR_EVER] * 2 + [1.0] * 2 + [7.0] * 2)
    async with open_group(store, naps, {"naps": 4}, claim_linger=60.0):
        await trio.sleep(5.0)
    assert [round(at - naps.starts_of(1.0)[0], 3) for at in naps.starts_of(7.0)] == [1.0, 1.0]


@pytest.mark.parametrize("notify", [True, False])
async def test_a_busy_group_finds_what_became_due_within_the_rescan_interval(
    notify: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """There is always something claimable, so it never sleeps, and nobody notifies who does not sleep."""
    store, naps = MemoryStore(), Naps()
    await store_jobs(store, [0.1] * 200)
    [urgent] = await store.enqueue([store_row(0.2, delay=2.0, priority=9)])
    never = {"poll_interval": 3600.0, "listening_poll_interval": 3600.0}
    async with open_group(store, naps, {"naps": 1}, rescan_interval=0.5, notify=notify, **never):
        await trio.sleep(15.0)
        assert store.status_of(urgent.id) is triojobs.JobStatus.DONE
    [began] = naps.starts_of(0.2)
    assert 2.0 <= began <= 2.0 + 0.5 + 0.1 + 0.01  # due, an interval, the job that has the slot, a linger


async def test_the_cap_bounds_the_sum_of_all_workers_and_is_shared(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, naps = MemoryStore(), Naps()
    await store_jobs(store, [1.0] * 60)
    await store_jobs(store, [1.0] * 60, queue="other")
    async with open_group(store, naps, {"naps": 4, "other": 4}, concurrency=3):
        await trio.sleep(20.5)
        assert naps.most == 3
        assert sum(naps.done.values()) >= 3 * 19  # no slot of the cap idles
        assert abs(naps.done["naps"] - naps.done["other"]) <= 3  # one round


async def test_a_capped_group_gives_all_to_the_only_queue_with_work(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, naps = MemoryStore(), Naps()
    await store_jobs(store, [1.0] * 30)
    async with open_group(store, naps, {"naps": 8, "other": 8}, concurrency=3):
        await trio.sleep(10.5)
        assert naps.most == 3
        assert naps.done["naps"] >= 3 * 9


LONG_LINE = 400


@pytest.fixture
def positions_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_positions, "MANY", 1)


async def test_a_job_that_lands_behind_is_overlooked_for_the_rescan_interval_at_most(
    autojump_clock: Any, positions_are_worth_it: None
) -> None:
    database = testing.MemoryDatabase()
    store = MemoryStore(database)
    naps = Naps()
    async with open_group(store, naps, {"naps": 2}, rescan_interval=3.0) as group:
        await store.enqueue([store_row(0.1) for _ in range(LONG_LINE)])
        waits: list[float] = []
        for nth in range(1, 4):
            while len(naps.starts) < 90 * nth:
                await trio.sleep(0.05)
            landed = trio.current_time()
            early = database.utc_now() - dt.timedelta(hours=1)
            await store.enqueue([store_row(nth / 100, run_at=early)])
            while not naps.starts_of(nth / 100):
                await trio.sleep(0.05)
            waits.append(naps.starts_of(nth / 100)[0] - landed)
        assert len(naps.starts) < LONG_LINE  # the line was long enough
        group.stop()
    assert max(waits) <= 3.0 + 0.1


async def test_a_job_of_a_priority_between_two_others_needs_no_rescan(
    autojump_clock: Any, positions_are_worth_it: None
) -> None:
    store = MemoryStore(testing.MemoryDatabase())
    naps = Naps()
    async with open_group(store, naps, {"naps": 2}, rescan_interval=FOR_EVER) as group:
        await store.enqueue([store_row(0.1, priority=p) for p in (0, 9) for _ in range(LONG_LINE // 2)])
        while len(naps.starts) < LONG_LINE // 2 + 10:  # both bands have a position
            await trio.sleep(0.05)
        landed = trio.current_time()
        await store.enqueue([store_row(0.2, priority=5)])
        while not naps.starts_of(0.2):
            await trio.sleep(0.05)
        assert naps.starts_of(0.2)[0] - landed <= 0.2
        group.stop()


async def test_a_line_is_worked_off_from_positions_and_the_head_is_looked_at_in_intervals(
    autojump_clock: Any, positions_are_worth_it: None
) -> None:
    store = MemoryStore(testing.MemoryDatabase())
    orders: list[tuple[float, bool]] = []
    claim = store.claim

    async def noted(order: Any, book: Any, **options: Any) -> Any:
        orders.append((trio.current_time(), "naps" in order.starts))
        return await claim(order, book, **options)

    store.claim = noted  # type: ignore[method-assign]
    await store.enqueue([store_row(0.1) for _ in range(LONG_LINE)])
    naps = Naps()
    async with open_group(store, naps, {"naps": 4}, rescan_interval=2.0) as group:
        await group.wait_idle()
    assert naps.done.total() == LONG_LINE
    busy = [(at, on) for at, on in orders if at < LONG_LINE * 0.1 / 4 - 0.5]
    heads = [at for at, on in busy if not on]
    assert sum(on for _, on in busy) > 10 * len(heads) > 0
    assert all(1.9 < second - first < 2.3 for first, second in itertools.pairwise(heads[1:]))
