"""Whether the event loop still turns: while it has jobs in hand it shows signs of life, and the beat thread looks.

Pure, and shared by three threads: the one that claims lights the beacon, the event loop turns it and
puts it out once nothing is in hand, the beat thread looks at it. Without jobs in hand nobody wakes up.

Time is counted by the looks: of the time between two looks at most `LOOK_CAP` counts. Whoever stopped
the whole process, or made the watcher itself wait, has told nothing about the event loop.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Final

__all__ = ["TURN_INTERVAL", "Beacon"]

TURN_INTERVAL: Final = 0.25  # seconds between signs of life, and between looks; 0.15 % of a core
LOOK_CAP: Final = 0.5  # seconds; less than BLOCKED_AFTER, so that one late look never accuses the loop
BLOCKED_AFTER: Final = 0.75  # seconds without a turn that are worth a warning: three looks


class Beacon:
    """The sign of life of one registration's event loop.

    Args:
        dead_after: seconds without a turn after which the loop is given up (inf: never).
        on_lit: called when it is lit and watched, in any thread.

    Attributes written by → read by:
        lit: claims, event loop → beat thread. blocks: beat thread → statistics; how often the loop was
        found blocked.
    """

    def __init__(self, *, dead_after: float = math.inf, on_lit: Callable[[], None] = lambda: None) -> None:
        self.lit: bool = False
        self.blocks: int = 0
        self._dead_after = dead_after
        self._on_lit = on_lit
        self._nudge: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._turns = 0
        self._seen = 0
        self._silent = 0.0
        self._looked_at = -math.inf
        self._warn_after = BLOCKED_AFTER

    # In the thread that claims.

    def light(self) -> None:
        """Begin to show signs of life: jobs are in hand."""
        with self._lock:
            if self.lit:
                return
            self.lit = True
            self._turns += 1  # what was before is forgotten
        if self._nudge is not None:
            self._nudge()
            self._on_lit()

    # On the event loop.

    def turn(self) -> None:
        """Show that the loop turns."""
        self._turns += 1

    def put_out(self, in_hand: Callable[[], int]) -> bool:
        """Stop showing signs of life, unless something is in hand; return whether it is out."""
        with self._lock:  # a claim that is booked after this count lights it again
            if self.lit and not in_hand():
                self.lit = False
        return not self.lit

    # In the beat thread.

    def watched(self, nudge: Callable[[], None]) -> None:
        """From now on somebody looks; `nudge` wakes him when it is lit (called in any thread).

        Without a watcher nobody needs a sign of life, and the event loop gives none.
        """
        self._nudge = nudge
        if self.lit:
            self._on_lit()

    def next_look(self, now: float) -> float:
        """Return the clock reading at which to look next."""
        return now + TURN_INTERVAL if self.lit else math.inf

    def look(self, now: float) -> float | None:
        """Return for how many seconds the loop has not turned, if that is worth telling (again)."""
        between, self._looked_at = now - self._looked_at, now
        if not self.lit or self._turns != self._seen:
            self._seen = self._turns
            self._silent, self._warn_after = 0.0, BLOCKED_AFTER
            return None
        self._silent += min(between, LOOK_CAP)
        if self._silent < self._warn_after:
            return None
        self.blocks += self._warn_after == BLOCKED_AFTER
        self._warn_after = 2 * self._silent  # a long block is told now and then
        return self._silent

    @property
    def dead_for(self) -> float | None:
        """For how many seconds the loop has not turned, once that is so long that its jobs shall go to others."""
        return self._silent if self._silent >= self._dead_after else None
