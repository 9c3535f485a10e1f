"""One job through one worker group, and the table that its handler writes into."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
import trio

import triojobs
from tests.tools.looking import rows
from triojobs._sql import groups

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
follow_ups: triojobs.Queue[Any, Any] = triojobs.Queue("follow_ups")
AT_ONCE = triojobs.Backoff(first=0.0, jitter=0.0)
Handler = Callable[[triojobs.Job[Any]], Awaitable[Any]]

NOTES: LiteralString = "CREATE TABLE notes (job_id bigint, text text)"


def note(conn: psycopg.Connection[Any], job: triojobs.Job[Any], text: str = "work") -> None:
    """Write a row of the user's own table."""
    conn.execute("INSERT INTO notes VALUES (%s, %s)", [job.id, text])


def notes(conninfo: str) -> list[str]:
    """Return what is committed of them."""
    return [text for (text,) in rows(conninfo, "SELECT text FROM notes ORDER BY text")]


def waiting_in(conninfo: str, queue: triojobs.Queue[Any, Any]) -> int:
    """Return how many jobs of a queue are ready to run."""
    return len(rows(conninfo, "SELECT id FROM triojobs.ready WHERE queue = %s", queue.name))


def outcomes(conninfo: str, job_id: int) -> list[tuple[int, str]]:
    """Return attempt and status of each ended attempt, oldest first."""
    query: LiteralString = "SELECT attempt, status FROM triojobs.outcomes WHERE job_id = %s ORDER BY no"
    return rows(conninfo, query, job_id)


def retire_groups(conninfo: str) -> int:
    """Do to every group, at once, what a rescuer does after its lease; return the number of its jobs."""
    with psycopg.connect(conninfo) as conn:
        conn.execute("UPDATE triojobs.worker_groups SET lease_until = now() - interval '1 hour'")
        return groups.rescue(conn, "triojobs").jobs


def end_sessions(conninfo: str) -> None:
    """Have the server end every session of worker groups and clients on this database."""
    rows(
        conninfo,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'triojobs %%'",
    )


@dataclass(frozen=True)
class Ended:
    """What became of a job and of its group."""

    info: triojobs.JobInfo[Any]
    report: triojobs.ShutdownReport
    statistics: triojobs.GroupStatistics


async def run_job(
    conninfo: str,
    handler: Handler,
    *,
    queue: triojobs.Queue[Any, Any] = plain,
    payload: Any = None,
    job: dict[str, Any] | None = None,
    worker: dict[str, Any] | None = None,
    **group_options: Any,
) -> Ended:
    """Run one job until it has ended and its handler too."""
    workers = [triojobs.Worker(queue, handler, **({"retry": AT_ONCE} | (worker or {})))]
    with trio.fail_after(30):
        async with triojobs.open_worker_group(conninfo, workers, **group_options) as group:
            job_id = await group.client.enqueue(queue, payload, **(job or {}))
            async with group.client.as_completed([job_id]) as completions:
                async for _ in completions:
                    pass
            info = await group.client.get(job_id)
        assert info is not None
        return Ended(info, group.report, group.statistics())
