"""Delete jobs that do not run, with everything that is known of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import psycopg

from .._model import JobStatus
from .statements import plain_cursor, statement
from .steering import Act, Changed, locking, span, tried

__all__ = ["deleting"]

LOCK_READY: Final = """
SELECT x.id FROM {schema}.ready x
WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
ORDER BY x.id FOR UPDATE SKIP LOCKED
"""

LOCK_SCHEDULED: Final = """
SELECT x.id FROM {schema}.scheduled x
WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
ORDER BY x.id FOR UPDATE SKIP LOCKED
"""

# Keeps retries away: they lock the body too.
LOCK_BODIES: Final = """
SELECT j.id, j.key IS NOT NULL FROM unnest(%(ids)s::bigint[]) i
CROSS JOIN LATERAL (
    SELECT b.id, b.key FROM {schema}.jobs b WHERE b.id = i OFFSET 0 FOR UPDATE SKIP LOCKED
) j
"""

DELETE_WAITING: Final = """
WITH due AS (DELETE FROM {schema}.ready WHERE id = ANY (%(ids)s::bigint[]))
DELETE FROM {schema}.scheduled WHERE id = ANY (%(ids)s::bigint[])
"""

# Under one snapshot: a job on its way from one table to the next is in exactly one of them, as others
# see it. So what is in none of them has ended, or has just lost its waiting row to us.
GONE: Final = """
SELECT i FROM unnest(%(ids)s::bigint[]) i
WHERE NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.id = i OFFSET 0)
  AND NOT EXISTS (SELECT FROM {schema}.scheduled s WHERE s.id = i OFFSET 0)
  AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.id = i OFFSET 0)
  AND (i = ANY (%(waited)s::bigint[]) OR (
      SELECT x.status FROM {schema}.outcomes x WHERE x.job_id = i ORDER BY x.no DESC LIMIT 1
  ) = ANY (%(statuses)s::text[]))
  AND (%(latest)s::bigint IS NULL OR NOT EXISTS (
      SELECT FROM {schema}.outcomes x WHERE x.job_id = i AND x.no > %(latest)s OFFSET 0))
"""

# A key that somebody is taking over is left to him; one whose job is gone holds nobody up.
LOCK_KEYS: Final = """
SELECT k.queue, k.key FROM unnest(%(ids)s::bigint[]) i
CROSS JOIN LATERAL (SELECT b.queue, b.key FROM {schema}.jobs b WHERE b.id = i OFFSET 0) j
CROSS JOIN LATERAL (
    SELECT x.queue, x.key FROM {schema}.keys x
    WHERE x.queue = j.queue AND x.key = j.key AND x.job_id = i OFFSET 0 FOR UPDATE SKIP LOCKED
) k
"""

DELETE_KEYS: Final = """
DELETE FROM {schema}.keys k USING unnest(%(queues)s::text[], %(keys)s::text[]) d(queue, key)
WHERE k.queue = d.queue AND k.key = d.key
"""

DELETE_OUTCOMES: Final = """
DELETE FROM {schema}.outcomes o
WHERE o.job_id = ANY (%(ids)s::bigint[]) AND o.job_id >= %(least)s AND o.job_id <= %(most)s
"""

DELETE_BODIES: Final = """
DELETE FROM {schema}.jobs j
WHERE j.id = ANY (%(ids)s::bigint[]) AND j.id >= %(least)s AND j.id <= %(most)s
"""


def deleting(statuses: Collection[JobStatus], *, latest: int | None = None) -> Act:
    """Return the act that deletes jobs of these statuses, and without an outcome after number `latest`."""

    def act(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int], /, *, wait: bool) -> Changed:
        cursor = plain_cursor(conn)
        with conn.transaction():
            waiting: set[int] = set()
            if asked := tried(statuses):
                for template in (LOCK_READY, LOCK_SCHEDULED):
                    parameters = {"ids": sorted(ids), "tried": asked}
                    found = cursor.execute(statement(locking(template, wait=wait), schema), parameters)
                    waiting |= {row[0] for row in found}
            template = locking(LOCK_BODIES, wait=wait)
            bodies = cursor.execute(statement(template, schema), {"ids": sorted(ids)}).fetchall()
            locked = [row[0] for row in bodies]
            waited = sorted(waiting.intersection(locked))
            cursor.execute(statement(DELETE_WAITING, schema), {"ids": waited})
            gone = _gone(cursor, schema, locked, waited, statuses, latest)
            _delete(cursor, schema, gone, keyed=any(row[1] for row in bodies))
        return Changed(frozenset(gone))

    return act


def _gone(
    cursor: psycopg.Cursor[Any],
    schema: str,
    locked: Sequence[int],
    waited: Sequence[int],
    statuses: Collection[JobStatus],
    latest: int | None,
) -> list[int]:
    ended = [str(status) for status in statuses if status.ended]
    parameters = {"ids": list(locked), "waited": list(waited), "statuses": ended, "latest": latest}
    return [row[0] for row in cursor.execute(statement(GONE, schema), parameters)]


def _delete(cursor: psycopg.Cursor[Any], schema: str, ids: list[int], *, keyed: bool) -> None:
    if not ids:
        return
    if keyed:
        keys = cursor.execute(statement(LOCK_KEYS, schema), {"ids": ids}).fetchall()
        parameters = {"queues": [row[0] for row in keys], "keys": [row[1] for row in keys]}
        cursor.execute(statement(DELETE_KEYS, schema), parameters)
    for template in (DELETE_OUTCOMES, DELETE_BODIES):
        cursor.execute(statement(template, schema), span(ids))
