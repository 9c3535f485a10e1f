"""Workers as processes of their own: started, told what to do by payloads, watched line by line, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .rig import PATIENCE

ROOT = Path(__file__).parents[2]


class WorkerProcess:
    """One process that runs `tests.faults.worker_program`; its lines are dicts with an "event"."""

    def __init__(self, conninfo: str, *, env: dict[str, str] | None = None, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.faults.worker_program",
                json.dumps({"conninfo": conninfo, **settings}),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
        )
        self.lines: list[dict[str, Any]] = []
        self.errors = ""
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read_lines, name="worker's lines", daemon=True),
            threading.Thread(target=self._read_errors, name="worker's errors", daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(
        self, event: str, *, count: int = 1, seconds: float = PATIENCE, **fields: Any
    ) -> dict[str, Any]:
        """Wait for the count-th line about an event with these fields; return it."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._nth(event, count, fields), seconds)
            assert found, f"no {event} {fields} within {seconds:g} s; {self.lines}; {self.errors}"
            return found

    def all(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the lines about an event so far."""
        with self._changed:
            return [line for line in self.lines if line["event"] == event and fields.items() <= line.items()]

    def send(self, number: signal.Signals) -> float:
        """Send a signal; return when (monotonic seconds)."""
        self._process.send_signal(number)
        return time.monotonic()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; return the exit code (negative: the signal that ended it)."""
        code = self._process.wait(seconds)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """End it without mercy, whatever its state."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _nth(self, event: str, count: int, fields: dict[str, Any]) -> dict[str, Any] | None:
        found = [line for line in self.lines if line["event"] == event and fields.items() <= line.items()]
        return found[count - 1] if len(found) >= count else None

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(json.loads(line))
                self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors += line


@contextmanager
def worker_processes() -> Iterator[Callable[..., WorkerProcess]]:
    """Yield a function that starts workers; whatever still runs at the end is killed."""
    started: list[WorkerProcess] = []

    def start(conninfo: str, **settings: Any) -> WorkerProcess:
        started.append(WorkerProcess(conninfo, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
