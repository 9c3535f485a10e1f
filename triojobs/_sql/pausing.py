"""Pause and resume queues, and ask a worker group to drain.

A claim reads the paused queues under its own snapshot. So a pause that committed holds for every claim
that begins afterwards; one whose snapshot is older may still take rows. `claims_in_flight` names the
transactions that may be such claims, for whoever wants to wait for their end.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

import psycopg

from .._errors import GroupNotFoundError
from .statements import plain_cursor, statement

__all__ = ["claims_in_flight", "drain", "pause", "resume"]

PAUSE: Final = """
INSERT INTO {schema}.paused_queues (queue, reason) VALUES (%(queue)s, %(reason)s) ON CONFLICT DO NOTHING
"""

RESUME: Final = "DELETE FROM {schema}.paused_queues WHERE queue = %(queue)s"

# A claim locks the tables of its plan before it takes its snapshot, and keeps them until its end: so
# every claim with an older snapshot is here. RowShareLock on the groups is what claims and settles
# have, and what a transaction of the application's does not have.
IN_FLIGHT: Final = """
SELECT l.virtualtransaction
FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_class c ON c.oid = l.relation
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'RowShareLock'
  AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
  AND n.nspname = {channel} AND c.relname = 'worker_groups' AND l.pid <> pg_backend_pid()
"""

DRAIN: Final = """
INSERT INTO {schema}.drains (group_id, reason)
SELECT g.id, %(reason)s FROM {schema}.worker_groups g WHERE g.id = %(id)s AND g.closed_at IS NULL
ON CONFLICT DO NOTHING
"""

IS_OPEN: Final = "SELECT closed_at IS NULL FROM {schema}.worker_groups WHERE id = %(id)s"


def pause(conn: psycopg.Connection[Any], schema: str, queue: str, reason: str) -> bool:
    """Let nobody claim from this queue. False: it was paused before; that reason stays."""
    parameters = {"queue": queue, "reason": reason}
    return plain_cursor(conn).execute(statement(PAUSE, schema), parameters).rowcount == 1


def resume(conn: psycopg.Connection[Any], schema: str, queue: str) -> bool:
    """Let everybody claim from this queue again. False: it was not paused."""
    return plain_cursor(conn).execute(statement(RESUME, schema), {"queue": queue}).rowcount == 1


def claims_in_flight(conn: psycopg.Connection[Any], schema: str) -> set[str]:
    """Return the transactions that run now and may be claims. An id is not used again."""
    return {row[0] for row in plain_cursor(conn).execute(statement(IN_FLIGHT, schema)).fetchall()}


def drain(conn: psycopg.Connection[Any], schema: str, group_id: uuid.UUID, reason: str) -> bool:
    """Ask a group to stop claiming, finish, and close. False: it is closed.

    Raises:
        GroupNotFoundError: no group has this id.
    """
    cursor = plain_cursor(conn)
    cursor.execute(statement(DRAIN, schema), {"id": group_id, "reason": reason})
    row = cursor.execute(statement(IS_OPEN, schema), {"id": group_id}).fetchone()
    if row is None:
        raise GroupNotFoundError(group_id, operation="draining")
    return bool(row[0])
