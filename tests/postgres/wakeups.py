"""What the tests of wake-ups share: a sleeper that is stopped within its protocol, and producers in halves.

The sleeper is a real worker group that never polls. It goes through its protocol in named stages:
it has claimed nothing; it has committed its mark; it has claimed once more; it sleeps. At each it can
be held. A producer is any transition that makes a job claimable; it is held between its first half
(what comes before the commit of a transaction of the caller's, or the commit of our own) and its
second half (that commit, or the notification).

Nothing here depends on time: notifications arrive in order, so once a later one was heard, the earlier
ones were; and a group whose tasks are all blocked while it has no call in flight sleeps.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import trio
import trio.testing

import triojobs
from tests.contract.contract_rig import Group, row
from tests.tools.gates import PATIENCE, Gate, ThreadGate
from tests.tools.looking import rows, value
from triojobs._bridge import Call
from triojobs._group import GroupContext, with_workers
from triojobs._model import Claim, Outcome
from triojobs._options import GroupOptions
from triojobs._postgres import PostgresStore
from triojobs._store import ClaimOrder, ClaimReply, ListenEvents

STAGES = ("before the mark", "before the second claim", "before the sleep", "asleep")
Q: triojobs.Queue[int, Any] = triojobs.Queue("q", int)
MARKER = "marker"  # a queue of nobody: its notification says that earlier ones have arrived
HOUR = 3600.0


class Ears:
    """Passes on what the listener reports, and remembers it."""

    def __init__(self, store: WatchedStore, events: ListenEvents) -> None:
        self._store = store
        self._events = events

    def listening(self, healthy: bool) -> None:
        self._events.listening(healthy)
        self._store.note("listening" if healthy else "deaf")

    def queue_woken(self, queue: str) -> None:
        if queue != MARKER:
            self._events.queue_woken(queue)
        self._store.note(queue)

    def group_woken(self) -> None:
        self._events.group_woken()


class WatchedStore(PostgresStore):
    """The sleeper's store: stops at the stages, remembers calls, does not beat (so that it rescues nobody)."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(conninfo, schema="triojobs", call_timeout=PATIENCE)
        self.may_listen = trio.Event()
        self.heard: list[str] = []
        self.calls: list[str] = []
        self.next_due_in: float | None = None  # what the last promotion said
        self.errors: dict[str, BaseException] = {}  # raised once in place of the call
        self._gates = {stage: Gate() for stage in STAGES[:-1]}
        self._in_flight = 0
        self._changed = trio.Event()
        self._released: dict[uuid.UUID, trio.Event] = {}

    def note(self, heard: str) -> None:
        """Remember what was heard."""
        self.heard.append(heard)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something was heard or a call has ended, and the condition is true."""
        with trio.fail_after(PATIENCE):
            while not condition():
                await self._changed.wait()

    async def asleep(self) -> None:
        """Wait until the group has nothing left to do."""
        with trio.fail_after(PATIENCE):
            while True:
                await trio.testing.wait_all_tasks_blocked()
                if not self._in_flight:
                    return
                await self._changed.wait()

    async def go_to(self, stage: str) -> None:
        """Let the group go on to this stage, and wait until it is there."""
        for earlier in STAGES[: STAGES.index(stage)]:
            self._gates[earlier].open()
        if stage == "asleep":
            await self.until(lambda: "listening" in self.heard)
            await self.asleep()
        else:
            await self._gates[stage].reached()

    def open_gates(self) -> None:
        """Stop nobody any more."""
        for gate in self._gates.values():
            gate.open()

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        if error := self.errors.pop(name, None):
            raise error
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            self.calls.append(name)
            self._tell()

    async def _stop(self, stage: str) -> None:
        with trio.CancelScope(shield=True):
            await self._gates[stage].pass_through()

    async def claim(
        self, order: ClaimOrder, book: Callable[[Sequence[Claim]], None], **options: Any
    ) -> ClaimReply:
        number = self.calls.count("claim") + 1
        with self._call("claim"):
            reply = await super().claim(order, book, **options)
            if order.promote:
                self.next_due_in = reply.next_due_in
            if self.may_listen.is_set() and number <= 2:
                await self._stop("before the mark" if number == 1 else "before the sleep")
        return reply

    async def mark_waiting(self, group_id: uuid.UUID, queues: Collection[str], waiting: bool) -> None:
        name = "mark" if waiting else "unmark"
        with self._call(name):
            await super().mark_waiting(group_id, queues, waiting)
            if self.calls.count("mark") == 0 and waiting:
                await self._stop("before the second claim")

    async def listen(self, group_id: uuid.UUID, queues: Collection[str], events: ListenEvents) -> None:
        await self.may_listen.wait()
        await super().listen(group_id, [*queues, MARKER], Ears(self, events))

    async def hold_lease(self, registration: Any, *args: Any) -> None:
        await self._released.setdefault(registration.group_id, trio.Event()).wait()

    def release_lease(self, group_id: uuid.UUID) -> None:
        self._released.setdefault(group_id, trio.Event()).set()


class Producer(PostgresStore):
    """Another process, held between a commit of its own and the notification."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(conninfo, schema="triojobs", call_timeout=PATIENCE, job_connections=1)
        self.gate: ThreadGate | None = None

    def notify_later(self, call: Call, queues: Collection[str]) -> None:
        if self.gate is not None:
            call.afterwards(lambda conn: self.gate and self.gate.pass_through())
        super().notify_later(call, queues)


class World:
    """A sleeper, a producer with a rival group of its own, and the gate between the producer's halves."""

    def __init__(self, conninfo: str, store: WatchedStore, producer: Producer) -> None:
        self.conninfo = conninfo
        self.store = store
        self.producer = producer
        self.rival = Group(producer)
        self.claims: list[Claim] = []
        self.gate = ThreadGate()

    async def heard_all(self) -> None:
        """Wait until whatever was notified before has arrived."""
        before = self.store.heard.count(MARKER)
        rows(self.conninfo, f"SELECT pg_notify('triojobs', '{MARKER}')")  # type: ignore[arg-type]
        await self.store.until(lambda: self.store.heard.count(MARKER) > before)

    async def settled(self) -> None:
        """Wait until everything was heard and acted upon."""
        await self.heard_all()
        await self.store.go_to("asleep")

    def left(self) -> int:
        """Return how many jobs of the queue still wait."""
        query = "SELECT count(*) FROM triojobs.ready WHERE queue = 'q'"
        later = "SELECT count(*) FROM triojobs.scheduled WHERE queue = 'q'"
        return value(self.conninfo, f"SELECT ({query}) + ({later})")  # type: ignore[arg-type]

    def marked(self) -> bool:
        """Return whether the sleeper's mark is in the database."""
        return value(self.conninfo, "SELECT count(*) FROM triojobs.waiting WHERE queue = 'q'") == 1


@asynccontextmanager
async def world(
    conninfo: str, *, make_producer: Callable[[str], Producer] = Producer
) -> AsyncIterator[World]:
    """A producer and a sleeper that has not been opened."""
    producer = make_producer(conninfo)
    await producer.open()
    try:
        yield World(conninfo, WatchedStore(conninfo), producer)
    finally:
        with trio.CancelScope(shield=True):
            await producer.aclose()


@asynccontextmanager
async def sleeper(
    w: World,
    handler: Callable[[triojobs.Job[int]], Awaitable[None]] | None = None,
    *,
    concurrency: int = 2,
) -> AsyncIterator[None]:
    """Open the group that never polls; it has claimed and now begins to listen."""

    async def nothing(job: triojobs.Job[int]) -> None: ...

    workers: list[triojobs.Worker[Any, Any]] = [
        triojobs.Worker(Q, handler or nothing, concurrency=concurrency)
    ]
    options = GroupOptions(
        name="sleeper",
        claim_linger=0.0,
        poll_interval=HOUR,
        listening_poll_interval=HOUR,
        rescan_interval=HOUR,
        lease_duration=HOUR,
    )
    async with GroupContext(lambda: w.store, workers, with_workers(options, workers)):
        try:
            await w.store.asleep()
            w.store.calls.clear()
            w.store.may_listen.set()
            yield
        finally:
            w.store.open_gates()
            w.gate.open()


# Producers: `prepare` runs before the sleeper opens, `act` passes `w.gate` between its halves.

Act = Callable[[World], Awaitable[Any]]


class Source:
    """A transition that makes a job claimable."""

    def __init__(self, act: Act, prepare: Act | None = None) -> None:
        self.act = act
        self._prepare = prepare

    async def prepare(self, w: World) -> None:
        await w.rival.register()
        if self._prepare is not None:
            await self._prepare(w)
        w.producer.gate = w.gate


async def enqueue(w: World, **changes: Any) -> None:
    await w.producer.enqueue([row(**changes)])


async def enqueue_each(w: World) -> None:
    await w.producer.enqueue_each([row(1), row(2, key="k")])


async def outbox(w: World, **options: Any) -> None:
    def work() -> None:
        with psycopg.connect(w.conninfo) as conn:
            triojobs.enqueue_on(conn, Q, 1, **options)
            w.gate.pass_through()

    await trio.to_thread.run_sync(work)


async def sql(w: World) -> None:
    def work() -> None:
        with psycopg.connect(w.conninfo) as conn:
            conn.execute("SELECT triojobs.enqueue('q', '1')")
            w.gate.pass_through()

    await trio.to_thread.run_sync(work)


async def commit(w: World) -> None:
    def work(conn: Any) -> None:
        triojobs.enqueue_on(conn, Q, 1)
        w.gate.pass_through()

    await w.producer.commit_work(w.claims[0], work, lambda value: (b"\xf6", "cbor"), lambda: None)


async def claim_elsewhere(w: World) -> None:
    await w.producer.enqueue([row(queue="elsewhere")])
    w.claims = await w.rival.claim(1, "elsewhere")


async def claim_one(w: World) -> None:
    await w.producer.enqueue([row()])
    w.claims = await w.rival.claim(1)


def end(outcome: Outcome, delay: float = 0.0) -> Act:
    async def act(w: World) -> None:
        await w.rival.end(w.claims[0], outcome, delay=delay)

    return act


async def close(w: World) -> None:
    await w.rival.close()


async def compare(w: World) -> None:
    await w.rival.compare()


async def rescue(w: World) -> None:
    rescuer = await Group(w.producer).register()
    rows(w.conninfo, "UPDATE triojobs.worker_groups SET lease_until = now() WHERE id = %s", w.rival.id)
    async with rescuer.beating() as recorder:
        await recorder.wait_for(lambda: recorder.jobs_rescued > 0)


async def two_later(w: World) -> None:
    await w.producer.enqueue([row(1, delay=HOUR), row(2, delay=HOUR)])


async def promote(w: World) -> None:
    rows(w.conninfo, "UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    await w.rival.claim(1, promote=True)


async def one_later(w: World) -> None:
    await w.producer.enqueue([row(key="k", delay=HOUR)])


async def replace(w: World, delay: float | None = None) -> None:
    await w.producer.enqueue([row(key="k", delay=delay, on_conflict="replace")])


OWN_COMMIT: dict[str, Source] = {
    "enqueue": Source(enqueue),
    "shared enqueue": Source(enqueue_each),
    "retry": Source(end(Outcome.FAILED), claim_one),
    "snooze": Source(end(Outcome.SNOOZED), claim_one),
    "release": Source(end(Outcome.RELEASED), claim_one),
    "close": Source(close, claim_one),
    "comparison": Source(compare, claim_one),
    "rescue": Source(rescue, claim_one),
    "promotion": Source(promote, two_later),
    "replacement": Source(replace, one_later),
}
CALLERS_COMMIT: dict[str, Source] = {
    "outbox": Source(outbox),
    "sql function": Source(sql),
    "job.commit": Source(commit, claim_elsewhere),
}
SOURCES = {**OWN_COMMIT, **CALLERS_COMMIT}

SOON = 0.3  # seconds: the job is scheduled, and due while the test looks on
SCHEDULING: dict[str, Source] = {
    "enqueue": Source(lambda w: enqueue(w, delay=SOON)),
    "outbox": Source(lambda w: outbox(w, delay=SOON)),
    "retry": Source(end(Outcome.FAILED, SOON), claim_one),
    "replacement": Source(lambda w: replace(w, SOON), one_later),
}


async def run_through(w: World, source: Source, first: str, second: str, *, hear_first: bool = False) -> None:
    """Have the producer's halves happen at these stages of the sleeper, and let everything come to rest.

    `hear_first`: what the first half has told is heard before the second; else the two may meet.
    """
    finished = trio.Event()

    async def act() -> None:
        await source.act(w)
        finished.set()

    async with trio.open_nursery() as nursery:
        await w.store.go_to(first)
        nursery.start_soon(act)
        await w.gate.reached()
        if hear_first:
            await w.heard_all()
        await w.store.go_to(second)
        w.gate.open()
        with trio.fail_after(PATIENCE):
            await finished.wait()
        await w.settled()


async def wakes_the_sleeper(
    conninfo: str,
    source: Source,
    first: str,
    second: str,
    make_producer: Callable[[str], Producer] = Producer,
    *,
    hear_first: bool = False,
) -> bool:
    """Return whether the sleeper took the job, when the producer's halves happen at these stages."""
    async with world(conninfo, make_producer=make_producer) as w:
        await source.prepare(w)
        async with sleeper(w):
            await run_through(w, source, first, second, hear_first=hear_first)
            return w.left() == 0


async def sets_the_timer(conninfo: str, source: Source, first: str, second: str) -> bool:
    """Return whether the sleeper knows when the job is due, or has taken it already."""
    async with world(conninfo) as w:
        await source.prepare(w)
        async with sleeper(w):
            await run_through(w, source, first, second)
            due = w.store.next_due_in
            return w.left() == 0 or (due is not None and due <= SOON)
