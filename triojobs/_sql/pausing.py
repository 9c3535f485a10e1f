"""Pause and resume queues, and ask a worker group to drain.

A claim reads the paused queues under its own snapshot. So a pause that committed holds for every claim
that begins afterwards; one whose snapshot is older may still take rows. `claims_in_flight` names the
transactions that may be such claims, for whoever wants to wait for their end.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Final

import psycopg

from .._errors import DatabaseError, GroupNotFoundError
from .statements import plain_cursor, statement

__all__ = ["claims_in_flight", "drain", "pause", "resume", "wait_for_claims"]

CLAIMS_TIME: Final = 3.0  # seconds; a claim takes milliseconds, or its backend is broken off
CLAIMS_POLL: Final = 0.005  # seconds between looks: a look takes the lock manager's locks for a moment

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


def wait_for_claims(conn: psycopg.Connection[Any], schema: str) -> None:
    """Wait, after the commit of a pause, until every claim with an older snapshot has ended.

    Not by a lock: claims and enqueues that come later would have to queue behind it.

    Raises:
        DatabaseError: one of them did not end in three seconds (transient; the pause stands).
    """
    waited_for = claims_in_flight(conn, schema)
    give_up_at = time.monotonic() + CLAIMS_TIME
    while waited_for:
        if time.monotonic() >= give_up_at:
            raise DatabaseError(
                "the queue is paused, but a claim that began before has not ended",
                operation="pausing",
                hint="repeat the call to be sure that nothing is claimed any more",
                transient=True,
                committed=True,
            )
        time.sleep(CLAIMS_POLL)
        waited_for &= claims_in_flight(conn, schema)


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
