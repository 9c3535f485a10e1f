"""The fetcher: the one task of a registration that claims.

It waits for a free slot and for a reason to look (a wake-up, a full last claim, the timer of
`scheduled`, the poll), claims at most the free slots, and hands the rows to the slots. Before it
sleeps on a queue it commits a mark and claims once more: whoever adds work after that sees the mark
and notifies.

If a claim ends with anything but rows or a clean error, its commit may still come; if it is refused,
the database may have lost others. Then nothing is claimed until ledger and leases were compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import trio

from ._backoff import reconnect_delay
from ._demand import Demand
from ._errors import DatabaseError, SchemaError
from ._events import GroupIdle
from ._handling import Slots
from ._logs import Log
from ._model import Claim
from ._options import GroupOptions
from ._positions import Positions, Stretch
from ._registration import LiveRegistration
from ._store import ClaimOrder, ClaimReply, Store
from ._wake import Wake

__all__ = ["Fetcher"]

log = Log("triojobs.fetcher")


class Fetcher:
    """Claims for one registration. Implements ListenEvents for its wake-ups."""

    def __init__(
        self, live: LiveRegistration, store: Store, slots: Mapping[str, Slots], options: GroupOptions
    ) -> None:
        self.wake = Wake()
        self._live = live
        self._store = store
        self._slots = slots
        self._options = options
        self._demand = Demand({}, linger=options.claim_linger, cap=options.concurrency)
        self._marked: set[str] = set()
        self._listening = False
        self._listened = False
        self._poll_at = -math.inf
        self._promote_at = -math.inf
        self._promote_next = False
        self._due_at = math.inf
        self._failures = 0
        self._idle = False
        self._positions = Positions(options.rescan_interval)

    def slots_ready(self) -> None:
        """Take the slots' sizes, once they stand (they need our wake-up, we need them)."""
        sizes = {queue: slots.worker.concurrency for queue, slots in self._slots.items()}
        self._demand = Demand(sizes, linger=self._options.claim_linger, cap=self._options.concurrency)

    # ListenEvents.

    def listening(self, healthy: bool) -> None:
        """LISTEN was (re-)established or lost: what was notified in between is lost, so look again."""
        if healthy and self._listened:
            # The server may have been away: a beat tells at once what it lost, also when no slot is free.
            self._store.beat_now(self._live.group_id)
        self._listening = healthy
        self._listened = self._listened or healthy
        self.look_anew()

    def queue_woken(self, queue: str) -> None:
        """Work was added to this queue, or its earliest due time moved forward."""
        self._demand.woken([queue])
        self._promote_next = True
        self.wake.set()

    def group_woken(self) -> None:
        """One of our jobs shall be cancelled: a beat brings the requests."""
        self._store.beat_now(self._live.group_id)

    def look_anew(self) -> None:
        """Forget what we told the database about our sleep; it may be lost."""
        self._marked.clear()
        self._positions.forget_all()
        self._look_everywhere()

    # The task.

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Claim until cancelled."""
        try:
            with self._live.fetch_scope:
                while True:
                    try:
                        await self._round()
                        self._failures = 0
                    except SchemaError:
                        raise  # does not heal by waiting
                    except DatabaseError as exc:
                        self._failures += 1
                        log.warning("%s", exc, extra={"event": "claim_failed", "sqlstate": exc.sqlstate})
                        await trio.sleep(reconnect_delay(self._failures, random.random))
                        self.look_anew()
        finally:
            self._live.fetching.value = False

    async def _round(self) -> None:
        wants = await self._wait_for_demand()
        sent = trio.current_time()
        starts = self._positions.starts(wants, sent)
        try:
            reply = await self._claim(wants, starts, sent)
        finally:
            self._wake_slots()  # for those of the claim before
        if reply.refused:
            self._live.doubt()
            return
        # No await from here to the hand-over, and none needed: the ledger has owned the rows since
        # their commit.
        if not self._live.fetch_scope.cancel_called:
            claims = self._live.ledger.take_booked()
            self._positions.claimed(wants, starts, claims, sent=sent, now=trio.current_time())
            for queue in reply.promoted:
                self._positions.forget(queue)
            self._live.feed.claimed(claims)
            self._idle = self._idle and not claims
            self._lay_in(claims, sent)
            if self._promote_next:
                await self._promote()
        await self._draw_conclusions(wants, starts, reply)

    async def _promote(self) -> None:
        """Look for what is due, after a wake-up.

        It is mostly about work that is due at once, and that was claimed first: a look at `scheduled` before it
        took a fifth of the time from the enqueue to the handler.
        """
        self._wake_slots()
        self._promote_at = -math.inf
        reply = await self._claim({}, {}, trio.current_time())
        self._demand.woken(reply.promoted)

    def _lay_in(self, claims: Sequence[Claim], sent: float) -> None:
        """Give claims to the slots. Whoever sleeps wakes when the next claim is under way, or is not made.

        Handlers that run first would hold it up: it waits for the interpreter's lock, and the server
        would stand idle.
        """
        for queue, slots in self._slots.items():
            slots.lay_in([claim for claim in claims if claim.queue == queue], sent)

    def _wake_slots(self) -> None:
        for slots in self._slots.values():
            slots.wake_some()

    async def _wait_for_demand(self) -> dict[str, int]:
        while True:
            if self._live.in_doubt.value:
                self._wake_slots()
                await self._live.in_doubt.wait_value(False)
            now = trio.current_time()
            if now >= min(self._poll_at, self._due_at):
                self._look_everywhere()
            free = {queue: slots.free for queue, slots in self._slots.items()}
            wants, again_at = self._demand.next_claim(free, now)
            if wants:
                return wants
            self._wake_slots()
            if any(free.values()):
                again_at = min(again_at, self._poll_at, self._due_at)
            self._tell_idle()
            # Without a free slot nothing can be claimed: a slot's end wakes us.
            await self.wake.wait_until(again_at)

    def _tell_idle(self) -> None:
        """Say that nothing is in hand and nothing is due, once."""
        idle = not self._live.ledger.held
        if idle and not self._idle:
            self._live.feed.send(GroupIdle(self._live.group_id))
        self._idle = idle

    def _look_everywhere(self) -> None:
        now = trio.current_time()
        interval = self._options.listening_poll_interval if self._listening else self._options.poll_interval
        self._poll_at = now + interval
        self._promote_at = -math.inf
        self._due_at = math.inf  # the promotion tells it anew
        self._demand.woken_everywhere()
        self.wake.set()

    async def _claim(
        self, wants: Mapping[str, int], starts: Mapping[str, Sequence[Stretch]], now: float
    ) -> ClaimReply:
        promote = now >= min(self._promote_at, self._due_at)
        if promote:
            # A wake-up while the claim is in flight asks for another one.
            self._promote_at = math.inf
            self._promote_next = False
        order = ClaimOrder(
            group_id=self._live.group_id,
            epoch=self._live.epoch,
            claim_no=self._live.next_claim_no(),
            wants=wants,
            promote=self._demand.queues if promote else (),
            starts=starts,
        )
        self._live.claim_is_sent()
        try:
            reply = await self._store.claim(order, self._live.book, under_way=self._wake_slots)
        except trio.Cancelled:
            raise  # it was never sent
        except BaseException as exc:
            # Anything but a clean refusal may still commit.
            if not (isinstance(exc, DatabaseError) and exc.committed is False):
                self._live.unknown_claim = True
                self._live.doubt()
            raise
        finally:
            self._live.claim_under_way = False
        if wants:
            self._demand.claimed(now)
        if promote:
            more = sum(reply.promoted.values()) >= 1000
            # While we are busy nobody notifies us, so look at the timer of new rows now and then.
            soon = -math.inf if more else now + self._options.rescan_interval
            self._promote_at = min(self._promote_at, soon)
            self._due_at = math.inf if reply.next_due_in is None else now + max(0.0, reply.next_due_in)
        return reply

    async def _draw_conclusions(
        self, wants: Mapping[str, int], starts: Mapping[str, Sequence[Stretch]], reply: ClaimReply
    ) -> None:
        short = {queue for queue, n in wants.items() if reply.got.get(queue, 0) < n}
        # One that did not begin at the head tells nothing about what is there: the next one will.
        wants = {queue: n for queue, n in wants.items() if queue not in short or queue not in starts}
        short -= starts.keys()
        if short or self._marked:
            self._wake_slots()  # what follows may take a while
        if self._listening:
            unmarked = short - self._marked
            if unmarked:
                # The mark is committed, then the next round claims once more from the head.
                await self._store.mark_waiting(self._live.group_id, sorted(unmarked), True)
                self._marked |= unmarked
                short -= unmarked
                self._promote_at = -math.inf  # what was scheduled just before the mark notified nobody
            full = (set(wants) - short - unmarked) & self._marked
            if full:
                await self._store.mark_waiting(self._live.group_id, sorted(full), False)
                self._marked -= full
        for queue in short:
            self._demand.satisfied(queue)
