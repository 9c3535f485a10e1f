"""The lease of a registration: kept by beats, given up in time when it can no longer be proven.

The beats run in a thread of the store, so that a blocked event loop does not lose the lease. Here
live the task that holds that thread, the one that shows it that the event loop turns, and the one that
cancels handlers when the lease runs out.
"""

from __future__ import annotations

import logging

import trio

from ._beacon import TURN_INTERVAL
from ._registration import LiveRegistration
from ._store import Store

__all__ = ["hold_lease", "show_signs_of_life", "watch_lease"]

log = logging.getLogger("triojobs.heartbeat")


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


@trio.lowlevel.enable_ki_protection
async def show_signs_of_life(live: LiveRegistration) -> None:
    """Turn the beacon while it is lit: until nothing is in hand."""
    while True:
        await live.lit.wait()
        while not live.beacon.put_out(lambda: live.ledger.held):
            await trio.sleep(TURN_INTERVAL)
            live.beacon.turn()


@trio.lowlevel.enable_ki_protection
async def watch_lease(live: LiveRegistration, store: Store) -> None:
    """Give the registration up when its lease can no longer be proven.

    The end of the lease is read again after each sleep: a loop that was blocked wakes late, and
    beats may have gone on meanwhile. A deadline on the handlers' scope would cancel healthy
    handlers, because Trio expires deadlines before it runs what threads have sent.
    """
    while not live.lost.value:
        remaining = live.lease.until - store.now()
        if remaining > 0:
            await trio.sleep(remaining)
            continue
        # One pass of the scheduler, so that news from the beat thread comes first.
        await trio.lowlevel.checkpoint()
        if not live.lease.provable(store.now()):
            log.error(
                "the lease of worker group %s cannot be proven any more; its handlers are cancelled",
                live.group_id,
                extra={"event": "lease_lost", "group_id": str(live.group_id)},
            )
            live.lose("the lease could not be prolonged in time")
