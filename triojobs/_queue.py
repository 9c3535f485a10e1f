"""Declarations: queues, workers and jobs to enqueue. Pure: no I/O, shared by producers and workers."""

from __future__ import annotations

import datetime as dt
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Never, TypeAlias, TypedDict, TypeVar, overload

from ._backoff import Backoff
from ._codec import CBOR, CborCodec, Codec, EncodeError, JsonCodec, check_type, decode, encode
from ._errors import OptionError, checked_seconds
from ._middleware import Middleware, checked_middleware
from ._model import KeyUntil, NewRow, OnConflict
from ._options import (
    KEY_LIMIT,
    PAYLOAD_LIMIT,
    checked_count,
    checked_metadata,
    checked_name,
    checked_text,
    checked_time,
)

if TYPE_CHECKING:
    from ._job import Job

__all__ = [
    "JobOptions",
    "JobOptionsButTimeout",
    "NewJob",
    "Payloads",
    "Queue",
    "Worker",
    "checked_payloads",
    "job_of_another_queue",
    "new_row",
    "plain_row",
    "unknown_job_id",
]

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")

ENQUEUEING: Final = "enqueueing"
DEFAULT_CONCURRENCY: Final = 10  # handlers at once per worker: enough to hide round trips, kind to memory


class Queue(Generic[PayloadT, ResultT]):
    """A typed name. Makes no connection; declare it once and import it in producers and workers.

    Args:
        name: 1 to 255 bytes in UTF-8, without NUL.
        payload: the payloads' type: dataclass, attrs class, msgspec.Struct, TypedDict, NamedTuple,
            a builtin or a typing form of these; default: any plain value.
        result: the type of what handlers return; default: any plain value.
        codec: see `Codec`; default CBOR.
        payload_limit, result_limit: most bytes when encoded (default 1 MiB).

    Raises:
        OptionError: a name or limit is out of range, or no value could ever be sent as one of the types.
    """

    __slots__ = ("_nothing", "codec", "name", "payload", "payload_limit", "result", "result_limit")

    @overload
    def __init__(
        self: Queue[Any, Any],
        name: str,
        *,
        codec: Codec = ...,
        payload_limit: int = ...,
        result_limit: int = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Queue[PayloadT, Any],
        name: str,
        payload: type[PayloadT],
        *,
        codec: Codec = ...,
        payload_limit: int = ...,
        result_limit: int = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        payload: type[PayloadT],
        *,
        result: type[ResultT],
        codec: Codec = ...,
        payload_limit: int = ...,
        result_limit: int = ...,
    ) -> None: ...
    @overload  # typing forms such as `int | str` are no `type`
    def __init__(
        self: Queue[Any, Any],
        name: str,
        payload: Any = ...,
        *,
        result: Any = ...,
        codec: Codec = ...,
        payload_limit: int = ...,
        result_limit: int = ...,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        payload: type[PayloadT] | Any = Any,
        *,
        result: type[ResultT] | Any = Any,
        codec: Codec = CBOR,
        payload_limit: int = PAYLOAD_LIMIT,
        result_limit: int = PAYLOAD_LIMIT,
    ) -> None:
        self.name: str = checked_name("queue", name)
        self.payload: type[PayloadT] | Any = payload
        self.result: type[ResultT] | Any = result
        if not isinstance(codec, Codec) or isinstance(codec, type):  # a class has the methods, too
            raise OptionError("codec", codec, "an object with name, encode(value) and decode(data, type)")
        checked_text("codec.name", codec.name, least=1, most=32)
        self.codec: Codec = codec
        check_type("payload", payload, codec)
        check_type("result", result, codec)
        # Far below PostgreSQL's gigabyte per value: a claim fetches many payloads at once.
        self.payload_limit: int = checked_count("payload_limit", payload_limit, most=256 * 1024 * 1024)
        self.result_limit: int = checked_count("result_limit", result_limit, most=256 * 1024 * 1024)
        self._nothing: bytes | None = self._encode_nothing()

    def __repr__(self) -> str:
        return f"Queue({self.name!r}, {getattr(self.payload, '__name__', self.payload)})"

    def encode_payload(self, value: PayloadT) -> bytes:
        """Return the bytes of a payload, or raise EncodeError naming field, value and limit."""
        return encode("payload", value, self.payload, self.codec, limit=self.payload_limit)

    def encode_result(self, value: ResultT) -> bytes:
        """Return the bytes of a result, or raise EncodeError naming field, value and limit."""
        if value is None and self._nothing is not None:
            return self._nothing
        return encode("result", value, self.result, self.codec, limit=self.result_limit)

    def _encode_nothing(self) -> bytes | None:
        """Return the bytes of the most common result, None; None where it is none, or a user's codec decides."""
        if type(self.codec) not in (CborCodec, JsonCodec):
            return None
        try:
            return encode("result", None, self.result, self.codec, limit=self.result_limit)
        except EncodeError:
            return None

    def decode_payload(self, data: bytes, encoding: str) -> PayloadT:
        """Return the payload; CodecError when the bytes can never be read."""
        value: PayloadT = decode(data, self.payload, encoding, self.codec)
        return value

    def decode_result(self, data: bytes, encoding: str) -> ResultT:
        """Return the result; CodecError when the bytes can never be read."""
        value: ResultT = decode(data, self.result, encoding, self.codec)
        return value


class JobOptionsButTimeout(TypedDict, total=False):
    """`JobOptions` without `timeout`: where that name means how long a thread waits."""

    delay: float | None
    run_at: dt.datetime | None
    priority: int
    max_attempts: int
    deadline: dt.datetime | None
    key: str | None
    key_until: KeyUntil
    metadata: Mapping[str, Any] | None
    job_id: int | None
    on_conflict: OnConflict


class JobOptions(JobOptionsButTimeout, total=False):
    """The keywords of every form of enqueue, and of `NewJob`.

    Attributes:
        delay: seconds from now (server clock) until it is due (default 0).
        run_at: the same as an aware time; one in the past is due at once.
        priority: 0 (default) to 2**31-1, higher runs first.
        max_attempts: how often it may be tried (default 5).
        timeout: seconds for one attempt (default: the worker's).
        deadline: aware time after which it is not started, and is cancelled when it runs.
        key: at most one job per queue and key (up to 1024 bytes, case-sensitive, "" is a key).
        key_until: how long the key is taken: "kept" (default: as long as the job is kept), "ended" (until
            it is done, killed or cancelled), or seconds from now.
        metadata: JSON object, up to 8 KiB, handed to the handler and shown to operators.
        job_id: from `new_job_id`; enqueueing the same id again is a no-op.
        on_conflict: when the key is taken: "raise" (default; of `try_enqueue` "return"), "return" the other
            job's id, or "replace" the other job's body if it has not started.
    """

    timeout: float | None


@dataclass(frozen=True, slots=True)
class NewJob(Generic[PayloadT]):
    """One job of an `enqueue_many`, with options of its own. See `JobOptions` for their meaning."""

    payload: PayloadT
    delay: float | None = field(default=None, kw_only=True)
    run_at: dt.datetime | None = field(default=None, kw_only=True)
    priority: int = field(default=0, kw_only=True)
    max_attempts: int = field(default=5, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    deadline: dt.datetime | None = field(default=None, kw_only=True)
    key: str | None = field(default=None, kw_only=True)
    key_until: KeyUntil = field(default="kept", kw_only=True)
    metadata: Mapping[str, Any] | None = field(default=None, kw_only=True)
    job_id: int | None = field(default=None, kw_only=True)
    on_conflict: OnConflict = field(default="raise", kw_only=True)


Payloads: TypeAlias = Iterable[PayloadT | NewJob[PayloadT]] | Callable[[Never], PayloadT]
"""What `enqueue_many` takes: an iterable of payloads, and of `NewJob`s with options of their own.

The second form is nobody's argument (nothing can call it). With it mypy looks at the items only when the
queue has told what a payload is; without, it takes a list of both kinds for a list of objects.
"""


# Covariant for type checkers alone, who would call a list of different workers a list of objects: nobody calls a
# worker with what is of these types.
PayloadT_co = TypeVar("PayloadT_co", covariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Worker(Generic[PayloadT_co, ResultT_co]):
    """Binds one queue to one handler.

    Args:
        queue: where jobs come from.
        handler: `async def handler(job) -> result`. Dependencies reach it by closure,
            `functools.partial` or as a bound method.
        concurrency: handlers at once in this process (1 to 100,000).
        timeout: seconds that one attempt may take; None: no limit. A job's own timeout wins.
        retry: delays between attempts.
        middleware: runs around the handler, the first one outermost, inside of the group's; see
            `Middleware`.

    Raises:
        OptionError: a value is out of its range, or the handler cannot be one.
    """

    __slots__ = ("concurrency", "handler", "middleware", "queue", "retry", "timeout")

    def __init__(
        self,
        queue: Queue[PayloadT_co, ResultT_co],
        handler: Callable[[Job[PayloadT_co]], Awaitable[ResultT_co]],
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout: float | None = None,
        retry: Backoff = Backoff(),  # noqa: B008 - frozen
        middleware: Sequence[Middleware] = (),
    ) -> None:
        if not isinstance(queue, Queue):
            raise OptionError("queue", queue, "a triojobs.Queue")
        if (
            not callable(handler)
            or inspect.isasyncgenfunction(handler)
            or inspect.isgeneratorfunction(handler)
        ):
            raise OptionError("handler", handler, "an async function that takes a job")
        if not isinstance(retry, Backoff):
            raise OptionError("retry", retry, "a triojobs.Backoff")
        self.queue: Queue[PayloadT_co, ResultT_co] = queue
        self.handler: Callable[[Job[PayloadT_co]], Awaitable[ResultT_co]] = handler
        self.concurrency: int = checked_count("concurrency", concurrency, most=100_000)
        self.timeout: float | None = (
            None if timeout is None else checked_seconds("timeout", timeout, positive=True)
        )
        self.retry: Backoff = retry
        self.middleware: tuple[Middleware, ...] = checked_middleware(middleware)

    def __repr__(self) -> str:
        return f"Worker({self.queue.name!r}, concurrency={self.concurrency})"


def checked_payloads(payloads: Any) -> Iterable[Any]:
    """Return what `enqueue_many` may take; text or a mapping is one payload and no collection of them."""
    if isinstance(payloads, (str, bytes, bytearray, Mapping)) or not isinstance(payloads, Iterable):
        raise OptionError(
            "payloads",
            payloads,
            "an iterable of payloads, and of NewJobs",
            operation=ENQUEUEING,
            hint="one payload goes to `enqueue`, or into a list",
        )
    return payloads


def plain_row(queue: Queue[Any, Any], payload: Any, index: int | None = None) -> NewRow:
    """Encode one payload without options. As `new_row`, at a third of its price."""
    try:
        return NewRow(queue.name, queue.encode_payload(payload), queue.codec.name)
    except OptionError as exc:
        exc.locate(ENQUEUEING, index)
        raise


def new_row(queue: Queue[Any, Any], job: NewJob[Any], index: int | None = None) -> NewRow:
    """Validate and encode one job; `index` is its place in a call with many.

    Raises:
        OptionError: names the field, its value and the limit; nothing was sent.
    """
    try:
        return _new_row(queue, job)
    except OptionError as exc:
        exc.locate(ENQUEUEING, index)
        raise


def _new_row(queue: Queue[Any, Any], job: NewJob[Any]) -> NewRow:
    if not isinstance(queue, Queue):
        raise OptionError("queue", queue, "a triojobs.Queue")
    if isinstance(job.payload, NewJob):
        raise OptionError("payload", job.payload, "a payload (a NewJob goes into enqueue_many)")
    if job.delay is not None and job.run_at is not None:
        raise OptionError("run_at", job.run_at, "None when delay is given")
    if job.on_conflict not in ("raise", "return", "replace"):
        raise OptionError("on_conflict", job.on_conflict, "'raise', 'return' or 'replace'")
    hold, hold_seconds = _hold(job)
    return NewRow(
        queue=queue.name,
        payload=queue.encode_payload(job.payload),
        encoding=queue.codec.name,
        delay=None if job.delay is None else checked_seconds("delay", job.delay),
        run_at=None if job.run_at is None else checked_time("run_at", job.run_at),
        priority=checked_count("priority", job.priority, least=0),
        max_attempts=checked_count("max_attempts", job.max_attempts),
        timeout=None if job.timeout is None else checked_seconds("timeout", job.timeout, positive=True),
        deadline=None if job.deadline is None else checked_time("deadline", job.deadline),
        key=None if job.key is None else checked_text("key", job.key, least=0, most=KEY_LIMIT),
        hold=hold,
        hold_seconds=hold_seconds,
        metadata=checked_metadata("metadata", job.metadata),
        job_id=None if job.job_id is None else checked_count("job_id", job.job_id, most=2**63 - 1),
        on_conflict=job.on_conflict,
    )


def unknown_job_id(row: NewRow) -> OptionError:
    """Return the error for a job_id that is none of ours."""
    return OptionError("job_id", row.job_id, "an id that new_job_id() handed out", operation=ENQUEUEING)


def job_of_another_queue(row: NewRow, queue: str) -> OptionError:
    """Return the error for a job_id under which another job was enqueued."""
    return OptionError(
        "job_id",
        row.job_id,
        f"an id of a job of queue {row.queue!r}, or one that is not used yet (queue {queue!r} has it)",
        operation=ENQUEUEING,
    )


def _hold(job: NewJob[Any]) -> tuple[str, float | None]:
    if job.key is None and job.key_until != "kept":
        raise OptionError("key_until", job.key_until, "left out when there is no key")
    if isinstance(job.key_until, str):
        if job.key_until not in ("kept", "ended"):
            raise OptionError("key_until", job.key_until, "'kept', 'ended' or seconds")
        return job.key_until, None
    return "until", checked_seconds("key_until", job.key_until)
