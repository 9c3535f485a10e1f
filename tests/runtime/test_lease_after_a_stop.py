"""A process that was stopped beyond its lease: its handlers come through no checkpoint that they enter
after it goes on.

A stop is a jump of the clock: nothing runs meanwhile, and afterwards everything that was due is due at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio._core import _run

from triojobs._heartbeat import watch_lease
from triojobs._lease import Lease
from triojobs._model import Registration
from triojobs._registration import LiveRegistration

HANDLERS = 8
LEASE_ENDS = 20.0
SEEDS = range(10)  # of Trio's scheduler, which shuffles each batch of tasks


class Clockwork:
    """All that the watcher asks of a store: the time."""

    def now(self) -> float:
        return trio.current_time()


class Handlers:
    """Handlers in one scope; `passed` counts the checkpoints that were entered after the stop."""

    def __init__(self, live: LiveRegistration) -> None:
        self.passed = 0
        self.woken = 0
        self._live = live

    async def run(self) -> None:
        with self._live.handler_scope:
            async with trio.open_nursery() as nursery:
                for _ in range(HANDLERS):
                    nursery.start_soon(self.handler)

    async def handler(self) -> None:
        await trio.sleep(LEASE_ENDS / 2)
        self.woken += 1
        while True:
            stopped_before = trio.current_time() > LEASE_ENDS
            await trio.lowlevel.checkpoint()
            self.passed += stopped_before


@contextmanager
def scheduler_seed(seed: int) -> Iterator[None]:
    state = _run._r.getstate()
    _run._r.seed(seed)
    try:
        yield
    finally:
        _run._r.setstate(state)


def live_registration() -> LiveRegistration:
    record = Registration(uuid.uuid4(), "test", "localhost", 1, "0", lease_duration=LEASE_ENDS + 5)
    lease = Lease(duration=LEASE_ENDS + 5, margin=5.0, interval=1.0)
    lease.confirm(0.0)
    return LiveRegistration(record, lease)


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_checkpoint_is_passed_after_a_stop_while_all_were_waiting(
    seed: int, mock_clock: trio.testing.MockClock
) -> None:
    live: Any = live_registration()
    handlers = Handlers(live)
    with scheduler_seed(seed):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_lease, live, Clockwork())
            nursery.start_soon(handlers.run)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(3 * LEASE_ENDS)
    assert live.lost.value
    assert handlers.passed == 0


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_checkpoint_is_passed_after_a_stop_in_the_middle_of_a_pass(
    seed: int, mock_clock: trio.testing.MockClock
) -> None:
    live: Any = live_registration()
    handlers = Handlers(live)

    async def stop_in_the_middle() -> None:
        await trio.sleep(LEASE_ENDS / 2)  # wakes in the same pass as the handlers
        mock_clock.jump(2 * LEASE_ENDS)

    with scheduler_seed(seed):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_lease, live, Clockwork())
            nursery.start_soon(handlers.run)
            nursery.start_soon(stop_in_the_middle)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(LEASE_ENDS / 2)
    assert handlers.woken == HANDLERS
    assert handlers.passed == 0
