"""What a connection of ours is told: isolation, planning, limits. Once, or behind a pooler each time."""

from __future__ import annotations

from typing import Any, Final

import psycopg

from .._errors import DatabaseError

__all__ = [
    "begin_transaction",
    "prepare_job_session",
    "prepare_session",
    "refuse_deaf_conninfo",
    "refuse_undeclared_pooler",
]

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
             ('lock_timeout', '2s'),
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
       set_config('lock_timeout', '2s', true),
       set_config('idle_in_transaction_session_timeout', '10s', true)
"""

# The user's own statements run here: their plans, their time. The isolation stays pinned.
PREPARE_JOB: Final = """
SELECT set_config(s.name, w.value, false)
FROM (VALUES ('default_transaction_isolation', 'read committed'),
             ('client_connection_check_interval', '1s')) AS w(name, value)
JOIN pg_settings s ON s.name = w.name
"""


def prepare_session(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for connections that carry our statements only."""
    conn.execute(PREPARE, _limits(call_timeout))


def begin_transaction(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for one transaction of ours behind a pooler."""
    conn.execute(TRAVEL, _limits(call_timeout))


def _limits(call_timeout: float) -> dict[str, str]:
    # A little later than the breaker: it says better what happened; this one frees the server.
    return {"statement_timeout": f"{int((call_timeout + 1) * 1000)}ms"}


def prepare_job_session(conn: psycopg.Connection[Any]) -> None:
    """Settings for connections that are lent to `Job.commit`."""
    conn.execute(PREPARE_JOB)


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
