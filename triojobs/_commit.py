"""`Job.commit` and `Job.transact` on PostgreSQL: the user's work, then the fence, then COMMIT.

The work runs in a thread, on a connection of its own, in one transaction. Last in the transaction
stands the fence: the lease of this claim is deleted and its outcome written (`commit`), or it is locked
(`transact`); when it is gone, everything is rolled back. So nothing of ours is locked while the
user's work runs, and a claim that has ended meanwhile writes nothing.

The ledger hears of the end in the thread, right after COMMIT: a cancel or a timeout that came in
between loses. A COMMIT whose reply is lost is resolved by looking for the outcome of this claim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Final

import psycopg
import trio
from psycopg.pq import TransactionStatus

from ._backoff import reconnect_delay
from ._bridge import BrokenOff, Call, Line, clock
from ._errors import DatabaseError, StaleClaimError, TriojobsError
from ._logs import Log
from ._model import Claim
from ._sql import settle

__all__ = ["CommitAttempt", "commit"]

log = Log("triojobs.commit")

LOOK_TIME: Final = 3.0  # seconds to find out whether a COMMIT without a reply has happened
SHORTEST_LOOK: Final = 0.2  # seconds; with less left it is not worth a call
UNKNOWN: Final = "unknown"  # the answer when that could not be found out


async def commit(attempt: CommitAttempt, *, on: Line, look_on: Line) -> Any:
    """Run an attempt once and return the value of its work, or raise what became of it."""
    try:
        return await on.run_breakable(f"committing job {attempt.claim.job_id}", attempt.run)
    except BrokenOff:
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    except DatabaseError as exc:
        if not attempt.fenced:
            exc.committed = False  # COMMIT was never sent
        if exc.committed is None and attempt.completing:
            # The reply to COMMIT is lost: look for this claim's outcome before anybody is told.
            status = await _outcome_of(attempt, look_on)
            if status == "done":
                return attempt.value
            if status not in (None, UNKNOWN):
                raise StaleClaimError(attempt.claim.job_id, operation="committing") from exc
            if status is None:
                exc.committed = False
        await trio.lowlevel.checkpoint_if_cancelled()  # it failed because it was broken off
        if attempt.failure is None:
            raise
    raise attempt.failure  # what `work` raised, as it was raised


async def _outcome_of(attempt: CommitAttempt, line: Line) -> str | None:
    """Find out how this claim ended: a status, None for not at all, UNKNOWN when nobody answers.

    Who is cancelled waits no longer for fence, COMMIT and look together than for any call: leaving a
    group has a bound. The settlement that the closing writes finds what could not be found here.
    """
    deadline = clock() + min(LOOK_TIME, line.longest_call)
    if trio.current_effective_deadline() == -math.inf:
        deadline = min(deadline, attempt.fence_began + line.longest_call)
    failures, pause = 0, 0.0
    with trio.CancelScope(shield=True):
        while clock() + pause + SHORTEST_LOOK < deadline:
            await trio.sleep(pause)
            try:
                return await line.run(
                    f"looking for the outcome of job {attempt.claim.job_id}", attempt.look, deadline=deadline
                )
            except DatabaseError as exc:
                log.warning("%s", exc, extra={"event": "look_failed"})
                if not exc.transient:
                    break
            failures += 1
            pause = reconnect_delay(failures, random.random)
    return UNKNOWN


class CommitAttempt:
    """The thread's side of `Job.commit`: the user's work, then the fence, then COMMIT."""

    def __init__(
        self,
        schema: str,
        claim: Claim,
        work: Callable[[Any], Any],
        encode: Callable[[Any], tuple[bytes, str]] | None,
        committed: Callable[[], None],
    ) -> None:
        self.claim = claim
        self.value: Any = None
        self.fenced = False
        self.fence_began = math.inf  # by the bridge's clock
        self.failure: BaseException | None = None
        self._schema = schema
        self._work = work
        self._encode = encode
        self._committed = committed

    @property
    def completing(self) -> bool:
        """Whether it ends the claim."""
        return self._encode is not None

    def run(self, call: Call) -> Any:
        """Work, fence and COMMIT; in a thread."""
        with call.conn.transaction():
            data = self._do_work(call)
            self.fence_began = clock()
            if not self._fence(call.conn, data):
                raise StaleClaimError(
                    self.claim.job_id, operation="committing" if self.completing else "transacting"
                )
            self.fenced = True
            if self.completing:
                call.on_commit(self._committed)
        if self.failure is not None:  # psycopg.Rollback: the block swallows it
            raise self.failure
        return self.value

    def _do_work(self, call: Call) -> tuple[bytes, str] | None:
        """Run the user's function; return its value as the result's bytes and encoding, for `commit`."""
        conn = call.conn
        as_opened = conn.row_factory, conn.cursor_factory, conn.prepare_threshold
        with call.unguarded():
            try:
                self.value = self._work(conn)
            except BaseException as exc:
                self.failure = exc
                raise
            finally:
                # The fence, and the next job, find the connection as we opened it.
                conn.row_factory, conn.cursor_factory, conn.prepare_threshold = as_opened
            data = None if self._encode is None else self._encode(self.value)
        self._check_transaction(conn)
        return data

    def _check_transaction(self, conn: psycopg.Connection[Any]) -> None:
        match conn.pgconn.transaction_status:
            case TransactionStatus.IDLE:
                raise TriojobsError(
                    f"the work of job {self.claim.job_id} ended the transaction itself",
                    operation="committing",
                    hint="leave COMMIT and ROLLBACK to Job.commit and Job.transact",
                )
            case TransactionStatus.INERROR:
                raise TriojobsError(
                    f"the work of job {self.claim.job_id} went on after an error of the database",
                    operation="committing",
                    hint="what may fail goes into a savepoint: `with conn.transaction(): …`",
                )

    def _fence(self, conn: psycopg.Connection[Any], data: tuple[bytes, str] | None) -> bool:
        """Hold the claim, or end it with its result. False: it has ended."""
        claim = self.claim
        job_id, group_id, claim_no = claim.job_id, claim.group_id, claim.claim_no
        if data is None:
            return settle.hold_lease(conn, self._schema, job_id=job_id, group_id=group_id, claim_no=claim_no)
        result, encoding = data
        return settle.settle_one_done(
            conn,
            self._schema,
            job_id=job_id,
            group_id=group_id,
            claim_no=claim_no,
            result=result,
            encoding=encoding,
        )

    def look(self, call: Call) -> str | None:
        claim = self.claim
        status = settle.outcome_of_claim(
            call.conn, self._schema, job_id=claim.job_id, group_id=claim.group_id, claim_no=claim.claim_no
        )
        if status == "done":
            self._committed()
        return status
