"""One registration of a worker group while it lives: its lease, its ledger, its scopes.

Entry: the group registered. Inside: the fetcher claims, handlers run, the settler writes, the beat
loop keeps the lease. Exits: the group stops or is cancelled (close), or the lease is lost (handlers
are cancelled, what is left is closed, a new registration follows under a new id).
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Sequence

import trio
from trio_util import AsyncBool, AsyncValue

from ._beacon import Beacon
from ._events import EventFeed, LeaseLost
from ._instruments import claims_booked
from ._lease import Lease
from ._ledger import Ledger
from ._logs import Log
from ._model import CancelRequest, Claim, HardStop, Registration
from ._stacks import stack_of_thread
from ._wake import Wake

__all__ = ["LiveRegistration"]

log = Log("triojobs.heartbeat")


class LiveRegistration:
    """Everything that belongs to one group id.

    Attributes written by → read by:
        lease: beat thread → lease watcher. ledger: everybody. lit: the beacon → the task that turns it.
        epoch: comparison → fetcher. unknown_claim: fetcher, comparison → closing.
        in_doubt: ledger and leases may differ; nothing is claimed. Fetcher, beats → comparison → fetcher.
        claim_under_way: rows may be ours that the ledger does not know. Fetcher → beacon.
        fetching, slots_alive (0 or 1): fetcher and slots → supervisor. lost: beats → supervisor.
        running: how many handlers run. Slots → supervisor, the watch over handlers.
        unanswered: (job id, claim_no) of claims whose settlement's reply was lost. Settler and closing.
        interrupted_at: Trio's clock when handlers began to be cancelled; a timeout that fires later
        is not the job's fault.
    """

    def __init__(
        self,
        record: Registration,
        lease: Lease,
        *,
        loop_dead_after: float = math.inf,
        hard_stop: Callable[[HardStop], object] | None = None,
        feed: EventFeed | None = None,
    ) -> None:
        self.record = record
        self.feed = EventFeed() if feed is None else feed
        self.lease = lease
        self.lit = Wake()
        self.beacon = Beacon(dead_after=loop_dead_after, on_lit=self._wake_loop)
        self.unsettled = Wake()
        self.ledger = Ledger(on_ended=self.unsettled.set)
        self.epoch = 1
        self.unknown_claim = False
        self.claim_under_way = False
        self.in_doubt = AsyncBool(False)
        self.lost = AsyncBool(False)
        self.fetching = AsyncBool(False)
        self.beating = AsyncBool(False)
        self.settling = AsyncBool(False)
        self.slots_alive = AsyncValue(0)
        self.running = 0
        self._handler_began = Wake()
        self._handler_ended = Wake()
        self.fetch_scope = trio.CancelScope()
        self.handler_scope = trio.CancelScope()
        self.settle_scope = trio.CancelScope(shield=True)
        self.service_scope = trio.CancelScope()
        self.watch_scope = trio.CancelScope(shield=True)
        self.handler_cancelled = Wake()
        self.interrupted_at = math.inf
        self.closed = False
        self.rescued_jobs = 0
        self.on_cancel_request: Callable[[CancelRequest], None] = _nobody_runs
        self.on_drain_request: Callable[[str], None] = _not_begun
        self.unanswered: set[tuple[int, int]] = set()
        self._claim_no = 0
        self._hard_stop = hard_stop
        self._token = trio.lowlevel.current_trio_token()
        self._loop_thread = threading.get_ident()

    @property
    def group_id(self) -> uuid.UUID:
        """The id, never used again."""
        return self.record.group_id

    def next_claim_no(self) -> int:
        """Return a number that no claim of this registration had before."""
        self._claim_no += 1
        return self._claim_no

    def claim_is_sent(self) -> None:
        """From now on the loop must turn: its answer is read there, and nobody else knows what it took."""
        self.claim_under_way = True
        self.beacon.light()

    @property
    def in_hand(self) -> int:
        """How much there is for which the loop must turn."""
        return self.ledger.held + self.claim_under_way

    def book(self, claims: Sequence[Claim]) -> None:
        """Take ownership of claimed rows, in the thread that claimed them."""
        self.ledger.book(claims)
        if claims:
            self.beacon.light()
            claims_booked(claims)

    # On the way of each job: a count and flags, 0.2 µs where an AsyncValue takes 3.

    def handler_begins(self) -> None:
        """Count one handler more."""
        self.running += 1
        self._handler_began.set()

    def handler_ends(self) -> None:
        """Count one handler less."""
        self.running -= 1
        self._handler_ended.set()

    async def wait_handler(self) -> None:
        """Wait until a handler runs. For one task: the watch over handlers."""
        while not self.running:
            await self._handler_began.wait()

    async def wait_no_handler(self) -> None:
        """Wait until no handler runs. For one task: the supervisor."""
        while self.running:
            await self._handler_ended.wait()

    def note_interruption(self) -> None:
        """Remember since when handlers are being cancelled."""
        self.interrupted_at = min(self.interrupted_at, trio.current_time())
        self.handler_cancelled.set()

    def interrupt_handlers(self, reason: str) -> None:
        """Cancel the scope around all handlers."""
        self.note_interruption()
        self.handler_scope.cancel(reason=reason)

    def stop_hard(self, why: HardStop) -> None:
        """Call the user's `hard_stop`, if there is one; on the event loop or in the beat thread."""
        if self._hard_stop is None:
            return
        log.critical(
            "hard_stop is called: %s after %g s",
            "a handler does not end" if why.reason == "handler" else "the event loop does not turn",
            why.seconds,
            extra={"event": "hard_stop", "reason": why.reason, "job_ids": list(why.job_ids)},
        )
        try:
            self._hard_stop(why)
        except (Exception, SystemExit):
            # sys.exit ends no thread that waits for a handler; here it would only end the group's tasks.
            log.exception("hard_stop raised; the group goes on", extra={"event": "hard_stop_failed"})

    def lose(self, reason: str) -> None:
        """The lease cannot be proven any more: claim nothing, cancel handlers, register anew."""
        self.fetch_scope.cancel(reason=reason)
        self.interrupt_handlers(reason)
        if not self.lost.value:
            self.feed.send(LeaseLost(self.group_id, reason))
        self.lost.value = True

    def doubt(self) -> None:
        """Ledger and leases may differ: claim nothing until they were compared."""
        self.in_doubt.value = True

    # BeatEvents. Called from the beat thread, so they only pass the news to the event loop.

    def lease_lost(self) -> None:
        self._token.run_sync_soon(self.lose, "this registration was closed by somebody else")

    def must_compare(self) -> None:
        self._token.run_sync_soon(self.doubt)

    def rescued(self, jobs: int) -> None:
        self._token.run_sync_soon(self._count_rescued, jobs)

    def cancel_requests(self, requests: Sequence[CancelRequest]) -> None:
        for request in requests:
            self._token.run_sync_soon(self._pass_on, request)

    def drain_requested(self, reason: str) -> None:
        self._token.run_sync_soon(self._pass_on_drain, reason)

    def loop_blocked(self, seconds: float) -> None:
        # Logged here and not on the event loop, which does not turn.
        place, stack = stack_of_thread(self._loop_thread)
        log.warning(
            "the event loop has been blocked for %.1f s: no handler can go on, be cancelled or time out. It is "
            "in %s; a blocking call belongs into trio.to_thread.run_sync:\n%s",
            seconds,
            place,
            stack,
            extra={
                "event": "loop_blocked",
                "seconds": seconds,
                "place": place,
                "group_id": str(self.group_id),
            },
        )

    def loop_dead(self, seconds: float) -> None:
        place, stack = stack_of_thread(self._loop_thread)
        log.error(
            "the event loop has been blocked for %.0f s; worker group %s stops beating, so that its jobs are run "
            "elsewhere when its lease ends. It is in %s:\n%s",
            seconds,
            self.group_id,
            place,
            stack,
            extra={"event": "loop_dead", "seconds": seconds, "place": place, "group_id": str(self.group_id)},
        )
        self._token.run_sync_soon(self.lose, "the event loop was blocked for too long")
        jobs = tuple(job_id for job_id, _ in self.ledger.known())
        self.stop_hard(
            HardStop(reason="loop", group_id=self.group_id, job_ids=jobs, seconds=seconds, stack=stack)
        )

    def _wake_loop(self) -> None:
        self._token.run_sync_soon(self.lit.set)

    def _count_rescued(self, jobs: int) -> None:
        self.rescued_jobs += jobs

    def _pass_on(self, request: CancelRequest) -> None:
        self.on_cancel_request(request)

    def _pass_on_drain(self, reason: str) -> None:
        self.on_drain_request(reason)


def _nobody_runs(request: CancelRequest) -> None:
    """Before there are slots no job runs that could be cancelled."""


def _not_begun(reason: str) -> None:
    """Before the tasks run; the next beat repeats the request."""
