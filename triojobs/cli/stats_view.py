"""What `triojobs stats` shows: a live screen on a terminal, tables or lines elsewhere."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Protocol

import click

from .output import Column, Printer, console, one_line, say, shown_seconds, table_lines
from .queues import state_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from .. import GroupInfo, Quantiles, QueueInfo, Statistic
    from .stats import Snapshot

__all__ = ["View", "open_view"]

WIDE: Final = 110  # columns, from which on all quantiles are shown
HEAD: Final = (
    ("RUNNING_JOBS", "running"),
    ("QUEUE_BACKLOG", "due"),
    ("PENDING_JOBS", "pending"),
    ("FAILED_JOBS", "to be retried"),
    ("DONE_JOBS", "done"),
    ("KILLED_JOBS", "killed"),
    ("CANCELLED_JOBS", "cancelled"),
    ("JOBS_PAST_HOUR", "in the past hour"),
)


class View(Protocol):
    """Where snapshots go."""

    def show(self, snapshot: Snapshot) -> None: ...

    def close(self) -> None: ...


def open_view(*, live: bool) -> View:
    """Return the view that fits stdout."""
    terminal = console()
    if live and terminal is not None:
        return LiveView(terminal)
    return LineView() if live else PageView()


def queue_columns(*, wide: bool) -> list[Column]:
    """Return the columns of the table of queues."""
    quantiles = ("50", "95", "99") if wide else ("95",)
    return [
        Column("QUEUE", cut=True),
        *(Column(name, right=True) for name in ("READY", "LATER", "RUN", "RETRY", "OLDEST", "RATE/s")),
        *(Column(f"WAIT{q}", right=True) for q in quantiles),
        *(Column(f"TOOK{q}", right=True) for q in quantiles),
        Column("STATE", coloured=True),
    ]


def queue_cells(queue: QueueInfo, *, wide: bool) -> list[str]:
    """Return the cells of one queue."""
    about = "" if queue.exact else "~"
    return [
        queue.name,
        f"{about}{queue.ready}",
        f"{about}{queue.scheduled}",
        str(queue.running),
        f"{about}{queue.failed}",
        shown_seconds(queue.oldest_due_age),
        f"{queue.throughput:.1f}",
        *_quantiles(queue.wait, wide=wide),
        *_quantiles(queue.run, wide=wide),
        state_of(queue),
    ]


def _quantiles(found: Quantiles | None, *, wide: bool) -> list[str]:
    if found is None:
        return ["-"] * (3 if wide else 1)
    return [shown_seconds(each) for each in ((found.p50, found.p95, found.p99) if wide else (found.p95,))]


GROUPS: Final = (
    Column("GROUP", cut=True),
    Column("HOST", cut=True),
    Column("STATE", coloured=True),
    Column("RUN", right=True),
    Column("SLOTS", right=True),
    Column("BEAT", right=True),
)


def group_cells(group: GroupInfo) -> list[str]:
    """Return the cells of one worker group."""
    slots = sum((group.queues or {}).values())
    cap = slots if group.concurrency is None else min(slots, group.concurrency)
    return [
        group.name,
        f"{group.host}:{group.pid}",
        group.state,
        str(group.running),
        str(cap),
        shown_seconds(group.lease_age),
    ]


def head_of(snapshot: Snapshot) -> list[str]:
    """Return the figures of the headline."""
    shown = (_figure(snapshot.figures.get(name), words) for name, words in HEAD)
    return [words for words in shown if words]


def _figure(figure: Statistic | None, words: str) -> str:
    if figure is None or figure.value is None:
        return ""
    return f"{'' if figure.exact else '~'}{figure.value} {words}"


class PageView:
    """Two tables and a headline, once."""

    def show(self, snapshot: Snapshot) -> None:
        """Print everything."""
        terminal = console()
        wide = terminal is None or terminal.width >= WIDE
        say(", ".join(head_of(snapshot)))
        if snapshot.queues:
            click.echo()
            Printer(queue_columns(wide=wide)).print(queue_cells(each, wide=wide) for each in snapshot.queues)
        if snapshot.groups:
            click.echo()
            Printer(GROUPS).print(group_cells(each) for each in snapshot.groups)

    def close(self) -> None:
        """Nothing is open."""


class LineView:
    """One line for each queue and look."""

    def show(self, snapshot: Snapshot) -> None:
        """Print the lines."""
        now = f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
        alive = sum(group.state == "alive" for group in snapshot.groups)
        click.echo(f"{now} groups={alive} " + " ".join(_words(snapshot)))
        for queue in snapshot.queues:
            click.echo(f"{now} " + " ".join(f"{word}={value}" for word, value in _queue_words(queue)))

    def close(self) -> None:
        """Nothing is open."""


def _words(snapshot: Snapshot) -> Iterable[str]:
    names = (("running", "RUNNING_JOBS"), ("due", "QUEUE_BACKLOG"), ("killed", "KILLED_JOBS"))
    for word, name in names:
        if name in snapshot.figures:
            yield f"{word}={snapshot.figures[name].value}"


def _queue_words(queue: QueueInfo) -> Iterable[tuple[str, str | int]]:
    yield "queue", one_line(queue.name)
    yield "ready", queue.ready
    yield "later", queue.scheduled
    yield "running", queue.running
    yield "retry", queue.failed
    yield "oldest", shown_seconds(queue.oldest_due_age)
    yield "rate", f"{queue.throughput:.1f}/s"
    yield "wait95", _quantiles(queue.wait, wide=False)[0]
    yield "took95", _quantiles(queue.run, wide=False)[0]
    yield "state", state_of(queue)


class LiveView:
    """A whole screen that is drawn anew at each look, and given back at the end."""

    def __init__(self, terminal: Console) -> None:
        self._console = terminal
        self._live: Live | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Draw the screen."""
        picture = self._picture(snapshot)
        if self._live is None:
            from rich.live import Live

            # Without rich's thread: nothing is drawn after the end.
            self._live = Live(picture, console=self._console, auto_refresh=False, screen=True)
            self._live.start()
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Give the screen back. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _picture(self, snapshot: Snapshot) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        height, width = self._console.height, self._console.width
        wide = width >= WIDE
        head = Text(f"{dt.datetime.now():%H:%M:%S}  ", style="bold")
        head.append(", ".join(head_of(snapshot)), style="not bold")
        lines = -(-len(head.plain) // width)
        # Groups get a third of what the head, two heads of tables, two blank lines and the foot leave.
        room = max(2, height - lines - 6)
        some_groups = min(len(snapshot.groups), max(room // 3, room - len(snapshot.queues)))
        queues = sorted(snapshot.queues, key=_urgency, reverse=True)
        shown = queues[: room - some_groups]
        columns = queue_columns(wide=wide)
        parts: list[RenderableType] = [
            head,
            Text(),
            *table_lines(columns, [queue_cells(each, wide=wide) for each in shown], width),
            Text(),
            *table_lines(GROUPS, [group_cells(each) for each in snapshot.groups[:some_groups]], width),
        ]
        hidden = len(queues) - len(shown), len(snapshot.groups) - some_groups
        more = [f"{n} more {what}" for n, what in zip(hidden, ("queue(s)", "group(s)"), strict=True) if n > 0]
        parts.append(Text(", ".join([*more, "Ctrl-C ends"]), style="dim", no_wrap=True))
        return Group(*parts)


def _urgency(queue: QueueInfo) -> tuple[float, int]:
    return (queue.oldest_due_age or 0.0, queue.running)
