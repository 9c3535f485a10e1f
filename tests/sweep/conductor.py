"""Schedule points and virtual threads.

A schedule point is the boundary before one step of a task or before a virtual thread goes on by itself.
An injection happens at point k.

A virtual thread is a blocking call without a thread: it takes time before and after its effect, and
nothing can cancel it meanwhile. Its time is counted in the points of everybody else, drawn anew for each
call (uniform latencies hide abandoned calls: a mutant survived 365 runs); when nobody else has anything
to do, the thread that is nearest goes on. Some calls take virtual seconds instead, so that deadlines
expire, handlers end and beats are due while they last.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import outcome
import trio

from .lockstep import run_lockstep

T = TypeVar("T")

LATENCY: Final = 20  # points before and after the effect of a call, at most
SLOW: Final = 0.1  # the share of the pauses that take virtual seconds
SLOW_SECONDS: Final = 0.1  # at most
TURN_LIMIT: Final = 20_000  # points and passes of the loop; an ordinary run has some hundreds


@dataclass(eq=False)
class Flight:
    """A virtual thread on its way."""

    task: trio.lowlevel.Task
    left: int


class Conductor(trio.abc.Instrument):
    """Counts schedule points, fires at some of them, and moves virtual threads.

    Args:
        shots: at which points `fire` is called. spin: called when there is no end of points and of the
        loop's passes; once more after as many again.
    """

    def __init__(
        self, own: random.Random, shots: list[int], fire: Callable[[], None], spin: Callable[[str], None]
    ) -> None:
        self.points = 0
        self.in_thread = False  # an effect is at work: code that is a thread's in production
        self._own = own
        self._shots = sorted(shots, reverse=True)
        self._fire = fire
        self._spin = spin
        self._runnable = 0
        self._turns = 0
        self._flights: list[Flight] = []
        self._token: trio.lowlevel.TrioToken

    # Instrument.

    def before_run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self._runnable += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._runnable -= 1
        self._point()
        for flight in self._flights[:]:
            flight.left -= 1
            if flight.left <= 0:
                self._land(flight)

    def before_io_wait(self, timeout: float) -> None:
        self._turn()
        if self._runnable or not self._flights:
            return
        if self._point():
            # First whoever was woken by what was fired (a signal takes another round); and time stands still.
            self._token.run_sync_soon(_nothing)
            return
        nearest = min(self._flights, key=lambda flight: flight.left)
        passed = nearest.left
        for flight in self._flights:
            flight.left -= passed
        self._land(nearest)

    def _point(self) -> bool:
        """Count a point; return whether something was fired at it."""
        fired = False
        while self._shots and self.points >= self._shots[-1]:
            self._shots.pop()
            fired = True
            try:
                self._fire()
            except (
                Exception
            ) as exc:  # Trio would take an instrument that raises away, and all would stand still
                self._spin(f"the injection fell over {exc!r}")
        self.points += 1
        self._turn()
        return fired

    def _turn(self) -> None:
        self._turns += 1
        if self._turns % TURN_LIMIT == 0:
            self._spin(f"more than {self._turns} turns: it spins")

    def _land(self, flight: Flight) -> None:
        self._flights.remove(flight)
        trio.lowlevel.reschedule(flight.task)

    # Virtual threads.

    async def cross(self, fn: Callable[[], T]) -> T:
        """Do as the bridge: cancellable on entry, then never; `fn` is called once, its value comes back."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self.pause()
        self.in_thread = True
        try:
            result = outcome.capture(fn)
        finally:
            self.in_thread = False
        await self.pause()
        return result.unwrap()

    async def pause(self) -> None:
        """Let some time pass, not cancellable."""
        if self._own.random() < SLOW:
            with trio.CancelScope(shield=True):
                await trio.sleep(self._own.random() * SLOW_SECONDS)
        else:
            flight = Flight(trio.lowlevel.current_task(), self._own.randint(1, LATENCY))
            self._flights.append(flight)
            await trio.lowlevel.wait_task_rescheduled(lambda raise_cancel: trio.lowlevel.Abort.FAILED)

    async def block(self, fn: Callable[[], T]) -> T:
        """Run `fn`, which blocks on its way, in a thread."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self.pause()
        result = await outcome.acapture(run_lockstep, fn)
        await self.pause()
        return result.unwrap()


def _nothing() -> None:
    """What wakes the loop and does no more."""
