"""`triojobs queues list`, `pause` and `resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from .filters import insist_on_queue
from .options import Target, json_option, target_options
from .output import Column, Printer, note, print_json, shown_seconds
from .values import Duration

if TYPE_CHECKING:
    from .. import QueueInfo

__all__ = ["queues"]

LIST: Final = (
    Column("QUEUE", cut=True),
    Column("READY", right=True),
    Column("LATER", right=True),
    Column("RUNNING", right=True),
    Column("RETRY", right=True),
    Column("OLDEST", right=True),
    Column("RATE/s", right=True),
    Column("SLOTS", right=True),
    Column("GROUPS", right=True),
    Column("STATE", coloured=True),
)


@click.group()
def queues() -> None:
    """Look at queues, pause and resume them."""


@queues.command("list")
@target_options
@click.option(
    "--window", type=Duration(positive=True), default="5m", show_default=True, help="How far back to measure."
)
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), metavar="N")
@click.option("--after", metavar="CURSOR", help="Go on where an earlier list ended; it said how.")
@json_option
def list_queues(target: Target, window: float, limit: int, after: str | None, as_json: bool) -> None:
    """List queues with what stands in them now and what they did lately.

    RETRY: of those that wait, how many have failed before. OLDEST: for how long the job waits that has been due
    for longest. RATE: attempts that ended per second. SLOTS, GROUPS: of living worker groups.
    """
    with target.admin() as admin:
        page = admin.queues(window=window, limit=limit, after=after)
    if as_json:
        for item in page.items:
            print_json(item)
    elif page.items:
        Printer(LIST).print(_line(item) for item in page.items)
    else:
        note("no queue has jobs or worker groups")
    if page.next is not None:
        note(f"more follow: --after {page.next}")


def _line(queue: QueueInfo) -> tuple[str, ...]:
    about = "" if queue.exact else "~"
    return (
        queue.name,
        f"{about}{queue.ready}",
        f"{about}{queue.scheduled}",
        str(queue.running),
        f"{about}{queue.failed}",
        shown_seconds(queue.oldest_due_age),
        f"{queue.throughput:.1f}",
        str(queue.slots),
        str(queue.groups),
        state_of(queue),
    )


def state_of(queue: QueueInfo) -> str:
    """Return one word for how a queue is."""
    if queue.paused_at is not None:
        return "paused"
    if queue.groups == 0 and queue.ready:
        return "unserved"
    return "served" if queue.groups else "-"


@queues.command("pause")
@click.argument("queue", metavar="QUEUE")
@target_options
@click.option("--reason", default="paused by an operator", show_default=True, help="For those who ask why.")
@click.option("--new", is_flag=True, help="Also a queue that nobody knows yet.")
def pause(target: Target, queue: str, reason: str, new: bool) -> None:
    """Let nobody claim from a queue, in any group; what runs goes on.

    Once this has returned, nothing is claimed from it until it is resumed.
    """
    with target.admin() as admin:
        if not new:
            insist_on_queue(admin, queue, otherwise=", or --new to pause it before its first job")
        paused = admin.pause(queue, reason=reason)
    click.echo(f"queue {queue} is paused" + ("" if paused else ", as it was before; its reason stays"))


@queues.command("resume")
@click.argument("queue", metavar="QUEUE")
@target_options
def resume(target: Target, queue: str) -> None:
    """Let everybody claim from a queue again."""
    with target.admin() as admin:
        resumed = admin.resume(queue)
        if not resumed:
            insist_on_queue(admin, queue)
    click.echo(f"queue {queue} is resumed" if resumed else f"queue {queue} was not paused")
