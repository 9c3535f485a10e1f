"""When to beat, and until when a group may believe that its lease holds.

Pure arithmetic on one monotonic clock, shared between the beat thread (writes) and the event loop
(reads). Every attribute is replaced by a single assignment, so no lock is needed.

The lease is counted from *before* the beat was sent: the server adds the duration to its own clock
when it executes the beat, which is later, so what we believe always ends before what it wrote.
"""

from __future__ import annotations

import math

__all__ = ["Lease", "rescue_interval"]


class Lease:
    """The lease of one registration.

    Args:
        duration: seconds that each beat buys by the server's clock.
        margin: seconds before the end at which handlers are cancelled.
        interval: seconds between beats.
    """

    def __init__(self, *, duration: float, margin: float, interval: float) -> None:
        self.duration = duration
        self.margin = margin
        self.interval = interval
        self.until: float = -math.inf  # handlers must be cancelled when the clock reaches this
        self.lost: bool = False  # a beat matched no row: somebody else closed this registration
        self._sent = -math.inf
        self._failures = 0

    def confirm(self, sent_at: float) -> None:
        """Note that the beat sent at `sent_at` was executed."""
        self._failures = 0
        self._sent = sent_at
        self.until = sent_at + self.duration - self.margin

    def fail(self) -> None:
        """Note that a beat failed or that its fate is unknown."""
        self._failures += 1

    def lose(self) -> None:
        """Note that a beat matched no row."""
        self.lost = True
        self.until = -math.inf

    def next_beat(self, now: float) -> float:
        """Return the clock reading at which to beat next; sooner after failures."""
        if self._failures:
            # A failed beat costs part of the lease: try again soon, but not in a spin.
            return now + min(self.interval, 0.1 * 2.0 ** min(self._failures, 4))
        return self._sent + self.interval

    def age(self, now: float) -> float:
        """Return how many seconds ago the last beat that was executed had been sent (inf: none was)."""
        return now - self._sent

    def provable(self, now: float) -> bool:
        """Return whether nobody else can have rescued this registration by `now`."""
        return now < self.until


def rescue_interval(lease_duration: float) -> float:
    """Return the longest time between two looks for groups whose lease has ended (drawn anew each time)."""
    return min(5.0, lease_duration / 6)
