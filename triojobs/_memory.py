"""MemoryStore: the Store protocol without a database, for tests. No threads, and any clock of Trio.

Two stores on one `MemoryDatabase` see each other's jobs as two processes do. What happens in
PostgreSQL in one transaction happens here in one synchronous function, which crosses through one
seam: `crossing` takes its time before and after as a thread would, `fault` breaks it.

Time is `trio.current_time()`, so a MockClock moves leases, retries and delays. Its zero is called
2000-01-01 UTC: `run_at` and `deadline` given as datetimes are compared on that scale (`MemoryDatabase.at`
and `MemoryDatabase.utc_now` make them).
"""

from __future__ import annotations

import datetime as dt
import math
import random as random_module
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

import outcome
import trio

from ._backoff import reconnect_delay
from ._beacon import Beacon
from ._errors import DatabaseError, StaleClaimError, TriojobsError
from ._lease import Lease, rescue_interval
from ._logs import Log
from ._memory_retention import prune
from ._memory_tables import EPOCH, OutcomeRow, Snapshot, Tables
from ._model import (
    Claim,
    Enqueued,
    JobStatus,
    NewRow,
    Outcome,
    RawJob,
    Registration,
    Settled,
    Settlement,
)
from ._retention import Pruned, Retention
from ._store import BeatEvents, ClaimOrder, ClaimReply, Compared, ListenEvents, nothing
from ._wake import Wake

__all__ = ["Crossing", "Fault", "MemoryDatabase", "MemoryStore", "MemoryTransaction"]

T = TypeVar("T")
log = Log("triojobs.memory")

CLIENT_CALLS: Final = 2  # at once, as PostgresStore has connections for clients


class Crossing(Protocol):
    """How a call crosses: checkpoint (cancellable), shielded time, `fn()`, shielded time, its value.

    Like `trio.to_thread.run_sync(fn, abandon_on_cancel=False)`: Cancelled out of it means that `fn`
    was not called. `operation` is the name of the store's method (or beat, rescue, connect_listener,
    outcome_of_claim).
    """

    async def __call__(self, operation: str, fn: Callable[[], T], /) -> T: ...


Fault = Callable[[str, Literal["before", "after"]], None]
"""`fault(operation, when)` may raise in place of the database.

"before": the transaction did not happen (raise DatabaseError with committed=False). "after": it was
committed and the reply is lost (committed=None): the call's callbacks are not called.
"""


async def cross(operation: str, fn: Callable[[], T], /) -> T:
    """Cross in the least number of steps."""
    await trio.lowlevel.checkpoint()
    result = outcome.capture(fn)
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result.unwrap()


def no_fault(operation: str, when: Literal["before", "after"]) -> None:
    """Let everything succeed."""


class Subscriber:
    """One listening group: what arrived for it and was not delivered yet."""

    def __init__(self, group_id: uuid.UUID, queues: Collection[str]) -> None:
        self._group_id = group_id
        self._queues = frozenset(queues)
        self._inbox: deque[str | None] = deque()
        self._wake = Wake()
        self.broken = False

    def notify(self, queue: str) -> None:
        if queue in self._queues:
            self._inbox.append(queue)
            self._wake.set()

    def notify_group(self, group_id: uuid.UUID) -> None:
        if group_id == self._group_id:
            self._inbox.append(None)
            self._wake.set()

    def break_off(self) -> None:
        self.broken = True
        self._wake.set()

    async def deliver(self, events: ListenEvents) -> None:
        """Deliver until broken off."""
        while not self.broken:
            while self._inbox:
                queue = self._inbox.popleft()
                if queue is None:
                    events.group_woken()
                else:
                    events.queue_woken(queue)
            await self._wake.wait()


class MemoryDatabase:
    """What the stores of one test share: the tables and who listens.

    Args:
        epoch: what the zero of Trio's clock is called as a datetime.

    Attributes:
        writes: what `Job.commit` and `Job.transact` have appended to their transaction's `writes`.
    """

    def __init__(self, *, epoch: dt.datetime = EPOCH) -> None:
        self.clock: Callable[[], float] = trio.current_time
        self.tables: Tables = Tables(epoch)
        self.writes: list[Any] = []
        self.subscribers: list[Subscriber] = []

    def at(self, seconds: float) -> dt.datetime:
        """Return a reading of the clock as a datetime."""
        return self.tables.at(seconds)

    def utc_now(self) -> dt.datetime:
        """Return the present as a datetime."""
        return self.at(self.clock())

    def status_of(self, job_id: int) -> JobStatus:
        """Return the job's status; KeyError: there is no such job."""
        return self.tables.status(job_id)

    def outcomes_of(self, job_id: int) -> list[OutcomeRow]:
        """Return the job's ended attempts, oldest first."""
        return list(self.tables.outcomes.get(job_id, ()))

    def rows_running(self, group_id: uuid.UUID) -> list[int]:
        """Return the ids of the jobs that run under this registration."""
        return sorted(row.id for row in self.tables.leases.values() if row.group_id == group_id)

    def make_up(self, row: NewRow, *, attempt: int, last_error: str) -> int:
        """Enqueue a job whose attempts before `attempt` have failed; return its id."""
        now, tables = self.clock(), self.tables
        job_id = tables.enqueue([row], now)[0].id
        maker = Registration(uuid.uuid4(), "made up", "nowhere", 0, "0", lease_duration=1.0)
        tables.register(maker, now)
        for claim_no in range(1, attempt):
            tables.lease(job_id, maker.group_id, claim_no, now)
            failed = Settlement(job_id, claim_no, Outcome.FAILED, error=last_error)
            tables.settle(maker.group_id, [failed], now)
            tables.promote([row.queue], now)
        tables.close_group(maker.group_id, now)
        return job_id

    def retire(self, group_id: uuid.UUID) -> int:
        """Do what a rescuer does to a group whose lease has ended; return the number of its jobs."""
        jobs, queues = self.tables.rescue([group_id], self.clock())
        self.notify_waiting(queues)
        return jobs

    def pause(self, queue: str) -> None:
        """Let nobody claim from this queue."""
        self.tables.paused.add(queue)

    def resume(self, queue: str) -> None:
        """Let everybody claim from this queue again, and wake who waits for it."""
        self.tables.paused.discard(queue)
        self.notify_waiting([queue])

    def drain(self, group_id: uuid.UUID, reason: str) -> None:
        """Ask a group to stop claiming, finish what it runs, and close."""
        self.tables.drains.setdefault(group_id, reason)
        self.notify_group(group_id)

    def check_invariants(self) -> None:
        """Raise AssertionError unless each job is in one place, attempts are exact, claims ended once."""
        self.tables.check_invariants()

    def snapshot(self) -> Snapshot:
        """Return what is committed now, for `crash`."""
        return self.tables.snapshot()

    def crash(self, kept: Snapshot) -> None:
        """Crash and come back at once, without what was committed after `kept` was taken.

        As PostgreSQL does with asynchronous commits, or a standby with asynchronous replication: the
        tables go back to `kept`, unlogged ones are empty, listeners lose their connections.
        """
        self.tables.crash(kept)
        self.break_listeners()

    def break_listeners(self) -> None:
        """Cut every listener's connection; each connects again by itself."""
        for subscriber in self.subscribers:
            subscriber.break_off()

    def notify_waiting(self, queues: Collection[str]) -> None:
        """Wake who listens, for those queues on which a living group sleeps."""
        self.notify(self.tables.awaited(queues, self.clock()))

    def notify(self, queues: Collection[str]) -> None:
        """Wake who listens for these queues."""
        for queue in sorted(queues):
            for subscriber in self.subscribers:
                subscriber.notify(queue)

    def notify_group(self, group_id: uuid.UUID) -> None:
        """Tell a group to look at its cancel requests."""
        for subscriber in self.subscribers:
            subscriber.notify_group(group_id)


class MemoryTransaction:
    """What `Job.commit(work)` and `Job.transact(work)` lend to `work` in place of a connection.

    `triojobs.enqueue_on` accepts it. All is undone unless the transaction commits.

    Attributes:
        writes: a place for the handler's own writes; appended to `MemoryDatabase.writes` by the commit.
    """

    def __init__(self, database: MemoryDatabase) -> None:
        self.writes: list[Any] = []
        self.queues: set[str] = set()
        self._database = database

    def enqueue_rows(self, rows: Sequence[NewRow]) -> list[Enqueued]:
        """Enqueue inside this transaction; what fails undoes this call alone."""
        answers = self._database.tables.enqueue(rows, self._database.clock())
        self.queues.update(row.queue for row in rows)
        return answers


class MemoryStore:
    """Jobs in memory.

    Args:
        database: shared with other stores; default: one of its own.
        crossing: how calls take their time. fault: what goes wrong. See `Crossing` and `Fault`.
        job_connections: `commit_work` calls at once.
        random: returns a float in [0, 1): when to rescue, how long to wait for a reconnect.
    """

    def __init__(
        self,
        database: MemoryDatabase | None = None,
        *,
        crossing: Crossing = cross,
        fault: Fault = no_fault,
        job_connections: int = 4,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self.database: MemoryDatabase = MemoryDatabase() if database is None else database
        self._tables = self.database.tables
        self._crossing = crossing
        self._fault = fault
        self._random = random
        self._beats: dict[uuid.UUID, BeatControl] = {}
        self._claim_line = trio.CapacityLimiter(1)
        self._settle_line = trio.CapacityLimiter(1)
        self._client_line = trio.CapacityLimiter(CLIENT_CALLS)
        self._job_line = trio.CapacityLimiter(job_connections)
        self._listen_line = trio.CapacityLimiter(1)

    async def _call(
        self,
        operation: str,
        line: trio.CapacityLimiter,
        effect: Callable[[], T],
        reply: Callable[[T], None] | None = None,
        *,
        deadline: float | None = None,
    ) -> T:
        """Cross, have the effect, and, unless its reply is lost, call `reply` in the same instant."""

        def fn() -> T:
            if deadline is not None and self.now() >= deadline:
                raise DatabaseError("there is no time left", operation=operation, transient=True)
            self._fault(operation, "before")
            value = effect()
            self._fault(operation, "after")
            if reply is not None:
                reply(value)
            return value

        async with line:
            return await self._crossing(operation, fn)

    def now(self) -> float:
        return self.database.clock()

    def check_owner(self) -> None:
        """Memory is copied by a fork, not shared: nothing to refuse."""

    async def open(self) -> None:
        await self._call("open", self._client_line, lambda: None)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def hurry(self, deadline: float) -> None:
        """Nothing in flight here lasts."""

    # Inspection, see MemoryDatabase.

    def status_of(self, job_id: int) -> JobStatus:
        """Return the job's status; KeyError: there is no such job."""
        return self.database.status_of(job_id)

    def outcomes_of(self, job_id: int) -> list[OutcomeRow]:
        """Return the job's ended attempts, oldest first."""
        return self.database.outcomes_of(job_id)

    def rows_running(self, group_id: uuid.UUID) -> list[int]:
        """Return the ids of the jobs that run under this registration."""
        return self.database.rows_running(group_id)

    def retire(self, group_id: uuid.UUID) -> int:
        """Do what a rescuer does to a group whose lease has ended; return the number of its jobs."""
        return self.database.retire(group_id)

    def check_invariants(self) -> None:
        """Raise AssertionError unless each job is in one place, attempts are exact, claims ended once."""
        self.database.check_invariants()

    # The worker group.

    async def register(self, registration: Registration, lease: Lease) -> None:
        def effect() -> float:
            sent = self.now()
            self._tables.register(registration, sent)
            return sent

        await self._call("register", self._claim_line, effect, lease.confirm)

    async def hold_lease(
        self, registration: Registration, lease: Lease, beacon: Beacon, events: BeatEvents
    ) -> None:
        # No thread: when the event loop does not turn, nobody is left to look at the beacon.
        group_id = registration.group_id
        control = self._beats.setdefault(group_id, BeatControl())
        line = trio.CapacityLimiter(1)
        interval = rescue_interval(registration.lease_duration)
        next_rescue = self.now()  # the first round is at once: a restart after a crash wants its jobs
        try:
            await trio.lowlevel.checkpoint()
            while not control.stopped:
                await control.wait_until(min(lease.next_beat(self.now()), next_rescue))
                if control.stopped or not await self._beat(line, group_id, lease, control, events):
                    return
                if self.now() >= next_rescue:
                    next_rescue = self.now() + interval * (0.5 + 0.5 * self._random())
                    await self._rescue(line, events)
        finally:
            del self._beats[group_id]

    async def _beat(
        self,
        line: trio.CapacityLimiter,
        group_id: uuid.UUID,
        lease: Lease,
        control: BeatControl,
        events: BeatEvents,
    ) -> bool:
        sent = self.now()
        try:
            found = await self._call("beat", line, lambda: self._tables.beat(group_id, self.now()))
        except DatabaseError as exc:
            lease.fail()
            log.warning("%s", exc, extra={"event": "beat_failed", "sqlstate": exc.sqlstate})
            return True
        if found is None:
            if not control.stopped:  # once closing has begun, a closed row is no news
                lease.lose()
                events.lease_lost()
            return False
        lease.confirm(sent)
        requests, witnessed = found
        if not witnessed:
            events.must_compare()
        if requests:
            events.cancel_requests(requests)
        if (reason := self._tables.drains.get(group_id)) is not None:
            events.drain_requested(reason)
        return True

    async def _rescue(self, line: trio.CapacityLimiter, events: BeatEvents) -> None:
        def effect() -> tuple[int, set[str]]:
            now = self.now()
            return self._tables.rescue(self._tables.lapsed(now), now)

        def reply(found: tuple[int, set[str]]) -> None:
            jobs, queues = found
            self.database.notify_waiting(queues)
            if jobs:
                events.rescued(jobs)

        try:
            await self._call("rescue", line, effect, reply)
        except DatabaseError as exc:
            log.warning("%s", exc, extra={"event": "service_failed"})

    def beat_now(self, group_id: uuid.UUID) -> None:
        if control := self._beats.get(group_id):
            control.poke()

    def release_lease(self, group_id: uuid.UUID) -> None:
        self._beats.setdefault(group_id, BeatControl()).stop()

    async def listen(self, group_id: uuid.UUID, queues: Collection[str], events: ListenEvents) -> None:
        failures = 0
        while True:
            try:
                await self._listen_once(Subscriber(group_id, queues), events)
                failures = 1
            except DatabaseError as exc:
                failures += 1
                log.warning("cannot listen: %s", exc, extra={"event": "listen_failed"})
            await trio.sleep(reconnect_delay(failures, self._random))

    async def _listen_once(self, subscriber: Subscriber, events: ListenEvents) -> None:
        """Connect and deliver until the connection breaks."""
        subscribers = self.database.subscribers
        try:
            await self._call("connect_listener", self._listen_line, lambda: subscribers.append(subscriber))
            try:
                events.listening(True)
                await subscriber.deliver(events)
            finally:
                events.listening(False)
        finally:
            if subscriber in subscribers:
                subscribers.remove(subscriber)

    async def claim(
        self,
        order: ClaimOrder,
        book: Callable[[Sequence[Claim]], None],
        *,
        under_way: Callable[[], None] = nothing,
    ) -> ClaimReply:
        def effect() -> tuple[ClaimReply, list[Claim]]:
            now = self.now()
            promoted, due = self._tables.promote(order.promote, now) if order.promote else ({}, None)
            claims = self._tables.claim(order, now)
            got = dict.fromkeys(order.wants, 0)
            for claimed in claims:
                got[claimed.queue] += 1
            may_claim = not order.wants or self._tables.may_claim(order.group_id, order.epoch)
            refused = not claims and not may_claim
            return ClaimReply(got, promoted, due, refused=refused), claims

        def reply(value: tuple[ClaimReply, list[Claim]]) -> None:
            answer, claims = value
            book(claims)
            more = {q for q, n in answer.promoted.items() if n > answer.got.get(q, 0)}
            self.database.notify_waiting(more)

        under_way()
        return (await self._call("claim", self._claim_line, effect, reply))[0]

    async def compare(
        self,
        group_id: uuid.UUID,
        known: Callable[[], Sequence[tuple[int, int]]],
        missing: Callable[[Sequence[tuple[int, int]]], None],
    ) -> Compared | None:
        def effect() -> tuple[int, list[tuple[int, int]], int, set[str]] | None:
            return self._tables.compare(group_id, known, self.now())

        def reply(found: tuple[int, list[tuple[int, int]], int, set[str]] | None) -> None:
            if found is not None:
                missing(found[1])
                self.database.notify_waiting(found[3])

        found = await self._call("compare", self._claim_line, effect, reply)
        return None if found is None else Compared(epoch=found[0], released=found[2])

    async def mark_waiting(self, group_id: uuid.UUID, queues: Collection[str], waiting: bool) -> None:
        marks = {(queue, group_id) for queue in queues}

        def effect() -> None:
            if waiting:
                self._tables.waiting |= marks
            else:
                self._tables.waiting -= marks

        await self._call("mark_waiting", self._claim_line, effect)

    async def settle(
        self,
        group_id: uuid.UUID,
        batch: Sequence[Settlement],
        written: Callable[[Sequence[Settled]], None],
        *,
        deadline: float | None = None,
    ) -> None:
        def reply(found: tuple[list[Settled], set[str]]) -> None:
            written(found[0])
            self.database.notify_waiting(found[1])

        await self._call(
            "settle",
            self._settle_line,
            lambda: self._tables.settle(group_id, batch, self.now()),
            reply,
            deadline=deadline,
        )

    async def close_group(
        self,
        group_id: uuid.UUID,
        written: Callable[[Sequence[Settled]], None],
        *,
        deadline: float | None = None,
    ) -> None:
        def reply(found: tuple[list[Settled], set[str]]) -> None:
            written(found[0])
            self.database.notify_waiting(found[1])

        await self._call(
            "close_group",
            self._settle_line,
            lambda: self._tables.close_group(group_id, self.now()),
            reply,
            deadline=deadline,
        )

    async def commit_work(
        self,
        claim: Claim,
        work: Callable[[Any], T],
        encode: Callable[[T], tuple[bytes, str]] | None,
        committed: Callable[[], None],
    ) -> T:
        values: list[T] = []

        def effect() -> None:
            transaction = MemoryTransaction(self.database)
            with self._tables.transaction():
                value = work(transaction)
                values.append(value)
                result = None if encode is None else encode(value)
                self._end_claim(claim, result)
            self.database.writes += transaction.writes
            # We do not own the commit, so the hint is part of it.
            self.database.notify(transaction.queues)

        def reply(_: None) -> None:
            if encode is not None:
                committed()

        try:
            await self._call("commit_work", self._job_line, effect, reply)
        except DatabaseError as exc:
            if exc.committed is not None or encode is None:
                raise
            await self._resolve(claim, committed, exc)
        return values[0]

    def _end_claim(self, claim: Claim, result: tuple[bytes, str] | None) -> None:
        """Check the fence, last; with `result` end the claim as done."""
        if self._tables.fenced(claim.group_id, claim.job_id, claim.claim_no) is None:
            raise StaleClaimError(claim.job_id, operation="committing")
        if result is not None:
            data, encoding = result
            done = Settlement(claim.job_id, claim.claim_no, Outcome.DONE, result=data, encoding=encoding)
            self._tables.settle(claim.group_id, [done], self.now())

    async def _resolve(self, claim: Claim, committed: Callable[[], None], exc: DatabaseError) -> None:
        """Find out whether a commit whose reply was lost has happened; raise unless it has."""

        def reply(status: str | None) -> None:
            if status == "done":
                committed()

        with trio.CancelScope(shield=True):
            status = await self._call(
                "outcome_of_claim",
                self._job_line,
                lambda: self._tables.outcome_of_claim(claim.group_id, claim.job_id, claim.claim_no),
                reply,
            )
        if status is None:
            exc.committed = False
            raise exc
        if status != "done":
            raise StaleClaimError(claim.job_id, operation="committing") from exc

    async def idle(self, queues: Collection[str], *, scheduled: bool = False) -> bool:
        until = math.inf if scheduled else self.now()
        return await self._call("idle", self._client_line, lambda: self._tables.idle(queues, until))

    # The client.

    async def enqueue(self, rows: Sequence[NewRow], *, deadline: float | None = None) -> list[Enqueued]:
        return await self._call(
            "enqueue",
            self._client_line,
            lambda: self._tables.enqueue(rows, self.now()),
            lambda _: self.database.notify_waiting({row.queue for row in rows}),
            deadline=deadline,
        )

    async def enqueue_each(
        self, rows: Sequence[NewRow], *, deadline: float | None = None
    ) -> list[Enqueued | TriojobsError]:
        def alone(row: NewRow) -> Enqueued | TriojobsError:
            try:
                return self._tables.enqueue([row], self.now())[0]
            except TriojobsError as exc:
                return exc

        try:
            return await self._call(
                "enqueue_each",
                self._client_line,
                lambda: [alone(row) for row in rows],
                lambda _: self.database.notify_waiting({row.queue for row in rows}),
                deadline=deadline,
            )
        except DatabaseError as exc:
            return [exc] * len(rows)

    async def new_job_ids(self, count: int) -> list[int]:
        return await self._call("new_job_ids", self._client_line, lambda: self._tables.new_job_ids(count))

    async def read_jobs(self, ids: Sequence[int]) -> list[RawJob]:
        def effect() -> list[RawJob]:
            found = (self._tables.read(job_id) for job_id in sorted(set(ids)))
            return [job for job in found if job is not None]

        return await self._call("read_jobs", self._client_line, effect)

    async def ended(self, ids: Sequence[int]) -> list[int]:
        return await self._call("ended", self._client_line, lambda: self._tables.ended(ids))

    async def prune(self, retention: Retention) -> Pruned | None:
        return await self._call(
            "prune", self._client_line, lambda: prune(self._tables, retention, self.now())
        )

    async def cancel_job(self, job_id: int, reason: str) -> bool:
        def reply(found: tuple[bool, uuid.UUID | None]) -> None:
            if found[1] is not None:
                self.database.notify_group(found[1])

        cancelled, _ = await self._call(
            "cancel_job",
            self._client_line,
            lambda: self._tables.cancel(job_id, reason, self.now()),
            reply,
        )
        return cancelled


class BeatControl:
    """How the rest of the program talks to a beat loop."""

    def __init__(self) -> None:
        self._wake = Wake()
        self.stopped = False

    def poke(self) -> None:
        """Have a beat at once."""
        self._wake.set()

    def stop(self) -> None:
        """End the loop after the call in flight."""
        self.stopped = True
        self._wake.set()

    async def wait_until(self, deadline: float) -> None:
        """Wait until poked or stopped, or until the clock reads `deadline`."""
        if not self.stopped:
            await self._wake.wait_until(deadline)
