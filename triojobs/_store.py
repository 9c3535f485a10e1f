"""The seam between tasks and database: what a worker group and a client ask of a store.

Two implementations pass the same contract suite: `PostgresStore` and `testing.MemoryStore`.

Cancellation: every coroutine here is "cancelled before it starts, or done": `trio.Cancelled` out of
a call means that it was never started. Nothing is abandoned in flight. Callbacks named `book`,
`missing` and `written` run right after the commit, before anything can be interrupted, possibly in a
thread.

Errors: `DatabaseError` (with `transient` and `committed`), `SchemaError`, and what each names.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ._beacon import Beacon
from ._errors import TriojobsError
from ._lease import Lease
from ._model import (
    CancelRequest,
    Claim,
    Enqueued,
    NewRow,
    RawJob,
    Registration,
    Settled,
    Settlement,
)
from ._positions import Stretch
from ._retention import Pruned, Retention

__all__ = ["BeatEvents", "ClaimOrder", "ClaimReply", "Compared", "ListenEvents", "Store"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """What to claim.

    Attributes:
        wants: most rows per queue (all > 0); none: promote only. promote: first move due rows of `promote` queues from
            `scheduled` to `ready`, at most 1,000. starts: for each queue that is not to be claimed from its head,
            the stretches in which to look, in their order.
    """

    group_id: uuid.UUID
    epoch: int
    claim_no: int
    wants: Mapping[str, int]
    promote: Sequence[str] = ()
    starts: Mapping[str, Sequence[Stretch]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """What a claim gave.

    Attributes:
        got: rows per queue. promoted: rows moved (1,000 means that more may be due).
        next_due_in: seconds until the earliest row left in `scheduled` is due; None: there is none
            or nothing was promoted.
        refused: this group may not claim: it must `compare` first (the epoch is another one, or the
            database may have lost commits), or its registration is over. Nothing was got.
    """

    got: Mapping[str, int]
    promoted: Mapping[str, int]
    next_due_in: float | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison did: the epoch from now on, and how many unknown rows went back."""

    epoch: int
    released: int


class BeatEvents(Protocol):
    """What the beat loop reports; called from its thread, so everything here is thread-safe."""

    def cancel_requests(self, requests: Sequence[CancelRequest]) -> None: ...
    def lease_lost(self) -> None: ...
    def must_compare(self) -> None: ...
    def loop_blocked(self, seconds: float) -> None: ...
    def loop_dead(self, seconds: float) -> None: ...
    def rescued(self, jobs: int) -> None: ...
    def drain_requested(self, reason: str) -> None: ...


class ListenEvents(Protocol):
    """What the listener reports; called on the event loop."""

    def listening(self, healthy: bool) -> None: ...
    def queue_woken(self, queue: str) -> None: ...
    def group_woken(self) -> None: ...


def nothing() -> None:
    """Do nothing."""


class Store(Protocol):
    """The database, as worker groups and clients see it."""

    def now(self) -> float:
        """Return the reading of the monotonic clock that leases are counted on (seconds)."""

    def check_owner(self) -> None:
        """Raise TriojobsError in a forked child, which must not use its parent's connections."""

    async def open(self) -> None:
        """Connect and verify the schema. Raises DatabaseError or SchemaError; leaves nothing behind."""

    async def aclose(self) -> None:
        """Close every connection and thread. Bounded; never raises for a broken connection."""

    def hurry(self, deadline: float) -> None:
        """Have calls end by `deadline` (clock reading): in flight, or begun before it is changed; inf: no more."""

    # The worker group.

    async def register(self, registration: Registration, lease: Lease) -> None:
        """Insert the group's row and confirm the lease."""

    async def hold_lease(
        self, registration: Registration, lease: Lease, beacon: Beacon, events: BeatEvents
    ) -> None:
        """Beat, deliver requests to cancel and to drain, and rescue dead groups, until `release_lease`.

        A store that beats in a thread watches `beacon` there, and gives the lease up when it is dead.
        """

    def beat_now(self, group_id: uuid.UUID) -> None:
        """Ask for a beat at once (it returns the group's cancel requests)."""

    def release_lease(self, group_id: uuid.UUID) -> None:
        """End `hold_lease` of this registration; a beat in flight is waited for there."""

    async def listen(self, group_id: uuid.UUID, queues: Collection[str], events: ListenEvents) -> None:
        """Report wake-ups until cancelled; reconnects by itself."""

    async def claim(
        self,
        order: ClaimOrder,
        book: Callable[[Sequence[Claim]], None],
        *,
        under_way: Callable[[], None] = nothing,
    ) -> ClaimReply:
        """Promote and claim. A DatabaseError with `committed` not False leaves the claim unknown.

        `under_way` is called on the event loop when the claim is on its way, perhaps more than once or,
        when there is no connection, not at all: what it starts does not hold up the claim.
        """

    async def compare(
        self,
        group_id: uuid.UUID,
        known: Callable[[], Sequence[tuple[int, int]]],
        missing: Callable[[Sequence[tuple[int, int]]], None],
    ) -> Compared | None:
        """Make the rows of this group agree with what it knows; from then on it may claim.

        Raises the epoch, so that no earlier claim can commit rows afterwards; releases this group's
        rows that `known` lacks; and tells `missing` which of `known` have neither a lease nor an
        outcome: the database lost them, or a settlement in flight has given them back. `known` and
        `missing` are called as `book` is. No claim is in flight meanwhile.

        Returns None when the registration is closed or gone.
        """

    async def mark_waiting(self, group_id: uuid.UUID, queues: Collection[str], waiting: bool) -> None:
        """Commit that the group sleeps (or no longer sleeps) on these queues."""

    async def settle(
        self,
        group_id: uuid.UUID,
        batch: Sequence[Settlement],
        written: Callable[[Sequence[Settled]], None],
        *,
        deadline: float | None = None,
    ) -> None:
        """Write outcomes, fenced; rows not reported to `written` were stale.

        Safe to repeat after any error. `deadline`: clock reading at which the call is broken off.
        """

    async def close_group(
        self,
        group_id: uuid.UUID,
        written: Callable[[Sequence[Settled]], None],
        *,
        deadline: float | None = None,
    ) -> None:
        """Close the registration and release all its rows, with refund. Safe to repeat."""

    async def commit_work(
        self,
        claim: Claim,
        work: Callable[[Any], T],
        encode: Callable[[T], tuple[bytes, str]] | None,
        committed: Callable[[], None],
    ) -> T:
        """Run `work` in a transaction fenced by the claim.

        With `encode` the claim's outcome `done` is written in it too, and `committed` is called
        right after COMMIT. Cancellable while waiting for a connection and while `work` runs.

        Raises:
            StaleClaimError: the claim has ended; everything was rolled back.
        """

    async def prune(self, retention: Retention) -> Pruned | None:
        """Remove what is older than this says, when it is time. None: it is not, or somebody else's turn.

        Many short calls; cancellable between them.
        """

    async def idle(self, queues: Collection[str], *, scheduled: bool = False) -> bool:
        """Return whether nothing due or running (or `scheduled` for later) is left in these queues, anywhere."""

    # The client.

    async def enqueue(self, rows: Sequence[NewRow], *, deadline: float | None = None) -> list[Enqueued]:
        """Insert jobs in one transaction, then notify.

        Raises:
            DuplicateJobError: a key with on_conflict "raise" is taken; nothing was written.
            OptionError: a job_id was not handed out by `new_job_ids`.
        """

    async def enqueue_each(
        self, rows: Sequence[NewRow], *, deadline: float | None = None
    ) -> list[Enqueued | TriojobsError]:
        """Insert jobs that have nothing to do with each other under shared commits, one answer each."""

    async def new_job_ids(self, count: int) -> list[int]:
        """Reserve ids."""

    async def read_jobs(self, ids: Sequence[int]) -> list[RawJob]:
        """Return the jobs that exist, in no particular order."""

    async def ended(self, ids: Sequence[int]) -> list[int]:
        """Return those ids whose job does not exist, then those whose job has ended, in the order of their ends."""

    async def cancel_job(self, job_id: int, reason: str) -> bool:
        """Cancel a waiting job, or ask for the cancellation of a running one. False: it had ended.

        Raises:
            JobNotFoundError: there is no such job.
        """
