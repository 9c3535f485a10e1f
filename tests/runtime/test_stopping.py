"""A graceful stop: what its time limits count from."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

import triojobs
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
