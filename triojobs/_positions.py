"""From where to claim: on from what this group has claimed, so that it does not walk over its own dead rows.

Claimed rows leave entries in the index until vacuum may remove them, which an old snapshot can prevent
for hours; they lie at the head, where each claim begins. So after a full claim, of many rows or a slow one,
the next goes on from the last position in each priority (band) that it knows, and looks into the gaps
between the bands.

Pure. A position gives no wrong row, only a late one. What lands behind it: a commit that came late, a
released or rescued job with its place kept, a row that somebody held locked. They are found from the head: after
a claim that came back short, after a promotion, and every `rescan_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from ._model import Claim

__all__ = ["Positions", "Stretch"]

BANDS: Final = (
    16  # priorities of one queue whose positions are known, the highest ones; each costs an index look-up
)
MANY: Final = 100  # rows of a claim that are worth positions: for ten of them they cost 4 %, for 500 nothing
SLOW: Final = (
    0.005  # seconds of a claim from the head that are worth them for few rows, too: some 50,000 dead ones
)
PATIENCE: Final = 4.0  # the walk from the head takes at most a fifth of the time, however long it is
BEYOND: Final = 2**31  # a priority above all, as bigint; -1 is below all


class Stretch(NamedTuple):
    """A part of a queue, in its order.

    `band` is not None: this priority, behind (run_at, job_id). Else all priorities between `above` and `below`, both
    exclusive. Fetcher → store.
    """

    band: int | None
    above: int
    below: int
    run_at: float
    job_id: int

    @classmethod
    def gap(cls, above: int, below: int) -> Stretch:
        """Return all priorities between these."""
        return cls(None, above, below, -math.inf, 0)

    @classmethod
    def behind(cls, band: int, run_at: float, job_id: int) -> Stretch:
        """Return what follows in this priority."""
        return cls(band, 0, 0, run_at, job_id)


class QueuePosition:
    """Where one queue was claimed up to, by priority."""

    def __init__(self) -> None:
        self.bands: dict[int, tuple[float, int]] = {}
        self.rescan_at = -math.inf
        self.is_worth_it = False

    def stretches(self) -> list[Stretch]:
        """Return the parts in which rows may be that were not claimed, in their order."""
        found: list[Stretch] = []
        above = BEYOND
        for band in sorted(self.bands, reverse=True)[:BANDS]:
            if band < above - 1:
                found.append(Stretch.gap(above, band))
            found.append(Stretch.behind(band, *self.bands[band]))
            above = band
        if above > 0:
            found.append(Stretch.gap(above, -1))
        return found


class Positions:
    """Where this group's queues were claimed up to.

    Args:
        rescan_interval: seconds after which a queue is claimed from its head again.
    """

    def __init__(self, rescan_interval: float) -> None:
        self._rescan_interval = rescan_interval
        self._queues: dict[str, QueuePosition] = {}

    def starts(self, queues: Iterable[str], now: float) -> dict[str, Sequence[Stretch]]:
        """Return where to go on, for those queues that are not to be claimed from the head."""
        return {
            queue: position.stretches()
            for queue in queues
            if (position := self._queues.get(queue)) is not None
            and position.is_worth_it
            and now < position.rescan_at
        }

    def claimed(
        self,
        wants: Mapping[str, int],
        starts: Mapping[str, Sequence[Stretch]],
        claims: Iterable[Claim],
        *,
        sent: float,
        now: float,
    ) -> None:
        """Note what a claim of `wants` gave, of which `starts` were not claimed from the head."""
        got: dict[str, list[Claim]] = {}
        for claim in claims:
            got.setdefault(claim.queue, []).append(claim)
        for queue, want in wants.items():
            found = got.get(queue, [])
            if len(found) < want:
                self.forget(queue)
                continue
            position = self._queues.setdefault(queue, QueuePosition())
            if queue not in starts:
                position.rescan_at = sent + max(self._rescan_interval, PATIENCE * (now - sent))
                position.is_worth_it = len(found) >= MANY or now - sent >= SLOW
            last: dict[int, tuple[float, int]] = {}
            for claim in found:
                place = (claim.run_at, claim.job_id)
                last[claim.priority] = max(place, last.get(claim.priority, place))
            # Also backwards: when a claim from the head finds rows that landed behind, more of them may follow.
            position.bands |= last

    def forget(self, queue: str) -> None:
        """Claim this queue from its head."""
        self._queues.pop(queue, None)

    def forget_all(self) -> None:
        """Claim every queue from its head."""
        self._queues.clear()
