"""The vocabulary of data: enums and frozen records, with nothing that waits or decides.

Written by → read by stands beside each record that crosses a border.
"""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "Enqueued",
    "Fence",
    "GroupStatistics",
    "JobInfo",
    "JobStatus",
    "Outcome",
    "ShutdownReport",
]

PayloadT = TypeVar("PayloadT")
OnConflict: TypeAlias = Literal["raise", "return", "replace"]
KeyUntil: TypeAlias = "Literal['kept', 'ended'] | float"

Fence: TypeAlias = tuple[uuid.UUID, int]
"""`(group_id, claim_no)`: with the job's id it names one claim, for ever. Equal or not, never greater."""


class JobStatus(StrEnum):
    """Where a job is, as the view `job_status` decides it."""

    PENDING = "pending"
    RUNNING = "running"
    FAILED = "failed"  # the last attempt failed; waiting for the next
    DONE = "done"
    KILLED = "killed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True for done, killed and cancelled: the job will not run again unless a person retries it."""
        return self in ENDED


ENDED: Final = frozenset({JobStatus.DONE, JobStatus.KILLED, JobStatus.CANCELLED})


class Outcome(StrEnum):
    """How a claim ends."""

    DONE = "done"
    FAILED = "failed"  # will be tried again
    KILLED = "killed"
    CANCELLED = "cancelled"
    SNOOZED = "snoozed"  # runs again later; the attempt is not counted
    RELEASED = "released"  # given back untouched; the attempt is refunded


SETTLED: Final = (Outcome.DONE, Outcome.FAILED, Outcome.KILLED, Outcome.CANCELLED, Outcome.SNOOZED)


class NewRow(NamedTuple):
    """One job, validated and encoded: what enqueueing sends. Client → store.

    `delay` and `run_at` exclude each other; neither means now, by the server's clock. A tuple, because
    one is made for each job: a frozen dataclass of this size takes four times as long.
    """

    queue: str
    payload: bytes
    encoding: str
    delay: float | None = None
    run_at: dt.datetime | None = None
    priority: int = 0
    max_attempts: int = 5
    timeout: float | None = None
    deadline: dt.datetime | None = None
    key: str | None = None
    hold: str = "kept"  # kept | ended | until
    hold_seconds: float | None = None
    metadata: str = "{}"  # JSON text of an object
    job_id: int | None = None
    on_conflict: OnConflict = "raise"

    @property
    def is_plain(self) -> bool:
        """Whether nothing can stand in its way: it has neither a key nor an id of the caller's."""
        return self.key is None and self.job_id is None


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The answer of `try_enqueue`.

    Attributes:
        id: the job that exists now under this call's id or key.
        created: True if this call made it.
        replaced: True if this call changed the body of a job that had not started.
    """

    id: int
    created: bool
    replaced: bool = False


@dataclass(slots=True, eq=False)
class Claim:
    """One claimed row, as the claim returned it: bytes and numbers only. Store → ledger → handler.

    Text stays undecoded until the job's own task looks at it: bytes that do not decode then spoil
    one job, not the booking of its batch. Times are seconds since the epoch by the server's clock.
    `payload` is None when the body is missing.
    """

    job_id: int
    claim_no: int
    group_id: uuid.UUID
    queue: str
    attempt: int
    max_attempts: int
    priority: int
    run_at: float
    enqueued_at: float | None
    payload: bytes | None
    encoding: bytes | None
    timeout: float | None
    deadline: float | None
    claimed_at: float
    key: bytes | None
    metadata: bytes | None
    last_error: bytes | None

    @property
    def deadline_in(self) -> float | None:
        """Seconds from the claim until the deadline; negative: it has passed."""
        return None if self.deadline is None else self.deadline - self.claimed_at

    @property
    def waited(self) -> float:
        """Seconds from when it was due, or was enqueued if that was later, until the claim."""
        return max(0.0, self.claimed_at - max(self.run_at, self.enqueued_at or self.run_at))

    @property
    def fence(self) -> Fence:
        return (self.group_id, self.claim_no)


class Settlement(NamedTuple):
    """What to write about one claim. Handler → ledger → settler → store.

    A tuple, as `Settled`: there is one of each for each job, and a frozen dataclass takes four times as long.
    `delay`: seconds until the next run, for failed and snoozed.
    """

    job_id: int
    claim_no: int
    outcome: Outcome
    error: str | None = None
    result: bytes | None = None
    encoding: str | None = None
    delay: float = 0.0


class Settled(NamedTuple):
    """What was written about one claim: a cancel asked for meanwhile may have changed the outcome."""

    job_id: int
    claim_no: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Somebody asked to cancel a running job. Store → heartbeat → handler."""

    job_id: int
    claim_no: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawJob:
    """One row of `job_status` with body and last result, undecoded. Store → client."""

    id: int
    queue: str
    status: str
    attempts: int
    max_attempts: int
    priority: int
    run_at: dt.datetime
    key: str | None
    metadata: dict[str, Any]
    group_id: uuid.UUID | None
    enqueued_at: dt.datetime
    claimed_at: dt.datetime | None
    finished_at: dt.datetime | None
    last_error: str | None
    payload: bytes
    encoding: str
    deadline: dt.datetime | None
    result: bytes | None
    result_encoding: str | None
    claim_no: int | None
    cancel_reason: str | None


@dataclass(frozen=True, slots=True)
class JobInfo(Generic[PayloadT]):
    """A job as it stood when it was read.

    Attributes:
        payload: typed when read with its queue, plain CBOR/JSON values otherwise.
        status: see `JobStatus`.
        attempts: attempts made (counted at the claim; a released one is given back).
        result: what the handler returned, once done; None before.
        error: text of the last failure, the reason of a kill or of a cancellation; else None.
        group: id of the group that runs it, or ended it; None while it waits.
        fence: `(group_id, claim_no)` of the claim that runs or ended it; None while it waits.
        cancel_reason: why its cancellation was asked for while it ran or waited; else None.
        run_at: when it is (was) due; enqueued_at, claimed_at, finished_at: server times, UTC.
    """

    id: int
    queue: str
    status: JobStatus
    payload: PayloadT
    attempts: int
    max_attempts: int
    priority: int
    metadata: Mapping[str, Any]
    key: str | None
    enqueued_at: dt.datetime
    run_at: dt.datetime
    deadline: dt.datetime | None
    claimed_at: dt.datetime | None
    finished_at: dt.datetime | None
    result: Any
    error: str | None
    group: uuid.UUID | None
    fence: Fence | None
    cancel_reason: str | None

    @property
    def attempt(self) -> int:
        """The number of the present or last attempt; 0 before the first."""
        return self.attempts

    @property
    def last_error(self) -> str | None:
        """The same as `error`, by the name that a running job has for it."""
        return self.error


@dataclass(frozen=True, slots=True)
class Registration:
    """What a group writes about itself when it registers. Group → store.

    `queues`: slots of each queue that it serves (None: it does not say); `concurrency`: cap of their
    sum, or None.
    """

    group_id: uuid.UUID
    name: str
    host: str
    pid: int
    version: str
    lease_duration: float
    queues: Mapping[str, int] | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class HardStop:
    """What `hard_stop` is told: what does not end.

    Attributes:
        reason: "handler": handlers were cancelled `seconds` ago and have not ended; their leases are
            kept, the group waits for them. "loop": the event loop has been blocked for `seconds`; the
            group has stopped beating, and its jobs will be run elsewhere.
        group_id: the registration. job_ids: those handlers' jobs; with "loop" all that are in hand.
        stack: where they are, or where the event loop is.
    """

    reason: Literal["handler", "loop"]
    group_id: uuid.UUID
    job_ids: tuple[int, ...]
    seconds: float
    stack: str


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """What a worker group did, in numbers that equal the rows.

    Attributes:
        settled: outcomes written, by outcome ("done", "failed", "killed", "cancelled", "snoozed").
        released: claims given back with their attempt refunded.
        abandoned: ids of jobs that are still `running` under this group's ids because the database
            could not be reached in time; they are rescued when the lease ends.
        unknown_claims: claims whose reply never came and that could not be swept; their jobs, if
            any, cannot be named and are rescued when the lease ends.
        duration: seconds that the shutdown took.
        group_ids: the ids of all registrations of the group, oldest first.
    """

    settled: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys((str(o) for o in SETTLED), 0))
    released: int = 0
    abandoned: tuple[int, ...] = ()
    unknown_claims: int = 0
    duration: float = 0.0
    group_ids: tuple[uuid.UUID, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """A snapshot of a group's work. Counters are sums since it was opened.

    Attributes:
        running: handlers that run now. free: slots without a job.
        unsettled: ended claims whose outcome is not written yet.
        claimed, settled, released: claims taken, ended by an outcome, given back.
        stale: outcomes refused because the job had moved on.
        rescued: jobs that this group took from groups whose lease had ended.
        lease_until: when the lease must be thought lost, on the group's clock (seconds);
            minus infinity when there is none.
        registrations: how often the group registered (1 unless its lease was lost).
        lease_age: seconds since the last beat that the server has confirmed was sent: below
            lease_duration minus lease_margin while all is well; infinity when there is no lease.
        loop_blocked: how often something blocked the event loop for about a second or longer while
            jobs were in hand; the log says where.
        events_dropped: events that readers of `events` had no room for.
    """

    running: int
    free: int
    unsettled: int
    claimed: int
    settled: int
    released: int
    stale: int
    rescued: int
    lease_until: float
    registrations: int
    loop_blocked: int
    events_dropped: int = 0
    lease_age: float = math.inf
