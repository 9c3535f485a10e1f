"""From a `JobFilter` to ids of jobs, a bounded number of rows at a time.

Candidates come in the order of ids, out of the narrowest table that has them all; what they must
fulfil besides is looked up one by one. A slice looks at no more than so many candidates and says where
to go on, so that each statement is short however rare the jobs that are sought. Nothing here needs an
index that the way of a job does not have anyway, but for killed and cancelled jobs and for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, LiteralString

import psycopg

from .._admin_model import JobFilter
from .._model import JobStatus
from .._options import checked_metadata
from .statements import plain_cursor, statement

__all__ = ["ALIVE", "EVERY", "WAITING", "Bounds", "Search", "Slice", "find", "present", "time_bounds"]

CHEAP_SLICE: Final = 50_000  # candidates that need no look elsewhere: 10 to 25 ms
SLICE: Final = 10_000  # candidates that are looked up in other tables, five for a status: 20 to 60 ms
LATELY: Final = 10_000  # outcomes that are looked at for what ended since a time: 5 ms
OVERLAP: Final = 600.0  # seconds by which the server's clock may have been set back meanwhile
RESERVED_AHEAD: Final = 3600.0  # seconds between `new_job_id` and its enqueue that a filter by time allows
LAST_ID: Final = 2**63 - 1

EVERY: Final = frozenset(JobStatus)
WAITING: Final = frozenset({JobStatus.PENDING, JobStatus.FAILED})
ALIVE: Final = WAITING | {JobStatus.RUNNING}
ENDED_BADLY: Final = frozenset({JobStatus.KILLED, JobStatus.CANCELLED})


@dataclass(frozen=True, slots=True)
class Source:
    """Where candidates come from.

    Attributes:
        rows: selects their ids, and what else is at hand, newest first, at most %(budget)s of them.
        statuses: those that they can have. columns: how much of a job is at hand.
    """

    rows: LiteralString
    statuses: frozenset[JobStatus]
    columns: Literal["id", "queue", "body"]


ALL_JOBS: Final = Source(
    """
    SELECT b.id, b.queue, b.key, b.metadata, b.enqueued_at FROM {schema}.jobs b
    WHERE b.id >= %(low)s AND b.id < %(high)s ORDER BY b.id DESC LIMIT %(budget)s
    """,
    EVERY,
    "body",
)

JOBS_OF_KEY: Final = Source(
    """
    SELECT b.id, b.queue, b.key, b.metadata, b.enqueued_at FROM {schema}.jobs b
    WHERE b.key = %(key)s AND b.id >= %(low)s AND b.id < %(high)s ORDER BY b.id DESC LIMIT %(budget)s
    """,
    EVERY,
    "body",
)

GIVEN_IDS: Final = Source(
    """
    SELECT DISTINCT i AS id FROM unnest(%(ids)s::bigint[]) i
    WHERE i >= %(low)s AND i < %(high)s ORDER BY i DESC LIMIT %(budget)s
    """,
    EVERY,
    "id",
)

WAITING_JOBS: Final = Source(
    """
    SELECT w.id, w.queue, w.attempts FROM (
        SELECT id, queue, attempts FROM {schema}.ready
        UNION ALL SELECT id, queue, attempts FROM {schema}.scheduled
    ) w
    WHERE w.id >= %(low)s AND w.id < %(high)s ORDER BY w.id DESC LIMIT %(budget)s
    """,
    WAITING,
    "queue",
)

RUNNING_JOBS: Final = Source(
    """
    SELECT l.id, l.queue FROM {schema}.leases l
    WHERE l.id >= %(low)s AND l.id < %(high)s ORDER BY l.id DESC LIMIT %(budget)s
    """,
    frozenset({JobStatus.RUNNING}),
    "queue",
)

JOBS_ALIVE: Final = Source(
    """
    SELECT a.id, a.queue FROM (
        SELECT id, queue FROM {schema}.ready UNION ALL SELECT id, queue FROM {schema}.scheduled
        UNION ALL SELECT id, queue FROM {schema}.leases
    ) a
    WHERE a.id >= %(low)s AND a.id < %(high)s ORDER BY a.id DESC LIMIT %(budget)s
    """,
    ALIVE,
    "queue",
)

# A job with an outcome may wait or run again, so the status is looked up all the same. Not the bodies:
# a backlog of a million jobs that have not started would have to be walked before the first hit.
JOBS_WITH_OUTCOMES: Final = Source(
    """
    SELECT DISTINCT o.job_id AS id FROM {schema}.outcomes o
    WHERE o.job_id >= %(low)s AND o.job_id < %(high)s ORDER BY o.job_id DESC LIMIT %(budget)s
    """,
    EVERY,
    "id",
)

JOBS_ENDED_BADLY: Final = Source(
    """
    SELECT DISTINCT o.job_id AS id FROM {schema}.outcomes o
    WHERE o.status IN ('killed', 'cancelled') AND o.job_id >= %(low)s AND o.job_id < %(high)s
    ORDER BY o.job_id DESC LIMIT %(budget)s
    """,
    EVERY,
    "id",
)

# OFFSET 0 keeps the look-ups one by one, and with them the order of the candidates.
BODY: Final = """
CROSS JOIN LATERAL (
    SELECT b.queue, b.key, b.metadata, b.enqueued_at FROM {schema}.jobs b WHERE b.id = c.id OFFSET 0
) j
"""

STATUS: Final = """
CROSS JOIN LATERAL (
    SELECT v.status, v.finished_at FROM {schema}.job_status v WHERE v.id = c.id OFFSET 0
) s
"""

LAST_GIVEN: Final = "SELECT last_value FROM {schema}.job_ids"

TIME_BOUNDS: Final = """
SELECT {schema}.first_id_since(%(since)s::timestamptz - %(room)s::float8 * interval '1 second'),
       {schema}.first_id_since(%(until)s::timestamptz + %(room)s::float8 * interval '1 second')
"""

# Between which ids is what ended since, if the last outcomes reach so far back; no row if they do not. An
# outcome gets its number and its time when it is written, so later numbers have later times.
ENDED_SINCE: Final = """
SELECT coalesce(min(o.job_id) FILTER (WHERE o.finished_at >= %(since)s), 0),
       coalesce(max(o.job_id) FILTER (WHERE o.finished_at >= %(since)s), 0)
FROM {schema}.outcomes o WHERE o.no > (SELECT n.last_value - %(most)s FROM {schema}.outcome_nos n)
HAVING min(o.finished_at) < %(since)s::timestamptz - %(overlap)s::float8 * interval '1 second'
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Ids from `low` to below `high`."""

    low: int = -LAST_ID
    high: int = LAST_ID


@dataclass(frozen=True, slots=True)
class Slice:
    """Ids that were found, in order, and what is left to be searched (None: nothing)."""

    ids: list[int]
    rest: Bounds | None


# What is found, and if that is not as much as was wanted, how far the search came. The second half runs
# only when the first one has given all it has.
HEAD: Final = "WITH found AS ((SELECT c.id, false AS is_mark FROM ("
MIDDLE: Final = """ ORDER BY c.id DESC LIMIT %(limit)s)
UNION ALL
(SELECT min(c.id), true FROM ("""
TAIL: Final = ") c HAVING count(*) >= %(budget)s) LIMIT %(limit)s)"

ONLY_IDS: Final = "SELECT f.is_mark, f.id FROM found f ORDER BY f.is_mark, f.id DESC"


@dataclass(frozen=True, slots=True)
class Search:
    """What to look for, in one of the two orders of ids.

    `statuses`: those of the filter that the caller can do something with.
    """

    which: JobFilter
    statuses: frozenset[JobStatus]
    newest_first: bool = True

    def cursor(self, rest: Bounds) -> int:
        """Return the one number that says what is left."""
        return rest.high if self.newest_first else rest.low

    def resumed(self, bounds: Bounds, cursor: int | None) -> Bounds:
        """Return what is left of `bounds` at `cursor` (None: all of it)."""
        if cursor is None:
            return bounds
        if self.newest_first:
            return Bounds(bounds.low, min(bounds.high, cursor))
        return Bounds(max(bounds.low, cursor), bounds.high)

    def statement(self, columns: LiteralString) -> LiteralString:
        """Return the template of a slice; `columns` selects from `found` (id, is_mark)."""
        rows = self._source().rows
        looks, conditions = self._looks()
        found = HEAD + rows + ") c" + looks + " WHERE true" + conditions + MIDDLE + rows + TAIL + columns
        return (
            found if self.newest_first else found.replace(" DESC", " ASC").replace("min(c.id)", "max(c.id)")
        )

    def parameters(self, bounds: Bounds, limit: int) -> dict[str, Any]:
        """Return what the statement refers to."""
        which = self.which
        return {
            "low": bounds.low,
            "high": bounds.high,
            "budget": SLICE if self._looks()[0] else CHEAP_SLICE,
            "limit": limit,
            "ids": None if which.ids is None else list(which.ids),
            "queue": which.queue,
            "key": which.key,
            "statuses": [str(each) for each in self.statuses],
            "metadata": checked_metadata("metadata", which.metadata),
            "enqueued_since": which.enqueued_since,
            "enqueued_until": which.enqueued_until,
            "finished_since": which.finished_since,
            "finished_until": which.finished_until,
        }

    def slice(self, rows: Sequence[tuple[bool, int]], bounds: Bounds, limit: int) -> Slice:
        """Read the answer: (is_mark, id) in order."""
        ids = [job_id for is_mark, job_id in rows if not is_mark]
        if not rows or (len(ids) < limit and not rows[-1][0]):
            return Slice(ids, None)
        last = rows[-1][1]
        return Slice(ids, Bounds(bounds.low, last) if self.newest_first else Bounds(last + 1, bounds.high))

    def _source(self) -> Source:
        """Return the narrowest source that has all of them."""
        if self.which.ids is not None:
            return GIVEN_IDS
        if self.which.key is not None:
            return JOBS_OF_KEY
        for source in (RUNNING_JOBS, WAITING_JOBS, JOBS_ALIVE):
            if self.statuses <= source.statuses:
                return source
        if self.statuses <= ENDED_BADLY:
            return JOBS_ENDED_BADLY
        return ALL_JOBS if self.statuses & ALIVE else JOBS_WITH_OUTCOMES

    def _looks(self) -> tuple[LiteralString, LiteralString]:
        """Return where to look besides the candidates, and the conditions."""
        source = self._source()
        at_hand = self._conditions_at_hand(source)
        on_body = self._conditions_on_body(source)
        on_status = self._conditions_on_status(source)
        looks: LiteralString = ""
        if source.columns == "body":
            on_body = on_body.replace(" j.", " c.")
        elif on_body or source == GIVEN_IDS:  # ids may be made up
            looks += BODY
        if on_status:
            looks += STATUS
        return looks, at_hand + on_body + on_status

    def _conditions_at_hand(self, source: Source) -> LiteralString:
        found: LiteralString = ""
        if self.which.queue is not None and source.columns != "id":
            found += " AND c.queue = %(queue)s"
        if source == WAITING_JOBS and self.statuses != WAITING:
            # Attempts count what failed: a retry by a person starts them anew.
            found += " AND c.attempts > 0" if JobStatus.FAILED in self.statuses else " AND c.attempts = 0"
        return found

    def _conditions_on_body(self, source: Source) -> LiteralString:
        which = self.which
        found: LiteralString = ""
        if which.queue is not None and source.columns == "id":
            found += " AND j.queue = %(queue)s"
        if which.key is not None and source != JOBS_OF_KEY:
            found += " AND j.key = %(key)s"
        if which.metadata is not None:
            found += " AND j.metadata @> %(metadata)s::text::jsonb"
        if which.enqueued_since is not None:
            found += " AND j.enqueued_at >= %(enqueued_since)s"
        if which.enqueued_until is not None:
            found += " AND j.enqueued_at < %(enqueued_until)s"
        return found

    def _conditions_on_status(self, source: Source) -> LiteralString:
        found: LiteralString = ""
        if self.which.finished_since is not None:
            found += " AND s.finished_at >= %(finished_since)s"
        if self.which.finished_until is not None:
            found += " AND s.finished_at < %(finished_until)s"
        if source != WAITING_JOBS and not source.statuses <= self.statuses:
            found += " AND s.status = ANY (%(statuses)s)"
        return found


def present(conn: psycopg.Connection[Any], schema: str, which: JobFilter) -> Bounds:
    """Return between which ids jobs of the filter's times can be that are enqueued by now."""
    bounds = time_bounds(conn, schema, which)
    row = plain_cursor(conn).execute(statement(LAST_GIVEN, schema)).fetchone()
    assert row is not None
    return Bounds(bounds.low, min(bounds.high, int(row[0]) + 1))


def time_bounds(conn: psycopg.Connection[Any], schema: str, which: JobFilter) -> Bounds:
    """Return between which ids jobs of the filter's times can be; no query when it names none."""
    bounds = Bounds()
    # Nothing ends before it was enqueued.
    until = min((t for t in (which.enqueued_until, which.finished_until) if t is not None), default=None)
    if which.enqueued_since is not None or until is not None:
        parameters = {"since": which.enqueued_since, "until": until, "room": RESERVED_AHEAD}
        row = plain_cursor(conn).execute(statement(TIME_BOUNDS, schema), parameters).fetchone()
        assert row is not None
        bounds = Bounds(
            -LAST_ID if which.enqueued_since is None else int(row[0]),
            LAST_ID if until is None else int(row[1]),
        )
    if which.finished_since is not None:
        lately = {"since": which.finished_since, "most": LATELY, "overlap": OVERLAP}
        row = plain_cursor(conn).execute(statement(ENDED_SINCE, schema), lately).fetchone()
        if row is not None:
            bounds = Bounds(max(bounds.low, int(row[0])), min(bounds.high, int(row[1]) + 1))
    return bounds


def find(conn: psycopg.Connection[Any], schema: str, search: Search, bounds: Bounds, *, limit: int) -> Slice:
    """Return the first ids of one slice, at most `limit`."""
    rows = plain_cursor(conn).execute(
        statement(search.statement(ONLY_IDS), schema), search.parameters(bounds, limit)
    )
    return search.slice(rows.fetchall(), bounds, limit)
