"""What a new connection of ours is told once: isolation, planning, limits."""

from __future__ import annotations

import math
from typing import Any, Final

import psycopg

from .._errors import DatabaseError

__all__ = ["limit_transaction", "prepare_job_session", "prepare_session", "refuse_undeclared_pooler"]

LOCK_TIMEOUT: Final = 2.0  # seconds; whoever holds a lock of ours for longer is stuck or gone

# READ COMMITTED whatever the role's default: close, rescue and retry need a new snapshot for each
# statement. Generic plans: `LIMIT` with a parameter makes the planner try custom ones for ever (65 µs
# a claim). No sequential scans: a generic plan made while the tables were small would read them whole
# for as long as the session lives. No JIT: it would compile statements of microseconds. The server looks for a vanished
# client each second, so that a claim whose client is gone does not commit late.
PREPARE: Final = """
SELECT set_config(s.name, w.value, false)
FROM (VALUES ('default_transaction_isolation', 'read committed'),
             ('plan_cache_mode', 'force_generic_plan'),
             ('enable_seqscan', 'off'),
             ('jit', 'off'),
             ('client_connection_check_interval', '1s'),
             ('statement_timeout', %(statement_timeout)s),
             ('lock_timeout', %(lock_timeout)s),
             ('idle_in_transaction_session_timeout', '10s')) AS w(name, value)
JOIN pg_settings s ON s.name = w.name
"""

# The user's own statements run here: their plans, their time. The isolation stays pinned.
PREPARE_JOB: Final = """
SELECT set_config(s.name, w.value, false)
FROM (VALUES ('default_transaction_isolation', 'read committed'),
             ('client_connection_check_interval', '1s')) AS w(name, value)
JOIN pg_settings s ON s.name = w.name
"""

LIMIT_TRANSACTION: Final = """
SELECT set_config('statement_timeout', %(statement_timeout)s, true),
       set_config('lock_timeout', %(lock_timeout)s, true)
"""


def prepare_session(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for connections that carry our statements only."""
    # A little later than the breaker: it says better what happened; this one frees the server. A lock
    # is given up before the breaker comes, so that the call knows what it met.
    conn.execute(PREPARE, _limits(call_timeout + 1, call_timeout))


def limit_transaction(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Set the same limits for the open transaction alone: behind a pooler the session is not ours."""
    conn.execute(LIMIT_TRANSACTION, _limits(call_timeout, call_timeout))


def _limits(statement: float, call: float) -> dict[str, str]:
    seconds = {"statement_timeout": statement, "lock_timeout": min(LOCK_TIMEOUT, call / 2)}
    return {name: f"{math.ceil(value * 1000)}ms" for name, value in seconds.items()}


def prepare_job_session(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for connections that are lent to `Job.commit`."""
    conn.execute(PREPARE_JOB)


def refuse_undeclared_pooler(conn: psycopg.Connection[Any], *, declared: bool) -> None:
    """Raise DatabaseError when a pooler sits in between that was not declared with `pooled=True`."""
    if declared:
        return
    row = conn.execute("SELECT pg_backend_pid()").fetchone()
    if row is not None and conn.info.backend_pid != row[0]:
        raise DatabaseError(
            "the conninfo leads through a connection pooler",
            operation="connecting",
            hint="pass pooled=True (and listen_conninfo=, a direct one), or connect to the server directly",
        )
