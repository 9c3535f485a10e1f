"""Instruments: what telemetry attaches to enqueues, claims, handlers and groups of this process.

None is installed by default, and then a job pays for one look at an empty tuple. They are the
process's and not a group's or a client's: an enqueue inside the caller's own transaction
has nothing that an option could be given to.

What an instrument raises is logged, once for each of its methods, and hurts no job.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ._logs import Log
from ._model import Claim, Enqueued, GroupStatistics, NewRow, Outcome, Settled
from ._options import METADATA_LIMIT

if TYPE_CHECKING:
    from ._group import WorkerGroup
    from ._job import Job

__all__ = [
    "LAG_SECONDS",
    "RUN_SECONDS",
    "GroupTotals",
    "Installed",
    "Instrument",
    "Sending",
    "Watched",
    "by_name",
    "claims_booked",
    "claims_ended",
    "group_closed",
    "group_numbers",
    "group_opened",
    "install",
    "is_watched",
    "loop_was_late",
    "sending",
]

RUN_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Bounds of the histograms of how long handlers run and jobs wait."""

LAG_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Bounds of the histogram of how late the event loop is."""

T = TypeVar("T")
log = Log("triojobs.telemetry")


class Instrument:
    """The base of what watches a process's jobs; each method may stay as it is.

    Methods are called on the event loop or in any thread, must not block, and need not catch what they raise.
    What a `before_…` returns is handed to its `after_…`.
    """

    def before_enqueue(self, queue: str, jobs: int) -> Any:
        """Jobs are about to be enqueued by one call."""

    def metadata(self, token: Any) -> dict[str, str]:
        """Return what shall travel with each of these jobs; a key that the caller gave wins."""
        return {}

    def after_enqueue(
        self, token: Any, queue: str, entries: Sequence[Enqueued], error: BaseException | None
    ) -> None:
        """They were enqueued (in a caller's transaction: written), or the call raised."""

    def before_handler(self, job: Job[Any], waited: float) -> Any:
        """A handler is about to start, in these context variables; its job was due `waited` seconds ago."""

    def after_handler(
        self, token: Any, job: Job[Any], seconds: float, outcome: str | None, error: BaseException | None
    ) -> None:
        """A handler has ended; `outcome` as it will be written, None when the job had moved on before."""

    def removed(self) -> None:
        """Nothing follows."""

    def claimed(self, queue: str, jobs: int) -> None:
        """Jobs of this queue were claimed."""

    def ended(self, queue: str, outcome: Outcome, jobs: int) -> None:
        """The end of this many claims was written."""

    def loop_was_late(self, group: str, seconds: float) -> None:
        """By how much a timer of the event loop was late; measured while jobs are in hand."""


@dataclass(frozen=True, slots=True)
class GroupTotals:
    """Sums over all worker groups of this process, the closed ones included: they never fall."""

    rescued: int = 0
    stale: int = 0
    loop_blocked: int = 0
    events_dropped: int = 0

    def plus(self, numbers: GroupStatistics) -> GroupTotals:
        """Return the sums with one group more."""
        return GroupTotals(*(getattr(self, f.name) + getattr(numbers, f.name) for f in fields(self)))


_installed: tuple[Instrument, ...] = ()
_open_groups: set[WorkerGroup] = set()
_of_closed_groups = GroupTotals()
_failed: set[tuple[int, str]] = set()
_lock: Final = threading.Lock()


class Installed:
    """Telemetry at work; `remove` it, or leave the `with` block."""

    def __init__(self, instrument: Instrument) -> None:
        self._instrument = instrument

    def remove(self) -> None:
        """Take it out again. Idempotent."""
        global _installed
        with _lock:
            found = self._instrument in _installed
            _installed = tuple(each for each in _installed if each is not self._instrument)
        if found:
            self._instrument.removed()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def install(instrument: Instrument) -> Installed:
    """Have an instrument see all that happens in this process from now on."""
    global _installed
    with _lock:
        _installed = (*_installed, instrument)
    return Installed(instrument)


def is_watched() -> bool:
    """Return whether any instrument is installed."""
    return bool(_installed)


def _guarded(method: Callable[..., T], *args: Any) -> T | None:
    try:
        return method(*args)
    except Exception:
        whose = method.__self__ if hasattr(method, "__self__") else method
        name = getattr(method, "__name__", repr(method))
        with _lock:
            known = (id(whose), name) in _failed
            _failed.add((id(whose), name))
        if not known:
            log.exception(
                "%s of %r raised; this is logged once, and jobs go on",
                name,
                whose,
                extra={"event": "instrument_failed", "method": name},
            )
        return None


# Enqueues.


class Sending:
    """One call that enqueues rows of one queue: `with sending(rows) as sent: sent.entries = …(sent.rows)`."""

    __slots__ = ("_begun", "entries", "rows")

    def __init__(self, rows: list[NewRow]) -> None:
        self.rows = rows
        self.entries: Sequence[Enqueued] = ()
        self._begun: list[tuple[Instrument, Any]] = []

    def __enter__(self) -> Sending:
        for instrument in _installed if self.rows else ():
            token = _guarded(instrument.before_enqueue, self.rows[0].queue, len(self.rows))
            self._begun.append((instrument, token))
            added = _guarded(instrument.metadata, token)
            if added:
                self.rows = list(_carrying(self.rows, added))
        return self

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        for instrument, token in reversed(self._begun):
            _guarded(instrument.after_enqueue, token, self.rows[0].queue, self.entries, error)


def sending(rows: list[NewRow]) -> Sending:
    """Return a scope around the call that enqueues these rows; it has them as they shall be sent."""
    return Sending(rows)


def _carrying(rows: Iterable[NewRow], added: dict[str, str]) -> Iterator[NewRow]:
    """Add metadata, where it has room and the caller's own does not say otherwise."""
    alone = _compact(added)
    for row in rows:
        text = alone if row.metadata == "{}" else _compact({**added, **json.loads(row.metadata)})
        yield row._replace(metadata=text) if len(text.encode()) <= METADATA_LIMIT else row


def _compact(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, separators=(",", ":"), ensure_ascii=False)


# Claims and handlers.


class Watched:
    """One handler's run, as the instruments see it."""

    __slots__ = ("_begun", "_job")

    def __init__(self, job: Job[Any], waited: float) -> None:
        self._job = job
        self._begun = [
            (instrument, _guarded(instrument.before_handler, job, waited)) for instrument in _installed
        ]

    def end(self, seconds: float, outcome: Outcome | None, error: BaseException | None) -> None:
        """Tell how it ended."""
        text = None if outcome is None else str(outcome)
        for instrument, token in reversed(self._begun):
            _guarded(instrument.after_handler, token, self._job, seconds, text, error)


def claims_booked(claims: Sequence[Claim]) -> None:
    """Tell of claims, in the thread that made them."""
    if _installed and claims:
        for queue, jobs in Counter(claim.queue for claim in claims).items():
            for instrument in _installed:
                _guarded(instrument.claimed, queue, jobs)


def claims_ended(ended: Iterable[tuple[Claim, Settled]]) -> None:
    """Tell how claims ended, by what was written."""
    if _installed:
        counts = Counter((claim.queue, row.outcome) for claim, row in ended)
        for (queue, outcome), jobs in counts.items():
            for instrument in _installed:
                _guarded(instrument.ended, queue, outcome, jobs)


# Groups.


def loop_was_late(group: str, seconds: float) -> None:
    """Tell how late the event loop was."""
    for instrument in _installed:
        _guarded(instrument.loop_was_late, group, seconds)


def group_opened(group: WorkerGroup) -> None:
    """Remember a group for those who ask for its numbers."""
    with _lock:
        _open_groups.add(group)


def group_closed(group: WorkerGroup) -> None:
    """Forget a group, but not its numbers."""
    global _of_closed_groups
    with _lock:
        _open_groups.discard(group)
        _of_closed_groups = _of_closed_groups.plus(group.statistics())


def group_numbers() -> tuple[GroupTotals, list[tuple[str, GroupStatistics]]]:
    """Return the sums over all groups, and the open ones' names and numbers. Threads: any."""
    with _lock:
        numbers = [(group.name, group.statistics()) for group in _open_groups]
        totals = _of_closed_groups
    for _, each in numbers:
        totals = totals.plus(each)
    return totals, sorted(numbers, key=lambda pair: pair[0])


def by_name(groups: Iterable[tuple[str, GroupStatistics]], field: str) -> dict[str, float]:
    """Return one number of these groups by their names; of several with one name the sum, of ages the greatest."""
    found: dict[str, float] = {}
    for group, numbers in groups:
        value, known = float(getattr(numbers, field)), found.get(group, 0.0)
        found[group] = max(value, known) if field == "lease_age" else value + known
    return found
