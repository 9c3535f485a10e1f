"""`triojobs jobs cancel`, `retry`, `reschedule`, `edit` and `delete`: by id, or all that a filter names.

Ids are looked up before anything is changed: one that nobody knows stops the command. A filter's jobs are
counted first, and the person is asked.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click

from .asking import ask, progress_bar
from .ending import Failure
from .filters import filter_options, insist_on_queue
from .options import Target, target_options, yes_option
from .values import DURATION, INSTANT, JOB_ID

if TYPE_CHECKING:
    from .. import BulkResult, JobFilter, SyncAdmin

__all__ = ["cancel", "delete", "edit", "reschedule", "retry"]

MOST_IDS: Final = 1000  # on one command line


@dataclass(frozen=True)
class Act:
    """One way to change jobs.

    Attributes:
        verb, past: "cancel", "cancelled". possible: which jobs, in words.
        many: does it, given an admin, a filter, and what the admin's method takes besides.
        statuses: what jobs named by id may be; a filter has to say it by itself. None: whatever they are.
    """

    verb: str
    past: str
    possible: str
    many: Callable[..., BulkResult]
    statuses: tuple[str, ...] | None = None


def steering(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ids, a filter, `--yes` and where to work; it says what to do with an admin."""

    @wraps(command)
    def steered(
        target: Target, ids: tuple[int, ...], which: Callable[..., JobFilter], yes: bool, **given: Any
    ) -> None:
        if len(ids) > MOST_IDS:
            raise click.UsageError(f"{len(ids)} ids are more than {MOST_IDS}: use a filter")
        act: Act = command(**given)
        by_filter = not which().is_empty
        if not ids and not by_filter:
            raise click.UsageError("name jobs: by their ids, or by a filter such as --queue or --status")
        wanted = which(ids)
        if by_filter and act.statuses and wanted.status is None:
            raise click.UsageError(f"say which of them: --status {' or --status '.join(act.statuses)}")
        with target.admin() as admin:
            if ids:
                _insist_on_ids(admin, ids)
            if by_filter:
                _by_filter(admin, act, wanted, yes=yes)
            else:
                _by_ids(admin, act, replace(wanted, status=act.statuses), ids)

    ids_argument = click.argument("ids", nargs=-1, type=JOB_ID, metavar="[ID]...")
    return ids_argument(target_options(filter_options(yes_option(steered))))


def _insist_on_ids(admin: SyncAdmin, ids: tuple[int, ...]) -> None:
    from .. import JobFilter

    wanted = JobFilter(ids=ids)
    known: set[int] = set()
    after: str | None = None
    while True:
        page = admin.jobs(wanted, limit=MOST_IDS, after=after)
        known |= {job.id for job in page.items}
        after = page.next
        if after is None:
            break
    unknown = sorted(set(ids) - known)
    if unknown:
        words = ", ".join(map(str, unknown[:10])) + (", …" if len(unknown) > 10 else "")
        raise Failure(f"there is no job {words}; nothing was changed; check the ids and the schema")


def _by_ids(admin: SyncAdmin, act: Act, which: JobFilter, ids: tuple[int, ...]) -> None:
    result = act.many(admin, which)
    asked = len(set(ids))
    words = f"job {ids[0]}" if asked == 1 else f"{result.touched} of {asked} jobs"
    if result.touched == asked:
        click.echo(f"{act.past} {words}")
    elif asked == 1:
        raise Failure(
            f"job {ids[0]} was not {act.past}: only {act.possible} can be; see `triojobs jobs explain {ids[0]}`"
        )
    else:
        raise Failure(f"{act.past} {words}; the others were left: only {act.possible} can be {act.past}")


def _by_filter(admin: SyncAdmin, act: Act, which: JobFilter, *, yes: bool) -> None:
    with progress_bar("counting jobs") as show:
        count = act.many(admin, which, dry_run=True, progress=lambda seen: show(seen.touched, None)).touched
    if count == 0:
        if which.queue is not None:
            insist_on_queue(admin, which.queue)
        click.echo(f"no job matches that can be {act.past}; nothing was changed")
        return
    ask(f"{act.verb} {count} job(s)?", yes=yes)
    changed = 0

    def told(result: BulkResult) -> None:
        nonlocal changed
        changed = result.touched
        show(result.touched + result.skipped, count)

    try:
        with progress_bar(f"{act.past} jobs") as show:
            result = act.many(admin, which, progress=told)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {act.past} {changed} job(s), perhaps one batch more", err=True)
        raise
    left = f"; {result.skipped} had moved on, or cannot be {act.past}" if result.skipped else ""
    click.echo(f"{act.past} {result.touched} job(s){left}")


@click.command("cancel")
@steering
@click.option("--reason", default="cancelled by an operator", show_default=True, help="Its handler is told.")
def cancel(reason: str) -> Act:
    """Cancel jobs that wait or run.

    Those that wait have ended at once, those that run when their handlers have; these are cancelled.
    """

    def many(admin: SyncAdmin, which: JobFilter, **how: Any) -> BulkResult:
        return admin.cancel_many(which, reason=reason, **how)

    return Act("cancel", "cancelled", "jobs that wait or run", many)


@click.command("retry")
@steering
def retry() -> Act:
    """Run ended jobs once more.

    They are done, killed or cancelled, and get all their attempts again. With a filter, --status says which:
    --status killed.
    """

    def many(admin: SyncAdmin, which: JobFilter, **how: Any) -> BulkResult:
        return admin.retry_many(which, **how)

    return Act("retry", "retried", "jobs that have ended", many, ("done", "killed", "cancelled"))


@click.command("reschedule")
@steering
@click.option("--delay", type=DURATION, metavar="DURATION", help="Due so long from now.")
@click.option("--run-at", type=INSTANT, metavar="TIME", help="Due then. Neither: at once.")
def reschedule(delay: float | None, run_at: dt.datetime | None) -> Act:
    """Change when waiting jobs are due.

    That is their first attempt, or the next one.
    """
    if delay is not None and run_at is not None:
        raise click.UsageError("--delay and --run-at say the same thing: give one of them")

    def many(admin: SyncAdmin, which: JobFilter, **how: Any) -> BulkResult:
        return admin.reschedule_many(which, run_at=run_at, delay=delay, **how)

    return Act("reschedule", "rescheduled", "jobs that wait", many)


@click.command("edit")
@steering
@click.option("--priority", type=click.IntRange(0, 2**31 - 1), metavar="N", help="Higher goes first.")
@click.option("--max-attempts", type=click.IntRange(1, 2**31 - 1), metavar="N")
def edit(priority: int | None, max_attempts: int | None) -> Act:
    """Change jobs that have not started."""
    if priority is None and max_attempts is None:
        raise click.UsageError("say what to change: --priority, --max-attempts, or both")

    def many(admin: SyncAdmin, which: JobFilter, **how: Any) -> BulkResult:
        return admin.edit_many(which, priority=priority, max_attempts=max_attempts, **how)

    return Act("change", "changed", "jobs that have not started", many)


@click.command("delete")
@steering
def delete() -> Act:
    """Delete jobs that do not run, with their attempts and keys. Old ones are better left to `prune`."""

    def many(admin: SyncAdmin, which: JobFilter, **how: Any) -> BulkResult:
        return admin.delete_many(which, **how)

    return Act("delete", "deleted", "jobs that do not run", many)
