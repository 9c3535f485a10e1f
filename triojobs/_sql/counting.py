"""Queues in figures: what stands in them now, and what they did lately.

Nothing here reads a table of ended jobs from end to end. What waits or runs is counted in the narrow
tables; what ended lately is a bounded number of the last outcomes; which queues there are is found by
jumping from name to name.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg

from .rows import in_utc
from .statements import plain_cursor, statement

__all__ = ["QueueCounts", "Recent", "RecentQueue", "counts", "estimated_rows", "names", "recent"]

COUNTED: Final = 1_000_000  # waiting rows up to which every one is counted: 0.3 s
CAPPED: Final = 10_000  # beyond: rows of one queue that are counted before it is estimated
SAMPLE: Final = 100_000  # rows that an estimate looks at: 20 ms
RECENT: Final = 10_000  # outcomes: 50 ms
GROUPS_LOOKED_AT: Final = 10_000  # registrations whose queues are named
BANDS: Final = 1000  # priorities of one queue that are looked at for its oldest job

# From each name to the next by the index; a DISTINCT would read every waiting row.
NAMES: Final = """
WITH RECURSIVE due AS (
    (SELECT r.queue FROM {schema}.ready r WHERE r.queue > %(after)s ORDER BY r.queue LIMIT 1)
    UNION ALL
    SELECT n.queue FROM due d CROSS JOIN LATERAL (
        SELECT r.queue FROM {schema}.ready r WHERE r.queue > d.queue ORDER BY r.queue LIMIT 1
    ) n
), later AS (
    (SELECT s.queue FROM {schema}.scheduled s WHERE s.queue > %(after)s ORDER BY s.queue LIMIT 1)
    UNION ALL
    SELECT n.queue FROM later l CROSS JOIN LATERAL (
        SELECT s.queue FROM {schema}.scheduled s WHERE s.queue > l.queue ORDER BY s.queue LIMIT 1
    ) n
)
SELECT q.queue FROM (
    (SELECT queue FROM due LIMIT %(limit)s)
    UNION (SELECT queue FROM later LIMIT %(limit)s)
    UNION SELECT l.queue FROM {schema}.leases l
    UNION SELECT p.queue FROM {schema}.paused_queues p
    UNION SELECT k.queue FROM (
        SELECT g.queues FROM {schema}.worker_groups g ORDER BY g.registered_at DESC, g.id DESC LIMIT %(groups)s
    ) g CROSS JOIN LATERAL jsonb_object_keys(g.queues) k(queue)
    UNION SELECT e.queue FROM unnest(%(known)s::text[]) e(queue)
) q
WHERE q.queue > %(after)s ORDER BY q.queue LIMIT %(limit)s
"""

# The oldest due job of a queue heads one of its priorities: from each to the next by the index.
COUNTS: Final = """
SELECT n.queue, r.rows + s.due, s.rows - s.due, coalesce(l.running, 0), r.failed + s.failed,
       greatest(r.rows, s.rows) < %(most)s,
       least(b.run_at, s.first_due), extract(epoch FROM clock_timestamp() - least(b.run_at, s.first_due))::float8,
       g.groups, g.slots, p.paused_at, p.reason
FROM unnest(%(queues)s::text[]) WITH ORDINALITY n(queue, place)
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, count(*) FILTER (WHERE x.attempts > 0) AS failed
    FROM (SELECT y.attempts FROM {schema}.ready y WHERE y.queue = n.queue LIMIT %(most)s) x
) r
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, count(*) FILTER (WHERE x.attempts > 0) AS failed,
           count(*) FILTER (WHERE x.run_at <= statement_timestamp()) AS due,
           min(x.run_at) FILTER (WHERE x.run_at <= statement_timestamp()) AS first_due
    FROM (
        SELECT y.attempts, y.run_at FROM {schema}.scheduled y WHERE y.queue = n.queue
        ORDER BY y.run_at, y.id LIMIT %(most)s
    ) x
) s
CROSS JOIN LATERAL (
    WITH RECURSIVE band AS (
        (SELECT y.priority, y.run_at FROM {schema}.ready y WHERE y.queue = n.queue
         ORDER BY y.priority DESC, y.run_at, y.id LIMIT 1)
        UNION ALL
        SELECT m.priority, m.run_at FROM band o CROSS JOIN LATERAL (
            SELECT y.priority, y.run_at FROM {schema}.ready y
            WHERE y.queue = n.queue AND y.priority < o.priority
            ORDER BY y.priority DESC, y.run_at, y.id LIMIT 1
        ) m
    )
    SELECT min(x.run_at) AS run_at FROM (SELECT run_at FROM band LIMIT %(bands)s) x
) b
CROSS JOIN LATERAL (
    SELECT count(*) AS groups, coalesce(sum((w.queues ->> n.queue)::int), 0) AS slots
    FROM {schema}.worker_groups w
    WHERE w.closed_at IS NULL AND w.lease_until > clock_timestamp() AND w.queues ? n.queue
) g
LEFT JOIN (SELECT x.queue, count(*) AS running FROM {schema}.leases x GROUP BY x.queue) l ON l.queue = n.queue
LEFT JOIN {schema}.paused_queues p ON p.queue = n.queue
ORDER BY n.place
"""

ESTIMATE_READY: Final = """
SELECT r.queue, count(*), 0, count(*) FILTER (WHERE r.attempts > 0)
FROM {schema}.ready r TABLESAMPLE SYSTEM (%(percent)s) WHERE r.queue = ANY (%(queues)s) GROUP BY r.queue
"""

ESTIMATE_SCHEDULED: Final = """
SELECT s.queue, count(*) FILTER (WHERE s.run_at <= statement_timestamp()),
       count(*) FILTER (WHERE s.run_at > statement_timestamp()), count(*) FILTER (WHERE s.attempts > 0)
FROM {schema}.scheduled s TABLESAMPLE SYSTEM (%(percent)s) WHERE s.queue = ANY (%(queues)s) GROUP BY s.queue
"""

# What the server believes; as fresh as its statistics.
ROWS: Final = """
SELECT t.name,
       sum(CASE WHEN pg_stat_get_live_tuples(c.oid) > 0 THEN pg_stat_get_live_tuples(c.oid)
                ELSE greatest(c.reltuples, 0) END)::bigint
FROM unnest(%(tables)s::text[]) t(name)
JOIN pg_catalog.pg_class p ON p.relname = t.name AND p.relkind IN ('r', 'p')
 AND p.relnamespace = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = {channel})
LEFT JOIN pg_catalog.pg_partition_tree(p.oid) x ON x.isleaf
JOIN pg_catalog.pg_class c ON c.oid = coalesce(x.relid, p.oid)
GROUP BY t.name
"""

# The wait is that of jobs that were never claimed before: an attempt's own due time is not kept, and a
# job that a person retried would count the days that it lay dead.
RECENT_OUTCOMES: Final = """
WITH latest AS MATERIALIZED (
    SELECT s.last_value AS no, clock_timestamp() AS now FROM {schema}.outcome_nos s
), lately AS MATERIALIZED (
    SELECT o.job_id, o.no, o.attempt, o.status, o.claimed_at, o.finished_at
    FROM {schema}.outcomes o WHERE o.no > (SELECT no FROM latest) - %(most)s
), span AS (
    SELECT CASE WHEN l.no > %(most)s
                THEN least(%(window)s, extract(epoch FROM l.now - (SELECT min(finished_at) FROM lately)))
                ELSE %(window)s END AS seconds
    FROM latest l
), known AS (
    SELECT j.queue, r.status, extract(epoch FROM r.finished_at - r.claimed_at)::float8 AS ran,
           CASE WHEN r.attempt = 1 AND NOT EXISTS (
               SELECT FROM {schema}.outcomes e WHERE e.job_id = r.job_id AND e.no < r.no
           ) THEN extract(epoch FROM r.claimed_at - greatest(j.run_at, j.enqueued_at))::float8 END AS waited
    FROM lately r
    CROSS JOIN LATERAL (
        SELECT b.queue, b.run_at, b.enqueued_at FROM {schema}.jobs b WHERE b.id = r.job_id OFFSET 0
    ) j
    WHERE r.finished_at > (SELECT now FROM latest) - %(window)s::float8 * interval '1 second'
)
SELECT (SELECT seconds FROM span)::float8, NULL, 0, 0, 0, 0, NULL, NULL, 0, 0
UNION ALL
SELECT NULL, k.queue, count(*) FILTER (WHERE k.status = 'done'), count(*) FILTER (WHERE k.status = 'failed'),
       count(*) FILTER (WHERE k.status = 'killed'), count(*) FILTER (WHERE k.status = 'cancelled'),
       percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY k.waited),
       percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY k.ran), count(k.ran), sum(k.ran)
FROM known k GROUP BY k.queue
"""


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """What stands in a queue; see `QueueInfo`."""

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


@dataclass(frozen=True, slots=True)
class RecentQueue:
    """What ended in a queue lately. Quantiles in seconds; `runs` attempts ran, `ran_in_all` seconds in all."""

    ended: Mapping[str, int]
    waited: Sequence[float] | None
    ran: Sequence[float] | None
    runs: int
    ran_in_all: float


@dataclass(frozen=True, slots=True)
class Recent:
    """The last outcomes of all queues, and how many seconds back they reach."""

    window: float
    queues: Mapping[str, RecentQueue]


def names(
    conn: psycopg.Connection[Any], schema: str, *, after: str, limit: int, known: Collection[str] = ()
) -> list[str]:
    """Return names of queues in order: with jobs that wait or run, paused, served by a group, or `known`."""
    parameters = {"after": after, "limit": limit, "groups": GROUPS_LOOKED_AT, "known": list(known)}
    return [row[0] for row in plain_cursor(conn).execute(statement(NAMES, schema), parameters).fetchall()]


def counts(conn: psycopg.Connection[Any], schema: str, queues: Sequence[str]) -> list[QueueCounts]:
    """Count what stands in each of the queues, in the order given."""
    rows = estimated_rows(conn, schema, ["ready", "scheduled"])
    few = sum(rows.values()) <= COUNTED
    parameters = {"queues": list(queues), "most": 10 * COUNTED if few else CAPPED, "bands": BANDS}
    found = [
        QueueCounts(*in_utc(row))
        for row in plain_cursor(conn).execute(statement(COUNTS, schema), parameters).fetchall()
    ]
    large = [each.name for each in found if not each.exact]
    if not large:
        return found
    estimates = _estimates(conn, schema, large, rows)
    return [each if each.exact else _enlarged(each, estimates.get(each.name, (0, 0, 0))) for each in found]


def _estimates(
    conn: psycopg.Connection[Any], schema: str, queues: Sequence[str], rows: Mapping[str, int]
) -> dict[str, tuple[int, int, int]]:
    """Return ready, scheduled and failed of each queue, from a sample of the tables' pages."""
    found: dict[str, tuple[int, int, int]] = {}
    for table, template in (("ready", ESTIMATE_READY), ("scheduled", ESTIMATE_SCHEDULED)):
        percent = min(100.0, 100.0 * SAMPLE / max(1, rows.get(table, 0)))
        parameters = {"queues": list(queues), "percent": percent}
        for queue, *sampled in plain_cursor(conn).execute(statement(template, schema), parameters):
            ready, scheduled, failed = (round(n * 100.0 / percent) for n in sampled)
            before = found.get(queue, (0, 0, 0))
            found[queue] = (before[0] + ready, before[1] + scheduled, before[2] + failed)
    return found


def _enlarged(counted: QueueCounts, estimate: tuple[int, int, int]) -> QueueCounts:
    """Return the estimate, but no less than what was counted."""
    ready, scheduled, failed = estimate
    return replace(
        counted,
        ready=max(counted.ready, ready),
        scheduled=max(counted.scheduled, scheduled),
        failed=max(counted.failed, failed),
    )


def estimated_rows(conn: psycopg.Connection[Any], schema: str, tables: Sequence[str]) -> dict[str, int]:
    """Return about how many rows the tables have, all partitions together."""
    cursor = plain_cursor(conn)
    return dict(cursor.execute(statement(ROWS, schema), {"tables": list(tables)}).fetchall())


def recent(conn: psycopg.Connection[Any], schema: str, *, window: float) -> Recent:
    """Measure the last outcomes, at most those of the last `window` seconds."""
    parameters = {"most": RECENT, "window": window}
    head, *rows = plain_cursor(conn).execute(statement(RECENT_OUTCOMES, schema), parameters).fetchall()
    words = ("done", "failed", "killed", "cancelled")
    queues = {
        row[1]: RecentQueue(dict(zip(words, row[2:6], strict=True)), row[6], row[7], row[8], row[9] or 0.0)
        for row in rows
    }
    return Recent(head[0], queues)
