"""Handlers that do not end although they were cancelled: waited for, told of, and the hard stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from triojobs._group import GroupContext, WorkerGroup, with_workers
from triojobs._memory import MemoryStore
from triojobs._options import GroupOptions

NUMBERS: triojobs.Queue[int, Any] = triojobs.Queue("numbers", int)
CANCELLED_AT = 5.0  # seconds after the handler's start


class Stubborn:
    """A handler that ends when it is told to, whoever cancels it."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.release = trio.Event()
        self.runs = 0

    async def __call__(self, job: triojobs.Job[int]) -> int:
        self.runs += 1
        self.started.set()
        with trio.CancelScope(shield=True):
            await self.release.wait()
        return self.runs


def open_group(
    store: MemoryStore,
    handler: Callable[[triojobs.Job[int]], Any],
    *,
    timeout: float | None = None,
    **options: Any,
) -> GroupContext:
    workers: list[triojobs.Worker[Any, Any]] = [
        triojobs.Worker(NUMBERS, handler, concurrency=1, timeout=timeout)
    ]
    return GroupContext(lambda: store, workers, with_workers(GroupOptions(name="test", **options), workers))


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[Any]:
    return [record for record in caplog.records if getattr(record, "event", "") == event]


async def test_its_stack_is_logged_each_ten_seconds_and_its_lease_is_kept(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store, handler = MemoryStore(), Stubborn()
    async with open_group(store, handler) as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        await group.client.cancel(job_id, reason="enough")
        await trio.sleep(35.5)
        assert (store.rows_running(group.group_id), group.statistics().running) == ([job_id], 1)
        handler.release.set()
        assert await group.client.result(job_id, NUMBERS) == 1  # it returned: that counts
    records = told(caplog, "handler_does_not_end")
    assert [(r.job_id, round(r.seconds)) for r in records] == [(job_id, 10), (job_id, 20), (job_id, 30)]
    assert all("await self.release.wait()" in record.getMessage() for record in records)


async def cancel_by_request(group: WorkerGroup, store: MemoryStore, job_id: int) -> None:
    await trio.sleep(CANCELLED_AT)
    await group.client.cancel(job_id, reason="enough")


async def cancel_by_timeout(group: WorkerGroup, store: MemoryStore, job_id: int) -> None:
    """The worker's timeout fires after CANCELLED_AT seconds."""


async def cancel_by_the_loss_of_the_lease(group: WorkerGroup, store: MemoryStore, job_id: int) -> None:
    await trio.sleep(CANCELLED_AT)
    store.retire(group.group_id)
    store.beat_now(group.group_id)


async def cancel_by_the_end_of_grace(group: WorkerGroup, store: MemoryStore, job_id: int) -> None:
    await trio.sleep(CANCELLED_AT - 1.0)
    group.stop()


@pytest.mark.parametrize(
    "cancel",
    [
        cancel_by_request,
        cancel_by_timeout,
        cancel_by_the_loss_of_the_lease,
        cancel_by_the_end_of_grace,
    ],
)
async def test_the_hard_stop_is_called_once_whatever_cancelled_the_handler(
    cancel: Callable[[WorkerGroup, MemoryStore, int], Any],
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, handler = MemoryStore(), Stubborn()
    stops: list[tuple[float, triojobs.HardStop]] = []
    async with open_group(
        store,
        handler,
        timeout=CANCELLED_AT if cancel is cancel_by_timeout else None,
        grace_period=1.0,
        hard_stop=lambda why: stops.append((trio.current_time() - started_at, why)),
        hard_stop_after=15.0,
    ) as group:
        group_id = group.group_id
        job_id = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        started_at = trio.current_time()
        await cancel(group, store, job_id)
        await trio.sleep(100.0)
        [(after, why)] = stops
        # A timeout wakes nobody: it is seen at the next look, each ten seconds while handlers run.
        latest = CANCELLED_AT + 15.0 + (10.0 if cancel is cancel_by_timeout else 0.1)
        assert CANCELLED_AT + 15.0 <= after <= latest
        assert (why.reason, why.job_ids, why.group_id, why.seconds) == ("handler", (job_id,), group_id, 15.0)
        assert "await self.release.wait()" in why.stack
        handler.release.set()
    assert [(r.levelno, r.job_ids) for r in told(caplog, "hard_stop")] == [(logging.CRITICAL, [job_id])]


async def test_a_handler_that_ends_in_time_brings_no_hard_stop(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, handler = MemoryStore(), Stubborn()
    stops: list[triojobs.HardStop] = []
    async with open_group(store, handler, hard_stop=stops.append, hard_stop_after=15.0) as group:
        job_id = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        await trio.sleep(100.0)  # nobody has cancelled it
        await group.client.cancel(job_id, reason="enough")
        await trio.sleep(14.0)
        handler.release.set()
        await trio.sleep(100.0)
    assert stops == []


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), SystemExit(70)])
async def test_a_hard_stop_that_raises_does_not_hurt_the_group(
    error: BaseException, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store, handler = MemoryStore(), Stubborn()

    def hard_stop(why: triojobs.HardStop) -> None:
        raise error

    async with open_group(store, handler, hard_stop=hard_stop, hard_stop_after=1.0) as group:
        first = await group.client.enqueue(NUMBERS, 1)
        await handler.started.wait()
        await group.client.cancel(first, reason="enough")
        await trio.sleep(30.0)
        handler.release.set()
        second = await group.client.enqueue(NUMBERS, 2)
        assert await group.client.result(second, NUMBERS) == 2
    [failed] = told(caplog, "hard_stop_failed")
    assert failed.exc_info[1] is error
    assert group.report.settled["done"] == 2


async def test_handlers_that_are_late_together_are_told_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, handler = MemoryStore(), Stubborn()
    stops: list[triojobs.HardStop] = []
    workers: list[triojobs.Worker[Any, Any]] = [triojobs.Worker(NUMBERS, handler, concurrency=3)]
    options = GroupOptions(name="test", grace_period=0.0, hard_stop=stops.append, hard_stop_after=2.0)
    async with GroupContext(lambda: store, workers, with_workers(options, workers)) as group:
        ids = await group.client.enqueue_many(NUMBERS, [1, 2, 3])
        while handler.runs < 3:
            await trio.sleep(0.1)
        group.stop()
        await trio.sleep(10.0)
        handler.release.set()
    [why] = stops
    assert sorted(why.job_ids) == ids
