"""`triojobs demo` as a user runs it: a process of its own, its output, its signals, its rows."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from triojobs.cli.demo_books import TABLES

KEYS = ["enqueued", "done", "killed", "lost", "running", "released", "seconds"]


def command(*arguments: str, code: str | None = None) -> list[str]:
    start = ["-m", "triojobs"] if code is None else ["-c", code]
    return [sys.executable, "-W", "error", *start, "demo", *arguments]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRIOJOBS_DSN"}
    return inherited | variables


def run(*arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a demo to its end."""
    return subprocess.run(
        command(*arguments, code=code), env=environment(**variables), capture_output=True, text=True
    )


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A demo at work; its progress is on stderr."""
    with subprocess.Popen(
        command(*arguments, "--json"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> str:
    """Read progress until a line matches."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no line matched {pattern!r}: {seen}")


def report(output: str) -> dict[str, Any]:
    """Return the object that `--json` printed: one line, the documented keys."""
    assert output.count("\n") == 1
    found: dict[str, Any] = json.loads(output)
    assert list(found) == KEYS
    return found


def assert_complete(found: dict[str, Any], emails: int) -> None:
    """Each e-mail but the poisonous one is done and left a done activity."""
    expected = {"enqueued": 2 * emails - 1, "done": 2 * emails - 2, "killed": 1, "lost": 0, "running": 0}
    assert {name: found[name] for name in expected} == expected


@contextmanager
def no_email_can_be_sent(database: str) -> Iterator[psycopg.Connection[Any]]:
    """Hold the table that every e-mail writes to: handlers run, none of them ends."""
    with psycopg.connect(database) as conn:
        conn.execute(TABLES)
        conn.commit()
        conn.execute("LOCK TABLE triojobs_demo.sent IN SHARE MODE")
        yield conn


def value(database: str, query: str) -> Any:
    with psycopg.connect(database) as conn:
        row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def test_json_is_one_object_and_nothing_else(empty_database: str) -> None:
    done = run("--dsn", empty_database, "--jobs", "20", "--json")
    assert done.returncode == 0
    assert_complete(report(done.stdout), 20)


def test_the_counts_are_those_of_the_rows(empty_database: str) -> None:
    found = report(run("--dsn", empty_database, "--jobs", "20", "--json").stdout)
    by_status = "SELECT count(*) FROM triojobs.job_status WHERE status = "
    assert value(empty_database, "SELECT count(*) FROM triojobs.jobs") == found["enqueued"]
    assert value(empty_database, by_status + "'done'") == found["done"]
    assert value(empty_database, by_status + "'killed'") == found["killed"]
    assert value(empty_database, "SELECT count(*) FROM triojobs_demo.sent") == 19


def test_a_single_job_is_the_poisonous_one(empty_database: str) -> None:
    assert_complete(report(run("--dsn", empty_database, "--jobs", "1", "--json").stdout), 1)


def test_a_second_demo_on_the_same_server_begins_a_run_of_its_own(empty_database: str) -> None:
    run("--dsn", empty_database, "--jobs", "20", "--json")
    assert_complete(report(run("--dsn", empty_database, "--jobs", "5", "--json").stdout), 5)


def test_without_a_terminal_there_are_plain_lines_and_a_table(empty_database: str) -> None:
    done = run("--dsn", empty_database, "--jobs", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert re.search(r"^ +\d+\.\d s  enqueued \d+  running \d+  done \d+", done.stdout, re.M)
    assert re.search(r"^ +enqueued +9   5 e-mails, 4 activities$", done.stdout, re.M)
    assert re.search(r"^ +lost +0   ", done.stdout, re.M)
    assert "whose transaction was rolled back, does not exist" in done.stdout


def test_on_a_terminal_the_numbers_are_drawn_anew(empty_database: str) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("--dsn", empty_database, "--jobs", "5"),
        env=environment(TERM="xterm", COLUMNS="80"),
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # what Linux answers when the other side is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    assert b"\x1b[" in shown
    assert b"jobs/s" in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_gives_jobs_back_and_the_next_one_finishes(
    empty_database: str, number: signal.Signals, code: int
) -> None:
    with no_email_can_be_sent(empty_database), running("--dsn", empty_database, "--jobs", "40") as process:
        wait_for_line(process, r"enqueued 40  running 16 ")
        process.send_signal(number)
        output, progress = process.communicate()
        assert process.returncode == code
        found = report(output)
        assert (found["running"], found["done"], found["lost"]) == (0, 0, 0)
        assert found["released"] > 0
        assert "40 wait" in progress
        assert "again finishes them" in progress
        assert value(empty_database, "SELECT count(*) FROM triojobs.leases") == 0

    again = run("--dsn", empty_database, "--jobs", "7", "--json")
    assert again.returncode == 0
    assert "found an unfinished run of 40 e-mails" in again.stderr
    assert_complete(report(again.stdout), 40)


def test_a_second_signal_cancels_and_a_third_one_ends(empty_database: str) -> None:
    with no_email_can_be_sent(empty_database), running("--dsn", empty_database, "--jobs", "40") as process:
        wait_for_line(process, r"enqueued 40  running 16 ")
        with psycopg.connect(empty_database) as gate:
            gate.execute("LOCK TABLE triojobs.worker_groups")  # closing waits for it
            process.send_signal(signal.SIGINT)
            wait_for_line(process, "^stopping")
            process.send_signal(signal.SIGINT)
            wait_for_line(process, "^cancelling")
            process.send_signal(signal.SIGINT)
            assert process.wait() == -signal.SIGINT


def test_a_killed_demo_is_finished_by_the_next_one_on_the_same_directory(data: Path) -> None:
    with running("--data", str(data)) as process:
        wait_for_line(process, "running 1.  done [1-9]")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    again = run("--data", str(data), "--json")
    assert again.returncode == 0
    assert "found an unfinished run of 300 e-mails" in again.stderr
    assert_complete(report(again.stdout), 300)


def test_a_run_that_was_killed_while_it_enqueued_is_completed(empty_database: str) -> None:
    with psycopg.connect(empty_database) as gate:
        gate.execute(TABLES)
        gate.commit()
        gate.execute("LOCK TABLE triojobs_demo.orders IN SHARE MODE")  # a third of them cannot be enqueued
        with running("--dsn", empty_database, "--jobs", "30") as process:
            wait_for_line(process, "enqueued [1-9]")
            process.kill()
            process.wait()
    again = run("--dsn", empty_database, "--json")
    assert "of its e-mails are still to be enqueued" in again.stderr
    assert_complete(report(again.stdout), 30)


def test_a_job_without_a_place_is_counted_as_lost(empty_database: str) -> None:
    with no_email_can_be_sent(empty_database), running("--dsn", empty_database, "--jobs", "40") as process:
        wait_for_line(process, r"enqueued 40  running 16 ")
        process.send_signal(signal.SIGINT)
        process.communicate()
    with psycopg.connect(empty_database) as conn:
        conn.execute("DELETE FROM triojobs.ready WHERE id = (SELECT max(id) FROM triojobs.ready)")
    again = run("--dsn", empty_database, "--json")
    assert (again.returncode, report(again.stdout)["lost"]) == (1, 1)
    assert "error: 1 job(s) are lost" in again.stderr


def test_a_row_without_its_activity_is_counted_as_lost(empty_database: str) -> None:
    with (
        no_email_can_be_sent(empty_database) as conn,
        running("--dsn", empty_database, "--jobs", "40") as demo,
    ):
        wait_for_line(demo, r"enqueued 40  running 16 ")
        demo.send_signal(signal.SIGINT)
        demo.communicate()
        job_id = value(empty_database, "SELECT max(id) FROM triojobs.ready")
        conn.execute(
            "INSERT INTO triojobs_demo.sent SELECT 1, (metadata ->> 'number')::int, id, 0 "
            "FROM triojobs.jobs WHERE id = %s",
            [job_id],
        )
        conn.commit()
    # The e-mail can never be sent now: its row is there already, so it is killed, and its row is torn.
    again = run("--dsn", empty_database, "--json")
    assert (again.returncode, report(again.stdout)["lost"]) == (1, 1)


# Errors: one line, a remedy, no traceback.

TOO_NEW = "INSERT INTO triojobs.migrations (name, sha256, min_client) VALUES ('9999_later.sql', 'x', 99)"
NO_PROGRAMS = """
import triojobs._embedded_programs
triojobs._embedded_programs.candidates = lambda: iter(())
from triojobs.__main__ import main
main()
"""


def assert_one_line_of_error(done: subprocess.CompletedProcess[str], *parts: str, code: int = 1) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("starting an embedded")]
    assert (done.returncode, done.stdout, len(lines)) == (code, "", 1), done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--jobs", "0"], 2, ["--jobs", "1 to 1000000", "--help"]),
        (["--jobs", "many"], 2, ["--jobs", "integer", "--help"]),
        (["--nonsense"], 2, ["--nonsense", "--help"]),
        (["--dsn", "a", "--data", "b"], 2, ["give one of them"]),
        (["--schema", "No"], 1, ["schema is 'No'"]),
        (["--dsn", "nonsense"], 1, ["cannot be parsed", "postgresql://"]),
        (["--dsn", "host=/nowhere password=secret-word"], 1, ["check host and port"]),
        (["--data", "/proc/nowhere"], 1, ["--data is '/proc/nowhere'", "can be made and written"]),
    ],
)
def test_a_refused_argument_is_one_line(arguments: list[str], code: int, parts: list[str]) -> None:
    done = run(*arguments, "--json")
    assert_one_line_of_error(done, *parts, code=code)
    assert "secret-word" not in done.stderr


def test_a_directory_that_holds_something_else_is_one_line(data: Path) -> None:
    data.mkdir()
    (data / "letters.txt").touch()
    assert_one_line_of_error(run("--data", str(data), "--json"), "--data is", "new, empty, or")


def test_missing_programs_are_one_line_that_names_the_extra() -> None:
    done = run("--json", code=NO_PROGRAMS)
    assert_one_line_of_error(done, "triojobs[embedded]", "--dsn")


def test_a_schema_that_is_too_new_is_one_line(database: str) -> None:
    with psycopg.connect(database) as conn:
        conn.execute(TOO_NEW)
    assert_one_line_of_error(run("--dsn", database, "--json"), "too new", "upgrade triojobs")


def test_a_user_without_rights_is_one_line(database: str) -> None:
    with psycopg.connect(database) as conn:
        conn.execute("DROP ROLE IF EXISTS triojobs_demo_guest")
        conn.execute("CREATE ROLE triojobs_demo_guest LOGIN")
    try:
        done = run("--dsn", f"{database} user=triojobs_demo_guest", "--json")
        assert_one_line_of_error(done, "permission denied")
    finally:
        with psycopg.connect(database) as conn:
            conn.execute("DROP ROLE triojobs_demo_guest")


def test_the_environment_does_not_choose_the_server(data: Path) -> None:
    done = run("--data", str(data), "--jobs", "1", "--json", TRIOJOBS_DSN="host=/nowhere")
    assert done.returncode == 0
