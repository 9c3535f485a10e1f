"""A handler that commits, and what the rows must say however that ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, LiteralString

import psycopg
import trio

import triojobs
from tests.tools.looking import rows, value
from tests.tools.running import AT_ONCE, note, plain

HANG = 45.0  # seconds; whatever takes longer hangs
LONG = 3600  # seconds that work would take if nobody broke it off
WORKS: Final[LiteralString] = """
SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'
"""


def sleep(conn: psycopg.Connection[Any]) -> None:
    """Stay in a statement until it is broken off."""
    conn.execute("SELECT pg_sleep(%s)", [LONG])


class Committer:
    """A handler that commits a note, and remembers how that ended: the value, or what was raised."""

    def __init__(self, method: str = "commit") -> None:
        self.method = method
        self.ends: list[Any] = []
        self.works = 0
        self.before_work: Callable[[psycopg.Connection[Any]], None] = lambda conn: None
        self.in_work = trio.Event()

    async def handler(self, job: triojobs.Job[Any]) -> Any:
        def work(conn: psycopg.Connection[Any]) -> str:
            self.works += 1
            note(conn, job, f"attempt {job.attempt}")
            trio.from_thread.run_sync(self.in_work.set)
            self.before_work(conn)
            return f"attempt {job.attempt}"

        try:
            value = await getattr(job, self.method)(work)
        except BaseException as exc:
            self.ends.append(exc)
            raise
        self.ends.append(value)
        await trio.lowlevel.checkpoint()
        return value


@asynccontextmanager
async def one_job(
    conninfo: str, handler: Any, job: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[triojobs.WorkerGroup, int]]:
    """Open a group and give it one job; a hang is a failure."""
    worker = triojobs.Worker(plain, handler, retry=AT_ONCE)
    with trio.fail_after(HANG):
        async with triojobs.open_worker_group(conninfo, [worker], **options) as group:
            yield group, await group.client.enqueue(plain, None, **(job or {}))


def the_report_equals_the_rows(conninfo: str, group: triojobs.WorkerGroup) -> None:
    """Outcomes written under the group's ids are those that it reports; none of its leases is left."""
    written = dict(
        rows(
            conninfo,
            "SELECT status, count(*)::int FROM triojobs.outcomes WHERE group_id = ANY (%s)"
            " AND (error IS NULL OR error NOT LIKE 'rescued:%%') GROUP BY 1",
            list(group.report.group_ids),
        )
    )
    reported = {outcome: n for outcome, n in group.report.settled.items() if n and outcome != "snoozed"}
    assert reported == written
    assert value(conninfo, "SELECT count(*) FROM triojobs.leases") == len(group.report.abandoned)
