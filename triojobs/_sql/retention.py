"""Remove what is older than anybody wants to keep it.

A range of a million ids is dropped whole when few of its jobs have to stay: `survivors` names them, a
bounded number of ids at a time and the newest first, so that a young range is known by one look. The
rest goes job by job (`expired`, and the act of deletion). Nothing here waits for a worker, and nothing
that a worker does waits for longer than the locks' timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from .._retention import Retention
from .statements import plain_cursor, statement

__all__ = [
    "WIDTH",
    "Horizon",
    "Keys",
    "Rows",
    "delete_groups",
    "delete_keys",
    "drop_range",
    "expired",
    "gone_keys",
    "horizon",
    "ranges",
    "survivors",
    "take_turn",
]

WIDTH: Final = 1_000_000  # ids in a range: `add_partitions` in the migrations
# What comes later than our request for the lock waits behind it for so long.
LIMIT_LOCK: Final = "SET LOCAL lock_timeout = '100ms'"
FIRST_KEY: Final = ("", "")  # before all: a queue has a name

TAKE_TURN: Final = """
INSERT INTO {schema}.chores AS c (name, next_at)
VALUES ('prune', clock_timestamp() + %(seconds)s::float8 * interval '1 second')
ON CONFLICT (name) DO UPDATE SET next_at = excluded.next_at WHERE c.next_at <= clock_timestamp()
"""

HORIZON: Final = """
SELECT (SELECT last_value FROM {schema}.outcome_nos),
       (SELECT last_value FROM {schema}.job_ids),
       {schema}.first_id_since(clock_timestamp() - %(least)s::float8 * interval '1 second')
"""

RANGES: Final = """
SELECT substr(c.relname, 6)::bigint AS n
FROM pg_catalog.pg_inherits i
JOIN pg_catalog.pg_class p ON p.oid = i.inhparent
JOIN pg_catalog.pg_namespace s ON s.oid = p.relnamespace
JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
WHERE s.nspname = {channel} AND p.relname = 'jobs' AND c.relname ~ '^jobs_[0-9]+$'
ORDER BY n
"""

# By any outcome, not by the last one: that costs no look-up per job, and errs by keeping.
SURVIVORS: Final = """
SELECT s.id FROM (
    SELECT r.id FROM {schema}.ready r WHERE r.id >= %(low)s AND r.id < %(high)s
    UNION ALL SELECT w.id FROM {schema}.scheduled w WHERE w.id >= %(low)s AND w.id < %(high)s
    UNION ALL SELECT l.id FROM {schema}.leases l WHERE l.id >= %(low)s AND l.id < %(high)s
    UNION ALL
    SELECT o.job_id FROM {schema}.outcomes o
    WHERE o.job_id >= %(low)s AND o.job_id < %(high)s
      AND extract(epoch FROM clock_timestamp() - o.finished_at)::float8 < CASE o.status
          WHEN 'done' THEN %(longest_done)s::float8 WHEN 'killed' THEN %(longest_killed)s::float8
          WHEN 'cancelled' THEN %(longest_cancelled)s::float8 ELSE 0 END
      AND (NOT %(by_queue)s::bool OR EXISTS (
          SELECT FROM {schema}.jobs b WHERE b.id = o.job_id
          AND extract(epoch FROM clock_timestamp() - o.finished_at)::float8 < coalesce(
              (%(rules)s::text::jsonb -> b.queue ->> o.status)::float8,
              CASE o.status WHEN 'done' THEN %(done)s::float8 WHEN 'killed' THEN %(killed)s::float8
                            ELSE %(cancelled)s::float8 END)
          OFFSET 0))
) s LIMIT %(most)s
"""

DROP_RANGE: Final = "SELECT {schema}.drop_range(%(n)s, %(kept)s::bigint[], %(seen)s, %(most)s)"

EXPIRED: Final = """
SELECT max(e.id), array_agg(e.id) FILTER (WHERE e.is_expired) FROM (
    SELECT j.id,
           extract(epoch FROM clock_timestamp() - o.finished_at)::float8 >= %(slack)s::float8 + coalesce(
               (%(rules)s::text::jsonb -> j.queue ->> o.status)::float8,
               CASE o.status WHEN 'done' THEN %(done)s::float8 WHEN 'killed' THEN %(killed)s::float8
                             WHEN 'cancelled' THEN %(cancelled)s::float8 END)
           AND NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.id = j.id OFFSET 0)
           AND NOT EXISTS (SELECT FROM {schema}.scheduled w WHERE w.id = j.id OFFSET 0)
           AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.id = j.id OFFSET 0) AS is_expired
    FROM (
        SELECT b.id, b.queue FROM {schema}.jobs b
        WHERE b.id >= %(low)s AND b.id < %(high)s ORDER BY b.id LIMIT %(most)s
    ) j
    LEFT JOIN LATERAL (
        SELECT x.status, x.finished_at FROM {schema}.outcomes x WHERE x.job_id = j.id
        ORDER BY x.no DESC LIMIT 1
    ) o ON true
) e
"""

# One whose time is not over holds although its job is gone.
GONE_KEYS: Final = """
SELECT k.queue, k.key, k.job_id,
       (k.hold <> 'until' OR k.until <= clock_timestamp())
       AND NOT EXISTS (SELECT FROM {schema}.jobs j WHERE j.id = k.job_id OFFSET 0)
FROM {schema}.keys k WHERE (k.queue, k.key) > (%(queue)s, %(key)s) ORDER BY k.queue, k.key LIMIT %(most)s
"""

LOCK_KEYS: Final = """
SELECT k.queue, k.key, k.job_id
FROM unnest(%(queues)s::text[], %(keys)s::text[], %(ids)s::bigint[]) d(queue, key, job_id)
CROSS JOIN LATERAL (
    SELECT x.queue, x.key, x.job_id FROM {schema}.keys x
    WHERE x.queue = d.queue AND x.key = d.key AND x.job_id = d.job_id OFFSET 0 FOR UPDATE SKIP LOCKED
) k
"""

# In a statement of its own, which sees what committed before the lock: whoever took the key over in
# between has a body, and its new row would be seen by a lock with an older snapshot of the bodies.
DELETE_KEYS: Final = """
DELETE FROM {schema}.keys k USING unnest(%(queues)s::text[], %(keys)s::text[]) d(queue, key)
WHERE k.queue = d.queue AND k.key = d.key
  AND NOT EXISTS (SELECT FROM {schema}.jobs j WHERE j.id = k.job_id OFFSET 0)
"""

DELETE_GROUPS: Final = """
DELETE FROM {schema}.worker_groups WHERE id = ANY (ARRAY(
    SELECT g.id FROM {schema}.worker_groups g
    WHERE g.registered_at < clock_timestamp() - %(age)s::float8 * interval '1 second'
      AND g.closed_at < clock_timestamp() - %(age)s::float8 * interval '1 second'
      AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.group_id = g.id)
    ORDER BY g.registered_at, g.id LIMIT %(most)s FOR UPDATE SKIP LOCKED
))
"""

DELETE_DRAINS: Final = """
DELETE FROM {schema}.drains d WHERE NOT EXISTS (
    SELECT FROM {schema}.worker_groups g WHERE g.id = d.group_id AND g.closed_at IS NULL
)
"""


@dataclass(frozen=True, slots=True)
class Horizon:
    """What a round looks at: jobs below `high`, and no outcome after `seen`; ids are given out to `last`."""

    seen: int
    last: int
    high: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Expired jobs, and the last id that was looked at (None: there was none)."""

    ids: list[int]
    last: int | None


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys (queue, key, job) whose job is gone, and the last one that was looked at."""

    gone: list[tuple[str, str, int]]
    last: tuple[str, str] | None


def take_turn(conn: psycopg.Connection[Any], schema: str, seconds: float) -> bool:
    """Take the turn to prune, and with it everybody else's for so long. False: it is not time yet."""
    return plain_cursor(conn).execute(statement(TAKE_TURN, schema), {"seconds": seconds}).rowcount == 1


def horizon(conn: psycopg.Connection[Any], schema: str, least: float) -> Horizon:
    """Return up to where jobs can have ended so long ago: nothing ends before it was enqueued."""
    row = plain_cursor(conn).execute(statement(HORIZON, schema), {"least": least}).fetchone()
    assert row is not None
    return Horizon(*map(int, row))


def ranges(conn: psycopg.Connection[Any], schema: str) -> list[int]:
    """Return the numbers of the ranges that have a partition, oldest first."""
    return [row[0] for row in plain_cursor(conn).execute(statement(RANGES, schema))]


def survivors(
    conn: psycopg.Connection[Any], schema: str, retention: Retention, low: int, high: int, most: int
) -> set[int]:
    """Return jobs with ids in a stretch that have to be kept, at most `most` rows of them."""
    parameters = {**retention.parameters, "low": low, "high": high, "most": most}
    return {row[0] for row in plain_cursor(conn).execute(statement(SURVIVORS, schema), parameters)}


def drop_range(
    conn: psycopg.Connection[Any], schema: str, n: int, kept: Sequence[int], *, seen: int, most: int
) -> int | None:
    """Drop a range but for what has to be kept; returns how many those are. None: it has to stay.

    Raises psycopg's LockNotAvailable when somebody reads or writes the tables for too long.
    """
    with conn.transaction():
        conn.execute(LIMIT_LOCK)
        parameters = {"n": n, "kept": sorted(kept), "seen": seen, "most": most}
        row = plain_cursor(conn).execute(statement(DROP_RANGE, schema), parameters).fetchone()
    assert row is not None
    return None if row[0] is None else int(row[0])


def expired(
    conn: psycopg.Connection[Any],
    schema: str,
    retention: Retention,
    low: int,
    high: int,
    *,
    slack: float,
    most: int,
) -> Rows:
    """Return which of the first `most` jobs in a stretch have been kept for `slack` seconds too long."""
    parameters = {**retention.parameters, "low": low, "high": high, "slack": slack, "most": most}
    row = plain_cursor(conn).execute(statement(EXPIRED, schema), parameters).fetchone()
    assert row is not None
    return Rows(row[1] or [], row[0])


def gone_keys(conn: psycopg.Connection[Any], schema: str, after: tuple[str, str], most: int) -> Keys:
    """Return which of the `most` keys after one have no job any more."""
    parameters = {"queue": after[0], "key": after[1], "most": most}
    rows = plain_cursor(conn).execute(statement(GONE_KEYS, schema), parameters).fetchall()
    return Keys([(row[0], row[1], row[2]) for row in rows if row[3]], rows[-1][:2] if rows else None)


def delete_keys(conn: psycopg.Connection[Any], schema: str, gone: Sequence[tuple[str, str, int]]) -> int:
    """Delete keys whose jobs are gone; those that somebody takes over are left to him."""
    cursor = plain_cursor(conn)
    queues, keys, ids = ([row[n] for row in gone] for n in range(3))
    with conn.transaction():
        parameters: dict[str, Any] = {"queues": queues, "keys": keys, "ids": ids}
        locked = cursor.execute(statement(LOCK_KEYS, schema), parameters).fetchall()
        parameters = {"queues": [row[0] for row in locked], "keys": [row[1] for row in locked]}
        return cursor.execute(statement(DELETE_KEYS, schema), parameters).rowcount


def delete_groups(conn: psycopg.Connection[Any], schema: str, age: float, most: int) -> int:
    """Delete registrations that have been closed for so long, and requests to drain that were obeyed."""
    with conn.transaction():
        cursor = plain_cursor(conn)
        count = cursor.execute(statement(DELETE_GROUPS, schema), {"age": age, "most": most}).rowcount
        cursor.execute(statement(DELETE_DRAINS, schema))
    return count
