"""What the demo shows: a live table on a terminal, plain lines elsewhere, one JSON object on demand."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from .demo_books import Counts, Run
from .ending import OutputError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = ["Result", "View", "open_view"]

LINE_INTERVAL: Final = 1.0  # seconds between plain lines


@dataclass(frozen=True)
class Result:
    """How the demo ended. `released` and `seconds` are of this process, the counts of all of them.

    `worked` is how many jobs ended while this process ran; `signal` the one that interrupted it.
    """

    counts: Counts
    released: int
    seconds: float
    worked: int
    signal: int | None = None

    @property
    def rate(self) -> float:
        """Jobs that ended, per second."""
        return self.worked / self.seconds if self.seconds > 0 else 0.0

    def as_json(self) -> str:
        """Return the one line of `--json`."""
        counts = self.counts
        return json.dumps(
            {
                "enqueued": counts.enqueued,
                "done": counts.done,
                "killed": counts.killed,
                "lost": counts.lost,
                "running": counts.running,
                "released": self.released,
                "seconds": round(self.seconds, 3),
            }
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, number and explanation for the table."""
        counts = self.counts
        rows = [
            (
                "enqueued",
                counts.enqueued,
                f"{counts.emails} e-mails, {counts.enqueued - counts.emails} activities",
            ),
            ("done", counts.done, "completed"),
            ("failed", counts.failed, "attempts that failed and were tried again"),
            ("killed", counts.killed, "given up after the last attempt"),
            ("cancelled", counts.cancelled, "by somebody else"),
            ("waiting", counts.waiting, "due, or to be tried again"),
            ("running", counts.running, "under a lease that ends by itself"),
            ("attempts", counts.attempts, "of all jobs"),
            ("released", self.released, "given back at the stop, their attempt not counted"),
            ("jobs/s", round(self.rate), f"{self.worked} jobs in {self.seconds:.1f} s; the handlers sleep"),
            ("lost", counts.lost, "jobs without a place or an outcome, by the tables"),
        ]
        quiet = {"cancelled", "waiting", "running"}
        return [(name, str(number), why) for name, number, why in rows if number or name not in quiet]


class View(Protocol):
    """Where the demo's words and numbers go."""

    def note(self, text: str) -> None: ...

    def show(self, run: Run, counts: Counts, rate: float) -> None: ...

    def finish(self, result: Result) -> None: ...

    def close(self) -> None: ...


def open_view(*, as_json: bool) -> View:
    """Return the view that fits: JSON on stdout, a terminal with rich, or lines."""
    if as_json:
        return LineView(sys.stderr, result=_print_json)
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:  # the extra is missing: lines will do
            pass
        else:
            return LiveView(Console(highlight=False))
    return LineView(sys.stdout, result=_print_rows)


def _print_json(result: Result) -> None:
    _print(result.as_json(), sys.stdout)


def _print_rows(result: Result) -> None:
    for name, number, why in result.rows():
        _print(f"{name:>9} {number:>7}   {why}", sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError as exc:
        raise OutputError(exc) from exc


class LineView:
    """Plain lines: for files, pipes and other programs."""

    def __init__(self, stream: TextIO, *, result: Callable[[Result], None]) -> None:
        self._stream = stream
        self._result = result
        self._began = self._next = time.monotonic()

    def note(self, text: str) -> None:
        """Print one line."""
        _print(text, self._stream)

    def show(self, run: Run, counts: Counts, rate: float) -> None:
        """Print the numbers as one line, once a second."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LINE_INTERVAL
        self.note(
            f"{time.monotonic() - self._began:6.1f} s  enqueued {counts.enqueued}  running {counts.running}  "
            f"done {counts.done}  failed {counts.failed}  killed {counts.killed}  {rate:.0f} jobs/s"
        )

    def finish(self, result: Result) -> None:
        """Print the table, or the JSON object."""
        self._result(result)

    def close(self) -> None:
        """Nothing is open."""


class LiveView:
    """A terminal: one bar and one line of numbers that are drawn anew, words above them.

    Refreshed by its caller, without rich's thread: then nothing is drawn between two checkpoints.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False)

    def show(self, run: Run, counts: Counts, rate: float) -> None:
        """Draw bar and numbers."""
        picture = self._picture(run, counts, rate)
        if self._live is None:
            from rich.live import Live

            self._live = Live(picture, console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(picture, refresh=True)

    def finish(self, result: Result) -> None:
        """Replace bar and numbers by the table."""
        from rich.table import Table

        self.close()
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="right", style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        for name, number, why in result.rows():
            table.add_row(name, number, why, style=_colour(name, number))
        self._console.print()
        self._console.print(table)
        self._console.print()

    def close(self) -> None:
        """Take bar and numbers away. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _picture(self, run: Run, counts: Counts, rate: float) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = min(60, self._console.width - 1)
        bar = ProgressBar(total=run.expected, completed=min(counts.ended, run.expected), width=width)
        numbers = Text(no_wrap=True, overflow="ellipsis")
        for name, number in (
            ("enqueued", counts.enqueued),
            ("running", counts.running),
            ("done", counts.done),
            ("failed", counts.failed),
            ("killed", counts.killed),
            ("jobs/s", round(rate)),
        ):
            numbers.append(f"{name} ", style="dim")
            numbers.append(f"{number}  ", style=_colour(name, str(number)) or "bold")
        rows = Table.grid()  # a bar ends without a line break, so a group of the two would be one line
        rows.add_row(bar)
        rows.add_row(numbers)
        return rows


def _colour(name: str, number: str) -> str | None:
    if number == "0":
        return "green" if name == "lost" else None
    return {"done": "green", "failed": "yellow", "killed": "red", "lost": "bold red"}.get(name)
