"""Retry many jobs that have ended: they wait again, with all their attempts.

Jobs with a key are retried one by one. Whether the key is still theirs shows only when its row is
locked, and to lock rows of `keys` while holding bodies of other jobs could be a deadlock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import psycopg

from .._errors import DuplicateJobError
from .._model import JobStatus
from .operate import HOLD_KEY
from .statements import plain_cursor, statement
from .steering import Act, Changed, locking

__all__ = ["retrying"]

# "Ended" is an absence, and an absence cannot be locked: the bodies' locks keep two operators apart,
# and the second statement sees what the first of them did. OFFSET 0 keeps the look-ups one by one, in
# the order of the ids, and whatever the tables were like when the plan was made.
LOCK_BODIES: Final = """
SELECT j.id, j.queue, j.key FROM unnest(%(ids)s::bigint[]) i
CROSS JOIN LATERAL (
    SELECT b.id, b.queue, b.key FROM {schema}.jobs b WHERE b.id = i OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED
) j
"""

# In order, so that the clock gives them their old order.
RETRY: Final = """
INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT j.id, j.queue, j.priority, clock_timestamp(), 0, j.max_attempts
FROM unnest(%(ids)s::bigint[]) i
CROSS JOIN LATERAL (SELECT * FROM {schema}.jobs b WHERE b.id = i OFFSET 0) j
CROSS JOIN LATERAL (
    SELECT x.status FROM {schema}.outcomes x WHERE x.job_id = i ORDER BY x.no DESC LIMIT 1
) o
WHERE o.status = ANY (%(statuses)s::text[])
  AND NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.id = i OFFSET 0)
  AND NOT EXISTS (SELECT FROM {schema}.scheduled s WHERE s.id = i OFFSET 0)
  AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.id = i OFFSET 0)
ORDER BY i
RETURNING id, queue
"""


def retrying(statuses: Collection[JobStatus]) -> Act:
    """Return the act that retries jobs which ended with one of these statuses.

    Raises (the act, for one job): DuplicateJobError: its key has passed on to another job.
    """

    def act(conn: psycopg.Connection[Any], schema: str, ids: Sequence[int], /, *, wait: bool) -> Changed:
        cursor = plain_cursor(conn)
        with conn.transaction():
            template = locking(LOCK_BODIES, wait=wait)
            locked = cursor.execute(statement(template, schema), {"ids": sorted(ids)}).fetchall()
            alone = len(ids) == 1
            parameters = {
                "ids": [job_id for job_id, _, key in locked if alone or key is None],
                "statuses": [str(status) for status in statuses],
            }
            rows = cursor.execute(statement(RETRY, schema), parameters).fetchall()
            if rows and alone and locked[0][2] is not None:
                _hold_key(cursor, schema, *locked[0])
        return Changed(frozenset(row[0] for row in rows), queues=frozenset(row[1] for row in rows))

    return act


def _hold_key(cursor: psycopg.Cursor[Any], schema: str, job_id: int, queue: str, key: str) -> None:
    parameters = {"queue": queue, "key": key, "id": job_id}
    holder = cursor.execute(statement(HOLD_KEY, schema), parameters).fetchone()
    if holder is not None and holder[0] != job_id:
        raise DuplicateJobError(queue=queue, key=key, job_id=holder[0], operation="retrying")
