"""The beat loop: a thread that keeps a registration's lease and does services to all groups on the way."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Collection
from typing import Final

from ._beacon import Beacon
from ._bridge import Call, Line, clock
from ._errors import DatabaseError
from ._lease import Lease, rescue_interval
from ._logs import Log
from ._model import Registration
from ._sql import groups
from ._store import BeatEvents

__all__ = ["BeatControl", "BeatLoop"]

log = Log("triojobs.heartbeat")

PARTITION_INTERVAL: Final = 60.0  # seconds between looks whether new id ranges are needed


class BeatControl:
    """How the event loop talks to a beat thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._poked = False
        self._nudged = False
        self.stopped = False

    def poke(self) -> None:
        """Have a beat at once."""
        with self._changed:
            self._poked = True
            self._changed.notify()

    def nudge(self) -> None:
        """Have the loop think again about how long to wait."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    def stop(self) -> None:
        """End the loop after the call in flight."""
        with self._changed:
            self.stopped = True
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Wait until poked, nudged or stopped, or until `seconds` have passed; return whether poked."""
        with self._changed:
            if not self._poked and not self._nudged and not self.stopped:
                self._changed.wait(max(0.0, seconds))
            poked, self._poked, self._nudged = self._poked, False, False
            return poked


class BeatLoop:
    """Beats, hands over cancel requests, watches the event loop, rescues dead groups; in a thread of its own.

    A thread, because a beat that runs on the event loop dies with it: with the loop blocked for
    10 s the gap was 10.2 s as a Trio task and 2.0 s as a thread. But a thread that beats for a loop
    that never turns again would keep its jobs for ever: then it gives the lease up.
    """

    def __init__(
        self,
        line: Line,
        schema: str,
        notify_later: Callable[[Call, Collection[str]], None],
        registration: Registration,
        lease: Lease,
        beacon: Beacon,
        events: BeatEvents,
        control: BeatControl,
    ) -> None:
        self._line = line
        self._schema = schema
        self._notify_later = notify_later
        self._group_id = registration.group_id
        self._lease = lease
        self._beacon = beacon
        self._events = events
        self._control = control
        self._beat_at = lease.next_beat(clock())
        self._look_at = math.inf
        self._reachable = True
        self._rescue_interval = rescue_interval(registration.lease_duration)
        self._next_rescue = clock()  # the first round is at once: a restart after a crash wants its jobs
        self._next_partitions = clock() + PARTITION_INTERVAL * random.random()

    def run(self) -> None:
        self._beacon.watched(self._control.nudge)
        while True:
            due = min(self._beat_at, self._next_rescue, self._look_at)
            poked = self._control.wait(due - clock())
            if self._control.stopped or not self._look():
                return
            if not poked and clock() < min(self._beat_at, self._next_rescue):
                continue
            # The beat always goes first: it keeps our own jobs, a rescue can wait.
            if not self._beat():
                return
            self._beat_at = self._lease.next_beat(clock())
            now = clock()
            if now >= self._next_rescue:
                self._next_rescue = now + self._rescue_interval * random.uniform(0.5, 1.0)
                self._serve("rescuing dead worker groups", self._rescue)
            if now >= self._next_partitions:
                self._next_partitions = now + PARTITION_INTERVAL * random.uniform(0.5, 1.5)
                self._serve("adding partitions", self._add_partitions)

    def _look(self) -> bool:
        """Look at the event loop when it is time to. False: it is dead, and its lease given up."""
        now = clock()
        if now >= self._look_at:
            self._look_at = math.inf
            if (seconds := self._beacon.look(now)) is not None:
                self._events.loop_blocked(seconds)
            if (seconds := self._beacon.dead_for) is not None:
                self._lease.lose()
                self._events.loop_dead(seconds)
                return False
        if self._look_at == math.inf:
            self._look_at = self._beacon.next_look(now)
        return True

    def _beat(self) -> bool:
        sent = clock()
        try:
            found = self._line.call(
                "beating", lambda call: groups.beat(call.conn, self._schema, self._group_id)
            )
        except DatabaseError as exc:
            self._reachable = False
            self._lease.fail()
            log.warning("%s", exc, extra={"event": "beat_failed", "sqlstate": exc.sqlstate})
            return True
        self._reachable = True
        if found is None:
            if not self._control.stopped:  # once closing has begun, a closed row is no news
                self._lease.lose()
                self._events.lease_lost()
            return False
        self._lease.confirm(sent)
        if not found.witnessed:
            self._events.must_compare()
        if found.requests:
            self._events.cancel_requests(found.requests)
        if found.drain is not None:
            self._events.drain_requested(found.drain)
        return True

    def _rescue(self, call: Call) -> None:
        found = groups.rescue(call.conn, self._schema)
        if found.jobs:
            log.warning(
                "rescued %d job(s) of %d dead worker group(s)",
                found.jobs,
                len(found.groups),
                extra={"event": "rescued", "groups": [str(g) for g in found.groups], "jobs": found.jobs},
            )
            call.on_commit(lambda: self._events.rescued(found.jobs))
        self._notify_later(call, found.queues)

    def _add_partitions(self, call: Call) -> None:
        groups.add_partitions(call.conn, self._schema)

    def _serve(self, operation: str, fn: Callable[[Call], None]) -> None:
        """Do a service to all groups; its failure is logged, and the next round comes.

        Not while we shut down or the server does not answer: a closing waits for the call in flight.
        """
        if self._control.stopped or not self._reachable:
            return
        try:
            self._line.call(operation, fn)
        except DatabaseError as exc:
            self._reachable = False
            log.warning("%s", exc, extra={"event": "service_failed"})
