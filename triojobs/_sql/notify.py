"""Who sleeps, and how to wake them.

The worker commits its mark, claims once more from the head, and only then sleeps. The producer
commits, and only then, in a statement of its own with a new snapshot, looks at the marks. If the
worker's last claim missed the job, the job became visible after that claim, hence after the mark,
hence the producer sees the mark. Where we do not own the commit, the notify goes inside the
transaction, always.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any, Final

import psycopg

from .statements import statement

__all__ = ["group_channel", "mark_waiting", "notify_group", "notify_waiting", "unmark_waiting"]

NOTIFY_WAITING: Final = """
SELECT pg_notify({channel}, w.queue)
FROM (
    SELECT DISTINCT w.queue
    FROM {schema}.waiting w JOIN {schema}.worker_groups g ON g.id = w.group_id
    WHERE w.queue = ANY (%(queues)s) AND g.closed_at IS NULL AND g.lease_until > clock_timestamp()
) w
"""

MARK_WAITING: Final = """
INSERT INTO {schema}.waiting (group_id, queue)
SELECT %(group_id)s, q FROM unnest(%(queues)s::text[]) q ORDER BY q
ON CONFLICT DO NOTHING
"""

UNMARK_WAITING: Final = """
DELETE FROM {schema}.waiting WHERE group_id = %(group_id)s AND queue = ANY (%(queues)s)
"""


def group_channel(group_id: uuid.UUID) -> str:
    """Return the channel on which a group hears that one of its running jobs shall be cancelled."""
    return f"triojobs_group_{group_id.hex}"


def notify_waiting(conn: psycopg.Connection[Any], schema: str, queues: Collection[str]) -> None:
    """Wake the groups that sleep on these queues. Call it after the commit of what they shall see."""
    conn.execute(statement(NOTIFY_WAITING, schema), {"queues": sorted(queues)})


def notify_group(conn: psycopg.Connection[Any], group_id: uuid.UUID) -> None:
    """Tell a group to look at its cancel requests."""
    conn.execute("SELECT pg_notify(%s, '')", [group_channel(group_id)])


def mark_waiting(
    conn: psycopg.Connection[Any], schema: str, group_id: uuid.UUID, queues: Collection[str]
) -> None:
    """Say that this group sleeps on these queues."""
    conn.execute(statement(MARK_WAITING, schema), {"group_id": group_id, "queues": sorted(queues)})


def unmark_waiting(
    conn: psycopg.Connection[Any], schema: str, group_id: uuid.UUID, queues: Collection[str]
) -> None:
    """Say that this group no longer sleeps on these queues."""
    conn.execute(statement(UNMARK_WAITING, schema), {"group_id": group_id, "queues": sorted(queues)})
