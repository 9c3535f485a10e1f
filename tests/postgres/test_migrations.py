"""The migration runner on a real server, with small files of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from triojobs._errors import DatabaseError, OptionError, SchemaError
from triojobs._sql import schema as runner
from triojobs._sql.schema import check_schema, lock_key, migrate, pending_sql, verify_schema

Connection = psycopg.Connection[Any]

TABLE = "-- The first table.\nCREATE TABLE triojobs.first (id int);\n"
COLUMN = "-- One more column; a % and two statements.\nALTER TABLE triojobs.first ADD n int;\nSELECT 5 % 2;\n"
INDEX = """-- An index, without stopping the writers.
-- transactional: false
DROP INDEX CONCURRENTLY IF EXISTS triojobs.first_n;
-- statement
CREATE INDEX CONCURRENTLY first_n ON triojobs.first (n);
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with two plain files."""
    made = tmp_path / "migrations"
    made.mkdir()
    (made / "0001_table.sql").write_text(TABLE)
    (made / "0002_column.sql").write_text(COLUMN)
    return made


@pytest.fixture
def conn(empty_database: str) -> Iterator[Connection]:
    """A second connection to the empty database, in autocommit."""
    with psycopg.connect(empty_database, autocommit=True) as made:
        yield made


@pytest.fixture
def make_role(empty_database: str, conn: Connection) -> Iterator[Callable[[], tuple[str, str]]]:
    """Makes roles; returns each one's name and conninfo, and drops it with what it owns."""
    made: list[sql.Identifier] = []
    database = conn.info.dbname

    def make() -> tuple[str, str]:
        name = f"role{len(made)}_of_{database}"
        made.append(sql.Identifier(name))
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(made[-1]))
        return name, make_conninfo(empty_database, user=name)

    yield make
    for role in made:
        conn.execute(sql.SQL("DROP OWNED BY {0} CASCADE").format(role))
        conn.execute(sql.SQL("DROP ROLE {0}").format(role))


RUN = """
import json, sys
from pathlib import Path
from triojobs._sql.schema import migrate
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(migrate(sys.argv[1], directory=Path(sys.argv[2]))), flush=True)
"""


class Runner:
    """Another process that migrates when it is told to."""

    def __init__(self, conninfo: str, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, conninfo, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def applied(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert self.process.wait() == 0
        result: list[str] = json.loads(line)
        return result


def runners(stack: ExitStack, count: int, conninfo: str, directory: Path) -> list[Runner]:
    made = [stack.enter_context(Runner(conninfo, directory)) for _ in range(count)]
    for each in made:
        each.wait_ready()
    return made


def wait_until(conn: Connection, condition: str, **values: object) -> None:
    """Return when a condition on the server's state holds; the state is observed, not timed."""
    query = sql.SQL("SELECT {}").format(sql.SQL(condition))  # type: ignore[arg-type]
    while not conn.execute(query, values).fetchone()[0]:  # type: ignore[index]
        conn.execute("SELECT pg_stat_clear_snapshot()")


def names(conn: Connection, schema: str = "triojobs") -> list[str]:
    query = sql.SQL("SELECT name FROM {}.migrations ORDER BY applied_at, name").format(sql.Identifier(schema))
    return [row[0] for row in conn.execute(query)]


def columns(conn: Connection, schema: str = "triojobs") -> list[str]:
    return [
        row[0]
        for row in conn.execute(
            "SELECT column_name::text FROM information_schema.columns "
            "WHERE table_schema = %s AND table_name = 'first' ORDER BY ordinal_position",
            [schema],
        )
    ]


def test_pending_files_are_applied_in_order_and_named(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    assert migrate(empty_database, directory=directory) == ["0001_table.sql", "0002_column.sql"]
    assert names(conn) == ["0001_table.sql", "0002_column.sql"]
    assert columns(conn) == ["id", "n"]


def test_a_second_run_does_nothing(empty_database: str, directory: Path) -> None:
    migrate(empty_database, directory=directory)
    assert migrate(empty_database, directory=directory) == []


def test_a_new_file_is_applied_alone(empty_database: str, conn: Connection, directory: Path) -> None:
    migrate(empty_database, directory=directory)
    (directory / "0003_index.sql").write_text(INDEX)
    assert migrate(empty_database, directory=directory) == ["0003_index.sql"]


def test_the_shipped_files_fit_the_version_that_ships_them(empty_database: str) -> None:
    migrate(empty_database)
    verify_schema(empty_database)
    migrate(empty_database, schema="other")
    verify_schema(empty_database, schema="other")


def test_eight_processes_at_once_apply_each_file_once(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    with ExitStack() as stack:
        processes = runners(stack, 8, empty_database, directory)
        for each in processes:
            each.go()
        results = [each.applied() for each in processes]
    assert sorted(results, key=len) == [[]] * 7 + [["0001_table.sql", "0002_column.sql"]]
    assert names(conn) == ["0001_table.sql", "0002_column.sql"]


def test_a_runner_killed_inside_a_file_leaves_nothing_and_the_next_applies_it(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    conn.execute("CREATE TABLE public.gate ()")
    (directory / "0002_column.sql").write_text(
        "-- Stops at the gate.\nALTER TABLE triojobs.first ADD n int;\nLOCK TABLE public.gate;\n"
    )
    with Runner(empty_database, directory) as victim, psycopg.connect(empty_database) as gate:
        gate.execute("LOCK TABLE public.gate")
        victim.wait_ready()
        victim.go()
        wait_until(
            conn, "EXISTS (SELECT FROM pg_locks WHERE relation = 'public.gate'::regclass AND NOT granted)"
        )
        victim.process.kill()
        victim.process.wait()
    assert migrate(empty_database, directory=directory) == ["0002_column.sql"]
    assert columns(conn) == ["id", "n"]


def test_a_file_that_fails_is_undone_and_named_and_the_lock_is_free(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    (directory / "0002_column.sql").write_text(
        "-- Fails.\nALTER TABLE triojobs.first ADD n int;\nSELECT 1 / 0;\n"
    )
    with pytest.raises(
        DatabaseError, match=r"^while migrating: 0002_column\.sql: division by zero$"
    ) as caught:
        migrate(empty_database, directory=directory)
    assert (caught.value.sqlstate, caught.value.transient, caught.value.committed) == ("22012", False, False)
    assert names(conn) == ["0001_table.sql"]
    assert columns(conn) == ["id"]
    (directory / "0002_column.sql").write_text(COLUMN)
    assert migrate(empty_database, directory=directory, lock_wait=0) == ["0002_column.sql"]


def test_a_session_ended_inside_a_file_is_a_transient_error_and_undone(
    empty_database: str, directory: Path
) -> None:
    (directory / "0002_column.sql").write_text("-- Dies.\nSELECT pg_terminate_backend(pg_backend_pid());\n")
    with pytest.raises(DatabaseError, match=r"0002_column\.sql: ") as caught:
        migrate(empty_database, directory=directory)
    assert (caught.value.transient, caught.value.committed) == (True, False)


def test_an_index_built_beside_waiting_runners_does_not_deadlock(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    migrate(empty_database, directory=directory)
    (directory / "0003_index.sql").write_text(INDEX)
    with ExitStack() as stack:
        # A writer that was there first: the build waits for it, so the others meet the lock held.
        writer = stack.enter_context(psycopg.connect(empty_database))
        writer.execute("INSERT INTO triojobs.first VALUES (1, 1)")
        processes = runners(stack, 4, empty_database, directory)
        for each in processes:
            each.go()
        wait_until(
            conn,
            "count(*) FILTER (WHERE query LIKE 'SELECT pg_try_advisory_lock%%') = 3"
            " AND count(*) FILTER (WHERE query LIKE '%%CONCURRENTLY%%' AND wait_event_type = 'Lock') = 1"
            " FROM pg_stat_activity WHERE datname = current_database() AND application_name = %(name)s",
            name="triojobs migrate",
        )
        writer.commit()
        results = [each.applied() for each in processes]
    assert sorted(results, key=len) == [[], [], [], ["0003_index.sql"]]
    assert conn.execute(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = 'triojobs.first_n'::regclass"
    ).fetchone() == (True,)


def test_a_file_without_transaction_that_fails_is_not_recorded_and_runs_again(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    path = directory / "0003_index.sql"
    path.write_text(INDEX + "-- statement\nSELECT 1 / 0;\n")
    with pytest.raises(DatabaseError, match=r"0003_index\.sql: division by zero"):
        migrate(empty_database, directory=directory)
    assert names(conn) == ["0001_table.sql", "0002_column.sql"]
    path.write_text(INDEX)
    assert migrate(empty_database, directory=directory) == ["0003_index.sql"]


def test_a_lock_that_stays_held_is_a_transient_error_that_names_the_holder(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    conn.execute("SELECT pg_advisory_lock(%s)", [lock_key("triojobs")])
    with pytest.raises(DatabaseError, match=f"being migrated by session {conn.info.backend_pid} ") as caught:
        migrate(empty_database, directory=directory, lock_wait=0.1)
    assert caught.value.transient
    assert "waited 0.1 s" in str(caught.value)


def test_another_schema_has_another_lock(empty_database: str, conn: Connection, directory: Path) -> None:
    conn.execute("SELECT pg_advisory_lock(%s)", [lock_key("triojobs")])
    assert migrate(empty_database, directory=directory, schema="other", lock_wait=0) != []


@pytest.mark.parametrize("schema", ["other", "user"])
def test_another_schema_gets_everything_and_the_default_one_nothing(
    empty_database: str, conn: Connection, directory: Path, schema: str
) -> None:
    (directory / "0003_function.sql").write_text(
        "-- A function that finds its table.\n"
        "CREATE FUNCTION triojobs.count_first() RETURNS bigint\n"
        "LANGUAGE plpgsql SET search_path = triojobs AS $$ BEGIN RETURN (\n"
        "SELECT count(*) FROM triojobs.first WHERE tableoid = 'triojobs.first'::regclass); END $$;\n"
    )
    migrate(empty_database, schema=schema, directory=directory)
    verify_schema(empty_database, schema=schema, directory=directory)
    assert columns(conn, schema) == ["id", "n"]
    query = sql.SQL("SELECT {}.count_first()").format(sql.Identifier(schema))
    assert conn.execute(query).fetchone() == (0,)
    assert conn.execute("SELECT to_regnamespace('triojobs')").fetchone() == (None,)


def test_a_schema_name_that_needs_quoting_is_refused_before_connecting() -> None:
    for call in (migrate, verify_schema):
        with pytest.raises(OptionError, match="schema is 'a; DROP'"):
            call("host=/nonexistent", schema="a; DROP")  # type: ignore[operator]
    with pytest.raises(OptionError, match="schema is"):
        pending_sql(schema="A")


def test_a_negative_lock_wait_is_refused(empty_database: str) -> None:
    with pytest.raises(OptionError, match="lock_wait is -1"):
        migrate(empty_database, lock_wait=-1)


@pytest.mark.parametrize("call", [migrate, verify_schema])
def test_an_applied_file_that_was_changed_is_refused_with_both_checksums(
    empty_database: str, conn: Connection, directory: Path, call: Callable[..., object]
) -> None:
    migrate(empty_database, directory=directory)
    path = directory / "0001_table.sql"
    then = runner.read_files(directory)[0].sha256
    path.write_text(path.read_text() + "-- a late thought\n")
    now = runner.read_files(directory)[0].sha256
    with pytest.raises(
        SchemaError, match=rf"0001_table\.sql was changed .*{then[:12]}… then, {now[:12]}… now"
    ):
        call(empty_database, directory=directory)


def test_verify_names_a_missing_schema_and_the_command(empty_database: str, directory: Path) -> None:
    with pytest.raises(
        SchemaError, match=r"schema triojobs is missing; run `triojobs migrate` or triojobs\.migrate"
    ):
        verify_schema(empty_database, directory=directory)


def test_verify_names_what_is_pending(empty_database: str, directory: Path) -> None:
    migrate(empty_database, directory=directory)
    (directory / "0003_index.sql").write_text(INDEX)
    with pytest.raises(
        SchemaError, match=r"too old .*: not applied: 0003_index\.sql; run `triojobs migrate`"
    ):
        verify_schema(empty_database, directory=directory)


def apply_as_newer_version(
    monkeypatch: pytest.MonkeyPatch, conninfo: str, directory: Path, *, header: str
) -> None:
    newer = directory / "0003_newer.sql"
    newer.write_text(f"-- Of a later version.\n{header}SELECT 1;\n")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "CLIENT_GENERATION", 2)
        migrate(conninfo, directory=directory)
    newer.unlink()


@pytest.mark.parametrize("call", [migrate, verify_schema])
def test_a_schema_above_this_generation_is_refused(
    empty_database: str, directory: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., object]
) -> None:
    apply_as_newer_version(monkeypatch, empty_database, directory, header="-- min_client: 2\n")
    with pytest.raises(
        SchemaError, match=r"too new .*0003_newer\.sql asks for .*generation 2.*; upgrade triojobs"
    ):
        call(empty_database, directory=directory)


def test_an_additive_file_of_a_newer_version_is_no_obstacle(
    empty_database: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_as_newer_version(monkeypatch, empty_database, directory, header="")
    verify_schema(empty_database, directory=directory)
    assert migrate(empty_database, directory=directory) == []


def test_a_file_that_would_lock_out_its_own_version_is_refused_before_anything(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    (directory / "0003_newer.sql").write_text("-- why\n-- min_client: 2\nSELECT 1;\n")
    with pytest.raises(SchemaError, match="this version is of generation 1"):
        migrate(empty_database, directory=directory)
    assert conn.execute("SELECT to_regnamespace('triojobs')").fetchone() == (None,)


def test_check_schema_leaves_an_open_transaction_as_it_was(empty_database: str, directory: Path) -> None:
    migrate(empty_database, directory=directory)
    with psycopg.connect(empty_database, row_factory=dict_row) as mine:
        mine.execute("CREATE TABLE public.mine ()")
        check_schema(mine, directory=directory)
        with pytest.raises(SchemaError, match="schema other is missing"):
            check_schema(mine, "other", directory=directory)
        assert mine.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        assert mine.execute("SELECT to_regclass('public.mine')::text AS name").fetchone() == {"name": "mine"}


def test_check_schema_opens_no_transaction_that_stays(empty_database: str, directory: Path) -> None:
    migrate(empty_database, directory=directory)
    with psycopg.connect(empty_database) as mine:
        verify_schema(mine, directory=directory)
        assert mine.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_migrations_table_of_another_program_is_told_apart(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    conn.execute("CREATE TABLE public.migrations (version int)")
    with pytest.raises(SchemaError, match=r"public\.migrations is a table of some other program"):
        migrate(empty_database, schema="public", directory=directory)


def test_each_file_runs_read_committed_whatever_the_role_says(
    conn: Connection, directory: Path, make_role: Callable[[], tuple[str, str]]
) -> None:
    name, conninfo = make_role()
    role = sql.Identifier(name)
    conn.execute(sql.SQL("ALTER ROLE {} SET default_transaction_isolation = 'repeatable read'").format(role))
    conn.execute(sql.SQL("CREATE SCHEMA triojobs AUTHORIZATION {}").format(role))
    level = "current_setting('transaction_isolation') AS level"
    (directory / "0001_table.sql").write_text(f"-- why\nCREATE TABLE triojobs.first AS SELECT {level};\n")
    (directory / "0002_column.sql").write_text(
        f"-- why\n-- transactional: false\nINSERT INTO triojobs.first SELECT {level};\n"
    )
    migrate(conninfo, directory=directory)
    assert conn.execute("SELECT * FROM triojobs.first").fetchall() == [("read committed",)] * 2


def test_a_role_that_may_not_create_is_told_what_it_needs(
    empty_database: str, directory: Path, make_role: Callable[[], tuple[str, str]]
) -> None:
    _, conninfo = make_role()
    with pytest.raises(
        DatabaseError, match=r"permission denied for database .*; use a role with CREATE"
    ) as caught:
        migrate(conninfo, directory=directory)
    assert (caught.value.sqlstate, caught.value.transient) == ("42501", False)


def test_a_role_that_may_only_read_can_run_a_migrate_with_nothing_to_do(
    empty_database: str, conn: Connection, directory: Path, make_role: Callable[[], tuple[str, str]]
) -> None:
    migrate(empty_database, directory=directory)
    name, conninfo = make_role()
    conn.execute(sql.SQL("GRANT USAGE ON SCHEMA triojobs TO {}").format(sql.Identifier(name)))
    conn.execute(sql.SQL("GRANT SELECT ON triojobs.migrations TO {}").format(sql.Identifier(name)))
    assert migrate(conninfo, directory=directory) == []


def test_an_unreachable_server_is_one_line_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"^while migrating: .*; check host and port") as caught:
        migrate(f"host={tmp_path} user=ada password=ada-secret")
    assert caught.value.transient
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, psycopg.Error)


def test_a_role_that_does_not_exist_is_named(empty_database: str) -> None:
    with pytest.raises(DatabaseError, match=r'role "nobody_here" does not exist; check the user') as caught:
        migrate(make_conninfo(empty_database, user="nobody_here"))
    assert not caught.value.transient


def test_a_database_that_does_not_exist_is_named(empty_database: str) -> None:
    with pytest.raises(DatabaseError, match=r'database "nowhere" does not exist; check dbname') as caught:
        verify_schema(make_conninfo(empty_database, dbname="nowhere"))
    assert not caught.value.transient


@pytest.mark.parametrize("call", [migrate, verify_schema])
def test_what_is_no_text_is_no_conninfo(call: Any) -> None:
    with pytest.raises(OptionError, match="a libpq connection string or URI") as caught:
        call(5)
    assert caught.value.field == "conninfo"


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=localhost password=my secret",
        "postgresql://ada:my@secret@localhost/db",
        "postgresql://ada:secret@[::1/db",
        "secret",
    ],
)
def test_a_conninfo_that_is_no_conninfo_is_not_repeated(conninfo: str) -> None:
    with pytest.raises(DatabaseError, match=r"the conninfo cannot be parsed|contains @") as caught:
        migrate(conninfo)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


class FakePooler(threading.Thread):
    """Passes one connection on, but answers as a pooler does: with a backend's pid of its own making."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(daemon=True)
        options = conninfo_to_dict(conninfo)
        host, port = str(options["host"]), int(options.get("port") or 5432)
        if host.startswith("/"):
            self.server = socket.socket(socket.AF_UNIX)
            self.server.connect(f"{host}/.s.PGSQL.{port}")
        else:
            self.server = socket.create_connection((host, port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        own_port = self.listener.getsockname()[1]
        self.conninfo = make_conninfo(
            conninfo, host="127.0.0.1", port=own_port, sslmode="disable", gssencmode="disable"
        )

    def run(self) -> None:
        client = self.listener.accept()[0]
        back = threading.Thread(target=self.send_back, args=[client], daemon=True)
        back.start()
        while data := client.recv(65536):
            self.server.sendall(data)
        self.server.shutdown(socket.SHUT_WR)
        back.join()
        for each in (client, self.server, self.listener):
            each.close()

    def send_back(self, client: socket.socket) -> None:
        header = b"K\x00\x00\x00\x0c"  # BackendKeyData: pid and secret follow
        while data := self.server.recv(65536):
            at = data.find(header)
            if at >= 0:
                start = at + len(header)
                data = data[:start] + b"\x7f\x00\x00\x01" + data[start + 4 :]
            client.sendall(data)


def test_a_pooled_conninfo_is_refused_for_migrating_but_can_be_verified(
    empty_database: str, conn: Connection, directory: Path
) -> None:
    first = FakePooler(empty_database)
    first.start()
    with pytest.raises(
        DatabaseError, match=r"through a connection pooler.*; give the server's own host and port"
    ):
        migrate(first.conninfo, directory=directory)
    first.join()
    assert conn.execute("SELECT to_regnamespace('triojobs')").fetchone() == (None,)
    migrate(empty_database, directory=directory)
    second = FakePooler(empty_database)
    second.start()
    verify_schema(second.conninfo, directory=directory)
    second.join()


@pytest.mark.skipif(shutil.which("psql") is None, reason="needs psql")
@pytest.mark.parametrize("schema", ["triojobs", "other"])
def test_the_script_does_with_psql_what_migrate_does(
    empty_database: str, directory: Path, tmp_path: Path, schema: str
) -> None:
    (directory / "0003_index.sql").write_text(INDEX.rstrip().rstrip(";"))
    script = tmp_path / "script.sql"
    script.write_text(pending_sql(schema=schema, directory=directory))
    subprocess.run(["psql", "-X", "-q", "-d", empty_database, "-f", script], check=True, capture_output=True)
    verify_schema(empty_database, schema=schema, directory=directory)
    assert migrate(empty_database, schema=schema, directory=directory) == []


def test_the_script_for_a_database_leaves_out_what_it_has(empty_database: str, directory: Path) -> None:
    migrate(empty_database, directory=directory)
    assert pending_sql(empty_database, directory=directory) == "-- schema triojobs is up to date\n"
    (directory / "0003_index.sql").write_text(INDEX)
    script = pending_sql(empty_database, directory=directory)
    assert "0003_index.sql" in script
    assert "0002_column.sql" not in script
    assert "BEGIN;" not in script
