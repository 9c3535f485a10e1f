"""When a group claims: at once, within the linger, within the rescan interval, and never beyond its cap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
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
