"""How commands end when something goes wrong: one line, an exit code, no traceback; and how they are found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command import Command
from test_doctor_command import ALL, role
from tools import Connection, put, read

from triojobs.cli import COMMANDS, cli

BASH_COMPLETION = "_TRIOJOBS_COMPLETE"


def piped(command: str, dsn: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which $triojobs is the command."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={**os.environ, "TRIOJOBS_DSN": dsn, "triojobs": f"{sys.executable} -W error -m triojobs"},
        capture_output=True,
        text=True,
    )


def test_every_command_is_listed_with_one_line(triojobs_: Command) -> None:
    text = triojobs_.ok("--help")
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert "(not installed)" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_subcommand_has_a_help(triojobs_: Command, name: str) -> None:
    assert triojobs_.ok(name, "--help").startswith(f"Usage: triojobs {name}")
    for inner in getattr(cli.get_command(cli.make_context("x", [name]), name), "commands", {}):
        assert triojobs_.ok(name, inner, "--help").startswith(f"Usage: triojobs {name} {inner}")


def test_the_help_of_commands_needs_neither_database_nor_rich() -> None:
    program = "import sys; sys.modules['rich'] = None; from triojobs.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nonsense"], "No such option '--nonsense'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["jobs", "nonsense"], "No such command 'nonsense'"),
        (["jobs", "list", "--nonsense"], "No such option '--nonsense'"),
        (["jobs", "show"], "Missing argument 'ID'"),
    ],
)
def test_what_click_does_not_know_is_one_line(triojobs_: Command, arguments: list[str], words: str) -> None:
    line = triojobs_.refused(*arguments, code=2)
    assert words in line.replace("No such option: --nonsense", "No such option '--nonsense'")
    assert "--help`" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "list"],
        ["jobs", "show", "1"],
        ["jobs", "cancel", "1"],
        ["queues", "list"],
        ["queues", "pause", "q"],
        ["groups", "list"],
        ["groups", "drain", "x"],
        ["stats"],
        ["prune"],
        ["enqueue", "q", "1"],
    ],
)
def test_a_database_that_is_not_there_is_one_line(arguments: list[str], empty_database: str) -> None:
    nowhere = Command("host=/nowhere password=secret-word")
    line = nowhere.refused(*arguments)
    assert "check host and port" in line
    assert "secret-word" not in line
    assert "`triojobs migrate`" in Command(empty_database).refused(*arguments)


def test_without_a_dsn_the_variable_is_named() -> None:
    assert "TRIOJOBS_DSN" in Command(None).refused("jobs", "list", code=2)


def test_a_reader_that_goes_away_ends_a_list_quietly(dsn: str, db: Connection) -> None:
    put(db, 5000)
    done = piped("$triojobs jobs list --limit 0 --json | head -n 1 | wc -l", dsn)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (141, "1", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "command", ["jobs list", "queues list --json", "stats", "doctor", "stats --watch --count 1"]
)
def test_a_stdout_that_is_full_is_one_line(dsn: str, db: Connection, command: str) -> None:
    put(db, 1)
    done = piped(f"$triojobs {command} > /dev/full", dsn)
    assert done.returncode == 1
    assert done.stderr.startswith("error: stdout cannot be written: No space left on device; ")
    assert done.stderr.count("\n") == 1


def test_a_terminal_that_lacks_a_character_gets_its_number(dsn: str, db: Connection) -> None:
    put(db, 1, key="a→b")
    done = piped("PYTHONIOENCODING=latin-1 $triojobs jobs list", dsn)
    assert (done.returncode, "a\\u2192b" in done.stdout) == (0, True)


def test_a_pooler_that_was_not_declared_is_told_with_the_option(dsn: str) -> None:
    from tests.tools.pooler import pgbouncer, program

    if program() is None:
        pytest.skip("there is no PgBouncer here")
    with pgbouncer(dsn) as pooler:
        behind = Command(pooler.conninfo)
        assert "pass --pooled" in behind.refused("jobs", "list")
        assert behind.ok("enqueue", "q", "1", "--pooled").strip().isdecimal()
        assert len(behind.json("jobs", "list", "--pooled")) == 1


def test_a_role_that_lacks_a_right_is_sent_to_the_doctor(dsn: str, db: Connection) -> None:
    with role(dsn, *ALL, "REVOKE DELETE ON triojobs.ready FROM {}") as conninfo:
        (job,) = put(db, 1)
        line = Command(conninfo).refused("jobs", "cancel", str(job))
    assert (
        "permission denied for table ready; grant the role what it lacks; `triojobs doctor` names it" in line
    )
    assert read(db, job).status == "pending"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_comes_with_click(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "triojobs"],
        env={**os.environ, BASH_COMPLETION: f"{shell}_source"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "_TRIOJOBS_COMPLETE" in done.stdout


def test_commands_and_statuses_are_completed() -> None:
    def completed(line: str, word: int) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "triojobs"],
            env={**os.environ, BASH_COMPLETION: "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(word)},
            capture_output=True,
            text=True,
        )
        return [each.partition(",")[2] for each in done.stdout.splitlines()]

    assert completed("triojobs jo", 1) == ["jobs"]
    assert completed("triojobs jobs re", 2) == ["reschedule", "retry"]
    assert completed("triojobs jobs list --status ki", 4) == ["killed"]
