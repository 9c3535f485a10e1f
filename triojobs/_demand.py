"""Which queues to ask for how many jobs, and when. Pure: the caller brings the clock and the free slots.

A queue is `hungry` while due work may be waiting in it: at the start, after a wake-up, after a claim
that came back full. A claim that came back short satisfies it until somebody wakes it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

__all__ = ["Demand", "share"]


def share(free: Mapping[str, int], budget: int, turn: int) -> dict[str, int]:
    """Divide `budget` claims among queues, at most `free` each, as evenly as they can use it.

    `turn` rotates who gets the remainder, so that no queue is always last.
    """
    if sum(free.values()) <= budget:
        return {queue: n for queue, n in free.items() if n > 0}
    given = dict.fromkeys(free, 0)
    while budget > 0:
        open_queues = [queue for queue in free if given[queue] < free[queue]]
        each = max(1, budget // len(open_queues))
        first = turn % len(open_queues)
        for queue in open_queues[first:] + open_queues[:first]:
            more = min(each, free[queue] - given[queue], budget)
            given[queue] += more
            budget -= more
    return {queue: n for queue, n in given.items() if n > 0}


class Demand:
    """The state of one group's appetite.

    Args:
        slots: slots per queue. linger: seconds that a claim may wait for more free slots while fewer
            than half of a queue's slots are free. cap: most jobs at once over all queues, or None.
    """

    def __init__(self, slots: Mapping[str, int], *, linger: float, cap: int | None) -> None:
        self._slots = dict(slots)
        self._linger = linger
        self._cap = cap
        self._hungry = set(slots)
        self._woken: set[str] = set()  # since the last claim was sent
        self._turn = 0
        self._last_claim = -math.inf

    @property
    def queues(self) -> list[str]:
        return list(self._slots)

    def woken(self, queues: Iterable[str]) -> None:
        """Note that due work may be waiting in these queues."""
        for queue in queues:
            if queue in self._slots:
                self._hungry.add(queue)
                self._woken.add(queue)

    def woken_everywhere(self) -> None:
        """Note that due work may be waiting in any queue."""
        self.woken(self._slots)

    def satisfied(self, queue: str) -> None:
        """Note that a claim came back short, after everybody who adds work knew that we wait.

        A wake-up that came while the claim was in flight stays: its job may be younger than what the
        claim saw, and nobody will tell of it again.
        """
        if queue not in self._woken:
            self._hungry.discard(queue)

    def claimed(self, now: float) -> None:
        """Note that a claim was made."""
        self._last_claim = now

    def next_claim(self, free: Mapping[str, int], now: float) -> tuple[dict[str, int], float]:
        """Return what to claim now and, when that is nothing, when to ask again (inf: when woken).

        What it returns is claimed at once: wake-ups from here on are younger than the claim.
        """
        asking = {queue: n for queue, n in free.items() if n > 0 and queue in self._hungry}
        if self._cap is not None and asking:
            running = sum(self._slots[queue] - n for queue, n in free.items())
            asking = share(asking, max(0, self._cap - running), self._turn)
        if not asking:
            return {}, math.inf
        soon = any(2 * n >= self._slots[queue] for queue, n in asking.items()) or (
            self._cap is not None and 2 * sum(asking.values()) >= self._cap
        )
        ripe = self._last_claim + self._linger
        if soon or now >= ripe:
            self._woken -= asking.keys()
            # Dealt like cards: the next round begins where this one ended. Were it moved by one each
            # time, claims that alternate between one and two would favour the same queue for ever.
            self._turn += sum(asking.values())
            return asking, now
        return {}, ripe
