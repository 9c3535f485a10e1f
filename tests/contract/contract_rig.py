"""What the contract tests share: a database of either kind, stores on it, and a group that claims.

Nothing here sleeps to bring two actors into an order. `World.until` waits for a point in time where
time itself is under test (a due job, a lease that ended).
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, LiteralString, Protocol

import psycopg
import trio

from triojobs._beacon import Beacon
from triojobs._lease import Lease
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._model import (
    CancelRequest,
    Claim,
    Enqueued,
    NewRow,
    Outcome,
    RawJob,
    Registration,
    Settled,
    Settlement,
)
from triojobs._postgres import PostgresStore
from triojobs._queue import Queue
from triojobs._sql import notify, pausing
from triojobs._store import ClaimOrder, ClaimReply, Compared, Store

NUMBERS: Queue[int, Any] = Queue("numbers", int)

UNCLAIM: LiteralString = """
WITH lost AS (DELETE FROM triojobs.leases WHERE id = ANY (%s) RETURNING *)
INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT id, queue, priority, run_at, attempt - 1, max_attempts FROM lost
"""


class World(Protocol):
    """One database and the stores on it."""

    def make_store(self) -> Store: ...

    def crash(self, *lost: Claim) -> None:
        """Come back from a crash in which the claims `lost` were not yet durable."""

    def now(self) -> dt.datetime: ...

    def pause(self, queue: str) -> None: ...

    def resume(self, queue: str) -> None: ...

    def drain(self, group_id: uuid.UUID, reason: str) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self.database = MemoryDatabase()

    def make_store(self) -> Store:
        return MemoryStore(self.database)

    def crash(self, *lost: Claim) -> None:
        tables = self.database.tables
        kept = tables.snapshot()
        for claim in lost:
            lease = kept["leases"].pop(claim.job_id)
            kept["ready"][claim.job_id] = lease.waiting(lease.attempt - 1)
        self.database.crash(kept)

    def now(self) -> dt.datetime:
        return self.database.utc_now()

    def pause(self, queue: str) -> None:
        self.database.pause(queue)

    def resume(self, queue: str) -> None:
        self.database.resume(queue)

    def drain(self, group_id: uuid.UUID, reason: str) -> None:
        self.database.drain(group_id, reason)


class PostgresWorld:
    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo

    def make_store(self) -> Store:
        return PostgresStore(self.conninfo, schema="triojobs", call_timeout=20.0, job_connections=2)

    def crash(self, *lost: Claim) -> None:
        # What the rows are after a crash; a real one takes a server of its own and seconds.
        with psycopg.connect(self.conninfo) as conn:
            conn.execute(UNCLAIM, [[claim.job_id for claim in lost]])
            conn.execute("TRUNCATE triojobs.waiting, triojobs.witnesses")

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC)

    def pause(self, queue: str) -> None:
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            pausing.pause(conn, "triojobs", queue, "a test")

    def resume(self, queue: str) -> None:
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            pausing.resume(conn, "triojobs", queue)
            notify.notify_waiting(conn, "triojobs", [queue])

    def drain(self, group_id: uuid.UUID, reason: str) -> None:
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            pausing.drain(conn, "triojobs", group_id, reason)
            notify.notify_group(conn, group_id)


def row(number: int = 0, *, queue: str = "q", **changes: Any) -> NewRow:
    """Return a job to enqueue; `number` is its payload."""
    return NewRow(queue=queue, payload=NUMBERS.encode_payload(number), encoding="cbor", **changes)


def number_of(claim: Claim | RawJob) -> int:
    assert claim.payload is not None
    return NUMBERS.decode_payload(claim.payload, "cbor")


class Recorder:
    """BeatEvents and ListenEvents that remember, and let a task wait for what they heard."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._changed = trio.Event()
        self.requests: list[CancelRequest] = []
        self.lost = 0
        self.doubts = 0
        self.jobs_rescued = 0
        self.drains: list[str] = []
        self.heard: list[str] = []

    def cancel_requests(self, requests: Sequence[CancelRequest]) -> None:
        self._token.run_sync_soon(self._note, lambda: self.requests.extend(requests))

    def lease_lost(self) -> None:
        self._token.run_sync_soon(self._note, lambda: setattr(self, "lost", self.lost + 1))

    def must_compare(self) -> None:
        self._token.run_sync_soon(self._note, lambda: setattr(self, "doubts", self.doubts + 1))

    def loop_blocked(self, seconds: float) -> None: ...

    def loop_dead(self, seconds: float) -> None: ...

    def rescued(self, jobs: int) -> None:
        self._token.run_sync_soon(self._note, lambda: setattr(self, "jobs_rescued", self.jobs_rescued + jobs))

    def drain_requested(self, reason: str) -> None:
        self._token.run_sync_soon(self._note, lambda: self.drains.append(reason))

    def listening(self, healthy: bool) -> None:
        self._note(lambda: self.heard.append("listening" if healthy else "deaf"))

    def queue_woken(self, queue: str) -> None:
        self._note(lambda: self.heard.append(queue))

    def group_woken(self) -> None:
        self._note(lambda: self.heard.append("group"))

    def _note(self, do: Callable[[], Any]) -> None:
        do()
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


class Group:
    """A registration that claims and settles by hand."""

    def __init__(self, store: Store, *, lease_duration: float = 60.0) -> None:
        self.store = store
        self.id = uuid.uuid4()
        self.epoch = 1
        self.claim_no = 0
        self.registration = Registration(self.id, "group", "host", 1, "0", lease_duration)
        self.lease = Lease(duration=lease_duration, margin=lease_duration / 6, interval=lease_duration / 5)
        self.reply: ClaimReply

    async def register(self) -> Group:
        await self.store.register(self.registration, self.lease)
        return self

    async def claim(self, wants: int = 100, *queues: str, promote: bool = False) -> list[Claim]:
        """Claim with the next number; `reply` is what the store said."""
        self.claim_no += 1
        names = queues or ("q",)
        booked: list[Claim] = []
        order = ClaimOrder(
            group_id=self.id,
            epoch=self.epoch,
            claim_no=self.claim_no,
            wants=dict.fromkeys(names, wants),
            promote=names if promote else (),
        )
        self.reply = await self.store.claim(order, booked.extend)
        assert sum(self.reply.got.values()) == len(booked)
        return booked

    async def claim_one(self) -> Claim:
        [claim] = await self.claim()
        return claim

    async def settle(self, *ends: Settlement) -> list[Settled]:
        written: list[Settled] = []
        await self.store.settle(self.id, ends, written.extend)
        return written

    async def end(self, claim: Claim, outcome: Outcome, **changes: Any) -> Outcome | None:
        """Settle one claim; None: it was stale."""
        written = await self.settle(Settlement(claim.job_id, claim.claim_no, outcome, **changes))
        assert [(s.job_id, s.claim_no) for s in written] in ([], [(claim.job_id, claim.claim_no)])
        return written[0].outcome if written else None

    async def compare(self, *known: Claim) -> tuple[Compared | None, list[tuple[int, int]]]:
        """Compare as a ledger that knows these claims; return what the store did and what it missed."""
        missed: list[tuple[int, int]] = []
        found = await self.store.compare(
            self.id, lambda: [(claim.job_id, claim.claim_no) for claim in known], missed.extend
        )
        if found is not None:
            self.epoch = found.epoch
        return found, missed

    async def close(self) -> list[Settled]:
        written: list[Settled] = []
        await self.store.close_group(self.id, written.extend)
        return sorted(written, key=lambda s: s.job_id)

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[Recorder]:
        """Run the beat loop (and with it the rescue of others) while the block runs."""
        recorder = Recorder()

        async def hold() -> None:
            with trio.CancelScope(shield=True):
                await self.store.hold_lease(self.registration, self.lease, Beacon(), recorder)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            try:
                yield recorder
            finally:
                self.store.release_lease(self.id)

    @asynccontextmanager
    async def listening(self, *queues: str) -> AsyncIterator[Recorder]:
        """Listen while the block runs."""
        recorder = Recorder()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.listen, self.id, queues or ("q",), recorder)
            await recorder.wait_for(lambda: recorder.heard == ["listening"])
            recorder.heard.clear()
            yield recorder
            nursery.cancel_scope.cancel()


async def enqueue(store: Store, *rows: NewRow) -> list[int]:
    """Enqueue in one call; return the ids."""
    return [answer.id for answer in await store.enqueue(rows)]


async def enqueue_one(store: Store, **changes: Any) -> Enqueued:
    [answer] = await store.enqueue([row(**changes)])
    return answer


async def read(store: Store, job_id: int) -> RawJob:
    [found] = await store.read_jobs([job_id])
    return found


async def status(store: Store, job_id: int) -> str:
    return (await read(store, job_id)).status
