"""`triojobs groups list` and `drain`."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import TYPE_CHECKING, Final

import click

from .ending import Failure
from .options import Target, json_option, target_options
from .output import Column, Printer, note, print_json, shown_seconds

if TYPE_CHECKING:
    from .. import GroupInfo, SyncAdmin

__all__ = ["groups"]

PAGE: Final = 1000
LIST: Final = (
    Column("ID"),
    Column("NAME", cut=True),
    Column("HOST", cut=True),
    Column("STATE", coloured=True),
    Column("RUNNING", right=True),
    Column("BEAT", right=True),
    Column("UP", right=True),
    Column("QUEUES (SLOTS)", cut=True),
)


@click.group()
def groups() -> None:
    """Look at worker groups, and drain them."""


@groups.command("list")
@target_options
@click.option("--closed", is_flag=True, help="Also those that have closed.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), metavar="N")
@click.option("--after", metavar="CURSOR", help="Go on where an earlier list ended; it said how.")
@json_option
def list_groups(target: Target, closed: bool, limit: int, after: str | None, as_json: bool) -> None:
    """List worker groups, the newest first.

    BEAT: how long ago it last said that it lives. UP: since its registration. A lapsed group's jobs are
    taken back by any living one.
    """
    with target.admin() as admin:
        page = admin.groups(closed=closed, limit=limit, after=after)
    if as_json:
        for item in page.items:
            print_json(item)
    elif page.items:
        Printer(LIST).print(_line(item) for item in page.items)
    else:
        note("no worker group is open" if not closed else "there is no worker group")
    if page.next is not None:
        note(f"more follow: --after {page.next}")


def _line(group: GroupInfo) -> tuple[str, ...]:
    served = group.queues or {}
    now = group.beat_at + dt.timedelta(seconds=group.lease_age)  # by the server's clock
    up = ((group.closed_at or now) - group.registered_at).total_seconds()
    return (
        str(group.id)[:8],
        group.name,
        f"{group.host}:{group.pid}",
        group.state,
        str(group.running),
        shown_seconds(group.lease_age),
        shown_seconds(up),
        ", ".join(f"{queue} ({slots})" for queue, slots in sorted(served.items())),
    )


@groups.command("drain")
@click.argument("group", metavar="GROUP")
@target_options
@click.option("--reason", default="drained by an operator", show_default=True, help="Its log says it.")
def drain(target: Target, group: str, reason: str) -> None:
    """Ask a worker group to stop claiming, finish what it runs, and close.

    GROUP is its id, the beginning of it, or its name where only one open group has that name.
    """
    with target.admin() as admin:
        group_id = _group_id(admin, group)
        draining = admin.drain(group_id, reason=reason)
    click.echo(f"group {group_id} {'drains' if draining else 'has closed already'}")


def _group_id(admin: SyncAdmin, given: str) -> uuid.UUID:
    try:
        return uuid.UUID(given)
    except ValueError:
        pass
    named: list[GroupInfo] = []
    after: str | None = None
    while True:
        page = admin.groups(limit=PAGE, after=after)
        named += [
            g for g in page.items if g.name == given or (len(given) >= 4 and str(g.id).startswith(given))
        ]
        after = page.next
        if after is None:
            break
    if len(named) == 1:
        return named[0].id
    if not named:
        raise Failure(f"no open worker group has the id or name {given!r}; see `triojobs groups list`")
    ids = ", ".join(str(g.id)[:8] for g in named[:5])
    raise Failure(f"{len(named)} open worker groups are called {given!r}: name one by its id ({ids})")
