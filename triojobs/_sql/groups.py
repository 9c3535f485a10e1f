"""Worker groups: register, beat, close, compare, rescue.

Close, compare and rescue are transactions of separate statements. As one statement they miss rows:
its snapshot is older than its lock, so a claim that committed while it waited stays invisible (2
leases were left under a closed group). They take FOR UPDATE, because a plain UPDATE does not
conflict with a claim's KEY SHARE and would not wait for it at all.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from .._model import CancelRequest, Outcome, Registration, Settled
from .statements import statement

__all__ = [
    "Beat",
    "Comparison",
    "Rescue",
    "add_partitions",
    "beat",
    "close_group",
    "compare",
    "register",
    "rescue",
]

REGISTER: Final = """
WITH witness AS (
    INSERT INTO {schema}.witnesses (group_id) VALUES (%(id)s)
)
INSERT INTO {schema}.worker_groups
    (id, name, host, pid, version, lease_duration, lease_until, queues, concurrency)
VALUES (%(id)s, %(name)s, %(host)s, %(pid)s, %(version)s, %(lease_duration)s,
        clock_timestamp() + %(lease_duration)s * interval '1 second',
        %(queues)s::text::jsonb, %(concurrency)s)
"""

# The plain UPDATE takes NO KEY UPDATE: claims and settles of the group are not blocked by it.
BEAT: Final = """
WITH me AS (
    UPDATE {schema}.worker_groups
    SET lease_until = clock_timestamp() + lease_duration * interval '1 second'
    WHERE id = %(id)s AND closed_at IS NULL
    RETURNING id
)
SELECT l.id, l.claim_no, l.cancel_reason,
       EXISTS (SELECT FROM {schema}.witnesses w WHERE w.group_id = me.id),
       (SELECT d.reason FROM {schema}.drains d WHERE d.group_id = me.id)
FROM me LEFT JOIN {schema}.leases l ON l.group_id = me.id AND l.cancel_reason IS NOT NULL
"""

LOCK_GROUP: Final = "SELECT epoch FROM {schema}.worker_groups WHERE id = %(id)s FOR UPDATE"

CLOSE_GROUP: Final = """
UPDATE {schema}.worker_groups SET closed_at = clock_timestamp() WHERE id = ANY (%(ids)s) AND closed_at IS NULL
"""

FORGET: Final = """
WITH witnesses AS (
    DELETE FROM {schema}.witnesses WHERE group_id = ANY (%(ids)s)
)
DELETE FROM {schema}.waiting WHERE group_id = ANY (%(ids)s)
"""

RELEASE_ALL: Final = """
WITH ended AS (
    DELETE FROM {schema}.leases WHERE group_id = %(id)s RETURNING *
), written AS (
    INSERT INTO {schema}.outcomes (job_id, group_id, claim_no, attempt, status, error, claimed_at)
    SELECT e.id, e.group_id, e.claim_no, e.attempt, 'cancelled', e.cancel_reason, e.claimed_at
    FROM ended e WHERE e.cancel_reason IS NOT NULL
), back AS (
    INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
    SELECT e.id, e.queue, e.priority, e.run_at, e.attempt - 1, e.max_attempts
    FROM ended e WHERE e.cancel_reason IS NULL
)
SELECT id, claim_no, CASE WHEN cancel_reason IS NULL THEN queue END FROM ended
"""

RAISE_EPOCH: Final = """
UPDATE {schema}.worker_groups SET epoch = epoch + 1 WHERE id = %(id)s AND closed_at IS NULL RETURNING epoch
"""

# What a settlement or a commit has ended meanwhile has an outcome. What they released or snoozed has
# none, but then the process knows that it has ended.
MISSING: Final = """
SELECT k.id, k.claim_no
FROM unnest(%(ids)s::bigint[], %(claim_nos)s::bigint[]) AS k(id, claim_no)
WHERE NOT EXISTS (
        SELECT FROM {schema}.leases l
        WHERE l.id = k.id AND l.claim_no = k.claim_no AND l.group_id = %(id)s)
  AND NOT EXISTS (
        SELECT FROM {schema}.outcomes o
        WHERE o.job_id = k.id AND o.claim_no = k.claim_no AND o.group_id = %(id)s)
"""

TESTIFY: Final = "INSERT INTO {schema}.witnesses (group_id) VALUES (%(id)s) ON CONFLICT DO NOTHING"

RELEASE_STRAYS: Final = """
WITH known AS (
    SELECT * FROM unnest(%(ids)s::bigint[], %(claim_nos)s::bigint[]) AS k(id, claim_no)
), ended AS (
    DELETE FROM {schema}.leases l
    WHERE l.group_id = %(id)s
      AND NOT EXISTS (SELECT FROM known k WHERE k.id = l.id AND k.claim_no = l.claim_no)
    RETURNING *
), written AS (
    INSERT INTO {schema}.outcomes (job_id, group_id, claim_no, attempt, status, error, claimed_at)
    SELECT e.id, e.group_id, e.claim_no, e.attempt, 'cancelled', e.cancel_reason, e.claimed_at
    FROM ended e WHERE e.cancel_reason IS NOT NULL
), back AS (
    INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
    SELECT e.id, e.queue, e.priority, e.run_at, e.attempt - 1, e.max_attempts
    FROM ended e WHERE e.cancel_reason IS NULL
)
SELECT queue FROM ended WHERE cancel_reason IS NULL
"""

LOCK_LAPSED: Final = """
SELECT id FROM {schema}.worker_groups
WHERE closed_at IS NULL AND lease_until < clock_timestamp()
ORDER BY id
FOR UPDATE SKIP LOCKED
"""

# Takes what the lapsed groups held and what is left under closed or missing ones (belt and
# braces). A lease that a running `commit` holds is skipped and found in the next round. A group
# is inserted before its first claim, so a lease without a group has truly lost it.
RESCUE: Final = """
WITH ended AS (
    DELETE FROM {schema}.leases l
    WHERE l.id = ANY (ARRAY(
        SELECT x.id FROM {schema}.leases x
        LEFT JOIN {schema}.worker_groups g ON g.id = x.group_id
        WHERE g.id IS NULL OR g.closed_at IS NOT NULL
        ORDER BY x.id
        FOR UPDATE OF x SKIP LOCKED
    ))
    RETURNING l.*, CASE WHEN l.cancel_reason IS NOT NULL THEN 'cancelled'
                        WHEN l.attempt >= l.max_attempts THEN 'killed'
                        ELSE 'failed' END AS outcome
), written AS (
    INSERT INTO {schema}.outcomes (job_id, group_id, claim_no, attempt, status, error, claimed_at)
    SELECT e.id, e.group_id, e.claim_no, e.attempt, e.outcome,
           coalesce(e.cancel_reason, 'rescued: the lease of worker group ' || e.group_id || ' ended'),
           e.claimed_at
    FROM ended e
), back AS (
    INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
    SELECT e.id, e.queue, e.priority, e.run_at, e.attempt, e.max_attempts
    FROM ended e WHERE e.outcome = 'failed'
)
SELECT id, outcome, queue FROM ended
"""


ADD_PARTITIONS: Final = "SELECT {schema}.add_partitions()"


@dataclass(frozen=True, slots=True)
class Beat:
    """What a beat found: open cancel requests, whether the group's witness is there, and why the group
    shall drain (None: it shall not)."""

    requests: list[CancelRequest]
    witnessed: bool
    drain: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a group's leases differed from what it knew.

    Attributes:
        epoch: the new one. missing: known claims (job id, claim_no) without lease and without outcome.
        released: how many unknown rows went back. queues: those in which something became claimable.
    """

    epoch: int
    missing: list[tuple[int, int]]
    released: int
    queues: set[str]


@dataclass(frozen=True, slots=True)
class Rescue:
    """What one round found: dead groups, their jobs by outcome, queues with claimable jobs."""

    groups: tuple[uuid.UUID, ...]
    jobs: int
    queues: frozenset[str]


def register(conn: psycopg.Connection[Any], schema: str, registration: Registration) -> None:
    """Insert the group's row. Its id must be new."""
    parameters = {
        "id": registration.group_id,
        "name": registration.name,
        "host": registration.host,
        "pid": registration.pid,
        "version": registration.version,
        "lease_duration": registration.lease_duration,
        "queues": None if registration.queues is None else json.dumps(dict(registration.queues)),
        "concurrency": registration.concurrency,
    }
    conn.execute(statement(REGISTER, schema), parameters)


def beat(conn: psycopg.Connection[Any], schema: str, group_id: uuid.UUID) -> Beat | None:
    """Prolong the lease; None: the group is closed."""
    rows = conn.execute(statement(BEAT, schema), {"id": group_id}).fetchall()
    if not rows:
        return None
    requests = [CancelRequest(row[0], row[1], row[2]) for row in rows if row[0] is not None]
    return Beat(requests, witnessed=rows[0][3], drain=rows[0][4])


def close_group(
    conn: psycopg.Connection[Any], schema: str, group_id: uuid.UUID
) -> tuple[list[Settled], set[str]]:
    """Close the registration and give back every row under it, in a transaction of its own.

    Returns what was written and the queues in which something became claimable.
    """
    with conn.transaction():
        conn.execute(statement(LOCK_GROUP, schema), {"id": group_id})
        conn.execute(statement(CLOSE_GROUP, schema), {"ids": [group_id]})
        rows = conn.execute(statement(RELEASE_ALL, schema), {"id": group_id}).fetchall()
        conn.execute(statement(FORGET, schema), {"ids": [group_id]})
    written = [
        Settled(job_id, claim_no, Outcome.CANCELLED if queue is None else Outcome.RELEASED)
        for job_id, claim_no, queue in rows
    ]
    return written, {row[2] for row in rows if row[2] is not None}


def compare(
    conn: psycopg.Connection[Any],
    schema: str,
    group_id: uuid.UUID,
    known: Callable[[], Sequence[tuple[int, int]]],
) -> Comparison | None:
    """Raise the epoch, release this group's rows that are not `known`, and let it claim again.

    A claim that was given up either committed before the lock (its rows go back) or waits for the
    lock and then finds another epoch. `known` is asked once the lock is held. None: the group is
    closed or gone.
    """
    with conn.transaction():
        conn.execute(statement(LOCK_GROUP, schema), {"id": group_id})
        row = conn.execute(statement(RAISE_EPOCH, schema), {"id": group_id}).fetchone()
        if row is None:
            return None
        claims = known()
        parameters = {
            "id": group_id,
            "ids": [job_id for job_id, _ in claims],
            "claim_nos": [claim_no for _, claim_no in claims],
        }
        missing = conn.execute(statement(MISSING, schema), parameters).fetchall()
        strays = conn.execute(statement(RELEASE_STRAYS, schema), parameters).fetchall()
        conn.execute(statement(TESTIFY, schema), {"id": group_id})
    return Comparison(int(row[0]), missing, len(strays), {queue for (queue,) in strays})


def rescue(conn: psycopg.Connection[Any], schema: str) -> Rescue:
    """Close every group whose lease has ended, and put their jobs back as failed attempts."""
    with conn.transaction():
        lapsed = [row[0] for row in conn.execute(statement(LOCK_LAPSED, schema)).fetchall()]
        if lapsed:
            conn.execute(statement(CLOSE_GROUP, schema), {"ids": lapsed})
            conn.execute(statement(FORGET, schema), {"ids": lapsed})
        rows = conn.execute(statement(RESCUE, schema)).fetchall()
    return Rescue(tuple(lapsed), len(rows), frozenset(row[2] for row in rows if row[1] == "failed"))


def add_partitions(conn: psycopg.Connection[Any], schema: str) -> int:
    """Create the partitions that the next ids will need; returns how many. Gives way at once to readers."""
    with conn.transaction():
        # Creating one takes an exclusive lock on the default partition: rather come again than make
        # others queue behind us.
        conn.execute("SET LOCAL lock_timeout = '100ms'")
        row = conn.execute(statement(ADD_PARTITIONS, schema)).fetchone()
    return 0 if row is None else int(row[0])
