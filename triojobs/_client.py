"""The client: enqueue from Trio and from threads, read, wait, cancel."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import Any, Final, ParamSpec, TypeVar, Unpack, overload

import trio

from ._bridge import check_cancelled, on_loop
from ._codec import decode_plain
from ._errors import (
    CodecError,
    DatabaseError,
    DuplicateJobError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    OptionError,
    TriojobsError,
    checked_seconds,
    reason,
)
from ._flusher import Flusher
from ._instruments import sending
from ._logs import Log
from ._model import Enqueued, JobInfo, JobStatus, NewRow, RawJob
from ._options import checked_count, checked_text
from ._queue import (
    JobOptions,
    JobOptionsButTimeout,
    NewJob,
    Payloads,
    Queue,
    checked_payloads,
    new_row,
    plain_row,
)
from ._store import Store

__all__ = ["IN_TRIO", "Client", "async_side", "entered_twice", "info_of", "on_loop", "wrong_side"]

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")
P = ParamSpec("P")
T = TypeVar("T")

log = Log("triojobs.client")

ENCODED_AT_ONCE: Final = 500  # payloads between two checkpoints of a large call: about a millisecond
FIRST_LOOK: Final = 0.02  # seconds before a waiter looks again; grows while nothing ends
READ_AT_ONCE: Final = 50  # ended jobs; each may carry a payload and a result of a megabyte
LAST_LOOK: Final = 1.0  # seconds; the price of not being told: at most this much later
REASON_LIMIT: Final = 8 * 1024


def wrong_side(method: str, instead: str) -> TriojobsError:
    """Return the error for a method that was called from the wrong place."""
    return TriojobsError(
        f"{method} was called from the wrong place", operation="calling triojobs", hint=instead
    )


def entered_twice(function: str) -> TriojobsError:
    """Return the error for a scope that is entered a second time."""
    return TriojobsError(
        f"what {function} returned was entered twice",
        operation="calling triojobs",
        hint=f"call {function} for each `async with`",
    )


def async_side(
    instead: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Mark a method for Trio tasks: called elsewhere it raises at once, not when awaited."""

    def decorate(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
            if not on_loop():
                raise wrong_side(method.__name__, instead)
            return method(*args, **kwargs)

        if hasattr(inspect, "markcoroutinefunction"):  # Python 3.12
            inspect.markcoroutinefunction(checked)
        return checked

    return decorate


FROM_THREAD: Final = (
    "outside a Trio task use enqueue_from_thread, SyncClient, or enqueue_on with your connection"
)
IN_TRIO: Final = "call it from a Trio task; outside Trio use SyncClient"


class Client:
    """Enqueue jobs and look after them. Made by `open_client`, or `group.client`.

    All methods but `*_from_thread` are for Trio tasks; any number of tasks may call them at once.
    """

    def __init__(self, store: Store, flusher: Flusher) -> None:
        self._store = store
        self._flusher = flusher
        self._closed = False

    def _check_open(self) -> None:
        """Raise unless the client is open and this is the process and the Trio program it was opened in."""
        if self._closed:
            raise trio.ClosedResourceError("this triojobs client is closed")
        self._store.check_owner()
        if on_loop() and not self._flusher.serves_this_loop():
            raise wrong_side("a client of another trio.run", "open a client in this one")

    # Enqueue.

    @async_side(FROM_THREAD)
    async def enqueue(
        self,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        **options: Unpack[JobOptions],
    ) -> int:
        """Enqueue one job and return its id, once it is committed.

        Args:
            options: `delay`, `priority`, `key` and so on: see `JobOptions`.

        Raises:
            OptionError: an argument is out of its range; nothing was written.
            DuplicateJobError: the key is taken.
            DatabaseError: `committed` is None when the reply was lost: the job may exist.

        Cancellation: all or nothing.
        """
        return (await self._enqueue_one(queue, NewJob(payload, **options))).id

    @async_side(FROM_THREAD)
    async def try_enqueue(
        self,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        **options: Unpack[JobOptions],
    ) -> Enqueued:
        """Like `enqueue`, but tell whether this call created the job or replaced another's body.

        A key that is taken raises no error, unless `on_conflict` says so: it is "return" by default.
        """
        options.setdefault("on_conflict", "return")
        return await self._enqueue_one(queue, NewJob(payload, **options))

    async def _enqueue_one(self, queue: Queue[Any, Any], new: NewJob[Any]) -> Enqueued:
        self._check_open()
        with sending([new_row(queue, new)]) as sent:
            sent.entries = [await self._flusher.enqueue(sent.rows[0])]
        return sent.entries[0]

    @async_side(FROM_THREAD)
    async def enqueue_many(self, queue: Queue[PayloadT, Any], payloads: Payloads[PayloadT]) -> list[int]:
        """Enqueue jobs in one transaction, whatever their number; ids in the order given.

        Each item is a payload, or a `NewJob` with options of its own. An empty list returns [].

        Raises: as `enqueue`; a taken key undoes the whole call and `index` names the item.

        Cancellation: between chunks of 10,000; everything is rolled back.
        """
        return [entry.id for entry in await self._enqueue_rows(queue, payloads)]

    @async_side(FROM_THREAD)
    async def try_enqueue_many(
        self, queue: Queue[PayloadT, Any], payloads: Payloads[PayloadT]
    ) -> list[Enqueued]:
        """Like `enqueue_many`, but tell for each item whether it was created or replaced."""
        return await self._enqueue_rows(queue, payloads)

    async def _enqueue_rows(
        self, queue: Queue[Any, Any], payloads: Payloads[Any], *, first: int = 0
    ) -> list[Enqueued]:
        self._check_open()
        rows: list[NewRow] = []
        for index, item in enumerate(checked_payloads(payloads), first):
            if len(rows) % ENCODED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            rows.append(row_of(queue, item, index))
        if not rows:
            await trio.lowlevel.checkpoint()
            return []
        with naming_items(first), sending(rows) as sent:
            sent.entries = entries = await self._store.enqueue(sent.rows)
        return entries

    @async_side(FROM_THREAD)
    async def enqueue_stream(
        self,
        queue: Queue[PayloadT, Any],
        payloads: AsyncIterable[PayloadT | NewJob[PayloadT]],
        *,
        chunk: int = 1000,
    ) -> int:
        """Enqueue what an async iterable yields, a commit per `chunk` (1 to 10,000) items; return how many.

        The iterable is asked for more only after the last chunk is committed. An error carries a note
        that says how many items were committed before, also as its attribute `enqueued`.

        Cancellation: between chunks; chunks that were committed stay.
        """
        self._check_open()
        checked_count("chunk", chunk, most=10_000)
        done = 0
        gathered: list[Any] = []
        try:
            async for item in payloads:
                gathered.append(item)
                if len(gathered) == chunk:
                    done += len(await self._enqueue_rows(queue, gathered, first=done))
                    gathered.clear()
            done += len(await self._enqueue_rows(queue, gathered, first=done))
        except Exception as exc:
            exc.add_note(f"{done} item(s) of the stream were committed before")
            exc.enqueued = done  # type: ignore[attr-defined]  # for programs; the note is for people
            raise
        finally:
            if inspect.isasyncgen(payloads):  # nobody else can end one that an error left in the middle
                await payloads.aclose()
        return done

    def enqueue_from_thread(
        self,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        *,
        timeout: float | None = None,
        job_timeout: float | None = None,
        **options: Unpack[JobOptionsButTimeout],
    ) -> int:
        """Enqueue one job from any thread; block until it is committed; return its id.

        Calls of many threads and tasks share commits; each gets its own answer.

        Args:
            timeout: seconds to wait until the enqueue is begun (None: no limit); once begun, its
                answer is awaited. job_timeout: what `enqueue` calls timeout. Others: as `enqueue`.

        Raises: as `enqueue`; DatabaseError with `committed` False after `timeout`;
            `trio.ClosedResourceError` when the client or group has closed;
            `trio.Cancelled` in a Trio worker thread whose task was cancelled before it was begun.
        """
        if on_loop():
            raise wrong_side("enqueue_from_thread", "in a Trio task use `await client.enqueue(…)`")
        self._check_open()
        if timeout is not None:
            checked_seconds("timeout", timeout)
        new = NewJob(payload, timeout=job_timeout, **options)
        with sending([new_row(queue, new)]) as sent:
            sent.entries = [self._flusher.enqueue_from_thread(sent.rows[0], timeout, check_cancelled)]
        return sent.entries[0].id

    @async_side(IN_TRIO)
    async def new_job_id(self) -> int:
        """Reserve an id for `enqueue(…, job_id=…)`: an enqueue that can be repeated safely."""
        self._check_open()
        return (await self._store.new_job_ids(1))[0]

    # Look and wait.

    @overload
    async def get(self, job_id: int) -> JobInfo[Any] | None: ...
    @overload
    async def get(self, job_id: int, queue: Queue[PayloadT, Any]) -> JobInfo[PayloadT] | None: ...
    @async_side(IN_TRIO)
    async def get(self, job_id: int, queue: Queue[Any, Any] | None = None) -> JobInfo[Any] | None:
        """Return the job as it stands, or None. With `queue` payload and result are typed by it."""
        self._check_open()
        checked_job_id(job_id)
        found = await self._store.read_jobs([job_id])
        return info_of(found[0], queue) if found else None

    @overload
    async def result(self, job_id: int) -> Any: ...
    @overload
    async def result(self, job_id: int, queue: Queue[Any, ResultT]) -> ResultT: ...
    @async_side(IN_TRIO)
    async def result(self, job_id: int, queue: Queue[Any, Any] | None = None) -> Any:
        """Wait until the job has ended and return what its handler returned.

        Raises:
            JobFailedError: it was killed. JobCancelledError: it was cancelled.
            JobNotFoundError: there is no such job.

        Cancellation: at any time, the job is not touched; set a limit with `trio.fail_after`.
        """
        self._check_open()
        async with aclosing(self._ends([checked_job_id(job_id)])) as ends:
            async for raw in ends:
                return result_of(raw, queue)
        raise AssertionError  # one id gives one end, or JobNotFoundError

    @overload
    def as_completed(
        self, job_ids: Iterable[int]
    ) -> AbstractAsyncContextManager[AsyncIterator[JobInfo[Any]]]: ...
    @overload
    def as_completed(
        self, job_ids: Iterable[int], queue: Queue[PayloadT, Any]
    ) -> AbstractAsyncContextManager[AsyncIterator[JobInfo[PayloadT]]]: ...
    def as_completed(
        self, job_ids: Iterable[int], queue: Queue[Any, Any] | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[JobInfo[Any]]]:
        """Iterate over jobs as they end: `async with client.as_completed(ids) as done: async for info in done`.

        An id given twice comes once. Jobs that have ended already come first, in the order in which
        they ended. Database errors that may heal are waited out.

        Raises:
            JobNotFoundError: an id is unknown.
        """
        if not on_loop():
            raise wrong_side("as_completed", IN_TRIO)
        self._check_open()
        return self._as_completed([checked_job_id(job_id) for job_id in job_ids], queue)

    @asynccontextmanager
    async def _as_completed(
        self, wanted: list[int], queue: Queue[Any, Any] | None
    ) -> AsyncIterator[AsyncIterator[JobInfo[Any]]]:
        async def completions() -> AsyncGenerator[JobInfo[Any], None]:
            async with aclosing(self._ends(wanted)) as ends:
                async for raw in ends:
                    yield info_of(raw, queue)

        async with aclosing(completions()) as infos:
            yield infos

    async def _ends(self, job_ids: Iterable[int]) -> AsyncGenerator[RawJob, None]:
        waiting = dict.fromkeys(job_ids)
        look = FIRST_LOOK
        while waiting:
            self._check_open()
            try:
                ended = await self._store.ended(list(waiting))
                for first in range(0, len(ended), READ_AT_ONCE):
                    batch = ended[first : first + READ_AT_ONCE]
                    for raw in completed(batch, await self._store.read_jobs(batch)):
                        del waiting[raw.id]
                        look = FIRST_LOOK
                        yield raw
            except DatabaseError as exc:
                if not exc.transient:
                    raise
                log.warning("%s", exc, extra={"event": "wait_failed"})
            if waiting:
                await trio.sleep(look)
                look = min(LAST_LOOK, look * 1.5)

    @async_side(IN_TRIO)
    async def cancel(self, job_id: int, *, reason: str = "cancelled") -> bool:
        """Cancel a job. True: it will not run (again); False: it had ended before.

        A waiting job is cancelled at once. The handler of a running one is cancelled with the reason;
        if it returns all the same, the job is done.

        Raises:
            JobNotFoundError: there is no such job. OptionError: reason over 8 KiB.
        """
        self._check_open()
        checked_text("reason", reason, least=0, most=REASON_LIMIT)
        return await self._store.cancel_job(checked_job_id(job_id), reason)


def checked_job_id(value: object) -> int:
    """Return an id that fits a bigint, or raise OptionError. What no job can have is merely not found."""
    return checked_count("job_id", value, least=-(2**63), most=2**63 - 1)


def rows_of(queue: Queue[Any, Any], payloads: Payloads[Any]) -> list[NewRow]:
    """Validate and encode all items before anything is sent; errors name the item."""
    return [row_of(queue, item, index) for index, item in enumerate(checked_payloads(payloads))]


def row_of(queue: Queue[Any, Any], item: Any, index: int) -> NewRow:
    """Validate and encode one item of a call; errors name it."""
    if isinstance(queue, Queue) and not isinstance(item, NewJob):
        return plain_row(queue, item, index)
    return new_row(queue, item, index)


@contextmanager
def naming_items(first: int = 0) -> Iterator[None]:
    """Have a DuplicateJobError say which item it is, also when the call has but one."""
    try:
        yield
    except DuplicateJobError as exc:
        index = first + (exc.index or 0)
        raise DuplicateJobError(queue=exc.queue, key=exc.key, job_id=exc.job_id, index=index) from None


def completed(ended: Iterable[int], raws: Iterable[RawJob]) -> list[RawJob]:
    """Return the jobs that have ended, in the order in which they did.

    Raises:
        JobNotFoundError: a job of `ended` does not exist.
    """
    found = {raw.id: raw for raw in raws}
    for job_id in ended:
        if job_id not in found:
            raise JobNotFoundError(job_id, operation="waiting for jobs")
    # One that was retried in between has not ended.
    done = [raw for raw in found.values() if JobStatus(raw.status).ended and raw.finished_at is not None]
    return sorted(done, key=lambda raw: (raw.finished_at, raw.id))


def info_of(raw: RawJob, queue: Queue[Any, Any] | None) -> JobInfo[Any]:
    """Decode a row. Bytes that do not decode are given as they are when no queue is named."""
    status = JobStatus(raw.status)
    if queue is not None:
        if queue.name != raw.queue:
            raise OptionError("queue", queue.name, f"the queue of job {raw.id}: {raw.queue!r}")
        with _fitting("payload", raw, queue):
            payload = queue.decode_payload(raw.payload, raw.encoding)
        result = _result(raw, queue)
    else:
        payload = _plain(raw.payload, raw.encoding)
        result = _plain(raw.result, raw.result_encoding)
    return JobInfo(
        id=raw.id,
        queue=raw.queue,
        status=status,
        payload=payload,
        attempts=raw.attempts,
        max_attempts=raw.max_attempts,
        priority=raw.priority,
        metadata=raw.metadata,
        key=raw.key,
        enqueued_at=raw.enqueued_at.astimezone(dt.UTC),
        run_at=raw.run_at.astimezone(dt.UTC),
        deadline=_utc(raw.deadline),
        claimed_at=_utc(raw.claimed_at),
        finished_at=_utc(raw.finished_at),
        result=result,
        error=raw.last_error,
        group=raw.group_id,
        fence=None if raw.group_id is None or raw.claim_no is None else (raw.group_id, raw.claim_no),
        cancel_reason=raw.cancel_reason,
    )


def result_of(raw: RawJob, queue: Queue[Any, Any] | None) -> Any:
    """Return an ended job's result, or raise what became of it. Its payload is not looked at."""
    if queue is not None and queue.name != raw.queue:
        raise OptionError("queue", queue.name, f"the queue of job {raw.id}: {raw.queue!r}")
    if raw.status == JobStatus.KILLED:
        raise JobFailedError(raw.id, attempts=raw.attempts, error=raw.last_error)
    if raw.status == JobStatus.CANCELLED:
        raise JobCancelledError(raw.id, attempts=raw.attempts, reason=raw.last_error)
    return _plain(raw.result, raw.result_encoding) if queue is None else _result(raw, queue)


def _result(raw: RawJob, queue: Queue[Any, Any]) -> Any:
    if raw.result is None:
        return None
    with _fitting("result", raw, queue):
        return queue.decode_result(raw.result, raw.result_encoding or "cbor")


@contextmanager
def _fitting(what: str, raw: RawJob, queue: Queue[Any, Any]) -> Iterator[None]:
    """Turn whatever a conversion raises into a CodecError that names the job."""
    try:
        yield
    except CodecError:
        raise
    except Exception as exc:
        raise CodecError(
            f"the {what} of job {raw.id} does not fit {queue!r}: {reason(exc)}",
            operation="reading jobs",
            hint="declare the queue as its producers and workers do, or read the job without it",
        ) from exc


def _plain(data: bytes | None, encoding: str | None) -> Any:
    try:
        return decode_plain(data, encoding)
    except CodecError:
        return data


def _utc(at: dt.datetime | None) -> dt.datetime | None:
    return None if at is None else at.astimezone(dt.UTC)
