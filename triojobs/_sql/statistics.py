"""Figures about all queues, under the names that the admin of apalis has for them.

A snapshot that costs some tens of milliseconds, whatever the number of ended jobs: what waits or runs is
counted, what was killed or cancelled is found by its index, periods are distances between ids, and how
many jobs there are is what the server's own statistics say.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import psycopg

from .._admin_model import Statistic
from .counting import COUNTED, SAMPLE, Recent, estimated_rows, recent
from .rows import in_utc
from .statements import plain_cursor, statement

__all__ = ["statistics"]

BAD_ENDS: Final = 10_000  # killed or cancelled jobs that are looked at: 60 ms
RATE_WINDOW: Final = 86400.0  # seconds; in truth the last 10,000 attempts

# With 100 percent every row is counted.
WAITING: Final = """
SELECT count(*), count(*) FILTER (WHERE w.attempts > 0),
       count(*) FILTER (WHERE w.run_at <= statement_timestamp()),
       min(w.run_at) FILTER (WHERE w.run_at <= statement_timestamp())
FROM {schema}."""

SAMPLED: Final = " w TABLESAMPLE SYSTEM (%(percent)s)"

RUNNING: Final = """
SELECT count(*), count(*) FILTER (WHERE l.claimed_at < clock_timestamp() - interval '1 hour'),
       coalesce(extract(epoch FROM clock_timestamp() - min(l.claimed_at)) / 60, 0)::float8
FROM {schema}.leases l
"""

ENDED_BADLY: Final = """
SELECT count(*) FILTER (WHERE s.status = 'killed'), count(*) FILTER (WHERE s.status = 'cancelled'),
       count(*) FILTER (WHERE s.status = 'killed' AND s.finished_at >= %(today)s),
       count(*) FILTER (WHERE s.status = 'killed' AND s.finished_at >= clock_timestamp() - interval '7 days'),
       count(*) < %(most)s
FROM (
    SELECT DISTINCT o.job_id AS id FROM {schema}.outcomes o WHERE o.status IN ('killed', 'cancelled')
    ORDER BY o.job_id DESC LIMIT %(most)s
) c
CROSS JOIN LATERAL (
    SELECT v.status, v.finished_at FROM {schema}.job_status v WHERE v.id = c.id OFFSET 0
) s
"""

# How many ids were given out since then: some belong to enqueues that were rolled back.
ENQUEUED: Final = """
SELECT j.enqueued_at, greatest(0, j.id + 1 - {schema}.first_id_since(clock_timestamp() - interval '1 hour')),
       greatest(0, j.id + 1 - {schema}.first_id_since(%(today)s)),
       greatest(0, j.id + 1 - {schema}.first_id_since(clock_timestamp() - interval '24 hours')),
       greatest(0, j.id + 1 - {schema}.first_id_since(clock_timestamp() - interval '7 days'))
FROM (SELECT 1) one
LEFT JOIN LATERAL (SELECT b.id, b.enqueued_at FROM {schema}.jobs b ORDER BY b.id DESC LIMIT 1) j ON true
"""

SIZE: Final = """
SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint, current_setting('block_size')::int
FROM pg_catalog.pg_class c
WHERE c.relkind IN ('r', 'p')
  AND c.relnamespace = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = {channel})
"""

TODAY: Final = "SELECT date_trunc('day', clock_timestamp() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"


def statistics(conn: psycopg.Connection[Any], schema: str) -> list[Statistic]:
    """Return all figures. Each statement has a snapshot of its own: they may differ by what happens between."""
    today = _one(conn, schema, TODAY)[0]
    rows = estimated_rows(conn, schema, ["ready", "scheduled", "jobs"])
    waiting, exact = _waiting(conn, schema, rows)
    running, stale, longest = _one(conn, schema, RUNNING)
    killed, cancelled, killed_today, killed_lately, all_seen = _one(
        conn, schema, ENDED_BADLY, {"today": today, "most": BAD_ENDS}
    )
    newest, hour, day, last_24_hours, last_7_days = _one(conn, schema, ENQUEUED, {"today": today})
    size, page = _one(conn, schema, SIZE)
    total, failed, due, oldest = waiting
    active = total + running
    jobs = max(rows.get("jobs", 0), active + killed + cancelled)
    return [
        Statistic("RUNNING_JOBS", running, "jobs", True),
        Statistic("PENDING_JOBS", total - failed, "jobs", exact),
        Statistic("FAILED_JOBS", failed, "jobs", exact),
        Statistic("ACTIVE_JOBS", active, "jobs", exact),
        Statistic("STALE_RUNNING_JOBS", stale, "jobs", True),
        Statistic("LONGEST_RUNNING_JOB_MINS", longest, "minutes", True),
        Statistic("QUEUE_BACKLOG", due, "jobs", exact),
        Statistic("OLDEST_PENDING_JOB", oldest, "time", exact),
        Statistic("MOST_RECENT_JOB", newest, "time", False),
        Statistic("KILLED_JOBS", killed, "jobs", all_seen),
        Statistic("KILLED_JOBS_TODAY", killed_today, "jobs", all_seen),
        Statistic("KILLED_JOBS_PAST_7_DAYS", killed_lately, "jobs", all_seen),
        Statistic("CANCELLED_JOBS", cancelled, "jobs", all_seen),
        Statistic("TOTAL_JOBS", jobs, "jobs", False),
        Statistic("DONE_JOBS", jobs - active - killed - cancelled, "jobs", False),
        Statistic("COMPLETED_JOBS", jobs - active, "jobs", False),
        Statistic("JOBS_PAST_HOUR", hour, "jobs", False),
        Statistic("JOBS_TODAY", day, "jobs", False),
        Statistic("JOBS_PAST_24_HOURS", last_24_hours, "jobs", False),
        Statistic("JOBS_PAST_7_DAYS", last_7_days, "jobs", False),
        Statistic("AVG_JOBS_PER_MINUTE_PAST_HOUR", hour / 60, "jobs/minute", False),
        Statistic("AVG_JOBS_PER_HOUR_PAST_24H", last_24_hours / 24, "jobs/hour", False),
        Statistic("AVG_JOBS_PER_DAY_PAST_7D", last_7_days / 7, "jobs/day", False),
        *_rates(recent(conn, schema, window=RATE_WINDOW)),
        Statistic("DB_SIZE", size, "bytes", True),
        Statistic("DB_PAGE_SIZE", page, "bytes", True),
        Statistic("DB_PAGE_COUNT", size // page, "pages", True),
    ]


def _one(
    conn: psycopg.Connection[Any], schema: str, template: Any, parameters: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    row = plain_cursor(conn).execute(statement(template, schema), parameters).fetchone()
    assert row is not None
    return in_utc(row)


def _waiting(
    conn: psycopg.Connection[Any], schema: str, rows: dict[str, int]
) -> tuple[tuple[int, int, int, dt.datetime | None], bool]:
    """Return how many jobs wait, have failed before, are due, since when the oldest is; and whether exactly."""
    total = failed = due = 0
    oldest: list[dt.datetime] = []
    exact = True
    for table in ("ready", "scheduled"):
        percent = 100.0 if rows.get(table, 0) <= COUNTED else 100.0 * SAMPLE / rows[table]
        template = WAITING + ("ready" if table == "ready" else "scheduled") + SAMPLED
        found = _one(conn, schema, template, {"percent": percent})
        exact = exact and percent == 100.0
        total, failed, due = (
            before + round(n * 100.0 / percent)
            for before, n in zip((total, failed, due), found[:3], strict=True)
        )
        oldest += [found[3]] if found[3] is not None else []
    return (total, failed, due, min(oldest, default=None)), exact


def _rates(lately: Recent) -> list[Statistic]:
    """Return what the last attempts tell of jobs that ended."""
    done = sum(queue.ended["done"] for queue in lately.queues.values())
    killed = sum(queue.ended["killed"] for queue in lately.queues.values())
    ran = sum(queue.runs for queue in lately.queues.values())
    seconds = sum(queue.ran_in_all for queue in lately.queues.values())
    ended = done + killed
    return [
        Statistic("SUCCESS_RATE", 100 * done / ended if ended else None, "percent", False),
        Statistic("FAILURE_RATE", 100 * killed / ended if ended else None, "percent", False),
        Statistic("AVG_JOB_DURATION_MINS", seconds / ran / 60 if ran else None, "minutes", False),
    ]
