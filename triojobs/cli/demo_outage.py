"""What the demo does while its database is away: it waits, says so, and repeats what is safe to repeat.

Everything that the demo asks for is: reads, marks that may be set twice, and enqueues with a key.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

import psycopg
import trio

import triojobs

from .._sql.failures import cannot_connect, one_line, translate

__all__ = ["Outages", "told"]

T = TypeVar("T")

PAUSE: Final = 0.25  # seconds between tries


class Outages:
    """Repeats calls until the database is back, for at most `patience` seconds without a success.

    Args:
        note: tells the person who looks on.
        limiter: for the threads.
    """

    def __init__(
        self, note: Callable[[str], None], limiter: trio.CapacityLimiter, *, patience: float
    ) -> None:
        self._note = note
        self._limiter = limiter
        self._patience = patience
        self._since: float | None = None

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run `call` in a thread, again and again while the database is away.

        Cancellation: between two tries; not while `call` runs.
        """
        while True:
            try:
                found = await trio.to_thread.run_sync(call, limiter=self._limiter)
            except (triojobs.DatabaseError, psycopg.Error) as exc:
                await self.pause(exc)
            else:
                self.over()
                return found

    def here(self, call: Callable[[], T]) -> T:
        """Do the same in a thread of Trio's."""
        while True:
            try:
                found = call()
            except (triojobs.DatabaseError, psycopg.Error) as exc:
                trio.from_thread.run(self.pause, exc)
            else:
                trio.from_thread.run_sync(self.over)
                return found

    async def pause(self, exc: triojobs.DatabaseError | psycopg.Error) -> None:
        """Wait a moment; raise what does not heal, or has not healed in time."""
        error = told(exc)
        if not error.transient:
            raise error from exc
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self._note(f"the database is away, waiting for it ({error})")
        if now - self._since > self._patience:
            raise error from exc
        await trio.sleep(PAUSE)

    def over(self) -> None:
        """Note that the database answers."""
        if self._since is not None:
            self._note(f"the database is back, after {time.monotonic() - self._since:.1f} s")
            self._since = None


def told(exc: triojobs.DatabaseError | psycopg.Error) -> triojobs.DatabaseError:
    """Return an error of the demo's own statements in the words of triojobs, with a hint."""
    if isinstance(exc, triojobs.DatabaseError):
        return exc
    operation = "using the demo's tables"
    if exc.sqlstate is None and isinstance(exc, psycopg.OperationalError):
        return cannot_connect(one_line(exc), {}, operation=operation)
    return translate(exc, operation=operation)
