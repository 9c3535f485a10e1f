"""What an admin does, as steps: checked arguments, then one short call after the other.

Each function here either returns one `Step`, or is a generator that yields steps, is sent what they
gave, and returns the answer. Whoever drives it decides where the steps run: in a Trio task, in a
thread, or in the caller's transaction. So the asynchronous and the synchronous admin cannot differ.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from dataclasses import fields
from typing import Any, Final, TypeVar

from ._admin_model import (
    Explanation,
    GroupInfo,
    JobDetails,
    JobFilter,
    JobSummary,
    Page,
    Quantiles,
    QueueInfo,
    Statistic,
)
from ._admin_store import Step, Steps
from ._client import REASON_LIMIT, checked_job_id, info_of
from ._errors import JobNotFoundError, OptionError, checked_seconds
from ._explanation import explained
from ._options import checked_count, checked_name, checked_text, checked_time
from ._queue import Queue
from ._sql import counting, explaining, listing, pausing, selecting
from ._sql import statistics as statistics_sql
from ._sql.counting import QueueCounts, Recent
from ._sql.effects import Effect
from ._sql.selecting import Bounds, Search, Slice

__all__ = [
    "drain",
    "explain",
    "groups",
    "job",
    "jobs",
    "pause",
    "queue",
    "queues",
    "resume",
    "statistics",
]

T = TypeVar("T")

PAGE_LIMIT: Final = 1000  # items of a page: as much as one statement returns in some milliseconds
SEARCH_TIME: Final = 2.0  # seconds: a page that is not full by then is handed over as it is


def checked_filter(which: object) -> JobFilter:
    """Return a filter (None: every job), or raise OptionError."""
    if which is None:
        return JobFilter()
    if not isinstance(which, JobFilter):
        raise OptionError("which", which, "a triojobs.JobFilter")
    return which


def checked_cursor(after: object) -> int | None:
    """Return what a page of jobs said about where to go on, or raise OptionError."""
    if after is None:
        return None
    if isinstance(after, str) and after.isascii() and after.lstrip("-").isdecimal() and len(after) <= 20:
        return checked_count("after", int(after), least=-selecting.LAST_ID, most=selecting.LAST_ID)
    raise OptionError("after", after, "the `next` of an earlier page of this list")


def jobs(
    which: JobFilter | None, limit: int, after: str | None, newest_first: bool
) -> Steps[Page[JobSummary]]:
    """Find one page of jobs."""
    which = checked_filter(which)
    checked_count("limit", limit, most=PAGE_LIMIT)
    cursor = checked_cursor(after)
    search = Search(which, which.statuses, newest_first)
    bounds: Bounds | None = None
    found: list[JobSummary] = []
    give_up_at = time.monotonic() + SEARCH_TIME

    def look(conn: Any, schema: str) -> Effect[tuple[list[JobSummary], Slice]]:
        where = bounds
        if where is None:
            where = search.resumed(selecting.time_bounds(conn, schema, which), cursor)
        return Effect(listing.summaries(conn, schema, search, where, limit=limit - len(found)))

    while True:
        items, looked = yield Step("reading jobs", look)
        found += items
        bounds = looked.rest
        if bounds is None:
            return Page(tuple(found), None)
        if len(found) >= limit or time.monotonic() >= give_up_at:
            return Page(tuple(found), str(search.cursor(bounds)))


def job(job_id: int, queue: Queue[Any, Any] | None) -> Step[JobDetails[Any]]:
    """Read one job with its history."""
    checked_job_id(job_id)

    def work(conn: Any, schema: str) -> Effect[JobDetails[Any]]:
        found = listing.read_job(conn, schema, job_id)
        if found is None:
            raise JobNotFoundError(job_id, operation="reading a job")
        raw, history = found
        return Effect(JobDetails(info_of(raw, queue), history))

    return Step("reading a job", work)


def explain(job_id: int) -> Step[Explanation]:
    """Find out why a job does not run now."""
    checked_job_id(job_id)

    def work(conn: Any, schema: str) -> Effect[Explanation]:
        found = explaining.facts(conn, schema, job_id)
        if found is None:
            raise JobNotFoundError(job_id, operation="explaining a job")
        return Effect(explained(found))

    return Step("explaining a job", work)


def groups(*, closed: bool, limit: int, after: str | None) -> Step[Page[GroupInfo]]:
    """Find one page of worker groups."""
    checked_flag("closed", closed)
    checked_count("limit", limit, most=PAGE_LIMIT)
    before = None if after is None else checked_group_cursor(after)

    def work(conn: Any, schema: str) -> Effect[Page[GroupInfo]]:
        found = listing.groups(conn, schema, closed=closed, before=before, limit=limit)
        full = len(found) == limit
        following = f"{found[-1].registered_at.isoformat()}/{found[-1].id}" if full else None
        return Effect(Page(tuple(found), following))

    return Step("reading worker groups", work)


def checked_group_cursor(after: object) -> tuple[dt.datetime, uuid.UUID]:
    """Return what a page of groups said about where to go on, or raise OptionError."""
    try:
        at, _, group_id = str(after).partition("/")
        return checked_time("after", dt.datetime.fromisoformat(at)), uuid.UUID(group_id)
    except ValueError:
        raise OptionError("after", after, "the `next` of an earlier page of this list") from None


def queues(*, window: float, limit: int, after: str | None) -> Step[Page[QueueInfo]]:
    """Find one page of queues."""
    window = checked_seconds("window", window, positive=True)
    checked_count("limit", limit, most=PAGE_LIMIT)
    last = "" if after is None else checked_name("after", after)

    def work(conn: Any, schema: str) -> Effect[Page[QueueInfo]]:
        lately = counting.recent(conn, schema, window=window)
        names = counting.names(conn, schema, after=last, limit=limit, known=lately.queues)
        found = tuple(_queue_info(each, lately) for each in counting.counts(conn, schema, names))
        return Effect(Page(found, names[-1] if len(names) == limit else None))

    return Step("reading queues", work)


def queue(name: object, *, window: float) -> Step[QueueInfo]:
    """Look at one queue."""
    checked = checked_queue(name)
    window = checked_seconds("window", window, positive=True)

    def work(conn: Any, schema: str) -> Effect[QueueInfo]:
        lately = counting.recent(conn, schema, window=window)
        (found,) = counting.counts(conn, schema, [checked])
        return Effect(_queue_info(found, lately))

    return Step("reading a queue", work)


def _queue_info(counts: QueueCounts, lately: Recent) -> QueueInfo:
    recent = lately.queues.get(counts.name)
    ended = recent.ended if recent else dict.fromkeys(("done", "failed", "killed", "cancelled"), 0)
    return QueueInfo(
        **{each.name: getattr(counts, each.name) for each in fields(counts)},
        window=lately.window,
        ended=ended,
        throughput=sum(ended.values()) / lately.window if lately.window > 0 else 0.0,
        wait=Quantiles(*recent.waited) if recent and recent.waited else None,
        run=Quantiles(*recent.ran) if recent and recent.ran else None,
    )


def statistics() -> Step[dict[str, Statistic]]:
    """Look at all figures."""

    def work(conn: Any, schema: str) -> Effect[dict[str, Statistic]]:
        return Effect({each.name: each for each in statistics_sql.statistics(conn, schema)})

    return Step("reading statistics", work)


# Pausing and draining.


def pause(queue: object, reason: str) -> Steps[bool]:
    """Pause a queue, and wait for the claims that began before."""
    name = checked_queue(queue)
    checked_text("reason", reason, least=0, most=REASON_LIMIT)
    operation = f"pausing queue {name!r}"

    def work(conn: Any, schema: str) -> Effect[bool]:
        return Effect(pausing.pause(conn, schema, name, reason))

    def wait(conn: Any, schema: str) -> Effect[None]:
        pausing.wait_for_claims(conn, schema)
        return Effect(None)

    paused: bool = yield Step(operation, work)
    yield Step(operation, wait, after_commit=True)
    return paused


def resume(queue: object) -> Step[bool]:
    """Resume a queue and wake who waits for it."""
    name = checked_queue(queue)

    def work(conn: Any, schema: str) -> Effect[bool]:
        resumed = pausing.resume(conn, schema, name)
        return Effect(resumed, queues=frozenset({name}) if resumed else frozenset())

    return Step(f"resuming queue {name!r}", work)


def drain(group_id: object, reason: str) -> Step[bool]:
    """Ask a group to drain."""
    if not isinstance(group_id, uuid.UUID):
        raise OptionError("group_id", group_id, "the id of a worker group (a UUID)")
    checked_text("reason", reason, least=0, most=REASON_LIMIT)

    def work(conn: Any, schema: str) -> Effect[bool]:
        is_open = pausing.drain(conn, schema, group_id, reason)
        return Effect(is_open, groups=frozenset({group_id}) if is_open else frozenset())

    return Step(f"draining worker group {group_id}", work)


def checked_queue(queue: object) -> str:
    """Return the name of a queue given by name or as a Queue, or raise OptionError."""
    return queue.name if isinstance(queue, Queue) else checked_name("queue", queue)


def checked_flag(field: str, value: object) -> bool:
    """Return a bool, or raise OptionError."""
    if not isinstance(value, bool):
        raise OptionError(field, value, "True or False")
    return value
