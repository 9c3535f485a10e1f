"""Reads for operators: lists of jobs, one job with its history, worker groups."""

from __future__ import annotations

from typing import Any, Final

import psycopg

from .._admin_model import Attempt, JobSummary
from .._model import JobStatus, RawJob
from .inspect import READ_JOBS
from .selecting import Bounds, Search, Slice
from .statements import plain_cursor, statement

__all__ = ["read_job", "summaries"]

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


def summaries(
    conn: psycopg.Connection[Any], schema: str, search: Search, bounds: Bounds, *, limit: int
) -> tuple[list[JobSummary], Slice]:
    """Return the first jobs of one slice, at most `limit`, and what is left to be searched."""
    rows = (
        plain_cursor(conn)
        .execute(statement(search.statement(SUMMARIES), schema), search.parameters(bounds, limit))
        .fetchall()
    )
    found = [JobSummary(row[1], row[2], JobStatus(row[3]), *row[4:]) for row in rows if not row[0]]
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
    attempts = () if history[0] is None else tuple(Attempt(*each) for each in zip(*history, strict=True))
    return RawJob(*job), attempts
