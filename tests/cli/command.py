"""The command line as a test runs it: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from triojobs.cli import cli


class Command:
    """Runs commands on one database; `triojobs_("jobs", "list")`."""

    def __init__(self, dsn: str | None) -> None:
        self._environment = {"TRIOJOBS_DSN": dsn}

    def __call__(self, *arguments: str, input: str | bytes | None = None) -> Result:
        """Run one in this process."""
        return CliRunner(env=self._environment).invoke(cli, arguments, input=input, prog_name="triojobs")

    def ok(self, *arguments: str, input: str | None = None) -> str:
        """Run one that has to succeed; return its stdout."""
        done = self(*arguments, input=input)
        assert done.exit_code == 0, done.output
        return done.stdout

    def json(self, *arguments: str) -> list[Any]:
        """Run one with --json; return the objects, one of each line."""
        return [json.loads(line) for line in self.ok(*arguments, "--json").splitlines()]

    def refused(self, *arguments: str, code: int = 1, input: str | bytes | None = None) -> str:
        """Run one that has to fail; return its one line of error."""
        done = self(*arguments, input=input)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        (line,) = [line for line in done.stderr.splitlines() if line and not line.endswith("[y/N]: ")]
        assert line.startswith("error: ")
        return line


@contextmanager
def running(
    *arguments: str, dsn: str | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command at work in a process of its own; its words are on stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "TRIOJOBS_DSN"}
    if dsn is not None:
        environment["TRIOJOBS_DSN"] = dsn
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "triojobs", *arguments],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], words: str) -> str:
    """Read stderr until a line contains the words."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return line
    raise AssertionError(f"no line contained {words!r}: {seen}")
