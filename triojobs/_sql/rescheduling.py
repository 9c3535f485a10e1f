"""Change when jobs that wait are due."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from typing import Any, Final

import psycopg

from .._model import JobStatus
from .statements import plain_cursor, statement
from .steering import Act, Changed, locking, span, tried

__all__ = ["rescheduling"]

DUE_AT: Final = """
SELECT t.at, t.at <= clock_timestamp()
FROM (SELECT coalesce(%(run_at)s::timestamptz,
                      clock_timestamp() + %(delay)s::float8 * interval '1 second') AS at) t
"""

TO_READY: Final = """
WITH moved AS (
    DELETE FROM {schema}.scheduled WHERE id = ANY (ARRAY(
        SELECT x.id FROM {schema}.scheduled x
        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
        ORDER BY x.id FOR UPDATE SKIP LOCKED
    )) RETURNING id, queue, priority, attempts, max_attempts
), put AS (
    INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
    SELECT id, queue, priority, %(at)s, attempts, max_attempts FROM moved
), kept AS (
    UPDATE {schema}.ready SET run_at = %(at)s WHERE id = ANY (ARRAY(
        SELECT x.id FROM {schema}.ready x
        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
        ORDER BY x.id FOR UPDATE SKIP LOCKED
    )) RETURNING id, queue
)
SELECT id, queue FROM moved UNION ALL SELECT id, queue FROM kept
"""

TO_SCHEDULED: Final = """
WITH moved AS (
    DELETE FROM {schema}.ready WHERE id = ANY (ARRAY(
        SELECT x.id FROM {schema}.ready x
        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
        ORDER BY x.id FOR UPDATE SKIP LOCKED
    )) RETURNING id, queue, priority, attempts, max_attempts
), put AS (
    INSERT INTO {schema}.scheduled (id, queue, priority, run_at, attempts, max_attempts)
    SELECT id, queue, priority, %(at)s, attempts, max_attempts FROM moved
), kept AS (
    UPDATE {schema}.scheduled SET run_at = %(at)s WHERE id = ANY (ARRAY(
        SELECT x.id FROM {schema}.scheduled x
        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
        ORDER BY x.id FOR UPDATE SKIP LOCKED
    )) RETURNING id, queue
)
SELECT id, queue FROM moved UNION ALL SELECT id, queue FROM kept
"""

# The body of a job that has started stays as it was when it started.
BODY_RUN_AT: Final = """
UPDATE {schema}.jobs j SET run_at = %(at)s
WHERE j.id = ANY (%(ids)s::bigint[]) AND j.id >= %(least)s AND j.id <= %(most)s
  AND NOT EXISTS (SELECT FROM {schema}.outcomes o WHERE o.job_id = j.id OFFSET 0)
"""


def rescheduling(run_at: dt.datetime | None, delay: float | None, statuses: Collection[JobStatus]) -> Act:
    """Return the act that has jobs of these statuses run at a time, or so many seconds from then."""

    def act(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int], /, *, wait: bool) -> Changed:
        cursor = plain_cursor(conn)
        with conn.transaction():
            when = cursor.execute(statement(DUE_AT, schema), {"run_at": run_at, "delay": delay}).fetchone()
            assert when is not None
            at, is_due = when
            template = locking(TO_READY if is_due else TO_SCHEDULED, wait=wait)
            parameters = {"ids": sorted(ids), "tried": tried(statuses), "at": at}
            rows = cursor.execute(statement(template, schema), parameters).fetchall()
            done = sorted(row[0] for row in rows)
            if done:
                cursor.execute(statement(BODY_RUN_AT, schema), span(done) | {"at": at})
        return Changed(frozenset(done), queues=frozenset(row[1] for row in rows))

    return act
