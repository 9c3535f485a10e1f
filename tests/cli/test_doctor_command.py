"""`triojobs doctor`: each finding provoked on a real server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from command import Command, running, wait_for_line
from psycopg import sql
from psycopg.conninfo import make_conninfo
from test_queues_and_groups_commands import register
from tools import Connection, Group, put

from tests.conftest import SETTINGS
from tests.tools.pooler import pgbouncer, program
from triojobs._embedded_cluster import Cluster, running_cluster
from triojobs._sql.schema import migrate

WITH_A_FAST_CLOCK = """
import time
real = time.time
time.time = lambda: real() + 90
from triojobs.__main__ import main
main()
"""


def findings(dsn: str, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """Run it, and return what is not in order; each with its remedy."""
    import json

    done = Command(dsn)("doctor", "--json", *arguments)
    assert done.exit_code == code, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [each for each in found if each["level"] != "ok"]
    assert all(each["remedy"] for each in wrong)
    return wrong


def the(dsn: str, subject: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Return the one finding about a subject."""
    (found,) = [each for each in findings(dsn, *arguments, code=code) if each["subject"] == subject]
    return found


@contextmanager
def role(dsn: str, *statements: str) -> Iterator[str]:
    """A role of its own, as the statements make it; yields a conninfo for it."""
    name = f"triojobs_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(dsn, autocommit=True) as conn:
        for text in ("CREATE ROLE {} LOGIN", *statements):
            conn.execute(sql.SQL(text).format(sql.Identifier(name)))  # type: ignore[arg-type]
        try:
            yield make_conninfo(dsn, user=name)
        finally:
            conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


ALL = (
    "GRANT USAGE ON SCHEMA triojobs TO {}",
    "GRANT ALL ON ALL TABLES IN SCHEMA triojobs TO {}",
    "GRANT ALL ON ALL SEQUENCES IN SCHEMA triojobs TO {}",
)


@pytest.fixture(scope="module")
def odd_server(memory: Path | None) -> Iterator[str]:
    """A server without autovacuum, with prepared transactions and replication slots."""
    settings = {**SETTINGS, "max_prepared_transactions": "5", "autovacuum": "off", "wal_level": "replica"}
    data_dir = None if memory is None else memory / f"triojobs-test-{uuid.uuid4().hex[:12]}"
    try:
        with running_cluster(Cluster(data_dir, settings=settings)) as conninfo:
            migrate(conninfo)
            yield conninfo
    finally:
        if data_dir is not None:
            shutil.rmtree(data_dir, ignore_errors=True)


def test_a_server_that_is_in_order_has_a_line_for_each_subject(triojobs_: Command, dsn: str) -> None:
    lines = triojobs_.ok("doctor").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "connection"],
        ["ok", "server"],
        ["ok", "clock"],
        ["ok", "rights"],
        ["ok", "schema"],
        ["ok", "vacuum"],
        ["ok", "tables"],
        ["note", "groups"],
    ]


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    (found,) = findings(f"host={tmp_path}", code=1)
    assert (found["level"], found["subject"]) == ("broken", "connection")
    assert "check host and port" in found["remedy"]


def test_a_dsn_that_is_none() -> None:
    (found,) = findings("postgresql://[", code=1)
    assert "cannot be parsed" in found["text"]


def test_a_schema_that_is_missing(empty_database: str) -> None:
    found = the(empty_database, "schema", code=1)
    assert (found["level"], "is missing" in found["text"]) == ("broken", True)
    assert "`triojobs migrate`" in found["remedy"]


def test_a_schema_that_is_too_new(dsn: str, db: Connection) -> None:
    db.execute("INSERT INTO triojobs.migrations (name, sha256, min_client) VALUES ('9999_x.sql', '', 999)")
    try:
        assert "upgrade triojobs" in the(dsn, "schema", code=1)["remedy"]
    finally:
        db.execute("DELETE FROM triojobs.migrations WHERE name = '9999_x.sql'")


def test_a_role_whose_transactions_are_read_only(dsn: str) -> None:
    with role(dsn, *ALL, "ALTER ROLE {} SET default_transaction_read_only = on") as conninfo:
        found = the(conninfo, "role", code=1)
    assert (found["level"], "read-only by default" in found["text"]) == ("broken", True)


def test_a_role_with_another_isolation(dsn: str) -> None:
    change = "ALTER ROLE {} SET default_transaction_isolation = 'repeatable read'"
    with role(dsn, *ALL, change) as conninfo:
        found = the(conninfo, "role")
    assert (found["level"], "REPEATABLE READ" in found["text"]) == ("warning", True)


@pytest.mark.parametrize(
    ("statements", "lacks"),
    [
        ((), "USAGE on schema triojobs"),
        (ALL[:1], "SELECT on jobs"),
        ((*ALL, "REVOKE DELETE ON triojobs.leases FROM {}"), "DELETE on leases"),
        ((*ALL[:2],), "USAGE on job_ids"),
    ],
)
def test_a_role_that_lacks_a_right(dsn: str, statements: tuple[str, ...], lacks: str) -> None:
    with role(dsn, *statements) as conninfo:
        found = [each for each in findings(conninfo, code=1) if each["subject"] == "rights"]
    assert found[0]["level"] == "broken"
    assert lacks in found[0]["text"]
    assert "GRANT" in found[0]["remedy"]


def test_a_role_that_does_not_own_the_tables_and_does_not_see_the_sessions(dsn: str) -> None:
    with role(dsn, *ALL) as conninfo:
        found = [each for each in findings(conninfo) if each["subject"] == "rights"]
    assert [each["level"] for each in found] == ["note", "note"]
    assert "does not own the tables" in found[0]["text"]
    assert "GRANT pg_read_all_stats" in found[1]["remedy"]


def test_a_transaction_that_holds_back_vacuum(dsn: str) -> None:
    with psycopg.connect(dsn, application_name="a report") as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.execute("SELECT 1 FROM triojobs.jobs")
        found = the(dsn, "vacuum", "--patience", "0s")
        assert (
            f"session {conn.info.backend_pid} (a report, idle in transaction) holds it back" in found["text"]
        )
        assert f"pg_terminate_backend({conn.info.backend_pid})" in found["remedy"]
        assert not [each for each in findings(dsn, "--patience", "1h") if each["subject"] == "vacuum"]


def test_warnings_fail_only_when_strict(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.execute("SELECT 1 FROM triojobs.jobs")
        assert the(dsn, "vacuum", "--patience", "0s", code=0)["level"] == "warning"
        assert the(dsn, "vacuum", "--patience", "0s", "--strict", code=1)["level"] == "warning"


def test_a_prepared_transaction_that_was_forgotten(odd_server: str) -> None:
    with psycopg.connect(odd_server, autocommit=True) as conn:
        conn.execute("BEGIN")
        conn.execute("INSERT INTO triojobs.chores VALUES ('x', now())")
        conn.execute("PREPARE TRANSACTION 'forgotten'")
        try:
            found = the(odd_server, "vacuum", "--patience", "0s", code=1)
        finally:
            conn.execute("ROLLBACK PREPARED 'forgotten'")
    assert "prepared transaction forgotten" in found["text"]
    assert "ROLLBACK PREPARED 'forgotten'" in found["remedy"]


def test_a_replication_slot_that_nobody_uses(odd_server: str) -> None:
    with psycopg.connect(odd_server, autocommit=True) as conn:
        conn.execute("SELECT pg_create_physical_replication_slot('orphan', true)")
        try:
            found = the(odd_server, "vacuum", code=1)
        finally:
            conn.execute("SELECT pg_drop_replication_slot('orphan')")
    assert "replication slot orphan is not in use" in found["text"]
    assert "pg_drop_replication_slot('orphan')" in found["remedy"]


def test_autovacuum_that_is_off(odd_server: str) -> None:
    found = the(odd_server, "autovacuum", code=1)
    assert (found["level"], found["remedy"]) == (
        "broken",
        "ALTER SYSTEM SET autovacuum = on, then SELECT pg_reload_conf()",
    )


def test_dead_rows_that_nobody_removes(odd_server: str) -> None:
    with psycopg.connect(odd_server, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO triojobs.chores SELECT 'x' || n, now() FROM generate_series(1, 100001) n",
        )
        conn.execute("DELETE FROM triojobs.chores")
        conn.execute("SELECT pg_stat_force_next_flush()")
        conn.execute("SELECT 1")
        found = the(odd_server, "tables", code=1)
        conn.execute("VACUUM triojobs.chores")
    assert re.search(r"triojobs.chores has 10000\d dead rows", found["text"])
    assert "VACUUM triojobs.chores" in found["remedy"]


def test_a_table_without_autovacuum(dsn: str, db: Connection) -> None:
    db.execute("ALTER TABLE triojobs.ready SET (autovacuum_enabled = false)")
    try:
        assert "switched off for triojobs.ready" in the(dsn, "tables")["text"]
    finally:
        db.execute("ALTER TABLE triojobs.ready RESET (autovacuum_enabled)")


@pytest.mark.skipif(program() is None, reason="there is no PgBouncer here")
def test_a_pooler_in_between(dsn: str) -> None:
    with pgbouncer(dsn) as pooler:
        found = the(pooler.conninfo, "pooler")
        assert (found["level"], "pooled=True" in found["remedy"]) == ("warning", True)
        assert not [each for each in findings(pooler.conninfo, "--pooled") if each["subject"] == "pooler"]
    assert the(dsn, "pooler", "--pooled")["level"] == "note"


def test_clocks_that_differ(dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_FAST_CLOCK, "doctor", "--dsn", dsn],
        env={**os.environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert "clock      this machine's clock is 90" in line or "clock is 89" in line
    assert "ahead of the server's" in line


def test_a_group_without_a_connection_that_listens(dsn: str, db: Connection) -> None:
    register(db, "deaf", q=1)
    found = the(dsn, "listen")
    assert found["text"].startswith(
        "1 living worker group(s) (deaf), but 0 connection(s) that LISTEN: it polls"
    )


def test_a_group_that_listens_is_in_order(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import triojobs\nasync def work(job): pass\nworkers = triojobs.Worker(triojobs.Queue('q'), work)\n"
    )
    with running("worker", "app:workers", dsn=dsn, cwd=tmp_path) as process:
        wait_for_line(process, "serves")
        wait_until(dsn, lambda found: "listen" not in {each["subject"] for each in found})
        process.terminate()
        process.communicate(timeout=60)


def wait_until(dsn: str, good: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Ask until the answer is good; the test's own deadline ends a hang."""
    while not good(findings(dsn)):
        pass


def test_a_group_that_died_with_its_jobs(dsn: str, db: Connection, group: Group) -> None:
    put(db, 2)
    group.claim(db)
    group.lapse(db)
    found = [each for each in findings(dsn) if each["subject"] == "groups"]
    assert [each["level"] for each in found] == ["note", "warning"]
    assert "1 group(s) died (test); 2 job(s) wait to be taken" in found[1]["text"]


def test_queues_that_do_not_go_on(dsn: str, db: Connection, triojobs_: Command) -> None:
    put(db, 2, queue="mail")
    triojobs_.ok("queues", "pause", "mail", "--reason", "a bad deploy")
    found = [each for each in findings(dsn) if each["subject"] == "queues"]
    assert [each["level"] for each in found] == ["warning", "note"]
    assert "2 due job(s) in queue 'mail', which no living worker group serves" in found[0]["text"]
    assert found[1]["remedy"] == "`triojobs queues resume mail`"
