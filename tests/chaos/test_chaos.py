"""The program: a small run holds, mutants of the runtime are noticed, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.fleet import ROOT

TIME_LIMIT = 110.0  # seconds; a small run takes 12 to 20
KEYS = [
    "jobs",
    "done",
    "lost",
    "double_outcomes",
    "overlaps",
    "overlaps_stopped",
    "duplicates",
    "kills",
    "terminates",
    "restarts",
    "seconds",
]
# What must notice each mutant; more may.
NOTICED_BY = {
    "rescue-ignores-leases": {"overlaps", "unexcused"},
    "handlers-keep-on": {"past_checkpoint"},
    "settle-without-fence": {"contradictions"},
    "release-keeps-the-attempt": {"attempts"},
    "stale-settlements-are-written": {"double_outcomes"},
    "nobody-rescues": {"lost"},
}
QUICK = {
    "rescue-ignores-leases": ["--stops", "1", "--seconds", "25"],  # it never comes to rest
    "settle-without-fence": ["--stops", "3", "--seconds", "80"],
}
THOROUGH = ["--jobs", "1500", "--stops", "4", "--seconds", "60"]


class Program:
    """One run of `python -m tests.chaos` in a directory for temporary files of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.chaos", "--json", *arguments]
        self.directory = directory
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> tuple[int, dict[str, Any], str]:
        """Wait for the end; return exit code, the one line of stdout, and stderr."""
        try:
            out, err = self.process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # it stops what it has started
            self.process.communicate()
            raise
        assert out.count("\n") <= 1, out
        return self.process.returncode, json.loads(out or "{}"), err


@pytest.fixture
def directory() -> Any:
    with tempfile.TemporaryDirectory(prefix="triojobs-") as name:
        Path(name).chmod(0o711)  # the server of root runs as somebody else
        yield Path(name)


def left_behind(directory: Path) -> list[str]:
    """Return files in the program's directory and command lines of processes that name it."""
    found = [str(path) for path in directory.iterdir()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended
        if str(directory) in command:
            found.append(command.replace("\0", " "))
    return found


def test_a_small_run_holds(directory: Path) -> None:
    code, summary, err = Program(directory, "--jobs", "300", "--stops", "1").result()
    assert code == 0, f"{summary}\n{err}"
    assert set(KEYS) <= set(summary)
    assert summary["jobs"] >= 300
    assert summary["jobs"] == summary["done"] + summary["killed"] + summary["cancelled"]
    for must_be_zero in ("lost", "double_outcomes", "overlaps", "past_checkpoint", "unexcused_duplicates"):
        assert summary[must_be_zero] == 0
    for must_have_happened in ("kills", "terminates", "restarts", "stops"):
        assert summary[must_have_happened] >= 1
    assert left_behind(directory) == []


@pytest.mark.timeout(2 * TIME_LIMIT)
def test_mutants_are_noticed(directory: Path) -> None:
    """At once: it saves time, and they may well get in each other's way."""
    programs = {name: mutant(directory, name, "--jobs", "200", *QUICK[name]) for name in QUICK}
    for name, program in programs.items():
        check_noticed(name, program)


@pytest.mark.long
@pytest.mark.timeout(2 * TIME_LIMIT)
@pytest.mark.parametrize("name", NOTICED_BY)
def test_each_mutant_is_noticed(directory: Path, name: str) -> None:
    check_noticed(name, mutant(directory, name, *THOROUGH))


def mutant(directory: Path, name: str, *arguments: str) -> Program:
    own = directory / name
    own.mkdir(mode=0o711)
    return Program(own, "--mutant", name, *arguments)


def check_noticed(name: str, program: Program) -> None:
    code, summary, err = program.result()
    assert code == 1, f"{name} was not noticed: {summary}\n{err}"
    assert set(summary["wrong"]) >= NOTICED_BY[name], f"{name}: {summary}\n{err}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_that_was_started(directory: Path, number: signal.Signals) -> None:
    program = Program(directory, "--jobs", "300")
    assert program.process.stderr is not None
    for line in program.process.stderr:
        if "terminated backends" in line:  # in the middle of it
            break
    assert len(left_behind(directory)) > 4  # the server and the workers
    program.process.send_signal(number)
    code, _, err = program.result()
    assert code == 128 + number, err
    assert left_behind(directory) == []
