"""Starts measured programs, each a process of its own, and hears what they say (see programs/wire.py)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from .server import Database, cpu_seconds

__all__ = ["BenchError", "Program"]

PATIENCE: Final = 600.0  # seconds that a program may take in all; only one that hangs needs so long


class BenchError(Exception):
    """A run that is no measurement: a program failed, or the counts in the database are off."""


class Program:
    """One measured program. A context manager: at its end the process is gone."""

    def __init__(self, command: Sequence[str], order: Mapping[str, Any], database: Database) -> None:
        self._name = f"{os.path.basename(command[-1])} {order['do']}"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.process = subprocess.Popen(
            [*command, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | database.environment,
            text=True,
        )
        self._limit = threading.Timer(PATIENCE, self.process.kill)
        self._limit.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is not None:
            self.process.kill()
        self.end()

    def hear(self, what: str) -> Any:
        """Wait until the program says `what`; return the value."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and what in (said := json.loads(line)):
                return said[what]
        self.process.wait()
        raise BenchError(f"{self._name} ended without saying {what!r}: {self._last_words()}")

    def start(self) -> Program:
        """Wait until it is connected, and start the clock."""
        self.hear("ready")
        self.go()
        return self

    def go(self) -> None:
        """Start the clock."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def cpu_seconds(self) -> float:
        """Return its processor time until now."""
        return cpu_seconds(self.process.pid)

    def end(self) -> str:
        """Have it end gracefully; return what it said until then."""
        said = ""
        try:
            if self.process.poll() is None:
                said, _ = self.process.communicate(timeout=PATIENCE)  # closes its stdin
            if self.process.returncode > 0:
                raise BenchError(f"{self._name} failed: {self._last_words()}")
        finally:
            self._limit.cancel()
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self._errors):
                if stream is not None:
                    stream.close()
        return said

    def last(self) -> dict[str, Any]:
        """Have it end gracefully; return the last thing that it said."""
        lines = [line for line in self.end().splitlines() if line.startswith("{")]
        if not lines:
            raise BenchError(f"{self._name} said nothing at its end")
        last: dict[str, Any] = json.loads(lines[-1])
        return last

    def _last_words(self) -> str:
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]


def run_to_end(command: Sequence[str], order: Mapping[str, Any], database: Database) -> None:
    """Run a program that needs no clock (prepare)."""
    with Program(command, order, database):
        pass
