"""Which jobs a command is about: the options that make up a `JobFilter`, and what to say of queues nobody knows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click

from .ending import Failure
from .values import SINCE, parsed_json

if TYPE_CHECKING:
    from .. import JobFilter, SyncAdmin

__all__ = ["STATUSES", "filter_options", "insist_on_queue", "known_queues"]

STATUSES: Final = ("pending", "running", "failed", "done", "killed", "cancelled")
PAGE: Final = 1000  # queues in one look


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a filter; it gets a function that makes it, from ids, as `which`."""
    options = [
        click.option("--queue", "-q", metavar="NAME", help="Jobs of this queue."),
        click.option(
            "--status", "-s", multiple=True, type=click.Choice(STATUSES), help="Of this status; repeatable."
        ),
        click.option("--key", metavar="KEY", help="With this key."),
        click.option(
            "--metadata",
            metavar="OBJECT",
            help="Whose metadata contains this JSON object: '{\"tenant\": 7}'.",
        ),
        click.option("--enqueued-since", type=SINCE, metavar="TIME", help="Enqueued then or later."),
        click.option("--enqueued-until", type=SINCE, metavar="TIME", help="Enqueued before."),
        click.option(
            "--finished-since",
            type=SINCE,
            metavar="TIME",
            help="Ended then or later. TIME: 2030-01-31T09:00Z, or 2h: two hours ago.",
        ),
        click.option("--finished-until", type=SINCE, metavar="TIME", help="Ended before."),
    ]

    @wraps(command)
    def with_filter(
        queue: str | None,
        status: tuple[str, ...],
        key: str | None,
        metadata: str | None,
        enqueued_since: dt.datetime | None,
        enqueued_until: dt.datetime | None,
        finished_since: dt.datetime | None,
        finished_until: dt.datetime | None,
        **given: Any,
    ) -> Any:
        def which(ids: tuple[int, ...] = ()) -> JobFilter:
            from .. import JobFilter

            return JobFilter(
                ids=list(ids) or None,
                queue=queue,
                status=status or None,
                key=key,
                metadata=None if metadata is None else _object(metadata),
                enqueued_since=enqueued_since,
                enqueued_until=enqueued_until,
                finished_since=finished_since,
                finished_until=finished_until,
            )

        return command(which=which, **given)

    for option in reversed(options):
        with_filter = option(with_filter)
    return with_filter


def _object(text: str) -> dict[str, Any]:
    found = parsed_json(text, "--metadata")
    if not isinstance(found, dict):
        raise click.BadParameter(f"{text} is no JSON object", param_hint="'--metadata'")
    return found


def known_queues(admin: SyncAdmin) -> list[str]:
    """Return the names of all queues that somebody knows."""
    names: list[str] = []
    after: str | None = None
    while True:
        page = admin.queues(limit=PAGE, after=after)
        names += [each.name for each in page.items]
        after = page.next
        if after is None:
            return names


def insist_on_queue(admin: SyncAdmin, name: str, *, otherwise: str = "") -> None:
    """End with one line when nobody knows the queue: most likely it is mistyped."""
    import difflib

    names = known_queues(admin)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise Failure(f"there is no queue {name!r}; {guess}see `triojobs queues list`{otherwise}")
