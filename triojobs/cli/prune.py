"""`triojobs prune`: remove what is older than it has to be kept, by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .asking import ask, progress_bar
from .options import Target, json_option, keep_option, retention_of, target_options, yes_option
from .output import print_json

if TYPE_CHECKING:
    from .. import Pruned

__all__ = ["prune"]


@click.command()
@target_options
@keep_option
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@yes_option
@json_option
def prune(target: Target, keep: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove ended jobs that are old enough.

    Jobs that ended before --keep says, their keys, and worker groups that closed long ago.
    Worker groups do it by themselves, each hour, with the retention that they were opened with. Jobs go in
    ranges of a million ids where that is possible, else one by one; workers go on meanwhile.
    """
    retention = retention_of(keep)
    with target.admin() as admin:
        with progress_bar("looking for old jobs") as show:
            planned = admin.prune(retention, dry_run=True, progress=lambda seen: show(seen.jobs, None))
        if dry_run:
            _tell(planned, "would go", as_json=as_json)
            return
        if planned.ranges or planned.jobs:
            ask(f"remove {_words(planned)}?", yes=yes)
        with progress_bar("jobs removed one by one") as show:
            gone = admin.prune(retention, progress=lambda seen: show(seen.jobs, planned.jobs))
    _tell(gone, "went", as_json=as_json)


def _words(pruned: Pruned) -> str:
    parts = [f"{pruned.jobs} job(s)"]
    if pruned.ranges:
        kept = f", of which {pruned.moved} job(s) are kept" if pruned.moved else ""
        parts.insert(0, f"{pruned.ranges} whole range(s) of a million ids{kept},")
    return " and ".join(parts) if len(parts) > 1 else parts[0]


def _tell(pruned: Pruned, verb: str, *, as_json: bool) -> None:
    if as_json:
        print_json(pruned)
        return
    click.echo(f"{verb}: {_words(pruned)}, {pruned.keys} key(s), {pruned.groups} closed group(s)")
    if pruned.postponed:
        click.echo(f"left for later: {pruned.postponed} range(s) that somebody was using for too long")
