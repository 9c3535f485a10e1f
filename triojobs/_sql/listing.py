"""Reads for operators: lists of jobs, one job with its history, worker groups."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any, Final

import psycopg

from .._admin_model import Attempt, GroupInfo, GroupState, JobSummary
from .._model import JobStatus, RawJob
from .inspect import READ_JOBS
from .rows import in_utc
from .selecting import Bounds, Search, Slice
from .statements import plain_cursor, statement

__all__ = ["groups", "read_job", "summaries"]

HISTORY_LIMIT: Final = 1000  # attempts; a job that snoozes for ever must not become a page of megabytes

SUMMARIES: Final = """
SELECT f.is_mark, f.id, s.queue, s.status, s.attempts, s.max_attempts, s.priority, s.run_at, s.key, s.metadata,
       s.group_id, s.enqueued_at, s.claimed_at, s.finished_at, j.deadline, left(s.last_error, 500),
       l.cancel_reason
FROM found f
LEFT JOIN LATERAL (SELECT * FROM {schema}.job_status v WHERE v.id = f.id AND NOT f.is_mark OFFSET 0) s ON true
LEFT JOIN LATERAL (SELECT b.deadline FROM {schema}.jobs b WHERE b.id = s.id OFFSET 0) j ON true
LEFT JOIN LATERAL (SELECT r.cancel_reason FROM {schema}.leases r WHERE r.id = s.id OFFSET 0) l ON true
ORDER BY f.is_mark, f.id DESC
"""

# Job and history under one snapshot, so that they tell of the same instant.
READ_JOB: Final = (
    "SELECT r.*, h.* FROM ("
    + READ_JOBS
    + """) r
CROSS JOIN LATERAL (
    SELECT array_agg(a.attempt), array_agg(a.status), array_agg(a.error), array_agg(a.group_id),
           array_agg(g.name), array_agg(g.host), array_agg(a.claimed_at), array_agg(a.finished_at)
    FROM (
        SELECT * FROM (
            (SELECT x.no, x.attempt, x.status, x.error, x.group_id, x.claimed_at, x.finished_at
             FROM {schema}.outcomes x WHERE x.job_id = r.id ORDER BY x.no DESC LIMIT %(most)s)
            UNION ALL
            SELECT NULL, l.attempt, 'running', NULL, l.group_id, l.claimed_at, NULL
            FROM {schema}.leases l WHERE l.id = r.id
        ) o
        ORDER BY o.no NULLS LAST
    ) a
    LEFT JOIN LATERAL (SELECT * FROM {schema}.worker_groups w WHERE w.id = a.group_id OFFSET 0) g ON true
) h
"""
)


# The open ones are few and have an index of their own; OFFSET 0 keeps the closed ones, of months
# perhaps, out of the search for them.
OPEN_GROUPS: Final = "(SELECT * FROM {schema}.worker_groups o WHERE o.closed_at IS NULL OFFSET 0)"
ALL_GROUPS: Final = "{schema}.worker_groups"

GROUPS_HEAD: Final = """
SELECT g.id, g.name, g.host, g.pid, g.version,
       CASE WHEN g.closed_at IS NOT NULL THEN 'closed' WHEN g.lease_until <= clock_timestamp() THEN 'lapsed'
            WHEN d.group_id IS NOT NULL THEN 'draining' ELSE 'alive' END,
       g.queues, g.concurrency, coalesce(r.running, 0), g.registered_at,
       g.lease_until - g.lease_duration * interval '1 second',
       extract(epoch FROM clock_timestamp() - g.lease_until)::float8 + g.lease_duration,
       g.lease_until, g.closed_at, d.requested_at, d.reason
FROM (
    SELECT * FROM """

GROUPS_TAIL: Final = """ p
    WHERE (p.registered_at, p.id) < (%(registered_at)s::timestamptz, %(id)s::uuid)
    ORDER BY p.registered_at DESC, p.id DESC LIMIT %(limit)s
) g
LEFT JOIN (SELECT l.group_id, count(*) AS running FROM {schema}.leases l GROUP BY l.group_id) r
       ON r.group_id = g.id
LEFT JOIN LATERAL (SELECT * FROM {schema}.drains x WHERE x.group_id = g.id OFFSET 0) d ON true
ORDER BY g.registered_at DESC, g.id DESC
"""


def summaries(
    conn: psycopg.Connection[Any], schema: str, search: Search, bounds: Bounds, *, limit: int
) -> tuple[list[JobSummary], Slice]:
    """Return the first jobs of one slice, at most `limit`, and what is left to be searched."""
    rows = (
        plain_cursor(conn)
        .execute(statement(search.statement(SUMMARIES), schema), search.parameters(bounds, limit))
        .fetchall()
    )
    found = [JobSummary(row[1], row[2], JobStatus(row[3]), *in_utc(row[4:])) for row in rows if not row[0]]
    return found, search.slice([(row[0], row[1]) for row in rows], bounds, limit)


def read_job(
    conn: psycopg.Connection[Any], schema: str, job_id: int
) -> tuple[RawJob, tuple[Attempt, ...]] | None:
    """Return one job and its attempts, oldest first, with the one that runs."""
    parameters = {"ids": [job_id], "most": HISTORY_LIMIT}
    row = plain_cursor(conn).execute(statement(READ_JOB, schema), parameters).fetchone()
    if row is None:
        return None
    job, history = row[:-8], row[-8:]
    attempts = (
        () if history[0] is None else tuple(Attempt(*in_utc(each)) for each in zip(*history, strict=True))
    )
    return RawJob(*job), attempts


def groups(
    conn: psycopg.Connection[Any],
    schema: str,
    *,
    closed: bool,
    before: tuple[dt.datetime, uuid.UUID] | None,
    limit: int,
) -> list[GroupInfo]:
    """Return registrations, newest first, at most `limit`; `before`: time and id of the last one seen."""
    template = GROUPS_HEAD + (ALL_GROUPS if closed else OPEN_GROUPS) + GROUPS_TAIL
    at, group_id = ("infinity", uuid.UUID(int=2**128 - 1)) if before is None else before
    parameters = {"registered_at": at, "id": group_id, "limit": limit}
    rows = plain_cursor(conn).execute(statement(template, schema), parameters).fetchall()
    return [_group(*in_utc(row)) for row in rows]


def _group(
    group_id: uuid.UUID, name: str, host: str, pid: int, version: str, state: str, *rest: Any
) -> GroupInfo:
    return GroupInfo(group_id, name, host, pid, version, GroupState(state), *rest)
