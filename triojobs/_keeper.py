"""The task that removes old jobs, once in a while; of all worker groups one at a time."""

from __future__ import annotations

import random
from typing import Final

import trio
from trio_util import move_on_when

from ._errors import DatabaseError
from ._logs import Log
from ._registration import LiveRegistration
from ._retention import Retention
from ._store import Store

__all__ = ["keep_house"]

log = Log("triojobs.retention")

LOOKS: Final = 10  # looks whether it is time in each interval: cheap, and a dead group's turn comes to others


@trio.lowlevel.enable_ki_protection
async def keep_house(live: LiveRegistration, store: Store, retention: Retention) -> None:
    """Prune when it is time, as long as the group claims. A failure is logged, and the next round comes."""
    async with move_on_when(live.fetching.wait_value, False):
        while True:
            await trio.sleep(retention.interval / LOOKS * random.uniform(0.5, 1.5))
            try:
                pruned = await store.prune(retention)
            except DatabaseError as exc:
                log.warning("%s", exc, extra={"event": "prune_failed", "sqlstate": exc.sqlstate})
                continue
            if pruned is not None:
                log.info(
                    "pruned %d range(s) of a million ids, %d job(s), %d key(s) and %d worker group(s)",
                    pruned.ranges,
                    pruned.jobs,
                    pruned.keys,
                    pruned.groups,
                    extra={"event": "pruned", "postponed": pruned.postponed},
                )
