"""What a group claims, and when: slots, caps, priorities, wake-ups, idleness."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any

import psycopg
import pytest
import trio

import triojobs

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
other: triojobs.Queue[Any, Any] = triojobs.Queue("other")
NEVER_POLLS: dict[str, Any] = {"listening_poll_interval": 3600.0}


class Door:
    """A handler that reports who came in and lets out on demand."""

    def __init__(self) -> None:
        self.inside: list[Any] = []
        self.most = 0
        self.seen: list[Any] = []
        self._open = trio.Event()
        self._changed = trio.Condition()

    async def handler(self, job: triojobs.Job[Any]) -> Any:
        self.inside.append(job.payload)
        self.seen.append(job.payload)
        self.most = max(self.most, len(self.inside))
        async with self._changed:
            self._changed.notify_all()
        await self._open.wait()
        self.inside.remove(job.payload)
        return job.payload

    async def wait_for(self, n: int) -> None:
        with trio.fail_after(10):
            async with self._changed:
                while len(self.inside) < n:
                    await self._changed.wait()

    def open(self) -> None:
        self._open.set()


def leases(conninfo: str) -> int:
    with psycopg.connect(conninfo) as conn:
        return conn.execute("SELECT count(*) FROM triojobs.leases").fetchone()[0]


async def test_nothing_is_claimed_beyond_free_slots(conninfo: str) -> None:
    door = Door()
    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, door.handler, concurrency=3)]
    ) as group:
        await group.client.enqueue_many(plain, range(10))
        await door.wait_for(3)
        await trio.testing.wait_all_tasks_blocked()
        assert leases(conninfo) == 3
        assert (group.statistics().running, group.statistics().free) == (3, 0)
        door.open()
        with trio.fail_after(10):
            await group.wait_idle()
    assert door.most == 3
    assert group.report.settled["done"] == 10


async def test_a_free_slot_beside_long_jobs_is_filled_at_once(conninfo: str) -> None:
    long = trio.Event()
    quick = []

    async def handler(job: triojobs.Job[Any]) -> None:
        if job.payload == "long":
            await long.wait()
        else:
            quick.append(job.payload)

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler, concurrency=4)], **NEVER_POLLS
    ) as group:
        await group.client.enqueue_many(plain, ["long"] * 3 + list(range(50)))
        with trio.fail_after(10):
            while len(quick) < 50:
                await trio.sleep(0.005)
        assert group.statistics().running == 3
        long.set()


async def test_the_groups_cap_is_shared_between_its_workers(conninfo: str) -> None:
    doors = Door(), Door()
    workers = [
        triojobs.Worker(plain, doors[0].handler, concurrency=10),
        triojobs.Worker(other, doors[1].handler, concurrency=10),
    ]
    async with triojobs.open_worker_group(conninfo, workers, concurrency=4) as group:
        await group.client.enqueue_many(plain, range(20))
        await group.client.enqueue_many(other, range(20))
        with trio.fail_after(10):
            while leases(conninfo) < 4:
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()
        assert leases(conninfo) == 4
        for door in doors:
            door.open()
        with trio.fail_after(20):
            await group.wait_idle()
    assert group.report.settled["done"] == 40


async def test_higher_priority_first_then_due_time_then_id(conninfo: str) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue_many(
            plain,
            [
                triojobs.NewJob("later"),
                triojobs.NewJob("older", run_at=past),
                triojobs.NewJob("urgent", priority=9),
                triojobs.NewJob("last"),
            ],
        )
    seen = []

    async def handler(job: triojobs.Job[Any]) -> None:
        seen.append(job.payload)

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler, concurrency=1)]
    ) as group:
        with trio.fail_after(10):
            await group.wait_idle()
    assert seen == ["urgent", "older", "later", "last"]


async def test_a_sleeping_group_is_woken_by_the_notification(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        return job.payload

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], **NEVER_POLLS
    ) as group:
        await _asleep(conninfo)
        for n in range(3):
            with trio.fail_after(5):
                assert await group.client.result(await group.client.enqueue(plain, n)) == n


async def test_a_delayed_job_is_started_by_its_timer(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        return job.run_at

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], **NEVER_POLLS
    ) as group:
        await _asleep(conninfo)
        job_id = await group.client.enqueue(plain, None, delay=0.3)
        with trio.fail_after(5):
            run_at = await group.client.result(job_id)
        info = await group.client.get(job_id)
    assert info.claimed_at >= run_at


async def test_a_retry_is_started_by_its_timer(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        if job.attempt == 1:
            raise ValueError
        return "second"

    retry = triojobs.Backoff(first=0.2, jitter=0.0)
    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler, retry=retry)], **NEVER_POLLS
    ) as group:
        await _asleep(conninfo)
        ids = [await group.client.enqueue(plain, n) for n in range(5)]
        with trio.fail_after(5):
            for job_id in ids:
                assert await group.client.result(job_id) == "second"


async def test_without_notifications_the_poll_finds_the_work(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        return job.payload

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], notify=False, poll_interval=0.1
    ) as group:
        with trio.fail_after(5):
            assert await group.client.result(await group.client.enqueue(plain, 1)) == 1


async def test_released_work_is_taken_over_by_another_group_at_once(conninfo: str) -> None:
    door = Door()

    async def handler(job: triojobs.Job[Any]) -> Any:
        return "taken over"

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, door.handler)], grace_period=0.0
    ) as first:
        job_id = await first.client.enqueue(plain, "x")
        await door.wait_for(1)
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(plain, handler)], **NEVER_POLLS
        ) as second:
            await _asleep(conninfo, groups=1)
            first.stop()
            with trio.fail_after(5):
                assert await second.client.result(job_id) == "taken over"
    assert first.report.released == 1


async def test_wait_idle_waits_for_running_and_due_work_but_not_for_later_work(conninfo: str) -> None:
    door = Door()
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, door.handler)]) as group:
        await group.client.enqueue(plain, "later", delay=3600.0)
        with trio.fail_after(5):
            await group.wait_idle()
        await group.client.enqueue(plain, "now")
        await door.wait_for(1)
        with trio.move_on_after(0.2) as scope:
            await group.wait_idle()
        assert scope.cancelled_caught
        door.open()
        with trio.fail_after(5):
            await group.wait_idle()


async def test_two_groups_share_a_queue_without_doubling_anything(conninfo: str) -> None:
    seen: Counter[int] = Counter()

    async def handler(job: triojobs.Job[Any]) -> None:
        seen[job.payload] += 1
        await trio.lowlevel.checkpoint()

    workers = [triojobs.Worker(plain, handler, concurrency=7)]
    async with (
        triojobs.open_worker_group(conninfo, workers, name="same") as one,
        triojobs.open_worker_group(conninfo, workers, name="same") as two,
    ):
        await one.client.enqueue_many(plain, range(500))
        with trio.fail_after(30):
            await one.wait_idle()
    assert set(seen.values()) == {1}
    assert len(seen) == 500
    assert one.report.settled["done"] + two.report.settled["done"] == 500


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_a_job_sees_what_it_was_enqueued_with(conninfo: str, isolation: Any) -> None:
    deadline = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    found: list[triojobs.Job[Any]] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        found.append(job)

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, handler)], isolation=isolation
    ) as group:
        job_id = await group.client.enqueue(
            plain,
            {"a": 1},
            priority=3,
            max_attempts=7,
            key="kéy",
            metadata={"trace": "t", "n": [1, None]},
            deadline=deadline,
        )
        with trio.fail_after(5):
            await group.client.result(job_id)
        info = await group.client.get(job_id)
    job = found[0]
    assert (job.id, job.queue, job.payload) == (job_id, "plain", {"a": 1})
    assert (job.priority, job.max_attempts, job.attempt) == (3, 7, 1)
    assert (job.key, job.metadata) == ("kéy", {"trace": "t", "n": [1, None]})
    assert (job.deadline, job.enqueued_at, job.run_at) == (deadline, info.enqueued_at, info.run_at)
    assert (job.last_error, job.cancel_reason) == (None, None)
    assert job.fence == (group.group_id, 1) or job.fence[0] == group.group_id


async def _asleep(conninfo: str, groups: int = 1) -> None:
    """Wait until groups have marked that they sleep, and their last claim is over."""
    with trio.fail_after(10), psycopg.connect(conninfo, autocommit=True) as conn:
        while conn.execute("SELECT count(*) < %s FROM triojobs.waiting", [groups]).fetchone()[0]:
            await trio.sleep(0.01)
    await trio.testing.wait_all_tasks_blocked()
