"""What an admin does to jobs, as steps: one job, or all that a filter names, in bounded batches.

A batch is found in one step and changed in the next. The filter's statuses are looked at again when
the jobs are changed; everything else that a filter can name does not change while a job waits. What
others held locked is done one by one after its batch.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from . import _pruning as pruning
from ._admin_model import BulkResult, JobFilter
from ._admin_steps import checked_filter, checked_flag
from ._admin_store import Step, Steps
from ._client import REASON_LIMIT, checked_job_id
from ._errors import (
    DatabaseError,
    DuplicateJobError,
    JobNotFoundError,
    OptionError,
    TriojobsError,
    checked_seconds,
)
from ._model import ENDED, JobStatus
from ._options import checked_count, checked_text, checked_time
from ._queue import Queue
from ._retention import Pruned, Retention
from ._sql import operate, selecting
from ._sql.cancelling import cancelling
from ._sql.deleting import deleting
from ._sql.editing import Changes, editing
from ._sql.effects import Effect
from ._sql.rescheduling import rescheduling
from ._sql.retrying import retrying
from ._sql.selecting import ALIVE, EVERY, WAITING, Bounds, Search, Slice
from ._sql.steering import Act, Changed, State, insist

__all__ = [
    "KEEP",
    "Batches",
    "Progress",
    "cancel",
    "cancel_many",
    "delete",
    "delete_many",
    "edit",
    "edit_many",
    "prune",
    "reschedule",
    "reschedule_many",
    "retry",
    "retry_many",
]

Progress = Callable[[BulkResult], object]

BATCH_LIMIT: Final = 10_000  # jobs in one transaction: about a second, for which their rows are locked
COUNTED_AT_ONCE: Final = 10_000  # ids per statement of a dry run
NOT_RUNNING: Final = EVERY - {JobStatus.RUNNING}
KEEP: Final[Any] = object()
"""The default of a payload that stays as it is; None is a payload."""


# One job.


def cancel(job_id: int, reason: str) -> Step[bool]:
    """Cancel one job."""
    checked_job_id(job_id)
    checked_text("reason", reason, least=0, most=REASON_LIMIT)

    def work(conn: Any, schema: str) -> Effect[bool]:
        answer = operate.cancel(conn, schema, job_id, reason)
        groups = frozenset({answer}) if isinstance(answer, uuid.UUID) else frozenset()
        return Effect(answer is not operate.ENDED_BEFORE, groups=groups)

    return Step(f"cancelling job {job_id}", work, looks_again=True)


def retry(job_id: int) -> Step[bool]:
    """Retry one job."""
    checked_job_id(job_id)

    def work(conn: Any, schema: str) -> Effect[bool]:
        if not operate.retry(conn, schema, job_id):
            return Effect(False)
        queue = operate.queue_of(conn, schema, job_id)
        return Effect(True, queues=frozenset() if queue is None else frozenset({queue}))

    return Step(f"retrying job {job_id}", work, looks_again=True)


def reschedule(job_id: int, run_at: dt.datetime | None, delay: float | None) -> Step[bool]:
    """Change when one job is due."""
    act = rescheduling(*checked_when(run_at, delay), WAITING)
    return _one(act, job_id, lambda state: state.status in WAITING, "rescheduling")


def edit(
    job_id: int, priority: int | None, max_attempts: int | None, queue: Queue[Any, Any] | None, payload: Any
) -> Step[bool]:
    """Change one job that has not started."""
    act = editing(checked_changes(priority, max_attempts, queue, payload))

    def of_its_queue(conn: Any, schema: str, ids: Sequence[int], /, *, wait: bool) -> Changed:
        if queue is not None and (name := operate.queue_of(conn, schema, job_id)) not in (None, queue.name):
            raise OptionError("queue", queue.name, f"the queue of job {job_id}: {name!r}")
        return act(conn, schema, ids, wait=wait)

    return _one(of_its_queue, job_id, _can_be_edited, "editing")


def delete(job_id: int) -> Step[bool]:
    """Delete one job."""
    act = deleting(NOT_RUNNING)
    return _one(act, job_id, lambda state: state.status in NOT_RUNNING, "deleting")


def _one(act: Act, job_id: int, possible: Callable[[State], bool], operation: str) -> Step[bool]:
    checked_job_id(job_id)

    def work(conn: Any, schema: str) -> Effect[bool]:
        changed = insist(conn, schema, act, job_id, possible)
        if changed is None:
            raise DatabaseError(
                f"job {job_id} kept changing hands",
                operation=f"{operation} a job",
                hint="repeat the call",
                transient=True,
            )
        return Effect(bool(changed.ids), changed.queues, changed.groups)

    return Step(f"{operation} job {job_id}", work, looks_again=True)


def _can_be_edited(state: State) -> bool:
    return state.status is JobStatus.PENDING and not state.started


# Many jobs.


@dataclass(frozen=True, slots=True)
class Batches:
    """How a bulk call goes about it: jobs in a transaction, who is told after each, whether to count only."""

    batch: int
    progress: Progress | None
    dry_run: bool

    def __post_init__(self) -> None:
        checked_count("batch", self.batch, most=BATCH_LIMIT)
        checked_flag("dry_run", self.dry_run)
        if self.progress is not None and not callable(self.progress):
            raise OptionError("progress", self.progress, "a function that takes a triojobs.BulkResult")


def cancel_many(which: JobFilter, reason: str, how: Batches) -> Steps[BulkResult]:
    """Cancel what a filter names."""
    checked_text("reason", reason, least=0, most=REASON_LIMIT)
    statuses = checked_statuses(which, ALIVE)
    return _in_batches(which, statuses, cancelling(reason, statuses), "cancelling", how)


def retry_many(which: JobFilter, how: Batches) -> Steps[BulkResult]:
    """Retry what a filter names."""
    statuses = checked_statuses(which, ENDED, explicit=True)
    return _in_batches(which, statuses, retrying(statuses), "retrying", how)


def reschedule_many(
    which: JobFilter, run_at: dt.datetime | None, delay: float | None, how: Batches
) -> Steps[BulkResult]:
    """Change when the jobs that a filter names are due."""
    statuses = checked_statuses(which, WAITING)
    act = rescheduling(*checked_when(run_at, delay), statuses)
    return _in_batches(which, statuses, act, "rescheduling", how)


def edit_many(
    which: JobFilter, priority: int | None, max_attempts: int | None, how: Batches
) -> Steps[BulkResult]:
    """Change jobs that a filter names and that have not started."""
    statuses = checked_statuses(which, frozenset({JobStatus.PENDING}))
    act = editing(checked_changes(priority, max_attempts, None, KEEP))
    return _in_batches(which, statuses, act, "editing", how)


def delete_many(which: JobFilter, how: Batches) -> Steps[BulkResult]:
    """Delete what a filter names."""
    statuses = checked_statuses(which, NOT_RUNNING)
    return _in_batches(which, statuses, deleting(statuses), "deleting", how)


def _in_batches(
    which: JobFilter, statuses: frozenset[JobStatus], act: Act, operation: str, how: Batches
) -> Steps[BulkResult]:
    """Oldest first, so that what is retried waits in its old order. What is enqueued meanwhile is left."""
    search = Search(which, statuses, newest_first=False)
    result = BulkResult(0, 0)
    bounds: Bounds | None = None
    limit = COUNTED_AT_ONCE if how.dry_run else how.batch

    def find(conn: Any, schema: str) -> Effect[Slice]:
        where = bounds or selecting.present(conn, schema, which)
        return Effect(selecting.find(conn, schema, search, where, limit=limit))

    try:
        while True:
            found: Slice = yield Step(f"finding jobs for {operation}", find)
            if how.dry_run:
                result = BulkResult(result.touched + len(found.ids), 0)
            elif found.ids:
                result = yield from _change(found.ids, statuses, act, operation, result)
            if how.progress is not None:
                how.progress(result)
            if found.rest is None:
                return result
            bounds = found.rest
    except TriojobsError as exc:
        if not how.dry_run:
            exc.add_note(f"{result.touched} job(s) had been changed before")
        raise


def _change(
    ids: list[int], statuses: frozenset[JobStatus], act: Act, operation: str, before: BulkResult
) -> Steps[BulkResult]:
    def change(conn: Any, schema: str) -> Effect[Changed]:
        changed = act(conn, schema, ids, wait=False)
        return Effect(changed, changed.queues, changed.groups)

    changed: Changed = yield Step(f"{operation} {len(ids)} job(s)", change, looks_again=True)
    touched, skipped = before.touched + len(changed.ids), before.skipped
    for job_id in sorted(set(ids) - changed.ids):
        if (yield from _change_one(job_id, statuses, act, operation)):
            touched += 1
        else:
            skipped += 1
    return BulkResult(touched, skipped)


def _change_one(job_id: int, statuses: frozenset[JobStatus], act: Act, operation: str) -> Steps[bool]:
    """Change a job that was locked, or had moved, when its batch was changed."""

    def possible(state: State) -> bool:
        return state.status in statuses and (operation != "editing" or _can_be_edited(state))

    def work(conn: Any, schema: str) -> Effect[bool]:
        changed = insist(conn, schema, act, job_id, possible) or Changed()
        return Effect(bool(changed.ids), changed.queues, changed.groups)

    try:
        return bool((yield Step(f"{operation} job {job_id}", work, looks_again=True)))
    except (JobNotFoundError, DuplicateJobError):
        return False


def prune(retention: object, progress: Callable[[Pruned], object] | None, dry_run: bool) -> Steps[Pruned]:
    """Remove what is too old, at once."""
    checked_flag("dry_run", dry_run)
    if progress is not None and not callable(progress):
        raise OptionError("progress", progress, "a function that takes a triojobs.Pruned")
    if not isinstance(retention, Retention):
        raise OptionError("retention", retention, "a triojobs.Retention")
    return pruning.prune(retention, slack=0.0, dry_run=dry_run, progress=progress)


# Arguments.


def checked_statuses(
    which: object, possible: frozenset[JobStatus], *, explicit: bool = False
) -> frozenset[JobStatus]:
    """Return those of the filter's statuses that can be changed; refuse filters that name nothing.

    `explicit`: the filter has to name its statuses.
    """
    which = checked_filter(which)
    words = ", ".join(status for status in JobStatus if status in possible)
    if which.is_empty:
        raise OptionError("which", which, "a filter that names something, every status perhaps")
    if explicit and which.status is None:
        raise OptionError("status", None, f"one or some of: {words}")
    statuses = which.statuses & possible
    if not statuses:
        raise OptionError("status", which.status, f"one or some of: {words}")
    return statuses


def checked_when(run_at: object, delay: object) -> tuple[dt.datetime | None, float | None]:
    """Return a point in time or a delay, exactly one of them."""
    if run_at is not None and delay is not None:
        raise OptionError("run_at", run_at, "None when delay is given")
    if run_at is None:
        return None, checked_seconds("delay", 0.0 if delay is None else delay)  # type: ignore[arg-type]
    return checked_time("run_at", run_at), None


def checked_changes(
    priority: int | None, max_attempts: int | None, queue: Queue[Any, Any] | None, payload: Any
) -> Changes:
    """Return what to change: at least one thing; a payload needs its queue, which encodes it."""
    data = encoding = None
    if payload is not KEEP:
        if not isinstance(queue, Queue):
            raise OptionError("queue", queue, "the triojobs.Queue of the job when payload is given")
        data, encoding = queue.encode_payload(payload), queue.codec.name
    elif queue is not None:
        raise OptionError("queue", queue, "left out when there is no payload")
    if priority is None and max_attempts is None and data is None:
        raise OptionError("priority", None, "given, or max_attempts, or payload: something has to change")
    return Changes(
        priority=None if priority is None else checked_count("priority", priority, least=0),
        max_attempts=None if max_attempts is None else checked_count("max_attempts", max_attempts),
        payload=data,
        encoding=encoding,
    )
