"""The settler: writes how claims ended, in batches without a timer.

Each flush takes whatever gathered while the last one was in flight: one job at once when idle, many
under load. Settlements stay in the ledger until the database has confirmed their end, so a flush may
be repeated after any error; a repeated one matches nothing that the first has written.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import trio

from ._backoff import reconnect_delay
from ._errors import DatabaseError, SchemaError
from ._logs import Log
from ._model import Outcome, Settled, Settlement
from ._registration import LiveRegistration
from ._store import Store

__all__ = ["Settler"]

log = Log("triojobs.settler")

BATCH: Final = 500  # settlements per statement: the knee of the rate


class Settler:
    """Writes the outcomes of one registration."""

    def __init__(self, live: LiveRegistration, store: Store) -> None:
        self._live = live
        self._store = store

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Settle until cancelled; closing writes what is left."""
        live = self._live
        failures = 0
        try:
            with live.settle_scope:
                while True:
                    await live.unsettled.wait()
                    while live.ledger.unsettled:
                        try:
                            await self.flush()
                            failures = 0
                        except SchemaError:
                            raise
                        except DatabaseError as exc:
                            failures += 1
                            log.warning("%s", exc, extra={"event": "settle_failed", "sqlstate": exc.sqlstate})
                            await trio.sleep(reconnect_delay(failures, random.random))
        finally:
            live.settling.value = False

    async def flush(self, *, deadline: float | None = None) -> None:
        """Write one batch. A batch refused for its content is repeated row by row."""
        batch = self._live.ledger.ended(BATCH)
        try:
            await self._write(batch, deadline)
        except DatabaseError as exc:
            if exc.transient or exc.committed is not False or isinstance(exc, SchemaError):
                raise
            for settlement in batch:
                await self._write_alone(settlement, deadline)

    async def _write_alone(self, settlement: Settlement, deadline: float | None) -> None:
        try:
            await self._write([settlement], deadline)
        except DatabaseError as exc:
            if exc.transient or exc.committed is not False:
                raise
            log.error(
                "the outcome of job %d was refused: %s",
                settlement.job_id,
                exc,
                extra={"event": "outcome_refused", "job_id": settlement.job_id},
            )
            # Without its texts and bytes anything can be written.
            bare = Settlement(
                settlement.job_id,
                settlement.claim_no,
                Outcome.KILLED if settlement.outcome is Outcome.DONE else settlement.outcome,
                error="the outcome was refused by the database",
                delay=settlement.delay,
            )
            await self._write([bare], deadline)

    async def _write(self, batch: Sequence[Settlement], deadline: float | None) -> None:
        feed = self._live.feed
        claims = self._live.ledger.claims() if feed.is_heard else {}
        ended: list[Settled] = []

        def written(rows: Sequence[Settled]) -> None:
            ended.extend(rows)
            stale = self._live.ledger.close_out(batch, [*rows, *self._answered_before(batch, rows)])
            if stale:
                log.warning(
                    "%d settlement(s) were stale: their jobs had moved on",
                    len(stale),
                    extra={"event": "stale", "job_ids": [s.job_id for s in stale]},
                )

        try:
            await self._store.settle(self._live.group_id, batch, written, deadline=deadline)
        except DatabaseError as exc:
            if exc.committed is None:
                self._live.unanswered.update((s.job_id, s.claim_no) for s in batch)
            raise
        feed.ended(claims, ended)
        if self._live.unanswered:
            self._live.unanswered.difference_update((s.job_id, s.claim_no) for s in batch)

    def _answered_before(self, batch: Sequence[Settlement], rows: Sequence[Settled]) -> list[Settled]:
        """Return what an earlier, unanswered settlement has written without leaving an outcome.

        Outcomes are found by the store. A release or a snooze leaves none: when its row is gone, it
        was that settlement that took it.
        """
        if not self._live.unanswered:
            return []
        returned = {(row.job_id, row.claim_no) for row in rows}
        return [
            Settled(s.job_id, s.claim_no, s.outcome)
            for s in batch
            if s.outcome in (Outcome.RELEASED, Outcome.SNOOZED)
            and (s.job_id, s.claim_no) in self._live.unanswered - returned
        ]
