"""The admin for Trio tasks: look at jobs, queues and groups, and steer them.

What the methods do is in `_admin_steps`, shared with the synchronous twin.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TypeVar, overload

import trio

from . import _admin_steering as steering
from . import _admin_steps as steps
from ._admin_model import (
    BulkResult,
    Explanation,
    GroupInfo,
    JobDetails,
    JobFilter,
    JobSummary,
    Page,
    QueueInfo,
    Statistic,
)
from ._admin_steering import KEEP, Progress
from ._admin_store import AdminStore, Step, Steps, drive
from ._client import async_side
from ._errors import OptionError, checked_seconds
from ._options import DEFAULT_SCHEMA, checked_conninfo, checked_schema
from ._queue import Queue
from ._retention import DEFAULT_RETENTION, Pruned, Retention

__all__ = ["Admin", "open_admin"]

T = TypeVar("T")
PayloadT = TypeVar("PayloadT")

BATCH: Final = 500  # jobs: some 20 ms, and few enough that nobody notices their locks
CALL_TIMEOUT: Final = 10.0  # seconds; an operator's look may take longer than a worker's call
IN_TRIO: Final = "call it from a Trio task; outside Trio use SyncAdmin"


class Admin:
    """Look at jobs, queues and groups, and steer them. Made by `open_admin`.

    All methods are for Trio tasks; any number of tasks may call them at once. Lists come in pages and
    stay fast at millions of jobs; none reads a whole table of ended jobs.

    Raises (every method):
        OptionError: an argument is refused; nothing was read or written.
        DatabaseError: the database could not be reached, or refused; `transient`: try again.
        trio.ClosedResourceError: the admin is closed.

    Cancellation (every method): between calls of the database; each call is cancelled before it
    starts, or done.
    """

    def __init__(self, store: AdminStore) -> None:
        self._store = store
        self._closed = False

    async def _run(self, step: Step[T]) -> T:
        if self._closed:
            raise trio.ClosedResourceError("this triojobs admin is closed")
        return await self._store.run(step)

    async def _drive(self, given: Steps[T]) -> T:
        return await drive(given, self._run)

    # Jobs.

    @async_side(IN_TRIO)
    async def jobs(
        self,
        which: JobFilter | None = None,
        *,
        limit: int = 100,
        after: str | None = None,
        newest_first: bool = True,
    ) -> Page[JobSummary]:
        """Return a page of the jobs that match, in the order of their ids, that is of their enqueue.

        A search that finds little takes at most about two seconds and then hands over what it has,
        with `next` set: go on with that. Names of queues, metadata and times have no index: narrow
        them by a status, a key or a time where there are many millions of jobs.

        Args:
            which: None: every job. limit: 1 to 1,000 items. after: the `next` of the page before.
            newest_first: False: oldest first.
        """
        return await self._drive(steps.jobs(which, limit, after, newest_first))

    @overload
    async def job(self, job_id: int) -> JobDetails[Any]: ...
    @overload
    async def job(self, job_id: int, queue: Queue[PayloadT, Any]) -> JobDetails[PayloadT]: ...
    @async_side(IN_TRIO)
    async def job(self, job_id: int, queue: Queue[Any, Any] | None = None) -> JobDetails[Any]:
        """Return one job with its attempts: when, by whom, how long, and how each ended.

        With `queue` payload and result are typed by it, plain values otherwise.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return await self._run(steps.job(job_id, queue))

    @async_side(IN_TRIO)
    async def explain(self, job_id: int) -> Explanation:
        """Return the one reason for which a job does not run now, and what would change it.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return await self._run(steps.explain(job_id))

    # Steering.

    @async_side(IN_TRIO)
    async def cancel(self, job_id: int, *, reason: str = "cancelled") -> bool:
        """Cancel one job: `Client.cancel`. True: it will not run (again); False: it had ended before.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return await self._run(steering.cancel(job_id, reason))

    @async_side(IN_TRIO)
    async def retry(self, job_id: int) -> bool:
        """Run a job that has ended (done, killed, cancelled) once more, with all its attempts.

        Returns:
            False when it has not ended.

        Raises:
            JobNotFoundError: there is no such job.
            DuplicateJobError: its key has passed on to another job.
        """
        return await self._run(steering.retry(job_id))

    @async_side(IN_TRIO)
    async def reschedule(
        self, job_id: int, *, run_at: dt.datetime | None = None, delay: float | None = None
    ) -> bool:
        """Change when a job that waits is due: its first attempt, or the next one.

        Args:
            run_at: aware time. delay: seconds from now. Neither: at once, behind what is due.

        Returns:
            False when it does not wait: it runs, or has ended.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return await self._run(steering.reschedule(job_id, run_at, delay))

    @overload
    async def edit(
        self, job_id: int, *, priority: int | None = None, max_attempts: int | None = None
    ) -> bool: ...
    @overload
    async def edit(
        self,
        job_id: int,
        *,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        priority: int | None = None,
        max_attempts: int | None = None,
    ) -> bool: ...
    @async_side(IN_TRIO)
    async def edit(
        self,
        job_id: int,
        *,
        queue: Queue[Any, Any] | None = None,
        payload: Any = KEEP,
        priority: int | None = None,
        max_attempts: int | None = None,
    ) -> bool:
        """Change a job that has not started. A claim gets all of the changes, or comes before them.

        Args:
            queue, payload: the job's queue, and a new payload of its type.
            priority, max_attempts: as in `Client.enqueue`; what is left out stays.

        Returns:
            False when it has started: it runs, or was tried before.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return await self._run(steering.edit(job_id, priority, max_attempts, queue, payload))

    @async_side(IN_TRIO)
    async def delete(self, job_id: int) -> bool:
        """Delete a job that does not run, with its attempts and its key; nobody finds it any more.

        Returns:
            False when it runs: cancel it first.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return await self._run(steering.delete(job_id))

    # Steering by filter. Each works through the jobs that existed when it began, oldest first, in
    # transactions of `batch` jobs; an error says how many had been changed.

    @async_side(IN_TRIO)
    async def cancel_many(
        self,
        which: JobFilter,
        *,
        reason: str = "cancelled",
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Cancel the jobs that match and have not ended: those that wait at once, those that run by asking.

        Args:
            which: must name something. batch: 1 to 10,000 jobs in a transaction. progress: called with
                the result so far after each batch. dry_run: count what would be touched, and change
                nothing. (So in all methods that end in `_many`.)

        Cancellation: between batches; what was changed stays.
        """
        how = steering.Batches(batch, progress, dry_run)
        return await self._drive(steering.cancel_many(which, reason, how))

    @async_side(IN_TRIO)
    async def retry_many(
        self,
        which: JobFilter,
        *,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Retry the jobs that match and have ended; the filter has to name their statuses.

        Jobs whose key has passed on to another job are skipped. See `retry`, `cancel_many`.
        """
        return await self._drive(steering.retry_many(which, steering.Batches(batch, progress, dry_run)))

    @async_side(IN_TRIO)
    async def reschedule_many(
        self,
        which: JobFilter,
        *,
        run_at: dt.datetime | None = None,
        delay: float | None = None,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Change when the jobs are due that match and wait. See `reschedule`, `cancel_many`."""
        how = steering.Batches(batch, progress, dry_run)
        return await self._drive(steering.reschedule_many(which, run_at, delay, how))

    @async_side(IN_TRIO)
    async def edit_many(
        self,
        which: JobFilter,
        *,
        priority: int | None = None,
        max_attempts: int | None = None,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Change the jobs that match and have not started. See `edit`, `cancel_many`."""
        how = steering.Batches(batch, progress, dry_run)
        return await self._drive(steering.edit_many(which, priority, max_attempts, how))

    @async_side(IN_TRIO)
    async def delete_many(
        self,
        which: JobFilter,
        *,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Delete the jobs that match and do not run. See `delete`, `cancel_many`.

        Old jobs are better left to retention, which drops whole partitions.
        """
        return await self._drive(steering.delete_many(which, steering.Batches(batch, progress, dry_run)))

    @async_side(IN_TRIO)
    async def prune(
        self,
        retention: Retention = DEFAULT_RETENTION,
        *,
        progress: Callable[[Pruned], object] | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove now what is older than `retention` says: jobs, their keys, and closed worker groups.

        Worker groups do it by themselves, with the retention that they were opened with. Workers go on
        meanwhile: no call holds a lock for longer than some milliseconds.

        Args:
            retention: how long to keep what; its `interval` means nothing here. progress: called with
                the result so far after each part. dry_run: count ranges and jobs, and change nothing.

        Cancellation: between calls of the database; what was removed is gone.
        """
        return await self._drive(steering.prune(retention, progress, dry_run))

    # Groups.

    @async_side(IN_TRIO)
    async def groups(
        self, *, closed: bool = False, limit: int = 100, after: str | None = None
    ) -> Page[GroupInfo]:
        """Return a page of the worker groups, newest registration first.

        Args:
            closed: also those that have closed. limit, after: as `jobs`.
        """
        return await self._run(steps.groups(closed=closed, limit=limit, after=after))

    @async_side(IN_TRIO)
    async def drain(self, group_id: uuid.UUID, *, reason: str = "drained by an operator") -> bool:
        """Ask a worker group to stop claiming, finish what it runs, and close; its program goes on.

        The group hears at once, or by its next beat at the latest. A group that registers again after
        it lost its lease has a new id, and was not asked.

        Returns:
            False when it has closed already.

        Raises:
            GroupNotFoundError: there is no such group.
        """
        return await self._run(steps.drain(group_id, reason))

    # Queues.

    @async_side(IN_TRIO)
    async def queues(
        self, *, window: float = 300.0, limit: int = 100, after: str | None = None
    ) -> Page[QueueInfo]:
        """Return a page of the queues in the order of their names, with counts, rates and latencies.

        A queue is known while jobs wait or run in it, while it is paused, and as long as a group that
        served it is kept.

        Args:
            window: seconds back over which to measure what ended. limit, after: as `jobs`.
        """
        return await self._run(steps.queues(window=window, limit=limit, after=after))

    @async_side(IN_TRIO)
    async def queue(self, queue: str | Queue[Any, Any], *, window: float = 300.0) -> QueueInfo:
        """Return one queue as `queues` does; one that nobody knows is empty."""
        return await self._run(steps.queue(queue, window=window))

    @async_side(IN_TRIO)
    async def statistics(self) -> dict[str, Statistic]:
        """Return figures about all queues by their names (RUNNING_JOBS, QUEUE_BACKLOG, SUCCESS_RATE, …).

        Exact: what waits, runs, or was killed or cancelled (up to a million and ten thousand). Estimates:
        done jobs and totals, from the server's statistics; jobs of the past hour, day and week, from
        the distance of ids, which counts enqueues that were rolled back; rates and durations, from the
        last 10,000 attempts of the last day.
        """
        return await self._run(steps.statistics())

    @async_side(IN_TRIO)
    async def pause(self, queue: str | Queue[Any, Any], *, reason: str = "paused by an operator") -> bool:
        """Let nobody claim from a queue, in any group; what runs goes on, enqueues and timers too.

        Once this has returned nothing is claimed from the queue until it is resumed: claims that were
        on their way were waited for. A queue may be paused before it has any job.

        Returns:
            False when it was paused before; the first reason stays.

        Raises:
            DatabaseError: transient, with `committed` True: the pause holds for all claims that begin
                now, but one that began before has not ended within three seconds.
        """
        return await self._drive(steps.pause(queue, reason))

    @async_side(IN_TRIO)
    async def resume(self, queue: str | Queue[Any, Any]) -> bool:
        """Let everybody claim from a queue again, and wake who waits for it. False: it was not paused."""
        return await self._run(steps.resume(queue))


class AdminContext:
    """The async context manager that `open_admin` returns."""

    def __init__(self, store: AdminStore) -> None:
        self._store = store
        self._admin = Admin(store)

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Admin:
        try:
            await self._store.open()
        except BaseException:
            self._store.close()
            raise
        return self._admin

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._admin._closed = True
        self._store.close()
        await trio.lowlevel.cancel_shielded_checkpoint()


def open_admin(
    conninfo: str, *, schema: str = DEFAULT_SCHEMA, call_timeout: float = CALL_TIMEOUT, pooled: bool = False
) -> AdminContext:
    """Open an admin as a scope: `async with open_admin(conninfo) as admin: …`.

    Args:
        conninfo: libpq connection string or URI. schema: where the tables are. call_timeout: seconds
            per call of the database. pooled: conninfo leads to PgBouncer in transaction mode.

    Raises:
        DatabaseError, SchemaError: the database cannot be reached or does not fit.
    """
    return AdminContext(AdminStore(**checked_arguments(conninfo, schema, call_timeout, pooled)))


def checked_arguments(conninfo: str, schema: str, call_timeout: float, pooled: bool) -> dict[str, Any]:
    checked_conninfo("conninfo", conninfo)
    if not isinstance(pooled, bool):
        raise OptionError("pooled", pooled, "True or False")
    return {
        "conninfo": conninfo,
        "schema": checked_schema(schema),
        "call_timeout": checked_seconds("call_timeout", call_timeout, positive=True),
        "pooled": pooled,
    }
