"""What a person does to a job by its id: cancel, retry.

"0 rows" proves only "not there at my snapshot": the job may have been on its way between two
tables. So each place is looked at with a statement of its own, at most three rounds.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

import psycopg

from .._errors import DatabaseError, DuplicateJobError, JobNotFoundError
from .statements import plain_cursor, statement

__all__ = ["CANCELLED_WAITING", "ENDED_BEFORE", "cancel", "queue_of", "retry"]

ROUNDS: Final = 3

CANCEL_WAITING: Final = """
WITH ready AS (DELETE FROM {schema}.ready WHERE id = %(id)s RETURNING id, attempts),
later AS (DELETE FROM {schema}.scheduled WHERE id = %(id)s RETURNING id, attempts)
INSERT INTO {schema}.outcomes (job_id, attempt, status, error)
SELECT id, attempts, 'cancelled', %(reason)s FROM (TABLE ready UNION ALL TABLE later) w
"""

# The one update on a job's way. The first reason stays.
CANCEL_RUNNING: Final = """
UPDATE {schema}.leases SET cancel_reason = coalesce(cancel_reason, %(reason)s) WHERE id = %(id)s
RETURNING group_id
"""

LOOK: Final = """
SELECT EXISTS (SELECT FROM {schema}.jobs WHERE id = %(id)s),
       EXISTS (SELECT FROM {schema}.ready WHERE id = %(id)s)
       OR EXISTS (SELECT FROM {schema}.scheduled WHERE id = %(id)s)
       OR EXISTS (SELECT FROM {schema}.leases WHERE id = %(id)s)
"""

QUEUE_OF: Final = "SELECT queue FROM {schema}.jobs WHERE id = %(id)s"

LOCK_BODY: Final = "SELECT queue, key FROM {schema}.jobs WHERE id = %(id)s FOR NO KEY UPDATE"

# "Ended" is an absence, and an absence cannot be locked: the body's lock keeps two operators apart,
# and this second statement sees what the first of them did. As one statement both inserted.
RETRY: Final = """
INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT j.id, j.queue, j.priority, clock_timestamp(), 0, j.max_attempts
FROM {schema}.jobs j
WHERE j.id = %(id)s
  AND NOT EXISTS (SELECT FROM {schema}.ready WHERE id = %(id)s)
  AND NOT EXISTS (SELECT FROM {schema}.scheduled WHERE id = %(id)s)
  AND NOT EXISTS (SELECT FROM {schema}.leases WHERE id = %(id)s)
"""

# The new generation makes a take-over that waited for us look again.
HOLD_KEY: Final = """
INSERT INTO {schema}.keys AS k (queue, key, job_id, hold) VALUES (%(queue)s, %(key)s, %(id)s, 'kept')
ON CONFLICT (queue, key) DO UPDATE
SET generation = k.generation + CASE WHEN k.job_id = %(id)s THEN 1 ELSE 0 END
RETURNING job_id
"""

CANCELLED_WAITING: Final = None
"""`cancel` returns this when the job waited and is cancelled now."""


class Ended:
    """`cancel` returns the one instance when the job had ended before."""


ENDED_BEFORE: Final = Ended()


def cancel(conn: psycopg.Connection[Any], schema: str, job_id: int, reason: str) -> uuid.UUID | Ended | None:
    """Cancel a waiting job, or ask for the cancellation of a running one.

    Returns the group that runs it (to be notified), CANCELLED_WAITING, or ENDED_BEFORE.

    Raises:
        JobNotFoundError: there is no such job.
        DatabaseError: it changed hands for three rounds (transient).
    """
    parameters = {"id": job_id, "reason": reason}
    for _ in range(ROUNDS):
        if plain_cursor(conn).execute(statement(CANCEL_WAITING, schema), parameters).rowcount:
            return CANCELLED_WAITING
        running = plain_cursor(conn).execute(statement(CANCEL_RUNNING, schema), parameters).fetchone()
        if running is not None:
            group: uuid.UUID = running[0]
            return group
        exists, alive = plain_cursor(conn).execute(statement(LOOK, schema), {"id": job_id}).fetchone() or (
            False,
            False,
        )
        if not exists:
            raise JobNotFoundError(job_id, operation="cancelling")
        if not alive:
            return ENDED_BEFORE
    raise DatabaseError(
        f"job {job_id} kept changing hands", operation="cancelling", hint="repeat the call", transient=True
    )


def retry(conn: psycopg.Connection[Any], schema: str, job_id: int) -> bool:
    """Put an ended job back into `ready` with all its attempts. False: it has not ended.

    Raises:
        JobNotFoundError: there is no such job.
        DuplicateJobError: its key has passed on to another job.
    """
    with conn.transaction() as look:
        body = plain_cursor(conn).execute(statement(LOCK_BODY, schema), {"id": job_id}).fetchone()
        if body is None:
            raise JobNotFoundError(job_id, operation="retrying")
        if plain_cursor(conn).execute(statement(RETRY, schema), {"id": job_id}).rowcount == 0:
            raise psycopg.Rollback(look)  # a caller's transaction shall not keep the body locked for nothing
        queue, key = body
        if key is not None:
            # After the insert: keys come last in the lock order, and a job that has not ended is told
            # so even when its key has passed on.
            parameters = {"queue": queue, "key": key, "id": job_id}
            holder = plain_cursor(conn).execute(statement(HOLD_KEY, schema), parameters).fetchone()
            if holder is not None and holder[0] != job_id:
                raise DuplicateJobError(queue=queue, key=key, job_id=holder[0], operation="retrying")
        return True
    return False


def queue_of(conn: psycopg.Connection[Any], schema: str, job_id: int) -> str | None:
    """Return the queue of a job, which never changes, or None."""
    row = plain_cursor(conn).execute(statement(QUEUE_OF, schema), {"id": job_id}).fetchone()
    return None if row is None else str(row[0])
