"""What the tables say of one job, under one snapshot, for the explanation of why it does not run."""

from __future__ import annotations

from typing import Any, Final

import psycopg

from .._explanation import AHEAD_LIMIT, Facts
from .rows import in_utc
from .statements import plain_cursor, statement

__all__ = ["facts"]

# Its place in line: two ranges of the index that claims go by.
FACTS: Final = """
SELECT v.id, clock_timestamp(), v.queue, v.status, v.attempts, v.max_attempts, v.run_at, v.last_error,
       v.finished_at, v.claimed_at, j.deadline, l.cancel_reason,
       v.group_id, g.name, g.host, g.lease_until, g.closed_at,
       p.paused_at, p.reason, v.key, k.job_id,
       r.id IS NOT NULL, coalesce(a.ahead, 0), s.groups, s.slots, s.free, s.draining, s.silent
FROM (SELECT * FROM {schema}.job_status x WHERE x.id = %(id)s OFFSET 0) v
CROSS JOIN LATERAL (SELECT x.deadline FROM {schema}.jobs x WHERE x.id = v.id OFFSET 0) j
LEFT JOIN LATERAL (SELECT x.cancel_reason FROM {schema}.leases x WHERE x.id = v.id OFFSET 0) l ON true
LEFT JOIN LATERAL (SELECT * FROM {schema}.worker_groups x WHERE x.id = v.group_id OFFSET 0) g ON true
LEFT JOIN LATERAL (SELECT * FROM {schema}.paused_queues x WHERE x.queue = v.queue OFFSET 0) p ON true
LEFT JOIN LATERAL (
    SELECT x.job_id FROM {schema}.keys x WHERE x.queue = v.queue AND x.key = v.key OFFSET 0
) k ON true
LEFT JOIN LATERAL (SELECT * FROM {schema}.ready x WHERE x.id = v.id OFFSET 0) r ON true
LEFT JOIN LATERAL (
    SELECT count(*) AS ahead FROM (
        SELECT FROM {schema}.ready x WHERE x.queue = r.queue AND x.priority > r.priority
        UNION ALL
        SELECT FROM {schema}.ready x
        WHERE x.queue = r.queue AND x.priority = r.priority AND (x.run_at, x.id) < (r.run_at, r.id)
        LIMIT %(most)s
    ) x
) a ON true
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE y.serves AND NOT y.drains) AS groups,
           coalesce(sum(y.slots) FILTER (WHERE y.serves AND NOT y.drains), 0) AS slots,
           coalesce(sum(greatest(0, least(y.slots - y.busy, y.cap - y.running)))
                    FILTER (WHERE y.serves AND NOT y.drains), 0) AS free,
           count(*) FILTER (WHERE y.serves AND y.drains) AS draining,
           count(*) FILTER (WHERE y.queues IS NULL) AS silent
    FROM (
        SELECT w.queues, coalesce(w.queues ? v.queue, false) AS serves, (w.queues ->> v.queue)::int AS slots,
               coalesce(w.concurrency, 2147483647) AS cap, coalesce(b.busy, 0) AS busy,
               coalesce(b.running, 0) AS running,
               EXISTS (SELECT FROM {schema}.drains d WHERE d.group_id = w.id) AS drains
        FROM {schema}.worker_groups w
        LEFT JOIN (
            SELECT x.group_id, count(*) AS running, count(*) FILTER (WHERE x.queue = v.queue) AS busy
            FROM {schema}.leases x GROUP BY x.group_id
        ) b ON b.group_id = w.id
        WHERE w.closed_at IS NULL AND w.lease_until > clock_timestamp()
    ) y
) s
"""


def facts(conn: psycopg.Connection[Any], schema: str, job_id: int) -> Facts | None:
    """Return what is known of a job; None: there is no such job."""
    parameters = {"id": job_id, "most": AHEAD_LIMIT}
    row = plain_cursor(conn).execute(statement(FACTS, schema), parameters).fetchone()
    return None if row is None else Facts(*in_utc(row))
