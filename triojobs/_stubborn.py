"""Handlers that do not end although they were cancelled: their stacks are logged, and they may be the last straw.

Trio cannot end a task that does not want to. It is waited for, and its lease is kept, because giving its
job to somebody else would make two of them. Now and then the log says where it is; and a program that
would rather die than wait passes `hard_stop`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import trio

from ._handling import Running, Slots
from ._logs import Log
from ._model import HardStop
from ._options import GroupOptions
from ._registration import LiveRegistration
from ._stacks import stack_of_task

__all__ = ["watch_handlers"]

log = Log("triojobs.worker")

STUBBORN_INTERVAL: Final = 10.0  # seconds between log records with the stacks of handlers that do not end


@trio.lowlevel.enable_ki_protection
async def watch_handlers(live: LiveRegistration, slots: Mapping[str, Slots], options: GroupOptions) -> None:
    """Look after cancelled handlers until no handler is left (`live.watch_scope`, which is shielded)."""
    watch = Watch(live, slots, options.hard_stop_patience)
    with live.watch_scope:
        while True:
            await live.wait_handler()
            await live.handler_cancelled.wait_until(watch.look(trio.current_time()))


class Watch:
    """Looks at the handlers of one registration.

    Args:
        patience: seconds from a handler's cancellation to the hard stop (inf: there is none).
    """

    def __init__(self, live: LiveRegistration, slots: Mapping[str, Slots], patience: float) -> None:
        self._live = live
        self._slots = slots
        self._patience = patience
        self._interval = min(STUBBORN_INTERVAL, patience)

    def look(self, now: float) -> float:
        """Report who has been cancelled for long; return when to look again, unless woken before."""
        again_at = now + self._interval  # a timeout that fires meanwhile wakes nobody
        too_long: list[Running] = []
        for running in [r for per_queue in self._slots.values() for r in per_queue.running.values()]:
            since = min(running.cancelled_at, running.limit, self._live.interrupted_at)
            due_at = since + STUBBORN_INTERVAL * (running.reports + 1)
            if now >= due_at:
                running.reports += 1
                due_at += STUBBORN_INTERVAL
                self._report(running, now - since)
            stop_at = math.inf if running.given_up else since + self._patience
            if now >= stop_at:
                running.given_up = True
                too_long.append(running)
                stop_at = math.inf
            again_at = min(again_at, due_at, stop_at)
        if too_long:
            self._stop_hard(too_long)
        return again_at

    def _report(self, running: Running, seconds: float) -> None:
        log.warning(
            "the handler of job %d does not end although it was cancelled %.0f s ago; its lease is kept:\n%s",
            running.claim.job_id,
            seconds,
            stack_of_task(running.task),
            extra={"event": "handler_does_not_end", "job_id": running.claim.job_id, "seconds": seconds},
        )

    def _stop_hard(self, handlers: list[Running]) -> None:
        self._live.stop_hard(
            HardStop(
                reason="handler",
                group_id=self._live.group_id,
                job_ids=tuple(running.claim.job_id for running in handlers),
                seconds=self._patience,
                stack="\n".join(stack_of_task(running.task) for running in handlers),
            )
        )
