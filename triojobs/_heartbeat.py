"""The lease of a registration: kept by beats, given up in time when it can no longer be proven.

The beats run in a thread of the store, so that a blocked event loop does not lose the lease. Here
live the task that holds that thread, the one that shows it that the event loop turns, and the one that
cancels handlers when the lease runs out.
"""

from __future__ import annotations

import trio

from ._beacon import TURN_INTERVAL
from ._instruments import loop_was_late
from ._logs import Log
from ._registration import LiveRegistration
from ._store import Store

__all__ = ["hold_lease", "show_signs_of_life", "watch_lease"]

log = Log("triojobs.heartbeat")


@trio.lowlevel.enable_ki_protection
async def hold_lease(live: LiveRegistration, store: Store) -> None:
    """Beat until `store.release_lease`. Shielded: jobs that wind down still need their lease."""
    try:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(show_signs_of_life, live)
                await store.hold_lease(live.record, live.lease, live.beacon, live)
                nursery.cancel_scope.cancel()
    finally:
        live.beating.value = False


class LeaseWatch(trio.abc.Instrument):
    """Gives the registration up at the beginning of a scheduler pass, before any task takes its turn in it.

    A process that was stopped beyond its lease goes on in the middle of a pass, and tasks that are ready
    for the next one take their turns in any order: a task as the only watch would let handlers that come
    before it through one more checkpoint.
    """

    def __init__(self, live: LiveRegistration, store: Store) -> None:
        self._live = live
        self._store = store

    def before_io_wait(self, timeout: float) -> None:
        self.look()

    def look(self) -> None:
        """Cancel the handlers if the lease cannot be proven any more."""
        live = self._live
        if live.lease.provable(self._store.now()) or live.lost.value:
            return
        log.error(
            "the lease of worker group %s cannot be proven any more; its handlers are cancelled",
            live.group_id,
            extra={"event": "lease_lost", "group_id": str(live.group_id)},
        )
        live.lose("the lease could not be prolonged in time")


@trio.lowlevel.enable_ki_protection
async def show_signs_of_life(live: LiveRegistration) -> None:
    """Turn the beacon while it is lit: until nothing is in hand."""
    while True:
        await live.lit.wait()
        while not live.beacon.put_out(lambda: live.in_hand):
            due = trio.current_time() + TURN_INTERVAL
            await trio.sleep_until(due)
            live.beacon.turn()
            loop_was_late(live.record.name, max(0.0, trio.current_time() - due))


@trio.lowlevel.enable_ki_protection
async def watch_lease(live: LiveRegistration, store: Store) -> None:
    """Give the registration up when its lease can no longer be proven.

    The end of the lease is read again after each sleep: a loop that was blocked wakes late, and
    beats may have gone on meanwhile (their thread writes it directly). A deadline on the handlers'
    scope would cancel healthy handlers, because Trio expires deadlines before it runs what threads
    have sent.
    """
    watch = LeaseWatch(live, store)
    trio.lowlevel.add_instrument(watch)
    try:
        while not live.lost.value:
            # Wakes a loop that has nothing else to do, and looks in the pass in which the sleep ends:
            # handlers that wake in the same one are cancelled at the next checkpoint that they enter.
            await trio.sleep(max(0.0, live.lease.until - store.now()))
            watch.look()
    finally:
        trio.lowlevel.remove_instrument(watch)
