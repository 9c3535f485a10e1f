"""What a connection of ours is told: isolation, planning, limits. Once, or behind a pooler each time."""

from __future__ import annotations

import math
from typing import Any, Final

import psycopg

from .._errors import DatabaseError

__all__ = [
    "begin_transaction",
    "prepare_job_session",
    "prepare_session",
    "refuse_deaf_conninfo",
    "refuse_undeclared_pooler",
    "restore_job_session",
]

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

# The same behind a pooler in transaction mode, where the session is somebody else's after the COMMIT. The
# isolation stands in our BEGIN. Generic plans: also a statement that is not prepared has one, and the
# shape of ours counts on it (see SETTLE). No look for a vanished client: ours is the pooler, which lives.
TRAVEL: Final = """
SELECT set_config('plan_cache_mode', 'force_generic_plan', true),
       set_config('enable_seqscan', 'off', true),
       set_config('jit', 'off', true),
       set_config('statement_timeout', %(statement_timeout)s, true),
       set_config('lock_timeout', %(lock_timeout)s, true),
       set_config('idle_in_transaction_session_timeout', '10s', true)
"""

# The user's own statements run here: their plans, their time. The isolation stays pinned. A client
# whose machine is gone would keep the rows that its work has locked for two hours; the server asks.
PREPARE_JOB: Final = """
SELECT set_config(w.name, w.value, false)
FROM (VALUES ('default_transaction_isolation', 'read committed'),
             ('client_connection_check_interval', '1s'),
             ('tcp_keepalives_idle', '5'),
             ('tcp_keepalives_interval', '2'),
             ('tcp_keepalives_count', '3')) AS w(name, value)
WHERE current_setting(w.name, true) IS NOT NULL
"""

# DISCARD ALL without the prepared statements, which psycopg knows by name. 60 µs.
RESTORE_JOB: Final = (
    """
CLOSE ALL;
SET SESSION AUTHORIZATION DEFAULT;
RESET ALL;
UNLISTEN *;
SELECT pg_advisory_unlock_all();
DISCARD TEMP;
"""
    + PREPARE_JOB
)


def prepare_session(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for connections that carry our statements only."""
    conn.execute(PREPARE, _limits(call_timeout))


def begin_transaction(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for one transaction of ours behind a pooler."""
    conn.execute(TRAVEL, _limits(call_timeout))


def _limits(call_timeout: float) -> dict[str, str]:
    # The statement's is a little later than the breaker: it says better what happened; this one frees the
    # server. A lock is given up before the breaker comes, so that the call knows what it met.
    seconds = {"statement_timeout": call_timeout + 1, "lock_timeout": min(LOCK_TIMEOUT, call_timeout / 2)}
    return {name: f"{math.ceil(value * 1000)}ms" for name, value in seconds.items()}


def prepare_job_session(conn: psycopg.Connection[Any]) -> None:
    """Settings for connections that are lent to `Job.commit`."""
    conn.execute(PREPARE_JOB)


def restore_job_session(conn: psycopg.Connection[Any]) -> None:
    """Undo what work has left behind in the session: settings, locks, temporary tables, LISTEN."""
    conn.execute(RESTORE_JOB, prepare=False)


def refuse_undeclared_pooler(conn: psycopg.Connection[Any]) -> None:
    """Raise DatabaseError when a pooler sits in between, for a conninfo that was not declared `pooled=True`."""
    row = conn.execute("SELECT pg_backend_pid()").fetchone()
    if row is not None and conn.info.backend_pid != row[0]:
        raise DatabaseError(
            "the conninfo leads through a connection pooler",
            operation="connecting",
            hint="pass pooled=True (and listen_conninfo=, a direct one), or connect to the server directly",
        )


def refuse_deaf_conninfo(conn: psycopg.Connection[Any]) -> None:
    """Raise DatabaseError when `listen_conninfo` leads through a pooler, where no notification arrives."""
    try:
        refuse_undeclared_pooler(conn)
    except DatabaseError:
        raise DatabaseError(
            "listen_conninfo leads through a connection pooler, where no notification arrives",
            operation="connecting to listen",
            hint="give the server's own host and port, or leave it out and poll",
        ) from None
