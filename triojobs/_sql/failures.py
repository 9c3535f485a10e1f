"""psycopg's errors in one clear line: what happened, and what to do about it. Never a password.

Server errors are told by SQLSTATE. Errors of connecting carry none (libpq gives only text), so they are
told by words that every libpq and server in English uses; in another language the hint is the general
one and `transient` is the cautious guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .._errors import DatabaseError, SchemaError
from .._options import checked_conninfo

# Connection, rollback (serialization, deadlock), resources, operator intervention, input/output; lock not
# available; idle in a transaction; read only (the primary became a standby).
TRANSIENT_SQLSTATES: Final = ("08", "40", "53", "57", "58", "55P03", "25P03", "25006")

# The call lost a race that the server decided: the same call again may win.
RETRY_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03"})

# The session is gone, or its server says goodbye (shutdown, crash, starting up, idle for too long).
# Whether it had committed before is not known.
FAREWELLS: Final = ("08", "57P", "25P03")

# A new connection may help: besides those, the server became a standby (there may be another host), or has
# no room for us.
READ_ONLY: Final = "25006"
RECONNECT_SQLSTATES: Final = (*FAREWELLS, READ_ONLY, "53300")

NO_SCHEMA: Final = frozenset({"3F000", "42P01", "42703", "42883"})

# Words of a failed connect, whether it may heal, and the hint; the first that matches wins.
CONNECT_HINTS: Final = (
    (
        (
            "starting up",
            "shutting down",
            "recovery mode",
            "not accepting",
            "not currently accepting",
            "not yet accepting",
        ),
        True,
        "try again later",
    ),
    (("too many", "connection slots"), True, "try again later, or raise max_connections"),
    (
        ("is read-only", "hot standby mode"),
        True,
        "name the primary server among the hosts of the conninfo; a standby may be about to become it",
    ),
    (("password", "authentication", "pg_hba.conf"), False, "check user and password of the conninfo"),
    (('role "',), False, "check the user of the conninfo, or create that role"),
    (('database "',), False, "check dbname of the conninfo, or create that database"),
)
MIGRATING: Final = "migrating"
UNREACHABLE_HINT: Final = "check host and port of the conninfo, and that the server is running"


@contextmanager
def translated(operation: str, *, doing: str = "", committed: bool | None = False) -> Iterator[None]:
    """Turn psycopg errors inside the block into DatabaseError.

    Args:
        operation: as in TriojobsError.
        doing: put before psycopg's words ("0002_x.sql").
        committed: what is known when the connection breaks; after a server's error it is always False.
    """
    try:
        yield
    except psycopg.Error as exc:
        broken = broke(exc) or (exc.sqlstate is not None and exc.sqlstate.startswith("08"))
        raise DatabaseError(
            f"{doing}: {one_line(exc)}" if doing else one_line(exc),
            operation=operation,
            hint=_hint(exc, operation),
            sqlstate=exc.sqlstate,
            transient=_is_transient(exc),
            committed=committed if broken else False,
        ) from exc


def connect(
    conninfo: str,
    *,
    operation: str,
    application_name: str,
) -> psycopg.Connection[Any]:
    """Open an autocommit connection, or raise DatabaseError that says what to check in the conninfo."""
    given = checked_options(conninfo, operation=operation)
    try:
        return psycopg.connect(
            conninfo,
            autocommit=True,
            prepare_threshold=None,
            client_encoding="utf8",  # with SQL_ASCII from the environment, text would arrive as bytes
            application_name=given.get("application_name") or application_name,
        )
    except psycopg.Error as exc:
        raise cannot_connect(one_line(exc), given, operation=operation, sqlstate=exc.sqlstate) from exc


def cannot_connect(
    text: str, options: Mapping[str, Any], *, operation: str, sqlstate: str | None = None
) -> DatabaseError:
    """Return the error for a failed connect with these options: without the password, with a hint."""
    if password := options.get("password"):
        text = text.replace(str(password), "***")
    transient, hint = True, UNREACHABLE_HINT
    for words, may_heal, remedy in CONNECT_HINTS:
        if any(word in text for word in words):
            transient, hint = may_heal, remedy
            break
    return DatabaseError(text, operation=operation, hint=hint, sqlstate=sqlstate, transient=transient)


class Remedy(Enum):
    """What to do with a connection after an error of a statement."""

    RECONNECT = "drop it: the session is gone, or another server is wanted"
    RETRY = "keep it and make the same call again"
    FAIL = "keep it and tell the caller"


def broke(exc: psycopg.Error) -> bool:
    """Whether the connection broke: libpq's own words. psycopg's own say that a value is wrong."""
    lost = isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError)
    return exc.sqlstate is None and lost


def remedy(exc: psycopg.Error) -> Remedy:
    """Return what may help after this error."""
    if exc.sqlstate is None:
        return Remedy.RECONNECT if broke(exc) else Remedy.FAIL
    if exc.sqlstate.startswith(RECONNECT_SQLSTATES):
        return Remedy.RECONNECT
    return Remedy.RETRY if exc.sqlstate in RETRY_SQLSTATES else Remedy.FAIL


def translate(exc: psycopg.Error, *, operation: str) -> DatabaseError:
    """Return our error for the failure of a statement that may have reached the server.

    A reply that names an error says that nothing was committed; a silence, or a farewell, says nothing.
    """
    lost = broke(exc) or (exc.sqlstate is not None and exc.sqlstate.startswith(FAREWELLS))
    error = SchemaError if exc.sqlstate in NO_SCHEMA else DatabaseError
    return error(
        one_line(exc),
        operation=operation,
        hint="run `triojobs migrate`" if error is SchemaError else _hint(exc, operation),
        sqlstate=exc.sqlstate,
        transient=_is_transient(exc),
        committed=None if lost else False,
    )


def one_line(exc: psycopg.Error) -> str:
    """Return an error's words without line breaks and without the server's context lines."""
    # Lines that begin with a tab are libpq's "Is the server running …?": the hint says it.
    text = exc.diag.message_primary or re.sub(r"\n\t[^\n]*", "", str(exc))
    return " ".join(text.split()) or type(exc).__name__


def checked_options(conninfo: str, *, operation: str) -> dict[str, Any]:
    try:
        options = conninfo_to_dict(checked_conninfo("conninfo", conninfo))
    except psycopg.Error:
        # libpq repeats parts of the conninfo, so neither its words nor the cause may be shown.
        raise DatabaseError(
            "the conninfo cannot be parsed",
            operation=operation,
            hint="write postgresql://user:password@host:port/dbname, special characters percent-encoded, "
            "or key=value pairs, values with spaces quoted",
        ) from None
    # user:pa@ss@host: the rest of the password became part of the host, and would be shown as such.
    # A leading @ is an abstract socket.
    if "@" in str(options.get("host") or "")[1:]:
        raise DatabaseError(
            "the host of the conninfo contains @", operation=operation, hint="write @ in a password as %40"
        )
    return options


def _is_transient(exc: psycopg.Error) -> bool:
    if exc.sqlstate is None:
        return isinstance(exc, psycopg.OperationalError)  # the connection broke
    return exc.sqlstate.startswith(TRANSIENT_SQLSTATES)


def _hint(exc: psycopg.Error, operation: str) -> str:
    if isinstance(exc, psycopg.errors.InsufficientPrivilege):
        if operation != MIGRATING:
            return "grant the role what it lacks; `triojobs doctor` names it"
        return (
            "use a role with CREATE on the database, or let its owner run "
            "CREATE SCHEMA … AUTHORIZATION this role first"
        )
    if isinstance(exc, psycopg.errors.ReadOnlySqlTransaction):
        return "connect to the primary server, not to a standby, with a role that is not set to be read-only"
    if isinstance(exc, psycopg.errors.InFailedSqlTransaction):
        return "roll back first: an earlier statement of this transaction has failed"
    return UNREACHABLE_HINT if broke(exc) else ""
