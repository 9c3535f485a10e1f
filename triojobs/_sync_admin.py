"""The admin without an event loop: on a connection of its own, or in the caller's transaction."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

import trio

from . import _admin_steering as steering
from . import _admin_steps as steps
from ._admin import BATCH, CALL_TIMEOUT, checked_arguments
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
from ._admin_store import CallersConnection, Step, Steps, SyncAdminStore, drive_sync
from ._bridge import on_loop
from ._client import wrong_side
from ._errors import OptionError
from ._options import DEFAULT_SCHEMA, checked_schema
from ._queue import Queue
from ._retention import DEFAULT_RETENTION, Pruned, Retention
from ._sync_store import is_connection

if TYPE_CHECKING:
    import psycopg

__all__ = ["SyncAdmin", "admin_on"]

T = TypeVar("T")
PayloadT = TypeVar("PayloadT")


class SyncAdmin:
    """The same without an event loop: `with SyncAdmin(conninfo) as admin: …`. See `Admin`.

    Args:
        conninfo, schema, call_timeout, pooled: as `open_admin`.

    Raises:
        DatabaseError, SchemaError: on entry, when the database cannot be reached or does not fit.

    Threads: any; calls of several threads take turns on one connection. Inside a Trio task every
    method raises at once: it would block the loop. (One from `admin_on` is allowed anywhere.)
    """

    def __init__(
        self,
        conninfo: str,
        *,
        schema: str = DEFAULT_SCHEMA,
        call_timeout: float = CALL_TIMEOUT,
        pooled: bool = False,
    ) -> None:
        self._store = SyncAdminStore(**checked_arguments(conninfo, schema, call_timeout, pooled))
        self._closed = False

    def __enter__(self) -> SyncAdmin:
        self._check()
        try:
            self._store.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if not self._closed:
            self._closed = True
            self._store.close()

    def _check(self) -> None:
        if on_loop():
            raise wrong_side("SyncAdmin", "in a Trio task use `async with open_admin(…) as admin`")
        if self._closed:
            raise trio.ClosedResourceError("this triojobs admin is closed")

    def _run(self, step: Step[T]) -> T:
        self._check()
        return self._store.run(step)

    def _drive(self, given: Steps[T]) -> T:
        return drive_sync(given, self._run)

    # Jobs.

    def jobs(
        self,
        which: JobFilter | None = None,
        *,
        limit: int = 100,
        after: str | None = None,
        newest_first: bool = True,
    ) -> Page[JobSummary]:
        """Return a page of the jobs that match. See `Admin.jobs`."""
        return self._drive(steps.jobs(which, limit, after, newest_first))

    @overload
    def job(self, job_id: int) -> JobDetails[Any]: ...
    @overload
    def job(self, job_id: int, queue: Queue[PayloadT, Any]) -> JobDetails[PayloadT]: ...
    def job(self, job_id: int, queue: Queue[Any, Any] | None = None) -> JobDetails[Any]:
        """Return one job with its attempts. See `Admin.job`."""
        return self._run(steps.job(job_id, queue))

    def explain(self, job_id: int) -> Explanation:
        """Return the one reason for which a job does not run now. See `Admin.explain`."""
        return self._run(steps.explain(job_id))

    # Steering.

    def cancel(self, job_id: int, *, reason: str = "cancelled") -> bool:
        """Cancel one job. See `Admin.cancel`."""
        return self._run(steering.cancel(job_id, reason))

    def retry(self, job_id: int) -> bool:
        """Run a job that has ended (done, killed, cancelled) once more, with all its attempts. See `Admin.retry`."""
        return self._run(steering.retry(job_id))

    def reschedule(
        self, job_id: int, *, run_at: dt.datetime | None = None, delay: float | None = None
    ) -> bool:
        """Change when a job that waits is due. See `Admin.reschedule`."""
        return self._run(steering.reschedule(job_id, run_at, delay))

    @overload
    def edit(self, job_id: int, *, priority: int | None = None, max_attempts: int | None = None) -> bool: ...
    @overload
    def edit(
        self,
        job_id: int,
        *,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        priority: int | None = None,
        max_attempts: int | None = None,
    ) -> bool: ...
    def edit(
        self,
        job_id: int,
        *,
        queue: Queue[Any, Any] | None = None,
        payload: Any = KEEP,
        priority: int | None = None,
        max_attempts: int | None = None,
    ) -> bool:
        """Change a job that has not started. See `Admin.edit`."""
        return self._run(steering.edit(job_id, priority, max_attempts, queue, payload))

    def delete(self, job_id: int) -> bool:
        """Delete a job that does not run, with its attempts and its key. See `Admin.delete`."""
        return self._run(steering.delete(job_id))

    # Steering by filter. Each works through the jobs that existed when it began, oldest first, in
    # transactions of `batch` jobs; an error says how many had been changed.

    def cancel_many(
        self,
        which: JobFilter,
        *,
        reason: str = "cancelled",
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Cancel the jobs that match and have not ended. See `Admin.cancel_many`."""
        how = steering.Batches(batch, progress, dry_run)
        return self._drive(steering.cancel_many(which, reason, how))

    def retry_many(
        self,
        which: JobFilter,
        *,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Retry the jobs that match and have ended. See `Admin.retry_many`."""
        return self._drive(steering.retry_many(which, steering.Batches(batch, progress, dry_run)))

    def reschedule_many(
        self,
        which: JobFilter,
        *,
        run_at: dt.datetime | None = None,
        delay: float | None = None,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Change when the jobs are due that match and wait. See `Admin.reschedule_many`."""
        how = steering.Batches(batch, progress, dry_run)
        return self._drive(steering.reschedule_many(which, run_at, delay, how))

    def edit_many(
        self,
        which: JobFilter,
        *,
        priority: int | None = None,
        max_attempts: int | None = None,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Change the jobs that match and have not started. See `Admin.edit_many`."""
        how = steering.Batches(batch, progress, dry_run)
        return self._drive(steering.edit_many(which, priority, max_attempts, how))

    def delete_many(
        self,
        which: JobFilter,
        *,
        batch: int = BATCH,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> BulkResult:
        """Delete the jobs that match and do not run. See `Admin.delete_many`."""
        return self._drive(steering.delete_many(which, steering.Batches(batch, progress, dry_run)))

    def prune(
        self,
        retention: Retention = DEFAULT_RETENTION,
        *,
        progress: Callable[[Pruned], object] | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove now what is older than `retention` says. See `Admin.prune`."""
        return self._drive(steering.prune(retention, progress, dry_run))

    # Groups.

    def groups(self, *, closed: bool = False, limit: int = 100, after: str | None = None) -> Page[GroupInfo]:
        """Return a page of the worker groups. See `Admin.groups`."""
        return self._run(steps.groups(closed=closed, limit=limit, after=after))

    def drain(self, group_id: uuid.UUID, *, reason: str = "drained by an operator") -> bool:
        """Ask a worker group to stop claiming, finish and close. See `Admin.drain`."""
        return self._run(steps.drain(group_id, reason))

    # Queues.

    def queues(self, *, window: float = 300.0, limit: int = 100, after: str | None = None) -> Page[QueueInfo]:
        """Return a page of the queues. See `Admin.queues`."""
        return self._run(steps.queues(window=window, limit=limit, after=after))

    def queue(self, queue: str | Queue[Any, Any], *, window: float = 300.0) -> QueueInfo:
        """Return one queue. See `Admin.queue`."""
        return self._run(steps.queue(queue, window=window))

    def statistics(self) -> dict[str, Statistic]:
        """Return figures about all queues by their names. See `Admin.statistics`."""
        return self._run(steps.statistics())

    def pause(self, queue: str | Queue[Any, Any], *, reason: str = "paused by an operator") -> bool:
        """Let nobody claim from a queue. See `Admin.pause`.

        In the caller's transaction the pause holds for the claims that begin after its commit.
        """
        return self._drive(steps.pause(queue, reason))

    def resume(self, queue: str | Queue[Any, Any]) -> bool:
        """Let everybody claim from a queue again. See `Admin.resume`."""
        return self._run(steps.resume(queue))


class AdminOnConnection(SyncAdmin):
    """What `admin_on` returns: the methods of SyncAdmin, on a connection that stays the caller's."""

    def __init__(self, connection: CallersConnection) -> None:
        self._connection = connection

    def __enter__(self) -> SyncAdmin:
        return self

    def close(self) -> None:
        """Do nothing: the connection is the caller's."""

    def _run(self, step: Step[T]) -> T:
        return self._connection.run(step)

    def prune(
        self,
        retention: Retention = DEFAULT_RETENTION,
        *,
        progress: Callable[[Pruned], object] | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove what is older than `retention` says; in autocommit mode, outside of a transaction, only."""
        self._connection.check_own_transactions("pruning")
        return super().prune(retention, progress=progress, dry_run=dry_run)

    def _drive(self, given: Steps[T]) -> T:
        with self._connection.one_call():
            return super()._drive(given)


def admin_on(conn: psycopg.Connection[Any], *, schema: str = DEFAULT_SCHEMA) -> SyncAdmin:
    """Return an admin that works in the caller's transaction: `admin_on(conn).cancel(job_id)`.

    What it does happens if and only if the caller's transaction commits; the workers are told then. A
    call that fails undoes itself alone (savepoint). The rows that it changes stay locked until the
    transaction ends: keep it short, and take few jobs.

    Args:
        conn: a synchronous psycopg connection; it is left as it was found, and is not closed. Steering
            needs READ COMMITTED. In autocommit mode, outside of a transaction, each call is a
            transaction of its own, or as many as it has batches. schema: where the tables are.

    Threads: any, also where a Trio loop runs; blocks its thread.
    """
    checked_schema(schema)
    if not is_connection(conn):
        raise OptionError("conn", conn, "a synchronous psycopg.Connection")
    return AdminOnConnection(CallersConnection(conn, schema))
