"""Claim and promote: rows on their way to a handler."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, LiteralString

import psycopg

from .._model import Claim
from .._positions import BEYOND, Stretch
from .exchange import Ready, ask, rows_of
from .statements import statement

__all__ = ["PROMOTE_LIMIT", "Asked", "claim", "may_claim", "promote"]

PROMOTE_LIMIT: Final = 1000  # rows per statement: 3.4 ms, so a promotion never delays a claim for long

# Why this shape:
# * `me` locks the group's row, and the array depends on it: a closed group, or one whose epoch was
#   raised after this claim was given up, deletes nothing. With the condition on the insert alone
#   the jobs would be deleted and lost. A CTE that nothing refers to is never executed.
# * The witness of the group: without it the server may have lost claims of this group (a crash, a
#   promotion), and nothing is claimed until it has compared them (groups.compare).
# * `ctid = ANY (ARRAY(…))` runs its sub-select once; the CTE and IN forms halve the rate and may be
#   evaluated again, past the limit. A row that moved between snapshot and lock is missed, never wrong.
# * LATERAL gives each queue a limit of its own in one statement. From positions: the outer LIMIT ends the walk
#   over the stretches, which come in their order (a nested loop over an array has no other), so no row is
#   locked that is not taken. A band's stretch must compare the priority by `=`, or its position would not be where
#   the index scan begins.
# * The paused queues are read once, under this statement's snapshot: 4 µs, whatever the number of
#   queues.
# * The body is LEFT JOINed: a missing body must come out as a row, never vanish into leases. OFFSET 0
#   keeps the look-up one by one: a plan made while the tables were small would hash every body, and
#   a generic plan stays until the next ANALYZE.
# * date_part, not extract: the latter makes a numeric of each time first.
# * Only bytes and numbers come back. Text that does not decode would otherwise raise here, after
#   the commit and before the booking.
CLAIM_HEAD: Final = """
WITH me AS MATERIALIZED (
    SELECT id FROM {schema}.worker_groups
    WHERE id = %(group_id)s AND epoch = %(epoch)s AND closed_at IS NULL
    FOR KEY SHARE
), taken AS (
    DELETE FROM {schema}.ready r
    WHERE r.ctid = ANY (ARRAY(
        SELECT c.ctid
        FROM """

FROM_HEAD: Final = """unnest(%(queues)s::text[], %(wants)s::int[]) AS w(queue, want)
        CROSS JOIN LATERAL (
            SELECT x.ctid FROM {schema}.ready x
            WHERE x.queue = w.queue
            ORDER BY x.priority DESC, x.run_at, x.id
            LIMIT w.want
            FOR UPDATE SKIP LOCKED
        ) c"""

FROM_POSITIONS: Final = """unnest(
            %(queues)s::text[], %(wants)s::int[], %(firsts)s::int[], %(lasts)s::int[]
        ) AS w(queue, want, first, last)
        CROSS JOIN LATERAL (
            SELECT y.ctid
            FROM unnest(
                (%(bands)s::int[])[w.first:w.last], (%(above)s::bigint[])[w.first:w.last],
                (%(below)s::int[])[w.first:w.last], (%(run_ats)s::float8[])[w.first:w.last],
                (%(ids)s::bigint[])[w.first:w.last]
            ) AS s(band, above, below, run_at, id)
            CROSS JOIN LATERAL (
                SELECT a.ctid FROM (
                    SELECT x.ctid FROM {schema}.ready x
                    WHERE s.band IS NOT NULL AND x.queue = w.queue AND x.priority = s.band
                      AND (x.run_at, x.id) > (to_timestamp(s.run_at), s.id)
                    ORDER BY x.priority DESC, x.run_at, x.id
                    LIMIT w.want
                    FOR UPDATE SKIP LOCKED
                ) a
                UNION ALL
                SELECT b.ctid FROM (
                    SELECT x.ctid FROM {schema}.ready x
                    WHERE s.band IS NULL AND x.queue = w.queue AND x.priority < s.above AND x.priority > s.below
                    ORDER BY x.priority DESC, x.run_at, x.id
                    LIMIT w.want
                    FOR UPDATE SKIP LOCKED
                ) b
            ) y
            LIMIT w.want
        ) c"""

CLAIM_TAIL: Final = """
        WHERE EXISTS (SELECT FROM me)
          AND EXISTS (SELECT FROM {schema}.witnesses s WHERE s.group_id = %(group_id)s)
          AND w.queue <> ALL (ARRAY(SELECT p.queue FROM {schema}.paused_queues p))
    ))
    RETURNING r.id, r.queue, r.priority, r.run_at, r.attempts, r.max_attempts
), leased AS (
    INSERT INTO {schema}.leases (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at)
    SELECT t.id, %(claim_no)s, %(group_id)s, t.attempts + 1, t.max_attempts, t.queue, t.priority, t.run_at
    FROM taken t
)
SELECT t.id, array_position(%(queues)s::text[], t.queue), t.attempts + 1, t.max_attempts, t.priority,
       date_part('epoch', t.run_at), date_part('epoch', j.enqueued_at),
       j.payload, convert_to(j.encoding, 'UTF8'), j.timeout,
       date_part('epoch', j.deadline), date_part('epoch', clock_timestamp()),
       convert_to(j.key, 'UTF8'),
       CASE WHEN j.metadata <> '{{}}' THEN convert_to(j.metadata::text, 'UTF8') END,
       CASE WHEN t.attempts > 0 THEN (
           SELECT convert_to(o.error, 'UTF8') FROM {schema}.outcomes o
           WHERE o.job_id = t.id AND o.error IS NOT NULL ORDER BY o.no DESC LIMIT 1
       ) END
FROM taken t
LEFT JOIN LATERAL (SELECT * FROM {schema}.jobs b WHERE b.id = t.id OFFSET 0) j ON true
"""

CLAIM: Final = CLAIM_HEAD + FROM_HEAD + CLAIM_TAIL
CLAIM_ON: Final = CLAIM_HEAD + FROM_POSITIONS + CLAIM_TAIL
THE_HEAD: Final = (Stretch.gap(BEYOND, -1),)

MAY_CLAIM: Final = """
SELECT EXISTS (
    SELECT FROM {schema}.worker_groups WHERE id = %(group_id)s AND epoch = %(epoch)s AND closed_at IS NULL
) AND EXISTS (SELECT FROM {schema}.witnesses WHERE group_id = %(group_id)s)
"""

# Owned by nobody, so no epoch. `statement_timestamp()` is stable, so it bounds the index scan;
# `clock_timestamp()` would be a filter over every future row.
PROMOTE: Final = """
WITH due AS (
    DELETE FROM {schema}.scheduled s
    WHERE s.ctid = ANY (ARRAY(
        SELECT c.ctid
        FROM unnest(%(queues)s::text[]) AS w(queue)
        CROSS JOIN LATERAL (
            SELECT x.ctid, x.run_at, x.id FROM {schema}.scheduled x
            WHERE x.queue = w.queue AND x.run_at <= statement_timestamp()
            ORDER BY x.run_at, x.id
            LIMIT %(limit)s
            FOR UPDATE SKIP LOCKED
        ) c
        ORDER BY c.run_at, c.id
        LIMIT %(limit)s
    ))
    RETURNING s.id, s.queue, s.priority, s.run_at, s.attempts, s.max_attempts
), moved AS (
    INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
    SELECT id, queue, priority, run_at, attempts, max_attempts FROM due
)
SELECT array_position(%(queues)s::text[], queue), count(*) FROM due GROUP BY queue
"""

NEXT_DUE: Final = """
SELECT extract(epoch FROM min(n.run_at) - clock_timestamp())::float8
FROM unnest(%(queues)s::text[]) AS w(queue)
CROSS JOIN LATERAL (
    SELECT x.run_at FROM {schema}.scheduled x WHERE x.queue = w.queue ORDER BY x.run_at, x.id LIMIT 1
) n
"""


def claim(
    conn: psycopg.Connection[Any],
    schema: str,
    *,
    group_id: uuid.UUID,
    epoch: int,
    claim_no: int,
    wants: Mapping[str, int],
    starts: Mapping[str, Sequence[Stretch]] | None = None,
) -> list[Claim]:
    """Claim up to `wants[queue]` rows of each queue, highest priority first, in one statement.

    A queue of `starts` is looked through in these stretches only.
    """
    return Asked(group_id, epoch, claim_no, wants, starts or {}).claim(conn, schema)


@dataclass(frozen=True, slots=True)
class Asked:
    """One claim: the statement, its parameters, and what its rows say. See `claim`."""

    group_id: uuid.UUID
    epoch: int
    claim_no: int
    wants: Mapping[str, int]
    starts: Mapping[str, Sequence[Stretch]]

    @property
    def template(self) -> LiteralString:
        return CLAIM_ON if self.starts else CLAIM

    def parameters(self) -> dict[str, Any]:
        """Return what the statement takes."""
        parameters: dict[str, Any] = {
            "group_id": self.group_id,
            "epoch": self.epoch,
            "claim_no": self.claim_no,
            "queues": list(self.wants),
            "wants": list(self.wants.values()),
        }
        if self.starts:
            parameters |= _arrays([self.starts.get(queue, THE_HEAD) for queue in self.wants])
        return parameters

    def claims(self, rows: Iterable[tuple[Any, ...]]) -> list[Claim]:
        """Return the claims in their order: to sort them here takes a third of what the server needs for it."""
        claim_no, group_id, queues = self.claim_no, self.group_id, ["", *self.wants]  # positions count from 1
        claims = [Claim(row[0], claim_no, group_id, queues[row[1]], *row[2:]) for row in rows]
        claims.sort(key=_order)
        return claims

    def claim(self, conn: psycopg.Connection[Any], schema: str) -> list[Claim]:
        """Claim, in this thread."""
        with conn.cursor(binary=True) as cursor:
            return self.claims(cursor.execute(statement(self.template, schema), self.parameters()).fetchall())

    def now(
        self, conn: psycopg.Connection[Any], schema: str, sent: Callable[[], None]
    ) -> Generator[Ready, None, list[Claim]]:
        """Claim by an exchange; `sent` is called when the server has the statement."""
        name = b"triojobs_claim_on" if self.starts else b"triojobs_claim"
        result = yield from ask(conn, name, self.template, schema, self.parameters(), sent=sent)
        return self.claims(rows_of(conn, result))


def _order(claim: Claim) -> tuple[int, float, int]:
    return (-claim.priority, claim.run_at, claim.job_id)


def _arrays(starts: Sequence[Sequence[Stretch]]) -> dict[str, list[Any]]:
    """Return all stretches one after the other, and which ones are whose (counted from 1)."""
    stretches = [stretch for those in starts for stretch in those]
    lasts = list(accumulate(len(those) for those in starts))
    return {
        "bands": [s.band for s in stretches],
        "above": [s.above for s in stretches],
        "below": [s.below for s in stretches],
        "run_ats": [s.run_at for s in stretches],
        "ids": [s.job_id for s in stretches],
        "firsts": [last - len(those) + 1 for last, those in zip(lasts, starts, strict=True)],
        "lasts": lasts,
    }


def may_claim(conn: psycopg.Connection[Any], schema: str, *, group_id: uuid.UUID, epoch: int) -> bool:
    """Return whether a claim of this group could match rows at all."""
    row = conn.execute(statement(MAY_CLAIM, schema), {"group_id": group_id, "epoch": epoch}).fetchone()
    return row is not None and bool(row[0])


def promote(
    conn: psycopg.Connection[Any], schema: str, *, queues: Sequence[str], limit: int = PROMOTE_LIMIT
) -> tuple[Counter[str], float | None]:
    """Move at most `limit` due rows of these queues to `ready`.

    Returns how many of each queue, and seconds until the earliest row left is due (None: no row).
    """
    names = list(queues)
    with conn.cursor(binary=True) as cursor:
        rows = cursor.execute(statement(PROMOTE, schema), {"queues": names, "limit": limit}).fetchall()
        due = cursor.execute(statement(NEXT_DUE, schema), {"queues": names}).fetchone()
    assert due is not None
    return Counter({names[at - 1]: count for at, count in rows}), due[0]
