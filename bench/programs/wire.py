"""How a measured program talks with the bench: one order as argument, lines on stdout and stdin.

    say(ready=True), wait for a line       connected; the clock may start
    say(…)                                 what happened, with readings of CLOCK_MONOTONIC in seconds
    wait for the end of stdin              a worker works until then, and ends gracefully

Runs in the environments of the peers too: standard library only. The JavaScript twin is wire.mjs.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

ORDER: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
now = time.monotonic


def say(**values: Any) -> None:
    """Tell the bench."""
    print(json.dumps(values), flush=True)


def wait_for_start() -> None:
    """Say that everything is connected, and wait for the signal to begin."""
    say(ready=True)
    if not sys.stdin.readline():
        raise SystemExit("the bench has gone")


def wait_for_end() -> None:
    """Wait until the bench closes our stdin; blocks its thread."""
    while sys.stdin.readline():
        pass


def payload(no: int) -> dict[str, Any]:
    """Return a payload whose JSON has about `size` bytes."""
    frame = {"to": "ada@example.com", "no": no, "text": ""}
    return frame | {"text": "x" * max(0, ORDER["size"] - len(json.dumps(frame)))}


class Handled:
    """Counts jobs, and tells when the first began and when the last of `jobs` did."""

    def __init__(self) -> None:
        self.count = 0
        self.wanted: int = ORDER["jobs"]
        self.started: float | None = None
        self.latencies: list[float] = []

    def one(self) -> None:
        """Note that a handler began."""
        self.count += 1
        if self.count == 1:
            self.started = now()
            say(started=self.started)
        if self.count == self.wanted:
            say(handled=now())

    def one_sent_at(self, at: float) -> None:
        """Note that a handler began whose job was sent at `at`."""
        self.latencies.append(now() - at)
        self.one()

    def say_all(self) -> None:
        """Tell the sums at the end."""
        say(count=self.count, first=self.started, latencies=self.latencies)
