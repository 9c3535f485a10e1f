"""Bring a database's schema up to this version, or say why it does not fit.

`migrate` applies the pending files of `migrations/`; what such a file looks like, and how another
schema's name gets into it, is told in `migration_files`. Which files have been applied stands in
`<schema>.migrations`, which the runner itself creates along with the schema.

One file is one transaction, and its row in `migrations` is part of it: a runner that is killed leaves
nothing behind, and the next one applies the file. A file that says `-- transactional: false` runs
statement by statement and is recorded afterwards: after a crash in between it runs again.

Any number of processes may migrate at once. They take turns by an advisory lock of the session, whose
key is the first eight bytes, signed and big-endian, of the SHA-256 of `triojobs.migrate:<schema>`. It is
polled with `pg_try_advisory_lock`, never awaited in `pg_advisory_lock`: the waiting statement's snapshot
makes CREATE INDEX CONCURRENTLY wait for it, while the builder of the index holds the lock. The server
calls that a deadlock and kills one of the two.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString, TypeAlias

import psycopg
from psycopg import sql
from psycopg.rows import class_row, tuple_row

from .._errors import DatabaseError, SchemaError, checked_seconds
from .._options import DEFAULT_SCHEMA, checked_schema
from .failures import MIGRATING, connect, translated
from .migration_files import MigrationFile, read_files

__all__ = ["CLIENT_GENERATION", "check_schema", "lock_key", "migrate", "pending_sql", "verify_schema"]

# What this version's SQL understands. A migration that older code must not meet (a column it writes is
# gone, a rule it ignores came) says `-- min_client: N`, and N becomes this constant in the same commit.
CLIENT_GENERATION: Final = 1

# How long a runner sleeps between two tries for the lock, in seconds. Short, because a start of eight
# processes goes through it eight times in turn; each try costs one round trip. Chosen by feel.
LOCK_POLL: Final = 0.05

VERIFYING: Final = "checking the schema"
MIGRATE_HINT: Final = "run `triojobs migrate` or triojobs.migrate(conninfo)"
UPGRADE_HINT: Final = "upgrade triojobs in this program"

Connection: TypeAlias = psycopg.Connection[Any]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One row of `<schema>.migrations`."""

    name: str
    sha256: str
    min_client: int


def migrate(
    conninfo: str,
    *,
    schema: str = DEFAULT_SCHEMA,
    directory: Path | None = None,
    lock_wait: float = 60.0,
) -> list[str]:
    """Apply the pending migrations and return their names, in the order applied.

    Args:
        conninfo: a direct one; a pooler does not keep the session that holds the lock.
        schema: where everything goes; created if missing.
        directory: read the files from there instead of from this version.
        lock_wait: seconds to wait while another process migrates; a minute is longer than any
            migration of an empty database and shorter than the patience of a deployment.

    Raises:
        OptionError: `schema` or `lock_wait` is refused.
        SchemaError: an applied file was changed, or the schema is too new for this version.
        DatabaseError: no connection, a pooled one, a refused statement, or the lock was not free within
            `lock_wait` (transient). Files that were applied before stay applied.

    Threads: allowed anywhere; blocks its thread.
    """
    checked_schema(schema)
    checked_seconds("lock_wait", lock_wait)
    files = _own_files(directory)
    with connect(conninfo, operation=MIGRATING, application_name="triojobs migrate") as conn:
        with translated(MIGRATING):
            _refuse_pooler(conn)
            # Pinned whatever the role's default is: a migration must see what was committed before each
            # of its statements.
            conn.execute("SET default_transaction_isolation = 'read committed'")
        with _locked(conn, schema, lock_wait=lock_wait):
            with translated(MIGRATING, doing=f"preparing schema {schema}"):
                _create_bookkeeping(conn, schema)
            applied = _read_applied(conn, schema, operation=MIGRATING)
            pending = _pending(files, applied, schema=schema, operation=MIGRATING)
            for file in pending:
                with translated(MIGRATING, doing=file.name, committed=None):
                    _apply(conn, schema, file)
    return [file.name for file in pending]


def verify_schema(
    conninfo_or_connection: str | Connection, *, schema: str = DEFAULT_SCHEMA, directory: Path | None = None
) -> None:
    """Return if this version can work with the schema, raise SchemaError if not.

    Raises:
        SchemaError: missing or too old (migrate), too new (upgrade triojobs), or an applied file was
            changed.
        DatabaseError: no connection, or no right to read the schema.

    Threads: allowed anywhere; blocks its thread.
    """
    checked_schema(schema)
    if isinstance(conninfo_or_connection, psycopg.Connection):
        check_schema(conninfo_or_connection, schema, directory=directory)
    else:
        with connect(conninfo_or_connection, operation=VERIFYING, application_name="triojobs verify") as conn:
            check_schema(conn, schema, directory=directory)


def check_schema(conn: Connection, schema: str = DEFAULT_SCHEMA, *, directory: Path | None = None) -> None:
    """Do what `verify_schema` does on an open connection, which is left as it was found.

    It reads only, and in a transaction (or savepoint) of its own; poolers are no obstacle.
    """
    files = _own_files(directory)
    applied = _read_applied(conn, schema, operation=VERIFYING)
    pending = _pending(files, applied, schema=schema, operation=VERIFYING)
    if pending and not applied:
        raise SchemaError(f"schema {schema} is missing", operation=VERIFYING, hint=MIGRATE_HINT)
    if pending:
        names = ", ".join(file.name for file in pending)
        raise SchemaError(
            f"schema {schema} is too old for this version of triojobs: not applied: {names}",
            operation=VERIFYING,
            hint=MIGRATE_HINT,
        )


def pending_sql(
    conninfo: str | None = None, *, schema: str = DEFAULT_SCHEMA, directory: Path | None = None
) -> str:
    """Return what `migrate` would do, as a script for psql.

    Args:
        conninfo: leave out what this database already has; None: everything, for an empty database.

    Raises:
        SchemaError, DatabaseError: as `migrate`, from reading `conninfo`'s state.
    """
    checked_schema(schema)
    pending: Sequence[MigrationFile] = _own_files(directory)
    if conninfo is not None:
        with connect(conninfo, operation=VERIFYING, application_name="triojobs migrate") as conn:
            applied = _read_applied(conn, schema, operation=VERIFYING)
        pending = _pending(pending, applied, schema=schema, operation=VERIFYING)
    if not pending:
        return f"-- schema {schema} is up to date\n"
    head = "\n".join(
        [
            f"-- Migrations of triojobs for schema {schema}, for psql. Stop other migrations while it runs.",
            "\\set ON_ERROR_STOP on",
            "SET default_transaction_isolation = 'read committed';",
            *(f"{text.as_string()};" for text in _bookkeeping(schema)),
        ]
    )
    return "\n\n".join([head, *(_script(file, schema) for file in pending)]) + "\n"


def lock_key(schema: str) -> int:
    """Return the key of the advisory lock under which `schema` is migrated."""
    digest = hashlib.sha256(f"triojobs.migrate:{schema}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _own_files(directory: Path | None) -> list[MigrationFile]:
    files = read_files(directory)
    for file in files:
        # Applied, it would lock out the very version that ships it.
        if file.min_client > CLIENT_GENERATION:
            raise SchemaError(
                f"{file.name} asks for clients of generation {file.min_client}, "
                f"but this version is of generation {CLIENT_GENERATION}",
                operation="reading the migrations",
                hint=UPGRADE_HINT,
            )
    return files


def _pending(
    files: Sequence[MigrationFile], applied: Sequence[Applied], *, schema: str, operation: str
) -> list[MigrationFile]:
    """Return the files that are not applied; refuse a schema that this version must not touch."""
    ours = {file.name: file for file in files}
    for row in applied:
        if row.min_client > CLIENT_GENERATION:
            raise SchemaError(
                f"schema {schema} is too new for this version of triojobs: {row.name} asks for clients of "
                f"generation {row.min_client}, this one is of generation {CLIENT_GENERATION}",
                operation=operation,
                hint=UPGRADE_HINT,
            )
    for row in applied:
        # A name that is not ours came with a newer version and asks for nothing new of us.
        if (file := ours.get(row.name)) is not None and file.sha256 != row.sha256:
            raise SchemaError(
                f"{row.name} was changed after it had been applied to schema {schema}: "
                f"sha256 {row.sha256[:12]}… then, {file.sha256[:12]}… now",
                operation=operation,
                hint="restore the file as it was released, and put the change into a new one",
            )
    done = {row.name for row in applied}
    return [file for file in files if file.name not in done]


def _refuse_pooler(conn: Connection) -> None:
    row = conn.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    if conn.info.backend_pid != row[0]:
        raise DatabaseError(
            "the conninfo leads through a connection pooler, which does not keep the session "
            "that holds the migration lock",
            operation=MIGRATING,
            hint="give the server's own host and port",
        )


@contextmanager
def _locked(conn: Connection, schema: str, *, lock_wait: float) -> Iterator[None]:
    key = lock_key(schema)
    give_up_at = time.monotonic() + lock_wait
    while True:
        with translated(MIGRATING):
            row = conn.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone()
        assert row is not None
        if row[0]:
            break
        if time.monotonic() >= give_up_at:
            raise DatabaseError(
                f"schema {schema} is being migrated by {_lock_holder(conn, key)}; waited {lock_wait:g} s",
                operation=MIGRATING,
                hint="try again when it has ended, or end that session",
                transient=True,
            )
        time.sleep(LOCK_POLL)
    try:
        yield
    finally:
        # A broken connection has no lock any more, and its error must not hide the first one.
        with suppress(psycopg.Error):
            conn.execute("SELECT pg_advisory_unlock(%s)", [key])


HOLDER: Final = """
    SELECT l.pid, a.application_name
      FROM pg_catalog.pg_locks AS l
      LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
     WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
       AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
       AND (l.classid::bigint << 32 | l.objid::bigint) = %(key)s
"""


def _lock_holder(conn: Connection, key: int) -> str:
    with translated(MIGRATING):
        row = conn.execute(HOLDER, {"key": key}).fetchone()
    return "another session" if row is None else f"session {row[0]} ({row[1] or 'no application name'})"


SCHEMA_STATE: Final = """
    SELECT n.oid IS NOT NULL, c.oid IS NOT NULL
      FROM (VALUES (1)) AS one
      LEFT JOIN pg_catalog.pg_namespace AS n ON n.nspname = %(schema)s
      LEFT JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = 'migrations'
"""
READ_APPLIED: Final = "SELECT name, sha256, min_client FROM {}.migrations ORDER BY name"
RECORD: Final = "INSERT INTO {}.migrations (name, sha256, min_client) VALUES ({}, {}, {})"
CREATE_SCHEMA: Final = "CREATE SCHEMA IF NOT EXISTS {}"
CREATE_TABLE: Final = """CREATE TABLE IF NOT EXISTS {}.migrations (
    name       text PRIMARY KEY,
    sha256     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    min_client int NOT NULL DEFAULT 1
)"""


def _create_bookkeeping(conn: Connection, schema: str) -> None:
    # Looked up first, because IF NOT EXISTS asks for the right to create even when there is nothing to
    # create, and an application's role may run a migrate that has nothing to do.
    present = _state(conn, schema)
    with conn.transaction():
        for exists, statement in zip(present, _bookkeeping(schema), strict=True):
            if not exists:
                conn.execute(statement)


def _bookkeeping(schema: str) -> tuple[sql.Composed, sql.Composed]:
    return _in_schema(CREATE_SCHEMA, schema), _in_schema(CREATE_TABLE, schema)


def _in_schema(text: LiteralString, schema: str, *values: object) -> sql.Composed:
    return sql.SQL(text).format(sql.Identifier(schema), *map(sql.Literal, values))


def _state(conn: Connection, schema: str) -> tuple[bool, bool]:
    """Return whether the schema and its table of migrations exist."""
    with conn.cursor(row_factory=tuple_row) as cursor:
        row = cursor.execute(SCHEMA_STATE, {"schema": schema}).fetchone()
    assert row is not None
    return row[0], row[1]


def _read_applied(conn: Connection, schema: str, *, operation: str) -> list[Applied]:
    """Return the rows of the schema's table of migrations, none if there is no such table."""
    try:
        with translated(operation), conn.transaction():
            if not all(_state(conn, schema)):
                return []
            with conn.cursor(row_factory=class_row(Applied)) as cursor:
                return cursor.execute(_in_schema(READ_APPLIED, schema)).fetchall()
    except DatabaseError as exc:
        if not isinstance(exc.__cause__, psycopg.errors.UndefinedColumn):
            raise
        raise SchemaError(
            f"{schema}.migrations is a table of some other program",
            operation=operation,
            hint="give triojobs a schema of its own",
            sqlstate=exc.sqlstate,
        ) from exc


def _apply(conn: Connection, schema: str, file: MigrationFile) -> None:
    record = _in_schema(RECORD, schema, file.name, file.sha256, file.min_client)
    # As bytes and without parameters: psycopg then sends it as it is, so a % needs no doubling, and one
    # call may hold several statements.
    if file.transactional:
        with conn.transaction():
            conn.execute(file.statements(schema)[0].encode())
            conn.execute(record)
    else:
        for statement in file.statements(schema):
            conn.execute(statement.encode())
        conn.execute(record)


def _script(file: MigrationFile, schema: str) -> str:
    record = _in_schema(RECORD, schema, file.name, file.sha256, file.min_client).as_string() + ";"
    # A lone semicolon ends a last statement that left its own out, and is nothing after one that did not.
    parts = [f"{part.strip()}\n;" for part in file.statements(schema)]
    body = [*parts, record] if not file.transactional else ["BEGIN;", *parts, record, "COMMIT;"]
    return "\n".join([f"-- {file.name}", *body])
