"""The comparison: makes the ledger and the leases of a registration agree whenever they may not.

They may differ after a claim of unknown fate (its rows may be there, or may still come), and when
the database may have lost commits: a crash with asynchronous commits, the promotion of a standby. Until
they were compared nothing is claimed, which the database itself sees to. Then

    a row of ours that the ledger does not know     goes back, the attempt refunded
    a claim in the ledger without row and outcome   is lost: somebody else may run the job, so its
                                                    handler is cancelled and its outcome would be stale
    a claim that has ended here                     is left to its settlement, which finds out by itself
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Final

import trio

from ._backoff import reconnect_delay
from ._errors import DatabaseError, SchemaError
from ._logs import Log
from ._model import CancelRequest
from ._registration import LiveRegistration
from ._store import Store

__all__ = ["LOST", "compare_when_in_doubt"]

log = Log("triojobs.comparison")

LOST: Final = "the database lost this claim"  # what the handler of such a job sees as its reason


@trio.lowlevel.enable_ki_protection
async def compare_when_in_doubt(
    live: LiveRegistration, store: Store, on_compared: Callable[[], None]
) -> None:
    """Compare whenever `live.in_doubt` is set, and reset it; call `on_compared` each time. Until cancelled.

    Not the fetcher's work: a group that stops claims nothing more, but its handlers still run.
    """
    failures = 0
    while True:
        await live.in_doubt.wait_value(True)
        try:
            if await _compare(live, store):
                failures = 0
                on_compared()
                continue
            store.beat_now(
                live.group_id
            )  # the registration is over: a beat tells it to all, and ends this task
        except SchemaError:
            raise  # does not heal by waiting
        except DatabaseError as exc:
            log.warning("%s", exc, extra={"event": "compare_failed", "sqlstate": exc.sqlstate})
        failures += 1
        await trio.sleep(reconnect_delay(failures, random.random))


async def _compare(live: LiveRegistration, store: Store) -> bool:
    """Compare once. False: the registration is closed or gone."""
    lost: list[tuple[int, int]] = []

    def missing(claims: Sequence[tuple[int, int]]) -> None:  # right after the commit, in its thread
        lost.extend(live.ledger.lose(claims))

    found = await store.compare(live.group_id, live.ledger.known, missing)
    if found is None:
        return False
    live.epoch = found.epoch
    live.unknown_claim = live.in_doubt.value = False
    live.ledger.gave_back(found.released)
    for job_id, claim_no in lost:
        live.on_cancel_request(CancelRequest(job_id, claim_no, LOST))
    log.log(
        logging.WARNING if lost or found.released else logging.INFO,
        "compared the leases of worker group %s: %d claim(s) were lost, %d unknown row(s) were given back",
        live.group_id,
        len(lost),
        found.released,
        extra={
            "event": "compared",
            "group_id": str(live.group_id),
            "epoch": found.epoch,
            "job_ids": [job_id for job_id, _ in lost],
            "released": found.released,
        },
    )
    return True
