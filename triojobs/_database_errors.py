"""From psycopg's errors to ours: what the code means for the caller.

Classes of SQLSTATE: reconnect (the session or its server is going away or turned read-only), retry
the call (lost a race that the server decided), everything else fails.
"""

from __future__ import annotations

from typing import Final

import psycopg

from ._errors import DatabaseError, SchemaError

__all__ = ["RECONNECT", "RETRY", "translate"]

RETRY: Final = frozenset({"40001", "40P01", "55P03"})  # serialization, deadlock, lock timeout
RECONNECT: Final = frozenset(
    {
        "25006",  # read only: the primary became a standby
        "57P01",  # admin shutdown
        "57P02",  # crash shutdown
        "57P03",  # cannot connect now
        "57P05",  # idle session timeout
        "25P03",  # idle in transaction timeout
        "08000", "08001", "08003", "08004", "08006", "08007", "08P01",
    }
)  # fmt: skip
LATER: Final = frozenset({"53000", "53100", "53200", "53300", "53400", "57014", "58000", "58030"})
NO_SCHEMA: Final = frozenset({"3F000", "42P01", "42703", "42883"})


def translate(exc: psycopg.Error, *, operation: str, sent: bool) -> DatabaseError:
    """Return our error for `exc`; `sent` says whether a statement may have reached the server."""
    state = exc.sqlstate
    text = one_line(exc)
    if state in NO_SCHEMA:
        return SchemaError(text, operation=operation, sqlstate=state, hint="run `triojobs migrate`")
    lost = state is None or state in RECONNECT
    hint = ""
    if not sent:
        hint = "check that PostgreSQL runs and that the conninfo is right (host, port, user, database)"
    return DatabaseError(
        text,
        operation=operation,
        hint=hint,
        sqlstate=state,
        transient=(lost and isinstance(exc, psycopg.OperationalError | psycopg.InternalError))
        or state in RETRY
        or state in LATER,
        # A reply that names an error says that nothing was committed; a silence says nothing.
        committed=None if sent and lost and state != "25006" else False,
    )


def one_line(exc: BaseException) -> str:
    """Return an error's text on one line; libpq never puts the password into it."""
    return " ".join(str(exc).split()) or exc.__class__.__name__
