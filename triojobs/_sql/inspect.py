"""Reads: jobs by id, and whether anything is left to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import psycopg

from .._model import RawJob
from .statements import statement

__all__ = ["ended", "idle", "read_jobs"]

# OFFSET 0 keeps the look-ups one by one: a plan made while the tables were small would hash every body.
READ_JOBS: Final = """
SELECT s.id, s.queue, s.status, s.attempts, s.max_attempts, s.priority, s.run_at, s.key, s.metadata,
       s.group_id, s.enqueued_at, s.claimed_at, s.finished_at, s.last_error,
       j.payload, j.encoding, j.deadline, CASE WHEN s.status = 'done' THEN o.result END,
       CASE WHEN s.status = 'done' THEN o.encoding END,
       CASE WHEN l.id IS NOT NULL THEN l.claim_no WHEN s.finished_at IS NOT NULL THEN o.claim_no END,
       CASE WHEN l.id IS NOT NULL THEN l.cancel_reason WHEN s.status = 'cancelled' THEN s.last_error END
FROM unnest(%(ids)s::bigint[]) i
CROSS JOIN LATERAL (SELECT * FROM {schema}.job_status v WHERE v.id = i OFFSET 0) s
CROSS JOIN LATERAL (SELECT * FROM {schema}.jobs b WHERE b.id = i OFFSET 0) j
LEFT JOIN LATERAL (SELECT * FROM {schema}.leases r WHERE r.id = i OFFSET 0) l ON true
LEFT JOIN LATERAL (
    SELECT x.result, x.encoding, x.claim_no FROM {schema}.outcomes x
    WHERE s.finished_at IS NOT NULL AND x.job_id = i ORDER BY x.no DESC LIMIT 1
) o ON true
"""

# One snapshot: a job on its way from one table to the next is in exactly one of them. Unknown ids, which
# have no outcome, come first.
ENDED: Final = """
SELECT i FROM unnest(%(ids)s::bigint[]) i
WHERE NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.id = i)
  AND NOT EXISTS (SELECT FROM {schema}.scheduled s WHERE s.id = i)
  AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.id = i)
ORDER BY (SELECT max(o.no) FROM {schema}.outcomes o WHERE o.job_id = i) NULLS FIRST, i
"""

IDLE: Final = """
SELECT NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.queue = ANY (%(queues)s))
   AND NOT EXISTS (SELECT FROM {schema}.scheduled s
                   WHERE s.queue = ANY (%(queues)s) AND s.run_at <= statement_timestamp())
   AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.queue = ANY (%(queues)s))
"""

# The same without a time: in a filter, or with a parameter, it would walk every future row.
EMPTY: Final = """
SELECT NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.queue = ANY (%(queues)s))
   AND NOT EXISTS (SELECT FROM {schema}.scheduled s WHERE s.queue = ANY (%(queues)s))
   AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.queue = ANY (%(queues)s))
"""


def read_jobs(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int]) -> list[RawJob]:
    """Return the jobs that exist, in no particular order."""
    # In binary: the text of a time depends on the session's DateStyle, which may be one that psycopg refuses.
    rows = conn.execute(statement(READ_JOBS, schema), {"ids": list(ids)}, binary=True).fetchall()
    return [RawJob(*row) for row in rows]


def ended(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int]) -> list[int]:
    """Return those ids that are neither waiting nor running: the unknown, then the ended as they ended."""
    return [row[0] for row in conn.execute(statement(ENDED, schema), {"ids": list(ids)}).fetchall()]


def idle(
    conn: psycopg.Connection[Any], schema: str, queues: Collection[str], *, scheduled: bool = False
) -> bool:
    """Return whether nothing due or running, or with `scheduled` nothing at all, is left in these queues."""
    query = statement(EMPTY if scheduled else IDLE, schema)
    row = conn.execute(query, {"queues": sorted(queues)}).fetchone()
    assert row is not None
    return bool(row[0])
