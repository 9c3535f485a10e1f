"""Looking at the database from outside, and waiting until it shows something: a bound, not an order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import trio


def rows(conninfo: str, query: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
    """Return the rows of one query on a connection of its own."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        cursor = conn.execute(query, parameters or None)
        return cursor.fetchall() if cursor.description else []


def value(conninfo: str, query: LiteralString, *parameters: Any) -> Any:
    """Return the first value of a query that has one."""
    return rows(conninfo, query, *parameters)[0][0]


async def until(conninfo: str, query: LiteralString, *parameters: Any, seconds: float = 10.0) -> Any:
    """Poll until the query's first value is true; return it."""
    with trio.fail_after(seconds), psycopg.connect(conninfo, autocommit=True) as conn:
        while True:
            row = conn.execute(query, parameters or None).fetchone()
            if row and row[0]:
                return row[0]
            await trio.sleep(0.01)


def places(conninfo: str) -> dict[str, int]:
    """Return how many rows each table of a job's way has; tables without rows are left out."""
    counted = {
        table: value(conninfo, f"SELECT count(*) FROM triojobs.{table}")  # type: ignore[arg-type]
        for table in ("jobs", "ready", "scheduled", "leases", "outcomes", "keys")
    }
    return {table: n for table, n in counted.items() if n}


BLOCKED: LiteralString = """
SELECT max(pid) FROM pg_stat_activity
WHERE application_name = 'triojobs ' || %s AND wait_event_type = 'Lock' AND datname = current_database()
"""


async def blocked(conninfo: str, role: str) -> int:
    """Wait until our connection of this role waits for a lock; return its process id."""
    found = await until(conninfo, BLOCKED, role)
    assert isinstance(found, int)
    return found


LOCKED: LiteralString = """
SELECT max(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
"""


async def anybody_blocked(conninfo: str) -> int:
    """Wait until some session of this database waits for a lock; return its process id."""
    found = await until(conninfo, LOCKED)
    assert isinstance(found, int)
    return found


def terminate(conninfo: str, pid: int) -> None:
    """End a backend: its client never gets a reply."""
    rows(conninfo, "SELECT pg_terminate_backend(%s)", pid)


@contextmanager
def locked(conninfo: str, statement: LiteralString, *parameters: Any) -> Iterator[psycopg.Connection[Any]]:
    """Hold what `statement` locks until the block ends, or until `rollback` or `commit` inside."""
    with psycopg.connect(conninfo) as gate:
        gate.execute(statement, parameters or None)
        yield gate
        gate.rollback()
