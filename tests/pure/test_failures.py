"""What becomes of each error of the server: of its connection, of the call, and what the caller is told."""

from __future__ import annotations

import psycopg
import pytest

from triojobs._errors import SchemaError
from triojobs._sql.failures import Remedy, remedy, translate

# SQLSTATE, what helps, whether the same call may succeed later, whether its writes were committed.
TABLE: list[tuple[str, Remedy, bool, bool | None]] = [
    # The connection, or its server, is going away: whether a COMMIT came through is not known.
    ("08000", Remedy.RECONNECT, True, None),
    ("08003", Remedy.RECONNECT, True, None),
    ("08006", Remedy.RECONNECT, True, None),
    ("08007", Remedy.RECONNECT, True, None),
    ("08P01", Remedy.RECONNECT, True, None),  # PgBouncer's farewells too
    ("25P03", Remedy.RECONNECT, True, None),
    ("57P01", Remedy.RECONNECT, True, None),
    ("57P02", Remedy.RECONNECT, True, None),
    ("57P03", Remedy.RECONNECT, True, None),
    ("57P04", Remedy.RECONNECT, True, None),
    ("57P05", Remedy.RECONNECT, True, None),
    # Another server, or another time, is wanted.
    ("25006", Remedy.RECONNECT, True, False),
    ("53300", Remedy.RECONNECT, True, False),
    # The call lost a race.
    ("40001", Remedy.RETRY, True, False),
    ("40P01", Remedy.RETRY, True, False),
    ("55P03", Remedy.RETRY, True, False),
    # The server refuses for now: backoff, on the same connection.
    ("53000", Remedy.FAIL, True, False),
    ("53100", Remedy.FAIL, True, False),
    ("53200", Remedy.FAIL, True, False),
    ("53400", Remedy.FAIL, True, False),
    ("57014", Remedy.FAIL, True, False),  # the breaker, statement_timeout
    ("58030", Remedy.FAIL, True, False),
    # Waiting does not help.
    ("22021", Remedy.FAIL, False, False),
    ("22P05", Remedy.FAIL, False, False),
    ("23505", Remedy.FAIL, False, False),
    ("42501", Remedy.FAIL, False, False),
    ("54000", Remedy.FAIL, False, False),
    ("XX000", Remedy.FAIL, False, False),
]


@pytest.mark.parametrize(("sqlstate", "helps", "transient", "committed"), TABLE)
def test_each_error_of_the_server_has_its_remedy(
    sqlstate: str, helps: Remedy, transient: bool, committed: bool | None
) -> None:
    error = psycopg.errors.lookup(sqlstate)("what the server said")
    assert error.sqlstate == sqlstate
    told = translate(error, operation="testing")
    assert (remedy(error), told.transient, told.committed) == (helps, transient, committed)
    assert told.sqlstate == sqlstate


@pytest.mark.parametrize("sqlstate", ["3F000", "42P01", "42703", "42883"])
def test_a_schema_that_does_not_fit_is_told_as_such(sqlstate: str) -> None:
    error = psycopg.errors.lookup(sqlstate)("no such thing")
    assert remedy(error) is Remedy.FAIL
    told = translate(error, operation="testing")
    assert isinstance(told, SchemaError)
    assert "triojobs migrate" in str(told)


@pytest.mark.parametrize(
    ("error", "helps", "transient"),
    [
        (psycopg.OperationalError("server closed the connection unexpectedly"), Remedy.RECONNECT, True),
        (psycopg.InterfaceError("the cursor is closed"), Remedy.RECONNECT, False),
        (psycopg.ProgrammingError("cannot adapt type"), Remedy.FAIL, False),
        (psycopg.DataError("timestamp too small (before year 1)"), Remedy.FAIL, False),
    ],
)
def test_an_error_without_a_code_is_libpqs_or_psycopgs(
    error: psycopg.Error, helps: Remedy, transient: bool
) -> None:
    told = translate(error, operation="testing")
    lost = helps is Remedy.RECONNECT
    assert (remedy(error), told.transient) == (helps, transient)
    assert told.committed is (None if lost else False)  # what psycopg itself refuses was never sent
    assert ("server is running" in told.hint) == lost
