"""What operators ask for and get: filters, pages, and frozen records of what stands in the tables.

All times are the server's, UTC. Durations are seconds.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final, Generic, TypeAlias, TypeVar

from ._errors import OptionError
from ._model import JobInfo, JobStatus
from ._options import KEY_LIMIT, checked_metadata, checked_name, checked_text, checked_time

__all__ = [
    "Attempt",
    "BulkResult",
    "Explanation",
    "GroupInfo",
    "GroupState",
    "JobDetails",
    "JobFilter",
    "JobSummary",
    "Page",
    "Quantiles",
    "QueueInfo",
    "Reason",
    "Statistic",
]

ItemT = TypeVar("ItemT")
PayloadT = TypeVar("PayloadT")
Statuses: TypeAlias = JobStatus | str | Collection[JobStatus | str]

IDS_LIMIT: Final = 10_000  # ids in one filter; more belong into several calls


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs: those for which everything that is given holds; nothing given means every job.

    Args:
        ids: one of these (at most 10,000).
        queue: this queue. key: this key, in any queue unless `queue` is given too.
        status: this status, or one of these; a `JobStatus` or its word.
        metadata: its metadata contains this (as PostgreSQL's `@>`): `{"tenant": 7}`.
        enqueued_since, enqueued_until: enqueued at or after, before; aware datetimes. A job under an id
            that was reserved more than an hour before its enqueue may be left out.
        finished_since, finished_until: ended (done, killed, cancelled) at or after, before.

    Raises:
        OptionError: names the field, its value, and what is allowed.
    """

    ids: Collection[int] | None = None
    queue: str | None = None
    key: str | None = None
    status: Statuses | None = None
    metadata: Mapping[str, Any] | None = None
    enqueued_since: dt.datetime | None = None
    enqueued_until: dt.datetime | None = None
    finished_since: dt.datetime | None = None
    finished_until: dt.datetime | None = None

    def __post_init__(self) -> None:
        if self.ids is not None:
            _check_ids(self.ids)
        if self.queue is not None:
            checked_name("queue", self.queue)
        if self.key is not None:
            checked_text("key", self.key, least=0, most=KEY_LIMIT)
        if self.metadata is not None:
            checked_metadata("metadata", self.metadata)
        for name in ("enqueued_since", "enqueued_until", "finished_since", "finished_until"):
            if getattr(self, name) is not None:
                checked_time(name, getattr(self, name))
        self.statuses  # noqa: B018 - raises for words that are no status

    @property
    def statuses(self) -> frozenset[JobStatus]:
        """The statuses that are asked for; all of them when none is named."""
        if self.status is None:
            return frozenset(JobStatus)
        given = [self.status] if isinstance(self.status, str) else self.status
        words = ", ".join(JobStatus)
        try:
            found = frozenset(JobStatus(each) for each in given)
        except (ValueError, TypeError):
            raise OptionError("status", self.status, f"one or some of: {words}") from None
        if not found:
            raise OptionError("status", self.status, f"at least one of: {words}")
        return found

    @property
    def is_empty(self) -> bool:
        """True when nothing is asked for: every job matches."""
        return all(getattr(self, each.name) is None for each in fields(self))


def _check_ids(ids: object) -> None:
    limit = f"at most {IDS_LIMIT} ids"
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Collection) or len(ids) > IDS_LIMIT:
        raise OptionError("ids", ids, limit)
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not -(2**63) <= each < 2**63:
            raise OptionError("ids", each, "ids of jobs (ints)")


@dataclass(frozen=True, slots=True)
class Page(Generic[ItemT]):
    """Part of a list.

    Attributes:
        items: in the order of the list; may be fewer than the limit, even none, though more follow: a
            search looks for about a second, then hands over what it found.
        next: pass it as `after` to go on; None: this was the end.
    """

    items: tuple[ItemT, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class JobSummary:
    """One line of a list of jobs: everything but payload, result and the full error.

    Attributes:
        status, attempts, max_attempts, priority, metadata, key: as in `JobInfo`.
        group: the group that runs it, or ended it; None while it waits.
        error: the beginning (500 characters) of the last failure's text, or the reason of its end.
        cancel_reason: why its cancellation was asked for while it runs; else None.
    """

    id: int
    queue: str
    status: JobStatus
    attempts: int
    max_attempts: int
    priority: int
    run_at: dt.datetime
    key: str | None
    metadata: Mapping[str, Any]
    group: uuid.UUID | None
    enqueued_at: dt.datetime
    claimed_at: dt.datetime | None
    finished_at: dt.datetime | None
    deadline: dt.datetime | None
    error: str | None
    cancel_reason: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a job, or its cancellation while it waited (no group, no claim).

    Attributes:
        number: from 1; 0 when it was cancelled before its first. Starts anew after a person's retry.
        status: how it ended: "done", "failed", "killed" or "cancelled"; "running" for the present one.
        error: text of the failure, or the reason; else None.
        group, group_name, host: who ran it; name and host are None once the group's row was removed.
        claimed_at, finished_at: server times; None when it was not claimed, has not ended.
    """

    number: int
    status: str
    error: str | None
    group: uuid.UUID | None
    group_name: str | None
    host: str | None
    claimed_at: dt.datetime | None
    finished_at: dt.datetime | None

    @property
    def duration(self) -> float | None:
        """Seconds from the claim to the end; None while it runs, or when it never ran."""
        if self.claimed_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.claimed_at).total_seconds()


@dataclass(frozen=True, slots=True)
class JobDetails(Generic[PayloadT]):
    """One job with everything that is known of it, as it stood at one instant.

    Attributes:
        info: the job, with payload and result.
        history: its attempts, oldest first, with the one that runs; at most the last 1,000.
    """

    info: JobInfo[PayloadT]
    history: tuple[Attempt, ...]


class GroupState(StrEnum):
    """What a registration of a worker group is doing, as far as the database knows."""

    ALIVE = "alive"
    DRAINING = "draining"  # somebody asked it to drain; it has not closed yet
    LAPSED = "lapsed"  # its lease has ended; any living group closes it and takes its jobs
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One registration of a worker group. A lease that was lost brings a new one, with a new id.

    Attributes:
        name, host, pid, version (of triojobs): who it is.
        queues: slots of each queue that it serves; None: a group of an older version, it does not say.
        concurrency: cap of the sum of its slots, or None.
        running: jobs that run under it.
        beat_at: its last beat. lease_age: seconds since then. lease_until: when its jobs may be taken.
        closed_at: None while it is open. drain_requested_at, drain_reason: None unless asked for.
    """

    id: uuid.UUID
    name: str
    host: str
    pid: int
    version: str
    state: GroupState
    queues: Mapping[str, int] | None
    concurrency: int | None
    running: int
    registered_at: dt.datetime
    beat_at: dt.datetime
    lease_age: float
    lease_until: dt.datetime
    closed_at: dt.datetime | None
    drain_requested_at: dt.datetime | None
    drain_reason: str | None


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds that half, 95 % and 99 % of what was looked at stayed below."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """One queue: what stands in it now, and what it did lately.

    Now; exact unless `exact` is False (beyond a million waiting jobs large counts are estimated):

    Attributes:
        ready: jobs that are due. scheduled: not due yet, retries among them. running: jobs that run.
        failed: of those that wait, how many have failed before.
        oldest_due_at: since when the job that has been due for longest waits. oldest_due_age: the same in
            seconds. None: no job is due.
        groups: living groups that serve it. slots: the sum of their slots for it. (Groups of an older
            version do not say what they serve, and do not count.)
        paused_at, pause_reason: None unless it is paused.

    Lately; measured on the last 10,000 attempts that ended in any queue:

    Attributes:
        window: how many seconds back that reaches, at most as many as were asked for.
        ended: attempts that ended, by "done", "failed", "killed", "cancelled".
        throughput: the sum of these per second.
        wait: from due to claimed, of first attempts. run: from claimed to ended. None: there were none.
    """

    name: str
    ready: int
    scheduled: int
    running: int
    failed: int
    exact: bool
    oldest_due_at: dt.datetime | None
    oldest_due_age: float | None
    groups: int
    slots: int
    paused_at: dt.datetime | None
    pause_reason: str | None
    window: float
    ended: Mapping[str, int]
    throughput: float
    wait: Quantiles | None
    run: Quantiles | None


@dataclass(frozen=True, slots=True)
class Statistic:
    """One figure about all queues, under the name that apalis has for it where it has one.

    Attributes:
        value: in `unit` ("jobs", "percent", "minutes", "bytes", "pages", "time" (UTC), "jobs/minute", …);
            None: there is nothing to measure.
        exact: False for estimates: of ended jobs from the server's statistics, of periods from ids.
    """

    name: str
    value: float | int | dt.datetime | None
    unit: str
    exact: bool


class Reason(StrEnum):
    """Why a job does not run now; the first obstacle, where there are several."""

    ENDED = "ended"
    RUNNING = "running"
    CANCELLING = "cancelling"  # it runs, and was asked to stop
    GROUP_LOST = "group lost"  # it ran under a group whose lease has ended; it waits to be rescued
    NOT_DUE = "not due"
    WAITING_FOR_RETRY = "waiting for retry"
    QUEUE_PAUSED = "queue paused"
    NO_GROUP = "no group"  # no living group serves its queue
    SLOTS_BUSY = "slots busy"
    IN_LINE = "in line"  # nothing stands in its way but jobs that are claimed before it
    NOWHERE = "nowhere"  # in none of the tables; cannot happen


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a job does not run now, and what would change it.

    Attributes:
        reason: for programs. text, remedy: for people, each a sentence without its full stop.
        until: when it changes by itself: due, or its group's lease ends; else None.
        ahead: jobs of its queue that are claimed before it (10,000: or more); None: it is not in line.
        group: the group that runs it, or ended it; else None.
    """

    job_id: int
    status: JobStatus | None
    reason: Reason
    text: str
    remedy: str
    until: dt.datetime | None
    ahead: int | None
    group: uuid.UUID | None

    def __str__(self) -> str:
        return f"job {self.job_id}: {self.text}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a call did to the jobs that a filter named.

    Attributes:
        touched: jobs that were changed (with `dry_run`: that would be).
        skipped: jobs that matched when they were found, but had moved on when they were to be changed, or
            cannot be changed: retried, though their key is another job's now; edited, though they had
            been tried before.
    """

    touched: int
    skipped: int
