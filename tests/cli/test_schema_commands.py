"""`triojobs migrate` and `triojobs verify` as a user runs them: output, exit code, one line of error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_LIBPQ = """
import ctypes.util, sys
sys.modules["psycopg_binary"] = sys.modules["psycopg_c"] = None
ctypes.util.find_library = lambda name: None
from triojobs.__main__ import main
main()
"""


def run(*arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, without the caller's TRIOJOBS_DSN."""
    environment = {name: value for name, value in os.environ.items() if name != "TRIOJOBS_DSN"}
    start = ["-m", "triojobs"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, "-W", "error", *start, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def assert_one_line_of_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_migrate_says_what_it_applied_and_then_that_nothing_is_left(empty_database: str) -> None:
    first = run("migrate", "--dsn", empty_database)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("applied 0001_")
    second = run("migrate", "--dsn", empty_database)
    assert (second.returncode, second.stdout) == (0, "schema triojobs is up to date\n")


def test_the_dsn_may_come_from_the_environment(empty_database: str) -> None:
    assert run("migrate", "--schema", "other", TRIOJOBS_DSN=empty_database).returncode == 0
    done = run("verify", "--schema", "other", TRIOJOBS_DSN=empty_database)
    assert (done.returncode, done.stdout) == (0, "schema other fits this version\n")


def test_verify_of_an_empty_database_names_the_command(empty_database: str) -> None:
    assert_one_line_of_error(run("verify", "--dsn", empty_database), "is missing", "`triojobs migrate`")


@pytest.mark.parametrize("command", ["migrate", "verify"])
def test_an_unreachable_server_is_one_line(command: str, tmp_path: Path) -> None:
    done = run(command, "--dsn", f"host={tmp_path} password=secret-word")
    assert_one_line_of_error(done, "check host and port")
    assert "secret-word" not in done.stderr


def test_a_refused_schema_name_is_one_line() -> None:
    assert_one_line_of_error(run("migrate", "--dsn", "", "--schema", "No"), "schema is 'No'")


@pytest.mark.parametrize("arguments", [["migrate"], ["verify"], ["migrate", "--nonsense"], ["nonsense"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_sql_needs_no_database() -> None:
    done = run("migrate", "--sql", "--schema", "other")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'CREATE SCHEMA IF NOT EXISTS "other";' in done.stdout


def test_sql_with_a_dsn_prints_what_is_pending_there(empty_database: str) -> None:
    run("migrate", "--dsn", empty_database)
    assert run("migrate", "--sql", "--dsn", empty_database).stdout == "-- schema triojobs is up to date\n"


def test_a_missing_libpq_is_told_with_the_extra_that_brings_it() -> None:
    assert run("--version", code=WITHOUT_LIBPQ).returncode == 0
    assert_one_line_of_error(
        run("jobs", "list", "--dsn", "", code=WITHOUT_LIBPQ), 'pip install "triojobs[binary]"'
    )
    imported = run(code=WITHOUT_LIBPQ.partition("from triojobs")[0] + "from triojobs import Queue")
    assert imported.returncode != 0
    assert imported.stderr.splitlines()[-1] == (
        'ImportError: triojobs needs psycopg with libpq; run: pip install "triojobs[binary]"'
    )


def test_a_command_whose_extra_is_missing_does_not_break_the_others(tmp_path: Path) -> None:
    lacking = f"""
import sys
from pathlib import Path
Path({str(tmp_path)!r}, "lacking_demo.py").write_text("import a_missing_extra")
sys.path.append({str(tmp_path)!r})
import triojobs.cli
triojobs.cli.COMMANDS["demo"] = "lacking_demo"
from triojobs.__main__ import main
main()
"""
    assert "(not installed)" in run("--help", code=lacking).stdout
    assert run("migrate", "--sql", code=lacking).returncode == 0
    assert_one_line_of_error(run("demo", "--jobs", "5", code=lacking), "a_missing_extra")
