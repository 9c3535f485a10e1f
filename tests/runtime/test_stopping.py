"""A graceful stop: what its time limits count from."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from tests.tools.gates import Gate
from triojobs._group import GroupContext, with_workers
from triojobs._memory import MemoryStore
from triojobs._options import GroupOptions
from triojobs._queue import NewJob, new_row

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


class SlowClaims(MemoryStore):
    """After the first claim each one takes four seconds, whoever is cancelled."""

    claims = 0

    async def claim(self, *args: Any, **options: Any) -> Any:
        self.claims += 1
        if self.claims > 1:
            with trio.CancelScope(shield=True):
                await trio.sleep(4.0)
        return await super().claim(*args, **options)


async def test_the_grace_period_counts_from_the_stop_and_not_from_the_end_of_a_claim(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Otherwise a call that hangs would be waited for twice: here, and in a handler that commits."""
    cancelled_at: list[float] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled_at.append(trio.current_time())

    store = SlowClaims()
    await store.enqueue([new_row(plain, NewJob("first"))])
    workers = [triojobs.Worker(plain, handler, concurrency=2)]
    options = with_workers(GroupOptions(name="test", grace_period=1.0), workers)
    async with GroupContext(lambda: store, workers, options) as group:
        while store.claims < 2 or not group.statistics().running:
            await trio.sleep(0.1)
        stopped_at = trio.current_time()
        group.stop()
    assert [round(at - stopped_at, 3) for at in cancelled_at] == [1.0]
    assert trio.current_time() - stopped_at < 4.1  # the claim was waited for
    assert group.report.released == 1


class GatedClaims(MemoryStore):
    """The reply of each claim waits at a gate, whoever is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    async def claim(self, *args: Any, **options: Any) -> Any:
        reply = await super().claim(*args, **options)
        with trio.CancelScope(shield=True):
            await self.gate.pass_through()
        return reply


@pytest.mark.parametrize("isolation", ["slot", "task"])
@pytest.mark.parametrize("when", ["at once", "claim in flight", "handed out"])
async def test_no_handler_starts_after_a_stop(isolation: Any, when: str) -> None:
    began: list[int] = []
    go_on = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        began.append(job.id)
        await go_on.wait()

    for _ in range(20):  # in whatever order Trio runs the tasks
        began.clear()
        go_on = trio.Event()
        store = GatedClaims()
        await store.enqueue([new_row(plain, NewJob(n)) for n in range(50)])
        workers = [triojobs.Worker(plain, handler, concurrency=100)]
        options = with_workers(GroupOptions(name="test", isolation=isolation), workers)
        async with GroupContext(lambda store=store: store, workers, options) as group:  # type: ignore[misc]
            if when != "at once":
                await store.gate.reached()
            if when == "handed out":
                store.gate.open()
                while not began:
                    await trio.lowlevel.checkpoint()
            group.stop()
            before = list(began)
            store.gate.open()
            go_on.set()
        assert began == before
        assert group.report.settled["done"] == len(before)
        assert group.report.released == (0 if when == "at once" else 50 - len(before))
