"""Wake-ups that are remembered: set by anybody on the loop, consumed by the one task that waits."""

from __future__ import annotations

import trio

__all__ = ["Wake"]


class Wake:
    """A flag with one waiter.

    Unlike an Event it is consumed by the wait; unlike `trio_util.RepeatedEvent` a wake-up that comes
    while the waiter works is not lost; and setting it again costs one comparison, which matters on
    the way of each job.
    """

    __slots__ = ("_lot", "_set")

    def __init__(self) -> None:
        self._set = False
        self._lot = trio.lowlevel.ParkingLot()

    def set(self) -> None:
        """Wake the waiter, now or at its next wait."""
        if not self._set:
            self._set = True
            self._lot.unpark_all()

    async def wait(self) -> None:
        """Return once set, and reset. Cancellation: the flag stays set."""
        if not self._set:
            await self._lot.park()
        self._set = False

    async def wait_until(self, deadline: float) -> None:
        """Return once set, or at `deadline` (Trio's clock)."""
        with trio.CancelScope(deadline=deadline):
            await self.wait()
