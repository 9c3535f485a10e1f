"""Options with their defaults, units, ranges and reasons; values that contradict each other cannot exist."""

from __future__ import annotations

import datetime as dt
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from ._errors import OptionError, checked_seconds
from ._middleware import Middleware
from ._model import HardStop

if TYPE_CHECKING:
    from ._retention import Retention

__all__ = [
    "DEFAULT_SCHEMA",
    "GroupOptions",
    "checked_conninfo",
    "checked_count",
    "checked_metadata",
    "checked_name",
    "checked_schema",
    "checked_text",
    "checked_time",
]

DEFAULT_SCHEMA: Final = "triojobs"
QUEUE_NAME_LIMIT: Final = 255  # bytes; also keeps it inside a notify payload
KEY_LIMIT: Final = 1024  # bytes; a btree entry must stay below a third of a page
METADATA_LIMIT: Final = 8 * 1024  # bytes of compact JSON; it travels with every claim
PAYLOAD_LIMIT: Final = 1024 * 1024  # bytes; larger things belong in a store of their own, by reference
ERROR_LIMIT: Final = 8 * 1024  # bytes of UTF-8; the head of a traceback's text is what people read
HARD_STOP_AFTER: Final = 60.0  # seconds
INT_LIMIT: Final = 2**31 - 1
# Times that survive every session's time zone on their way back from PostgreSQL.
YEARS: Final = range(1900, 9000)
# jsonb cannot hold NUL. JSON writes it as an escape, whose backslash is not itself escaped.
NUL_IN_JSON: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def checked_text(field: str, value: object, *, least: int, most: int) -> str:
    """Return `value` if it is a str of `least` to `most` UTF-8 bytes without NUL, else raise OptionError."""
    limit = f"a str of {least} to {most} bytes in UTF-8 without NUL"
    if not isinstance(value, str) or "\0" in value:
        raise OptionError(field, value, limit)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:  # lone surrogates
        raise OptionError(field, value, limit) from None
    if not least <= size <= most:
        raise OptionError(field, value, f"{limit} (it has {size})")
    return value


def checked_name(field: str, value: object) -> str:
    """Return a queue's or group's name: 1 to 255 bytes."""
    return checked_text(field, value, least=1, most=QUEUE_NAME_LIMIT)


def checked_count(field: str, value: object, *, least: int = 1, most: int = INT_LIMIT) -> int:
    """Return `value` if it is an int (not a bool) from `least` to `most`, else raise OptionError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise OptionError(field, value, f"an int from {least} to {most}")
    return value


def checked_conninfo(field: str, value: object) -> str:
    """Return a conninfo, or raise OptionError that does not show it: it may contain a password."""
    if not isinstance(value, str) or "\0" in value:
        raise OptionError(field, "…", "a libpq connection string or URI (str without NUL)")
    return value


def checked_schema(value: object) -> str:
    """Return a schema name that needs no quoting, else raise OptionError."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z_][a-z0-9_]{0,39}", value):
        raise OptionError("schema", value, "1 to 40 of a-z, 0-9 and _, not starting with a digit")
    return value


def checked_time(field: str, value: object) -> dt.datetime:
    """Return an aware datetime as UTC, in years that every session can show, else raise OptionError."""
    if not isinstance(value, dt.datetime) or value.tzinfo is None or value.utcoffset() is None:
        raise OptionError(field, value, "an aware datetime (with a time zone)")
    try:
        utc = value.astimezone(dt.UTC)
    except OverflowError:
        utc = None
    if utc is None or utc.year not in YEARS:
        raise OptionError(field, value, f"in the years {YEARS[0]} to {YEARS[-1]}")
    return utc


def checked_metadata(field: str, value: Mapping[str, Any] | None) -> str:
    """Return a mapping as compact JSON text of at most 8 KiB (None: an empty object), else raise OptionError."""
    if not value and (value is None or isinstance(value, Mapping)):
        return "{}"
    limit = f"a mapping of str to JSON values, at most {METADATA_LIMIT} bytes of compact JSON, without NUL"
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise OptionError(field, value, limit)
    try:
        text = json.dumps(dict(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as exc:
        raise OptionError(field, value, f"{limit} ({exc})") from exc
    if size > METADATA_LIMIT or NUL_IN_JSON.search(text):
        raise OptionError(field, value, f"{limit} (it has {size} bytes)")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """How a worker group behaves. All durations are seconds; see `open_worker_group` for use.

    Attributes:
        grace_period: how long handlers may go on after a stop before they are cancelled (>= 0).
        close_timeout: how long writing the last outcomes and giving rows back may take (> 0); whatever is
            in flight then, connects as well, ends with it.
        call_timeout: how long one call to the database may take before it is broken off (> 0), with
            connecting, to however many hosts. A call that is broken off has ended a second later.
        lease_duration: how long after its last beat a dead group keeps its jobs (> lease_margin).
            Longer survives longer stalls, shorter brings jobs of a dead process back sooner.
        lease_margin: how long before the end of the lease handlers are cancelled (> 0).
        beat_interval: time between beats; at least two must fit into lease_duration - lease_margin.
        loop_dead_after: how long the event loop may be blocked while it holds jobs before the beats,
            which do not need it, stop and others get the jobs (>= lease_duration; inf: never). None: 10
            times lease_duration: a block of minutes is a mistake that people want to survive, one that
            never ends must not keep jobs for ever.
        hard_stop: called when a handler has not ended `hard_stop_after` seconds after it was cancelled
            (whatever cancelled it), and when the event loop is dead (see loop_dead_after); None: it is
            waited for. It gets a `HardStop`, may be called in another thread than the event loop's,
            and need not return: `lambda why: os._exit(70)` leaves the jobs to rescue. What it
            raises is logged.
        hard_stop_after: see hard_stop (> 0). None: 60, which is longer than any clean-up should take.
        poll_interval: longest time that a due job waits when no notification can arrive (> 0).
        listening_poll_interval: the same while LISTEN is healthy: the price of a lost notification.
        rescan_interval: how long a job that became visible out of order may be overlooked (> 0), because claims go
            on from the last position; where a walk from the head takes more than a quarter of it, four times that.
        claim_linger: while fewer than half of the slots are free, how long a claim may wait for
            more of them, so that short jobs share claims (>= 0).
        notify: whether to LISTEN and to notify at all.
        pooled: declare that conninfo leads to PgBouncer in transaction mode.
        job_connections: connections for Job.commit and transact; None: min(concurrency, 4).
        concurrency: cap of the sum of the workers' slots, shared fairly; None: no cap.
        retention: how long ended jobs are kept, see `Retention`; None: this group does not prune. Whole
            ranges are dropped by a role that owns the tables; without it jobs are deleted one by one.
        middleware: runs around every handler, the first one outermost; see `Middleware`.
        isolation: "slot" runs a worker's jobs one after another in N tasks (fast);
            "task" starts a task for each job.
    """

    name: str
    schema: str = DEFAULT_SCHEMA
    grace_period: float = 10.0
    close_timeout: float = 5.0
    call_timeout: float = 4.0
    lease_duration: float = 30.0
    lease_margin: float = 5.0
    beat_interval: float = 6.0
    loop_dead_after: float | None = None
    hard_stop: Callable[[HardStop], object] | None = None
    hard_stop_after: float | None = None
    poll_interval: float = 1.0
    listening_poll_interval: float = 5.0
    rescan_interval: float = 1.0
    claim_linger: float = 0.005
    listen_conninfo: str | None = None
    notify: bool = True
    pooled: bool = False
    job_connections: int | None = None
    concurrency: int | None = None
    isolation: Literal["slot", "task"] = "slot"
    retention: Retention | None = None
    middleware: tuple[Middleware, ...] = ()

    def __post_init__(self) -> None:
        checked_name("name", self.name)
        checked_schema(self.schema)
        for field in ("grace_period", "claim_linger"):
            # An infinite grace period is a legitimate wish: wait for handlers, whatever it takes.
            if field != "grace_period" or self.grace_period != math.inf:
                checked_seconds(field, getattr(self, field))
        for field in (
            "close_timeout",
            "call_timeout",
            "lease_duration",
            "lease_margin",
            "beat_interval",
            "poll_interval",
            "listening_poll_interval",
            "rescan_interval",
        ):
            checked_seconds(field, getattr(self, field), positive=True)
        usable = self.lease_duration - self.lease_margin
        if usable <= 0:
            raise OptionError(
                "lease_margin", self.lease_margin, f"less than lease_duration ({self.lease_duration:g})"
            )
        if self.beat_interval > usable / 2:
            raise OptionError(
                "beat_interval",
                self.beat_interval,
                f"at most half of lease_duration - lease_margin ({usable / 2:g}), "
                "so that one lost beat does not cost the lease",
            )
        if self.loop_dead_after is not None and self.loop_dead_after != math.inf:
            checked_seconds("loop_dead_after", self.loop_dead_after, least=self.lease_duration)
        self._check_hard_stop()
        if self.job_connections is not None:
            checked_count("job_connections", self.job_connections, most=1000)
        if self.concurrency is not None:
            checked_count("concurrency", self.concurrency, most=1_000_000)
        if self.isolation not in ("slot", "task"):
            raise OptionError("isolation", self.isolation, "'slot' or 'task'")
        for field in ("notify", "pooled"):
            if not isinstance(getattr(self, field), bool):
                raise OptionError(field, getattr(self, field), "True or False")

    @property
    def exit_bound(self) -> float:
        """Longest time that leaving the group takes, given handlers that obey cancellation."""
        return self.grace_period + self.close_timeout + self.call_timeout + 1.0

    def _check_hard_stop(self) -> None:
        if self.hard_stop is not None and (
            not callable(self.hard_stop) or inspect.iscoroutinefunction(self.hard_stop)
        ):
            raise OptionError("hard_stop", self.hard_stop, "a synchronous function of one HardStop, or None")
        if self.hard_stop_after is not None:
            checked_seconds("hard_stop_after", self.hard_stop_after, positive=True)
            if self.hard_stop is None:
                raise OptionError("hard_stop_after", self.hard_stop_after, "None, as there is no hard_stop")

    @property
    def hard_stop_patience(self) -> float:
        """Seconds from a handler's cancellation to `hard_stop`; inf without one."""
        if self.hard_stop is None:
            return math.inf
        return HARD_STOP_AFTER if self.hard_stop_after is None else self.hard_stop_after

    @property
    def loop_death(self) -> float:
        """`loop_dead_after` with its default filled in."""
        return 10 * self.lease_duration if self.loop_dead_after is None else self.loop_dead_after
