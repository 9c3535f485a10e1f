"""`triojobs jobs list`, `show` and `explain`: look at jobs. What changes them is in `jobs_steering`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from .filters import filter_options, insist_on_queue
from .jobs_steering import cancel, delete, edit, reschedule, retry
from .options import Target, json_option, target_options
from .output import (
    Column,
    Printer,
    note,
    one_line,
    plain,
    print_json,
    say,
    shown_id,
    shown_seconds,
    shown_time,
)
from .values import JOB_ID

if TYPE_CHECKING:
    import datetime as dt

    from .. import JobDetails, JobFilter, JobSummary, SyncAdmin

__all__ = ["jobs"]

PAGE: Final = 1000  # jobs in one look: as many as an admin hands over
LIST: Final = (
    Column("ID", right=True),
    Column("QUEUE", cut=True),
    Column("STATUS", coloured=True),
    Column("TRIES", right=True),
    Column("WHEN (UTC)"),
    Column("KEY", cut=True),
    Column("ERROR OR REASON", cut=True),
)
HISTORY: Final = (
    Column("TRY", right=True),
    Column("STATUS", coloured=True),
    Column("CLAIMED (UTC)"),
    Column("TOOK", right=True),
    Column("GROUP", cut=True),
    Column("ERROR", cut=True),
)


@click.group()
def jobs() -> None:
    """Look at jobs, and steer them."""


for _command in (cancel, retry, reschedule, edit, delete):
    jobs.add_command(_command)


@jobs.command("list")
@target_options
@filter_options
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(0), metavar="N", help="At most; 0: all."
)
@click.option("--after", metavar="CURSOR", help="Go on where an earlier list ended; it said how.")
@click.option("--oldest-first", is_flag=True, help="In the order of the enqueue; else the newest first.")
@json_option
def list_jobs(
    target: Target,
    which: Callable[[], JobFilter],
    limit: int,
    after: str | None,
    oldest_first: bool,
    as_json: bool,
) -> None:
    """List jobs, the newest first.

    WHEN is the time at which the job is due while it waits, was claimed when it runs, ended when it ended.
    When more follow, stderr says with which --after to go on.
    """
    wanted = which()
    printer = Printer(LIST)
    found = 0
    following = after
    with target.admin() as admin:
        for items, following in _pages(admin, wanted, limit, after, newest_first=not oldest_first):
            found += len(items)
            if as_json:
                for item in items:
                    print_json(item)
            elif items:
                printer.print(_line(item) for item in items)
            if not items and following is not None and sys.stderr.isatty():
                note(f"searching, at job {following}")
        if found == 0 and after is None and wanted.queue is not None:
            insist_on_queue(admin, wanted.queue)
    if found == 0 and not as_json:
        note("no job matches")
    if following is not None:
        note(f"more follow: --after {following}")


def _pages(
    admin: SyncAdmin, which: JobFilter, limit: int, after: str | None, *, newest_first: bool
) -> Iterator[tuple[tuple[JobSummary, ...], str | None]]:
    left = limit
    while True:
        size = min(PAGE, left) if limit else PAGE
        page = admin.jobs(which, limit=size, after=after, newest_first=newest_first)
        left -= len(page.items)
        after = page.next
        yield page.items, after
        if after is None or (limit and left <= 0):
            return


def _when(job: JobSummary) -> dt.datetime | None:
    return job.finished_at or job.claimed_at or job.run_at


def _line(job: JobSummary) -> tuple[str, ...]:
    return (
        str(job.id),
        job.queue,
        job.status,
        f"{job.attempts}/{job.max_attempts}",
        shown_time(_when(job)),
        "" if job.key is None else job.key,
        _first_line(job.error if job.cancel_reason is None else f"cancelling: {job.cancel_reason}"),
    )


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


@jobs.command("show")
@click.argument("job_id", metavar="ID", type=JOB_ID)
@target_options
@json_option
def show(target: Target, job_id: int, as_json: bool) -> None:
    """Show one job: payload, result, and all of its attempts."""
    with target.admin() as admin:
        details = admin.job(job_id)
    if as_json:
        history = [{**plain(each), "duration": each.duration} for each in details.history]
        print_json({**plain(details.info), "history": history})
        return
    for name, value in _facts(details):
        first, *more = [one_line(line) for line in value.split("\n")]
        click.echo("\n".join([f"{name:>12}  {first}", *(" " * 14 + line for line in more)]))
    if details.history:
        click.echo()
        Printer(HISTORY).print(
            (
                str(each.number),
                each.status,
                shown_time(each.claimed_at),
                shown_seconds(each.duration),
                f"{each.group_name} ({each.host})" if each.group_name is not None else shown_id(each.group),
                _first_line(each.error),
            )
            for each in details.history
        )


def _facts(details: JobDetails[Any]) -> Iterator[tuple[str, str]]:
    info = details.info
    yield "job", str(info.id)
    yield "queue", info.queue
    yield "status", info.status
    yield "attempts", f"{info.attempts} of {info.max_attempts}"
    yield "priority", str(info.priority)
    if info.key is not None:
        yield "key", info.key
    if info.metadata:
        yield "metadata", _json(info.metadata)
    yield "enqueued", shown_time(info.enqueued_at)
    yield "due", shown_time(info.run_at)
    for name, at in (("deadline", info.deadline), ("claimed", info.claimed_at), ("ended", info.finished_at)):
        if at is not None:
            yield name, shown_time(at)
    if info.group is not None:
        yield "group", str(info.group)
    if info.cancel_reason is not None:
        yield "cancelling", info.cancel_reason
    yield "payload", _json(info.payload)
    if info.result is not None:
        yield "result", _json(info.result)
    if info.error is not None:
        yield "error", info.error.strip()


def _json(value: object) -> str:
    import json

    return json.dumps(plain(value), ensure_ascii=False)


@jobs.command("explain")
@click.argument("job_id", metavar="ID", type=JOB_ID)
@target_options
@json_option
def explain(target: Target, job_id: int, as_json: bool) -> None:
    """Say why a job does not run now, and what would change it."""
    with target.admin() as admin:
        found = admin.explain(job_id)
    if as_json:
        print_json(found)
        return
    say(f"job {job_id} ({found.status}): {found.text}")
    say(f"to change that: {found.remedy}")
