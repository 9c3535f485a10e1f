"""What a handler receives: one claimed job, decoded as far as the handler looks at it."""

from __future__ import annotations

import datetime as dt
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import trio

from ._errors import OptionError, TriojobsError
from ._model import Claim, Fence

if TYPE_CHECKING:
    import psycopg

__all__ = ["Job", "JobPort"]

PayloadT = TypeVar("PayloadT")
T = TypeVar("T")


class JobPort(Protocol):
    """What a job asks of the worker that runs it."""

    def commit_work(self, claim: Claim, work: Callable[[Any], T], *, completing: bool) -> Awaitable[T]: ...

    def cancel_reason(self, claim: Claim) -> str | None: ...


class Job(Generic[PayloadT]):
    """One attempt at one job. Made by the worker; handlers only read it.

    Attributes:
        id: the job's id. queue: its queue's name. payload: typed by the queue.
        attempt: number of this attempt, from 1. max_attempts: how many there may be.
        fence: `(group_id, claim_no)`; together with the id it names this claim for ever, for use
            in tables of your own. Compare it for equality only.
    """

    __slots__ = ("_claim", "_port", "payload")

    def __init__(self, claim: Claim, payload: PayloadT, port: JobPort) -> None:
        self._claim = claim
        self._port = port
        self.payload: PayloadT = payload

    def __repr__(self) -> str:
        return f"<Job {self.id} of {self.queue!r}, attempt {self.attempt} of {self.max_attempts}>"

    @property
    def id(self) -> int:
        """The job's id."""
        return self._claim.job_id

    @property
    def queue(self) -> str:
        """The queue's name."""
        return self._claim.queue

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self._claim.attempt

    @property
    def max_attempts(self) -> int:
        """How many attempts there may be."""
        return self._claim.max_attempts

    @property
    def priority(self) -> int:
        """Higher runs first."""
        return self._claim.priority

    @property
    def fence(self) -> Fence:
        """`(group_id, claim_no)` of this claim."""
        return self._claim.fence

    @property
    def key(self) -> str | None:
        """The key it was enqueued with."""
        return None if self._claim.key is None else self._claim.key.decode()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the enqueue attached."""
        found: dict[str, Any] = {} if self._claim.metadata is None else json.loads(self._claim.metadata)
        return found

    @property
    def enqueued_at(self) -> dt.datetime:
        """When it was enqueued (server clock, UTC)."""
        return _utc(self._claim.enqueued_at or 0.0)

    @property
    def run_at(self) -> dt.datetime:
        """When it became due (server clock, UTC)."""
        return _utc(self._claim.run_at)

    @property
    def deadline(self) -> dt.datetime | None:
        """When it must have ended (UTC), or None."""
        return None if self._claim.deadline is None else _utc(self._claim.deadline)

    @property
    def last_error(self) -> str | None:
        """Text of the last failed attempt, or None."""
        error = self._claim.last_error
        return None if error is None else error.decode(errors="replace")

    @property
    def cancel_reason(self) -> str | None:
        """Why somebody asked to cancel this job while it runs, or None."""
        return self._port.cancel_reason(self._claim)

    def commit(self, work: Callable[[psycopg.Connection[Any]], T]) -> Awaitable[T]:
        """Run `work(conn)` in a thread and commit its writes together with this job's completion.

        One transaction, fenced by this claim: if the job has moved on, nothing is written. What
        `work` returns is the job's result; what the handler does afterwards changes nothing.
        `work` is called at most once, must not commit or roll back (savepoints with
        `conn.transaction()` are fine), may enqueue with `enqueue_on(conn, …)`, and is bounded by the
        job's timeout and deadline alone. Our part comes last in the same transaction, with the rights
        of the role that is set then.

        Returns:
            What `work` returned.

        Raises:
            StaleClaimError: the job moved on; everything was rolled back.
            DatabaseError: see its `committed`. EncodeError: the value is no result of this queue.
            OptionError: `work` is no synchronous function.
            Anything that `work` raises; everything was rolled back.

        Cancellation: while it waits for a connection, nothing has happened; while `work` runs, its
        statement is cancelled and everything is rolled back; once the commit has happened it wins.
        """
        return self._commit_work("commit", work, completing=True)

    def transact(self, work: Callable[[psycopg.Connection[Any]], T]) -> Awaitable[T]:
        """Run `work(conn)` in a thread and commit its writes, if this claim still owns the job.

        Like `commit`, but the job goes on: the writes survive a later failure of the handler, and of the
        job's other attempts each writes again. When the reply to the COMMIT is lost, nobody can tell:
        the DatabaseError has `committed` None.
        """
        return self._commit_work("transact", work, completing=False)

    def _commit_work(self, method: str, work: Callable[[Any], T], *, completing: bool) -> Awaitable[T]:
        if not trio.lowlevel.in_trio_task():
            raise TriojobsError(
                f"job.{method} was called from the wrong place",
                operation="calling triojobs",
                hint="call it from the handler's task; in a thread use a connection of your own",
            )
        return self._port.commit_work(self._claim, _synchronous(work), completing=completing)


def _synchronous(work: Callable[[Any], T]) -> Callable[[Any], T]:
    """Return `work`, checked before the call and by what it returns.

    Calling what is asynchronous, or a generator, would not run its body: it would commit nothing, and say
    nothing.
    """
    limit = "a synchronous function of one psycopg connection"
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    if not callable(work) or any(is_kind(f) for is_kind in kinds for f in (work, type(work).__call__)):
        raise OptionError("work", work, limit)

    def call(conn: Any) -> T:
        value = work(conn)
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()  # nobody will ever start it
            raise OptionError("work", work, limit)
        return value

    return call


def _utc(seconds: float) -> dt.datetime:
    # From an integer of microseconds: a float of seconds would lose the last digit.
    return EPOCH + dt.timedelta(microseconds=round(seconds * 1_000_000))


EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
