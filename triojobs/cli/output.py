"""What commands print: tables for people, JSON lines for programs.

A terminal gets a table by rich, where it is installed, cut to the width of the window. Elsewhere the
same columns are aligned with spaces and nothing is cut. JSON is one object a line: a list of a
million jobs can be read while it is still being written.
"""

from __future__ import annotations

import base64
import datetime as dt
import math
import shutil
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = [
    "Column",
    "Printer",
    "colour_of",
    "console",
    "note",
    "one_line",
    "plain",
    "print_json",
    "say",
    "shown_id",
    "shown_seconds",
    "shown_time",
    "table_lines",
]

GAP: Final = "  "
LEAST: Final = 6  # characters of a cut column that are left to it
COLOURS: Final = {
    "done": "green",
    "running": "cyan",
    "failed": "yellow",
    "killed": "red",
    "cancelled": "magenta",
    "alive": "green",
    "draining": "yellow",
    "lapsed": "red",
    "closed": "dim",
    "paused": "yellow",
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "broken": "bold red",
}


def note(text: str) -> None:
    """Tell the person something that is no part of the output."""
    click.echo(text, err=True)


def print_json(value: object) -> None:
    """Print one line of JSON. What users wrote goes through `plain` before."""
    import msgspec

    click.echo(msgspec.json.encode(value))


def plain(value: object) -> Any:
    """Return a value as JSON has it: times in ISO 8601, UUIDs as text, bytes as base64, NaN as null."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)  # the word of an enum
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, dt.datetime):
        return value.isoformat().replace("+00:00", "Z")
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)


def console() -> Console | None:
    """Return rich's console when stdout is a terminal and rich is installed."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:  # the extra is missing: plain columns will do
        return None
    return Console(highlight=False)


def colour_of(word: str) -> str:
    """Return the style of a status, a state or a level; nothing for other words."""
    return COLOURS.get(word, "")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `cut` ones give way when the window is narrow; `coloured` ones hold words of COLOURS."""

    name: str
    right: bool = False
    cut: bool = False
    coloured: bool = False


class Printer:
    """Prints rows under one head, page by page."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._console = console()
        self._widths: list[int] = []

    def print(self, rows: Iterable[Sequence[str]]) -> None:
        """Print one page; the head comes with the first. Later pages are at least as wide as it."""
        lines = [[one_line(cell) for cell in row] for row in rows]
        head = not self._widths
        if self._console is not None:
            self._widths = self._widths or [0]
            for text in table_lines(self._columns, lines, self._console.width, head=head):
                self._console.print(text, no_wrap=True, overflow="crop", crop=True)
            return
        names = [column.name for column in self._columns]
        found = _widths([names, *lines], len)
        self._widths = [max(pair) for pair in zip(found, self._widths or found, strict=True)]
        for line in [names, *lines] if head else lines:
            cells = zip(line, self._widths, self._columns, strict=True)
            padded = (c.rjust(width) if column.right else c.ljust(width) for c, width, column in cells)
            click.echo(GAP.join(padded).rstrip())


def table_lines(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int, *, head: bool = True
) -> list[Text]:
    """Return the lines of a table for a terminal that is `room` wide; the widest cut columns give way first."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    names = [column.name for column in columns]
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = _widths([names, *rows], cell_len)
    over = sum(widths) + len(GAP) * (len(widths) - 1) - room
    while over > 0:
        n = max((n for n, c in enumerate(columns) if c.cut), key=lambda n: widths[n], default=None)
        if n is None or widths[n] <= LEAST:
            break  # the rest is lost at the right side
        widths[n] -= 1
        over -= 1
    lines = []
    for row in [names, *rows] if head else rows:
        line = Text(no_wrap=True)
        for n, (cell, column, width) in enumerate(zip(row, columns, widths, strict=True)):
            length = cell_len(cell)
            shown = cell if length <= width else set_cell_size(cell, width - 1) + "…"
            pad = " " * max(0, width - length)
            style = "bold" if row is names else colour_of(cell) if column.coloured else ""
            line.append(pad + shown if column.right else shown + pad, style=style)
            line.append(GAP if n < len(widths) - 1 else "")
        lines.append(line)
    return lines


def _widths(rows: Sequence[Sequence[str]], length: Callable[[str], int]) -> list[int]:
    return [max(map(length, cells)) for cells in zip(*rows, strict=True)]


def say(text: str) -> None:
    """Print a sentence; a terminal gets it broken between words."""
    text = one_line(text)
    if not sys.stdout.isatty():
        click.echo(text)
        return
    width = shutil.get_terminal_size().columns
    click.echo("\n".join(textwrap.wrap(text, width, break_on_hyphens=False)))


def one_line(text: str) -> str:
    """Return what a program wrote as it may go to a terminal: without line breaks and control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def shown_time(at: dt.datetime | None) -> str:
    """Return a time in UTC, to the second."""
    return "-" if at is None else f"{at.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S}"


def shown_seconds(seconds: float | None) -> str:
    """Return a duration in two units at most: 850ms, 12.3s, 4m05s, 3h20m, 12d."""
    if seconds is None:
        return "-"
    if seconds < 0:
        return "0s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02}m"
    return f"{hours // 24}d{hours % 24:02}h"


def shown_id(group: uuid.UUID | None) -> str:
    """Return the beginning of a group's id, which tells groups apart."""
    return "-" if group is None else str(group)[:8]
