"""`triojobs stats`: queues, worker groups and figures at a glance; with `--watch` as a live view."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from .options import Target, json_option, target_options
from .output import note, plain, print_json
from .values import Duration

if TYPE_CHECKING:
    from .. import GroupInfo, QueueInfo, Statistic, SyncAdmin

__all__ = ["Snapshot", "stats"]

SHOWN: Final = 1000  # queues and groups in one look
PATIENCE: Final = 5.0  # seconds between looks after an error


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at everything."""

    queues: tuple[QueueInfo, ...]
    groups: tuple[GroupInfo, ...]
    figures: Mapping[str, Statistic]

    def as_json(self) -> dict[str, Any]:
        """Return the object of `--json`."""
        return {
            "queues": plain(self.queues),
            "groups": plain(self.groups),
            "figures": {name: plain(each.value) for name, each in self.figures.items()},
        }


def look(admin: SyncAdmin, window: float) -> Snapshot:
    """Take a look at everything; a handful of statements, none of which reads ended jobs from end to end."""
    return Snapshot(
        admin.queues(window=window, limit=SHOWN).items, admin.groups(limit=SHOWN).items, admin.statistics()
    )


@click.command()
@target_options
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=Duration(positive=True),
    default="2s",
    show_default=True,
    help="Between two looks of --watch.",
)
@click.option(
    "--window", type=Duration(positive=True), default="1m", show_default=True, help="How far back to measure."
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after so many looks of --watch.")
@json_option
def stats(
    target: Target, watch: bool, interval: float, window: float, count: int | None, as_json: bool
) -> None:
    """Show queues, worker groups, rates and latencies.

    A terminal gets a live view with --watch, anything else lines, one for each queue and look. JSON is one object
    for each look.
    """
    from .stats_view import open_view

    if count is not None and not watch:
        raise click.UsageError("--count is for --watch")
    with target.admin() as admin:
        if not watch:
            snapshot = look(admin, window)
            if as_json:
                print_json(snapshot.as_json())
            else:
                open_view(live=False).show(snapshot)
            return
        view = None if as_json else open_view(live=True)
        with _ended_by_sigterm():
            try:
                for snapshot in _looks(admin, window, interval, count):
                    if view is None:
                        print_json(snapshot.as_json())
                    else:
                        view.show(snapshot)
            finally:
                if view is not None:
                    view.close()


def _looks(admin: SyncAdmin, window: float, interval: float, count: int | None) -> Iterator[Snapshot]:
    """Yield looks, at even intervals; a database that is away for a while is waited for."""
    from .. import DatabaseError

    seen = 0
    following = time.monotonic()
    while True:
        try:
            snapshot = look(admin, window)
        except DatabaseError as exc:
            if not exc.transient or seen == 0:
                raise
            note(f"{exc}; looking again in {PATIENCE:g} s")
            time.sleep(PATIENCE)
            continue
        yield snapshot
        seen += 1
        if seen == count:
            return
        following = max(following + interval, time.monotonic())
        time.sleep(following - time.monotonic() if following > time.monotonic() else 0)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM unwind the stack, so that the terminal is left as it was found."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
