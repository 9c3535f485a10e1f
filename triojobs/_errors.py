"""What can go wrong, and what a handler may raise on purpose.

Every error says "while <doing>: <what happened> (<ids>); <what to do>". `operation` is the
<doing>, `hint` the <what to do>. Signals, which a handler raises to steer its own job, are not
errors and do not end in `Error`.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

__all__ = [
    "CodecError",
    "DatabaseError",
    "DuplicateJobError",
    "GroupNotFoundError",
    "JobCancelledError",
    "JobFailedError",
    "JobNotFoundError",
    "Kill",
    "LeaseLostError",
    "OptionError",
    "RetryAfter",
    "SchemaError",
    "Snooze",
    "StaleClaimError",
    "TriojobsError",
]

SHOWN_VALUE_LIMIT: Final = 120  # characters of a refused value repeated in the message
SHOWN_REASON_LIMIT: Final = 500  # characters of another library's error repeated in ours


def shown(value: object) -> str:
    """Return the repr of any value, cut; a repr that fails or would be huge must not hide the error."""
    if isinstance(value, (str, bytes)):
        value = value[: SHOWN_VALUE_LIMIT + 1]
    try:
        text = repr(value)
    except Exception:  # too deep, too many digits, or the user's own bug
        text = f"<{type(value).__qualname__} that cannot be shown>"
    return cut(text, SHOWN_VALUE_LIMIT)


class Size(int):
    """A number of bytes, as the value of an error."""

    def __repr__(self) -> str:
        return f"{int(self)} bytes"


def reason(exc: BaseException) -> str:
    """Return another library's words on one line, cut."""
    return " ".join(cut(exc).split())


def cut(text: object, limit: int = SHOWN_REASON_LIMIT) -> str:
    """Return a text, cut to `limit` characters with a marker."""
    try:
        text = str(text)
    except Exception:
        text = f"<{type(text).__qualname__} whose text cannot be shown>"
    return text if len(text) <= limit else text[:limit] + "…"


class TriojobsError(Exception):
    """The root of every error that triojobs raises by itself.

    Attributes:
        operation: what was being done, as a present participle ("claiming jobs").
        hint: what the reader can do about it; may be empty.
    """

    def __init__(self, what: str, *, operation: str = "", hint: str = "") -> None:
        self._tell(what, operation=operation, hint=hint)

    def _tell(self, what: str, *, operation: str, hint: str) -> None:
        self.operation = operation
        self.hint = hint
        text = f"while {operation}: {what}" if operation else what
        super().__init__(f"{text}; {hint}" if hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is copied by calling its class with the finished text alone.
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[TriojobsError], args: tuple[Any, ...], state: dict[str, Any]) -> TriojobsError:
    exc = kind.__new__(kind, *args)
    exc.__dict__.update(state)
    return exc


class OptionError(TriojobsError, ValueError):
    """An argument is refused before anything was written.

    Attributes:
        field: the argument's name.
        value: what was given (shown cut to 120 characters); of something too large its size.
        limit: what is allowed, in words.
        index: the position in a call with many items, or None.
    """

    def __init__(self, field: str, value: object, limit: str, *, operation: str = "", hint: str = "") -> None:
        self.field = field
        self.value = value
        self.limit = limit
        self.index: int | None = None
        super().__init__(self._what(), operation=operation, hint=hint)

    def _what(self) -> str:
        item = "" if self.index is None else f" of item {self.index} of the call"
        return f"{self.field}{item} is {shown(self.value)}, but must be {self.limit}"

    def locate(self, operation: str, index: int | None = None) -> None:
        """Say what was being done, and which item of the call is refused."""
        self.index = index if self.index is None else self.index
        self._tell(self._what(), operation=self.operation or operation, hint=self.hint)


class DatabaseError(TriojobsError):
    """The database refused a call, or could not be reached; the psycopg error is `__cause__`.

    Attributes:
        sqlstate: the five-character code that the server sent, or None.
        transient: True when the same call may succeed later.
        committed: whether the call's writes were committed: True, False, or None for unknown
            (the reply was lost).
    """

    def __init__(
        self,
        what: str,
        *,
        operation: str = "",
        hint: str = "",
        sqlstate: str | None = None,
        transient: bool = False,
        committed: bool | None = False,
    ) -> None:
        self.sqlstate = sqlstate
        self.transient = transient
        self.committed = committed
        super().__init__(what, operation=operation, hint=hint)


class SchemaError(DatabaseError):
    """The schema is missing, too old, or too new for this version; the hint names the command."""


class CodecError(TriojobsError):
    """Bytes that are no valid payload, or a value that cannot be encoded or converted."""


class DuplicateJobError(TriojobsError):
    """The key is held by another job.

    Attributes:
        key: the key that was asked for.
        job_id: the job that holds it.
        index: the position in an `enqueue_many` call, or None.
    """

    def __init__(
        self, *, queue: str, key: str, job_id: int, index: int | None = None, operation: str = "enqueueing"
    ) -> None:
        self.queue = queue
        self.key = key
        self.job_id = job_id
        self.index = index
        at = "" if index is None else f" (item {index} of the call)"
        super().__init__(
            f"key {shown(key)} of queue {shown(queue)} is held by job {job_id}{at}; nothing was enqueued",
            operation=operation,
            hint="use try_enqueue with on_conflict='return' or 'replace' if that is expected",
        )


class JobNotFoundError(TriojobsError):
    """No job has this id (it never existed, its enqueue was rolled back, or it was pruned)."""

    def __init__(self, job_id: int, *, operation: str) -> None:
        self.job_id = job_id
        super().__init__(f"there is no job {job_id}", operation=operation, hint="check the id and the schema")


class GroupNotFoundError(TriojobsError):
    """No worker group has this id (it never registered, or was removed long after it closed)."""

    def __init__(self, group_id: uuid.UUID, *, operation: str) -> None:
        self.group_id = group_id
        super().__init__(
            f"there is no worker group {group_id}", operation=operation, hint="list the groups for their ids"
        )


class JobFailedError(TriojobsError):
    """The awaited job was killed: it will not run again.

    Attributes:
        job_id, attempts (made), error (text of the last failure, or the reason of `Kill`).
    """

    def __init__(self, job_id: int, *, attempts: int, error: str | None) -> None:
        self.job_id = job_id
        self.attempts = attempts
        self.error = error
        super().__init__(
            f"job {job_id} was killed after {attempts} attempt(s): {error}", operation="waiting for a result"
        )


class JobCancelledError(TriojobsError):
    """The awaited job was cancelled: it will not run (again).

    Attributes:
        job_id, attempts (made), reason (given to `cancel`).
    """

    def __init__(self, job_id: int, *, attempts: int, reason: str | None) -> None:
        self.job_id = job_id
        self.attempts = attempts
        self.reason = reason
        super().__init__(f"job {job_id} was cancelled: {reason}", operation="waiting for a result")


class StaleClaimError(TriojobsError):
    """The job moved on: this claim no longer owns it, and nothing was written."""

    def __init__(self, job_id: int, *, operation: str) -> None:
        self.job_id = job_id
        super().__init__(
            f"the claim of job {job_id} has ended (rescued or settled elsewhere); nothing was written",
            operation=operation,
        )


class LeaseLostError(TriojobsError):
    """The group's lease was lost and it cannot register again."""


class RetryAfter(Exception):
    """Raised by a handler: this attempt failed; run the job again after `seconds` (finite, >= 0)."""

    def __init__(self, seconds: float, message: str = "") -> None:
        self.seconds: float = checked_seconds("RetryAfter.seconds", seconds)
        super().__init__(message or f"retry after {seconds:g} s")


class Snooze(Exception):
    """Raised by a handler: run the job again after `seconds`; this attempt is not counted."""

    def __init__(self, seconds: float) -> None:
        self.seconds: float = checked_seconds("Snooze.seconds", seconds)
        super().__init__(f"snoozed for {seconds:g} s")


class Kill(Exception):
    """Raised by a handler: the job ends as killed, whatever attempts are left."""

    def __init__(self, reason: str = "killed by its handler") -> None:
        self.reason: str = str(reason)
        super().__init__(self.reason)


MAX_SECONDS: Final = 10 * 366 * 86400.0  # ten years: far beyond any use, well inside timestamptz


def checked_seconds(field: str, value: float, *, least: float = 0.0, positive: bool = False) -> float:
    """Return `value` as float seconds, or raise OptionError unless least <= value <= ten years."""
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    # NaN fails both comparisons, so it is refused here as well.
    if not number or not (least <= value <= MAX_SECONDS) or (positive and value <= 0):
        above = "> 0" if positive else f">= {least:g}"
        raise OptionError(field, value, f"finite seconds {above} and <= {MAX_SECONDS:g}")
    return float(value)


def sole_error(exc: BaseException | None) -> BaseException | None:
    """Return `exc`, or the one leaf of an exception group; None when it has several."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0] if len(exc.exceptions) == 1 else None
    return exc
