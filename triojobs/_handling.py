"""Slots: the tasks that run handlers, and what becomes of what they return and raise.

A worker has N slots. A slot keeps one cancel scope open across jobs and replaces it when a job used
it up; a task and a scope per job cost 2.5 times as much. A job that is cancelled for a reason of its
own (timeout, deadline, cancel request) uses up its scope; one that is cancelled because the group
stops is cancelled from outside, through the scope around all handlers.

Why no outcome is lost: from the handler's return to `ledger.settle` there is no await. A handler
that returned is settled as done even when a cancel came in between.
"""

from __future__ import annotations

import contextvars
import logging
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import CoroutineType
from typing import Any, Final, TypeVar

import trio

from ._errors import CodecError, StaleClaimError
from ._instruments import Watched, is_watched
from ._job import Job
from ._lifecycle import outcome_of_failure
from ._logs import Log
from ._middleware import Middleware, wrapped
from ._model import CancelRequest, Claim, Outcome, Settlement
from ._queue import Worker
from ._registration import LiveRegistration
from ._store import Store
from ._verdict import Circumstances, Verdict, capped, describe, judge

__all__ = ["Slots"]

T = TypeVar("T")
log = Log("triojobs.worker")

YIELD_AFTER: Final = 0.001  # seconds of handlers without a checkpoint before a slot makes one
RESTING: Final = 1.0  # seconds before a job is tried again whose earlier handler still runs here
WAKING: Final = 2  # slots on their way from their sleep to a job: one may be kept by its job, one goes on


@dataclass(slots=True, eq=False)
class Running:
    """One handler at work. Slot → cancel requests, the watch over handlers that do not end.

    `limit` is the bound that was set on the scope (Trio's clock); `limited_by_deadline` says which of
    the two it is. `cancelled_at` is when a request cancelled it. `committed`: it has completed itself.
    `reports` and `given_up` are the watch's.
    """

    claim: Claim
    scope: trio.CancelScope
    task: trio.lowlevel.Task
    limit: float = math.inf
    limited_by_deadline: bool = False
    timeout: float = math.inf
    cancel_reason: str | None = None
    cancelled_at: float = math.inf
    committed: bool = False
    reports: int = 0
    given_up: bool = False

    @property
    def may_be_cancelled(self) -> bool:
        """Whether anything of the job's own may have cancelled the scope; asking the scope takes longer."""
        return self.limit != math.inf or self.cancel_reason is not None


class Slots:
    """The slots of one worker in one registration. Implements JobPort for its jobs.

    Args:
        live: the registration. store: for `Job.commit`. busy_ids: the jobs whose handlers run in this
            group, over all registrations. on_free: called when a slot becomes free. middleware: the group's.
    """

    def __init__(
        self,
        worker: Worker[Any, Any],
        live: LiveRegistration,
        store: Store,
        *,
        busy_ids: set[int],
        on_free: Callable[[], None],
        middleware: Sequence[Middleware] = (),
    ) -> None:
        self.worker = worker
        self.running: dict[int, Running] = {}
        self._live = live
        self._ledger = live.ledger
        self._store = store
        self._busy_ids = busy_ids
        self._on_free = on_free
        self._inbox: deque[tuple[Claim, float]] = deque()
        self._lot = trio.lowlevel.ParkingLot()
        self._taken = 0
        self._waking = 0
        self._withdrawn = False
        self._yielded_at = 0.0
        self._clean = contextvars.copy_context()
        self._call_handler = _with_keyboard_interrupt(
            wrapped(worker.handler, [*middleware, *worker.middleware])
        )

    @property
    def free(self) -> int:
        """How many more jobs may be handed in."""
        return self.worker.concurrency - self._taken

    def hand_in(self, claims: Sequence[Claim], claimed_at: float) -> None:
        """Give claims to slots and wake them; `claimed_at` is Trio's clock when the claim was sent."""
        self.lay_in(claims, claimed_at)
        self.wake_some()

    def lay_in(self, claims: Sequence[Claim], claimed_at: float) -> None:
        """Give claims to slots that are awake; who calls this wakes some of the others soon."""
        self._taken += len(claims)
        self._inbox.extend([(claim, claimed_at) for claim in claims])

    def wake_some(self) -> None:
        """Wake a few slots; each that takes a job wakes the next.

        Waking all of them costs a pass of the scheduler for each job; a slot whose job does not wait
        takes the next one without a checkpoint, and the others never wake.
        """
        more = min(WAKING, len(self._inbox)) - self._waking
        if more > 0:
            self._waking += len(self._lot.unpark(count=more))

    def withdraw(self) -> None:
        """Take back what no handler has started, and start nothing more; closing will release it."""
        self._withdrawn = True
        self._taken -= len(self._inbox)
        self._inbox.clear()

    def cancel(self, request: CancelRequest) -> bool:
        """Cancel one running handler. False: this claim is not running here."""
        running = self.running.get(request.job_id)
        if running is None or running.claim.claim_no != request.claim_no:
            return False
        if running.cancel_reason is None:
            running.cancel_reason = request.reason
            running.cancelled_at = trio.current_time()
            running.scope.cancel(reason=request.reason)
            self._live.handler_cancelled.set()
        return True

    # Slots.

    @trio.lowlevel.enable_ki_protection
    async def slot(self) -> None:
        """Run one job after another, until cancelled."""
        task = trio.lowlevel.current_task()
        while True:
            with trio.CancelScope() as scope:
                while True:
                    await self._ready_for_next(task)
                    await self._start_nothing_when_interrupted()
                    claim, claimed_at = self._inbox.popleft()
                    self.wake_some()
                    running = await self._run(claim, claimed_at, scope, task)
                    # Read the outcome first (it is settled), then see whether the scope is used up.
                    if running.may_be_cancelled and scope.cancel_called:
                        break

    @trio.lowlevel.enable_ki_protection
    async def dispatch(self, nursery: trio.Nursery) -> None:
        """Start a task for each job, until cancelled (isolation="task")."""
        while True:
            while not self._inbox:
                await self._sleep()
            claim, claimed_at = self._inbox.popleft()
            self._clean.copy().run(nursery.start_soon, self._alone, claim, claimed_at)

    @trio.lowlevel.enable_ki_protection
    async def _alone(self, claim: Claim, claimed_at: float) -> None:
        await self._start_nothing_when_interrupted()
        if self._withdrawn:  # after this task was made, before its first step
            self._ended(claim)
            return
        with trio.CancelScope() as scope:
            await self._run(claim, claimed_at, scope, trio.lowlevel.current_task())

    async def _start_nothing_when_interrupted(self) -> None:
        """Raise Cancelled when handlers are being cancelled: without a checkpoint one would run to its end.

        What was not started stays in the ledger, and the closing gives it back.
        """
        if self._live.interrupted_at != math.inf:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def _ready_for_next(self, task: trio.lowlevel.Task) -> None:
        """Return when the inbox has a job, in clean context variables."""
        if task.context != self._clean:
            # A task's context takes effect with its next step, so a step must end here.
            task.context = self._clean.copy()
            await trio.lowlevel.checkpoint()
        elif self._inbox and time.perf_counter() - self._yielded_at > YIELD_AFTER:
            # Handlers without a checkpoint must not starve everybody else.
            await trio.lowlevel.checkpoint()
            self._yielded_at = time.perf_counter()
        while not self._inbox:
            await self._sleep()
            self._yielded_at = time.perf_counter()

    async def _sleep(self) -> None:
        await self._lot.park()
        self._waking -= 1  # a sleeper that is cancelled was not woken

    # One job.

    async def _run(
        self, claim: Claim, claimed_at: float, scope: trio.CancelScope, task: trio.lowlevel.Task
    ) -> Running:
        running = Running(claim, scope, task)
        job = self._prepare(claim, claimed_at, running)
        if job is None:
            self._ended(claim)
            return running
        self.running[claim.job_id] = running
        self._busy_ids.add(claim.job_id)
        self._live.handler_begins()
        watched: Watched | None = None
        began = 0.0
        if is_watched():
            watched = Watched(job, claim.waited + trio.current_time() - claimed_at)
            began = time.perf_counter()
        outcome: Outcome | None = None
        error: BaseException | None = None
        if running.limit != math.inf:
            scope.deadline = running.limit
        try:
            value = await self._call_handler(job)
        except BaseException as exc:
            error = exc
            verdict = judge(exc, claim, self._circumstances(running))
            outcome = self._settle(claim, verdict)
            if verdict.propagate is not None:
                if verdict.propagate is exc:
                    raise
                raise verdict.propagate from None
        else:
            outcome = self._returned(claim, value)
        finally:
            if watched is not None:
                watched.end(
                    time.perf_counter() - began, Outcome.DONE if running.committed else outcome, error
                )
            error = None  # no cycle through this frame
            if running.limit != math.inf:
                scope.deadline = math.inf
            del self.running[claim.job_id]
            self._busy_ids.remove(claim.job_id)
            self._live.handler_ends()
            self._ended(claim)
        return running

    def _ended(self, claim: Claim) -> None:
        self._taken -= 1
        self._on_free()

    def _prepare(self, claim: Claim, claimed_at: float, running: Running) -> Job[Any] | None:
        """Return the job, or None when it is settled without being run, or not ours any more."""
        if not self._ledger.owns(claim):
            return None
        if claim.job_id in self._busy_ids:
            # Our lease was lost and its handler does not obey: no second one beside it.
            self._settle(claim, Verdict(Outcome.SNOOZED, delay=RESTING))
            return None
        if claim.payload is None or claim.encoding is None:
            self._settle(claim, Verdict(Outcome.KILLED, "the job's body is missing"))
            return None
        if claim.deadline_in is not None:
            running.limit = claimed_at + claim.deadline_in
            running.limited_by_deadline = True
            if running.limit <= trio.current_time():
                self._settle(claim, Verdict(Outcome.KILLED, "past its deadline before it was started"))
                return None
        timeout = self.worker.timeout if claim.timeout is None else claim.timeout
        if timeout is not None and trio.current_time() + timeout < running.limit:
            running.limit = trio.current_time() + timeout
            running.limited_by_deadline = False
            running.timeout = timeout
        try:
            payload = self.worker.queue.decode_payload(claim.payload, claim.encoding.decode())
            job = Job(claim, payload, self)
            _ = job.key, job.metadata  # text that does not decode belongs to this job's troubles alone
        except (CodecError, UnicodeDecodeError) as exc:
            self._settle(claim, Verdict(Outcome.KILLED, capped(f"the payload cannot be read: {exc}")))
            return None
        except Exception as exc:
            # Another version may know this shape: a failed attempt, retried by policy.
            failed = outcome_of_failure(claim.attempt, claim.max_attempts)
            self._settle(
                claim, Verdict(failed, capped(f"the payload does not fit {self.worker.queue!r}: {exc}"))
            )
            return None
        return job

    def _circumstances(self, running: Running) -> Circumstances:
        own = running.scope.cancel_called
        interrupted_at = self._live.interrupted_at
        bound = own and running.cancel_reason is None and running.limit <= interrupted_at
        effective = trio.current_effective_deadline() == -math.inf
        return Circumstances(
            cancel_reason=running.cancel_reason,
            timed_out=running.timeout if bound and not running.limited_by_deadline else None,
            past_deadline=bound and running.limited_by_deadline,
            interrupted=effective,
        )

    def _returned(self, claim: Claim, value: object) -> Outcome | None:
        queue = self.worker.queue
        try:
            data = queue.encode_result(value)
        except Exception as exc:
            if not self._ledger.owns(claim):
                return None  # committed by Job.commit, or moved on
            failed = outcome_of_failure(claim.attempt, claim.max_attempts)
            return self._settle(claim, Verdict(failed, describe(exc)))
        owned = self._ledger.settle(
            claim,
            Settlement(claim.job_id, claim.claim_no, Outcome.DONE, None, data, queue.codec.name),
        )
        return Outcome.DONE if owned else None

    def _settle(self, claim: Claim, verdict: Verdict) -> Outcome | None:
        """Note the verdict; return its outcome, or None when the claim had ended before."""
        delay = verdict.delay
        if delay is None:
            failed = verdict.outcome is Outcome.FAILED
            delay = self.worker.retry.delay(claim.attempt, random.random) if failed else 0.0
        owned = self._ledger.settle(
            claim,
            Settlement(claim.job_id, claim.claim_no, verdict.outcome, error=verdict.error, delay=delay),
        )
        told = verdict.outcome is Outcome.CANCELLED  # whoever cancelled it knows why
        if verdict.log_error is not None or (not owned and verdict.error is not None and not told):
            log.error(
                "job %d of %r raised while it was being cancelled, or after its commit: %s",
                claim.job_id,
                claim.queue,
                verdict.error if verdict.log_error is None else describe(verdict.log_error),
                extra={"event": "error_aside", "job_id": claim.job_id, "queue": claim.queue},
            )
        if not owned:
            return None
        if verdict.outcome in (Outcome.FAILED, Outcome.KILLED):
            self._log_failure(claim, verdict)
        return verdict.outcome

    def _log_failure(self, claim: Claim, verdict: Verdict) -> None:
        error = verdict.error or ""
        killed = verdict.outcome is Outcome.KILLED
        log.log(
            logging.WARNING if killed else logging.INFO,  # what is tried again is no news for everybody
            "job %d of %r %s (attempt %d of %d): %s",
            claim.job_id,
            claim.queue,
            "was killed" if killed else "failed",
            claim.attempt,
            claim.max_attempts,
            error.partition("\n")[0],
            extra={
                "event": "job_killed" if killed else "job_failed",
                "job_id": claim.job_id,
                "queue": claim.queue,
                "attempt": claim.attempt,
                "group_id": str(claim.group_id),
                "error": error,
            },
        )

    # JobPort.

    def cancel_reason(self, claim: Claim) -> str | None:
        running = self.running.get(claim.job_id)
        return running.cancel_reason if running is not None and running.claim is claim else None

    def _committed(self, claim: Claim) -> None:
        self._ledger.committed(claim)
        running = self.running.get(claim.job_id)
        if running is not None and running.claim is claim:
            running.committed = True
        self._live.feed.committed_soon(claim)

    @trio.lowlevel.enable_ki_protection  # it runs inside the handler, where Ctrl-C may strike
    async def commit_work(self, claim: Claim, work: Callable[[Any], T], *, completing: bool) -> T:
        operation = "committing" if completing else "transacting"
        if not self._ledger.owns(claim):
            await trio.lowlevel.checkpoint()
            raise StaleClaimError(claim.job_id, operation=operation)
        queue = self.worker.queue

        def encode(value: T) -> tuple[bytes, str]:
            return queue.encode_result(value), queue.codec.name

        return await self._store.commit_work(
            claim, work, encode if completing else None, lambda: self._committed(claim)
        )


def _with_keyboard_interrupt(handler: Callable[[Job[Any]], Any]) -> Callable[[Job[Any]], Any]:
    """Let Ctrl-C raise inside the user's code; our own code around it is protected."""

    @trio.lowlevel.disable_ki_protection
    async def call(job: Job[Any]) -> Any:
        awaitable = handler(job)
        if type(awaitable) is not CoroutineType and not isinstance(awaitable, Awaitable):
            raise TypeError(
                f"a handler must be an async function, but {handler!r} returned {type(awaitable).__name__}"
            )
        return await awaitable

    return call
