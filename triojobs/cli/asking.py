"""Before and during long work: the question whether to do it, and a bar that shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .ending import Failure

__all__ = ["ask", "progress_bar"]


def ask(question: str, *, yes: bool) -> None:
    """Return if the person agrees, or said so before; else end with one line, having changed nothing."""
    if yes:
        return
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        # Ctrl-C as well; a program that gives no answer gets the same line.
        click.echo(err=True)
        raise Failure(f"{question} was not answered; nothing was changed; --yes does it unasked") from None
    if not agreed:
        raise Failure("nothing was changed")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show how far it is, on a terminal with rich; yields a function of the count and the total."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done, total: None
        return
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Transient: what is left on the screen is the sentence that follows.
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
