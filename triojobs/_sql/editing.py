"""Change jobs that have not started: priority, attempts, payload.

A job that has an outcome or a lease has started, and its body stays: handlers and people must be able
to rely on what ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import psycopg

from .statements import plain_cursor, statement
from .steering import Act, Changed, locking, span

__all__ = ["Changes", "editing"]

LOCK_READY: Final = """
SELECT x.id FROM {schema}.ready x WHERE x.id = ANY (%(ids)s::bigint[]) AND x.attempts = 0
ORDER BY x.id FOR UPDATE SKIP LOCKED
"""

LOCK_SCHEDULED: Final = """
SELECT x.id FROM {schema}.scheduled x WHERE x.id = ANY (%(ids)s::bigint[]) AND x.attempts = 0
ORDER BY x.id FOR UPDATE SKIP LOCKED
"""

EDIT_BODY: Final = """
UPDATE {schema}.jobs j
SET priority = coalesce(%(priority)s, j.priority), max_attempts = coalesce(%(max_attempts)s, j.max_attempts),
    payload = coalesce(%(payload)s, j.payload), encoding = coalesce(%(encoding)s, j.encoding)
WHERE j.id = ANY (%(ids)s::bigint[]) AND j.id >= %(least)s AND j.id <= %(most)s
  AND NOT EXISTS (SELECT FROM {schema}.outcomes o WHERE o.job_id = j.id OFFSET 0)
RETURNING j.id
"""

# Also when nothing in it changes: a claim whose snapshot is older misses a row that was updated; with a
# mere lock it would take the row and read the old body although the edit was reported.
EDIT_WAITING: Final = """
WITH due AS (
    UPDATE {schema}.ready SET priority = coalesce(%(priority)s, priority),
                              max_attempts = coalesce(%(max_attempts)s, max_attempts)
    WHERE id = ANY (%(ids)s::bigint[])
)
UPDATE {schema}.scheduled SET priority = coalesce(%(priority)s, priority),
                              max_attempts = coalesce(%(max_attempts)s, max_attempts)
WHERE id = ANY (%(ids)s::bigint[])
"""


@dataclass(frozen=True, slots=True)
class Changes:
    """What to change; None: leave it."""

    priority: int | None = None
    max_attempts: int | None = None
    payload: bytes | None = None
    encoding: str | None = None


def editing(changes: Changes) -> Act:
    """Return the act that changes jobs that have not started."""

    def act(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int], /, *, wait: bool) -> Changed:
        cursor = plain_cursor(conn)
        with conn.transaction():
            locked: list[int] = []
            for template in (LOCK_READY, LOCK_SCHEDULED):
                found = cursor.execute(statement(locking(template, wait=wait), schema), {"ids": sorted(ids)})
                locked += [row[0] for row in found]
            if not locked:
                return Changed()
            parameters = asdict(changes) | span(locked)
            done = [row[0] for row in cursor.execute(statement(EDIT_BODY, schema), parameters)]
            cursor.execute(statement(EDIT_WAITING, schema), parameters | {"ids": sorted(done)})
        return Changed(frozenset(done))

    return act
