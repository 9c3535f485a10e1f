"""Cancel many jobs: those that wait at once, those that run by asking their groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import psycopg

from .._model import JobStatus
from .statements import plain_cursor, statement
from .steering import Act, Changed, locking, tried

__all__ = ["cancelling"]

CANCEL_WAITING: Final = """
WITH due AS (
    DELETE FROM {schema}.ready WHERE id = ANY (ARRAY(
        SELECT x.id FROM {schema}.ready x
        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
        ORDER BY x.id FOR UPDATE SKIP LOCKED
    )) RETURNING id, attempts
), later AS (
    DELETE FROM {schema}.scheduled WHERE id = ANY (ARRAY(
        SELECT x.id FROM {schema}.scheduled x
        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])
        ORDER BY x.id FOR UPDATE SKIP LOCKED
    )) RETURNING id, attempts
)
INSERT INTO {schema}.outcomes (job_id, attempt, status, error)
SELECT id, attempts, 'cancelled', %(reason)s FROM (TABLE due UNION ALL TABLE later) w
RETURNING job_id
"""

# NO KEY UPDATE, because `Job.transact` holds the lease FOR KEY SHARE while it commits. The first
# reason stays.
CANCEL_RUNNING: Final = """
UPDATE {schema}.leases SET cancel_reason = coalesce(cancel_reason, %(reason)s)
WHERE id = ANY (ARRAY(
    SELECT x.id FROM {schema}.leases x WHERE x.id = ANY (%(ids)s::bigint[])
    ORDER BY x.id FOR NO KEY UPDATE SKIP LOCKED
))
RETURNING id, group_id
"""


def cancelling(reason: str, statuses: Collection[JobStatus]) -> Act:
    """Return the act that cancels jobs of these statuses."""

    def act(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int], /, *, wait: bool) -> Changed:
        cursor = plain_cursor(conn)
        parameters = {"ids": sorted(ids), "tried": tried(statuses), "reason": reason}
        done: set[int] = set()
        groups = set()
        with conn.transaction():
            if parameters["tried"]:
                template = locking(CANCEL_WAITING, wait=wait)
                done |= {row[0] for row in cursor.execute(statement(template, schema), parameters)}
            if JobStatus.RUNNING in statuses:
                template = locking(CANCEL_RUNNING, wait=wait)
                running = cursor.execute(statement(template, schema), parameters).fetchall()
                done |= {row[0] for row in running}
                groups |= {row[1] for row in running}
        return Changed(frozenset(done), groups=frozenset(groups))

    return act
