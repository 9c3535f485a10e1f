"""Claims and settlements as exchanges on the event loop: no threads, and what may go wrong there."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from forms import plain

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, places, rows, until, value
from tests.tools.mutants import Patch, code, noticed
from triojobs._bridge import Breaker, Line
from triojobs._lease import Lease
from triojobs._ledger import Ledger
from triojobs._model import Claim, Outcome, Registration, Settled, Settlement
from triojobs._postgres import PostgresStore
from triojobs._registration import LiveRegistration
from triojobs._store import ClaimOrder

BIG = "x" * 900_000  # what no socket takes at once


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that took a thread since the last `clear`."""
    operations: list[str] = []
    call = Line.call

    def noted(line: Line, operation: str, *args: Any, **options: Any) -> Any:
        operations.append(operation)
        return call(line, operation, *args, **options)

    monkeypatch.setattr(Line, "call", noted)
    return operations


class Group:
    """A registration at a store, with connections that are open, and a ledger of its own."""

    def __init__(self, store: PostgresStore) -> None:
        self.store = store
        self.id = uuid.uuid4()
        self.ledger = Ledger()
        self.written: list[Settled] = []
        self._claim_no = 0

    async def claim(self, count: int) -> list[Claim]:
        self._claim_no += 1
        order = ClaimOrder(self.id, 1, self._claim_no, {plain.name: count})
        await self.store.claim(order, self.ledger.book)
        return self.ledger.take_booked()

    async def settle(self, batch: list[Settlement]) -> None:
        await self.store.settle(self.id, batch, self.written.extend)


@asynccontextmanager
async def group_at(conninfo: str, *, call_timeout: float = 10.0) -> AsyncIterator[Group]:
    """Register a group at a store of its own, whose connections are open: what a worker has after its first claim."""
    store = PostgresStore(conninfo, schema="triojobs", call_timeout=call_timeout)
    await store.open()
    try:
        group = Group(store)
        lease = Lease(duration=3600.0, margin=1.0, interval=1000.0)
        await store.register(Registration(group.id, "test", "here", 0, "", lease.duration), lease)
        assert await group.claim(1) == []
        await group.settle([Settlement(0, 0, Outcome.RELEASED)])
        yield group
    finally:
        await store.aclose()


def done(claim: Claim, result: bytes = b"\xf6") -> Settlement:
    return Settlement(claim.job_id, claim.claim_no, Outcome.DONE, result=result, encoding="cbor")


async def test_claims_and_settlements_take_no_thread(conninfo: str, threads: list[str]) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        ids = await client.enqueue_many(plain, [1, 2, 3])
        threads.clear()
        claims = await group.claim(2)
        assert [claim.job_id for claim in claims] == ids[:2]
        await group.settle([done(claim) for claim in claims])
        assert threads == []
    assert group.written == [Settled(job_id, 2, Outcome.DONE) for job_id in ids[:2]]
    assert places(conninfo) | {"jobs": 3} == places(conninfo)
    assert rows(conninfo, "SELECT job_id, status FROM triojobs.outcomes ORDER BY no") == [
        (job_id, "done") for job_id in ids[:2]
    ]


async def test_what_is_not_done_goes_by_a_thread(conninfo: str, threads: list[str]) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        await client.enqueue_many(plain, [1, 2])
        one, two = await group.claim(2)
        threads.clear()
        await group.settle([done(one), Settlement(two.job_id, two.claim_no, Outcome.RELEASED)])
        assert threads == ["settling 2 job(s)"]
    assert {(s.job_id, s.outcome) for s in group.written} == {
        (one.job_id, Outcome.DONE),
        (two.job_id, Outcome.RELEASED),
    }


async def test_of_a_batch_with_a_stale_claim_the_others_are_written_and_said(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        await client.enqueue_many(plain, [1, 2, 3])
        one, two, three = await group.claim(3)
        rows(conninfo, "DELETE FROM triojobs.leases WHERE id = %s RETURNING id", two.job_id)
        await group.settle([done(claim) for claim in (one, two, three)])
    assert sorted(s.job_id for s in group.written) == [one.job_id, three.job_id]
    assert value(conninfo, "SELECT array_agg(job_id ORDER BY job_id) FROM triojobs.outcomes") == [
        one.job_id,
        three.job_id,
    ]


async def test_a_settlement_that_is_repeated_says_the_same_and_writes_nothing(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        await client.enqueue_many(plain, [1, 2])
        batch = [done(claim) for claim in await group.claim(2)]
        await group.settle(batch)
        first = group.written.copy()
        await group.settle(batch)
        assert sorted(group.written[len(first) :]) == sorted(first)
    assert value(conninfo, "SELECT count(*) FROM triojobs.outcomes") == 2


async def test_results_that_differ_are_each_jobs_own(conninfo: str) -> None:
    results = {1: b"\x01", 2: b"\x02", 3: b""}
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        await client.enqueue_many(plain, list(results))
        claims = await group.claim(3)
        expected = {claim.job_id: results[n] for n, claim in enumerate(claims, 1)}
        # In no order: the statement is what brings them into that of their ids.
        await group.settle([done(claim, expected[claim.job_id]) for claim in reversed(claims)])
    found = rows(conninfo, "SELECT job_id, result, encoding FROM triojobs.outcomes")
    assert {job_id: bytes(result) for job_id, result, _ in found} == expected
    assert {encoding for *_, encoding in found} == {"cbor"}


async def test_names_that_need_quoting_arrive(conninfo: str) -> None:
    odd: triojobs.Queue[Any, Any] = triojobs.Queue('a "b\\c", {d}\nNULL')
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        job_id = await client.enqueue(odd, 1)
        order = ClaimOrder(group.id, 1, 99, {"NULL": 1, odd.name: 1})
        reply = await group.store.claim(order, group.ledger.book)
        assert reply.got == {"NULL": 0, odd.name: 1}
    (claim,) = group.ledger.take_booked()
    assert (claim.job_id, claim.queue) == (job_id, odd.name)


async def test_in_a_cancelled_scope_nothing_is_claimed(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        await client.enqueue(plain, 1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await group.claim(1)
        assert scope.cancelled_caught
    assert value(conninfo, "SELECT count(*) FROM triojobs.leases") == 0


async def test_what_was_claimed_is_booked_however_late_the_cancel_comes(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo) as group:
        await client.enqueue(plain, 1)
        with trio.CancelScope() as scope, locked(conninfo, "LOCK TABLE triojobs.ready") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group.claim, 1)
                await blocked(conninfo, "claim")
                scope.cancel()
                gate.rollback()
        assert value(conninfo, "SELECT count(*) FROM triojobs.leases") == group.ledger.held == 1


PATIENCE = {"seconds": 20.0}  # for what takes two; only a mutant needs them


def within(true: Callable[[], bool]) -> bool:
    """Block the event loop until it is true."""
    end = time.monotonic() + PATIENCE["seconds"]
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


async def test_while_the_loop_is_blocked_an_answer_that_does_not_fit_holds_its_locks_for_a_bounded_time(
    conninfo: str,
) -> None:
    errors: list[triojobs.DatabaseError] = []
    async with triojobs.open_client(conninfo) as client, group_at(conninfo, call_timeout=0.5) as group:
        await client.enqueue_many(plain, [BIG] * 4)

        async def claim() -> None:
            try:
                await group.claim(4)
            except triojobs.DatabaseError as exc:
                errors.append(exc)

        writing = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
        free = "SELECT count(*) = 4 FROM (SELECT FROM triojobs.ready FOR UPDATE SKIP LOCKED) r"
        with locked(conninfo, "LOCK TABLE triojobs.ready") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(claim)
                await blocked(conninfo, "claim")
                gate.rollback()
                assert within(lambda: bool(value(conninfo, writing)))
                assert not value(conninfo, free)
                assert within(lambda: bool(value(conninfo, free)))
        assert [error.committed for error in errors] == [None]
        assert group.ledger.held == 0
        assert len(await group.claim(4)) == 4


async def test_an_answer_that_is_read_late_is_booked(conninfo: str, caplog: pytest.LogCaptureFixture) -> None:
    async with triojobs.open_client(conninfo) as client, group_at(conninfo, call_timeout=0.5) as group:
        await client.enqueue_many(plain, [1, 2])
        with locked(conninfo, "LOCK TABLE triojobs.ready") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group.claim, 2)
                await blocked(conninfo, "claim")
                gate.rollback()
                assert within(lambda: "answer_unread" in [getattr(r, "event", "") for r in caplog.records])
        assert group.ledger.held == 2
        await group.settle([done(claim) for claim in group.ledger.claims().values()])
        assert await group.claim(1) == []


async def test_from_the_sending_of_a_claim_on_the_loop_must_turn(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it took, nobody else can know: a loop that is blocked meanwhile is told of, and given up in time."""

    async def handler(job: triojobs.Job[Any]) -> None: ...

    worker = triojobs.Worker(plain, handler)
    async with triojobs.open_worker_group(
        conninfo, [worker], listening_poll_interval=0.1, beat_interval=0.5
    ) as group:
        await until(conninfo, "SELECT count(*) FROM triojobs.waiting WHERE group_id = %s", group.group_id)
        with locked(conninfo, "LOCK TABLE triojobs.ready"):
            await blocked(conninfo, "claim")
            assert group.statistics().running == 0
            assert within(lambda: "loop_blocked" in [getattr(r, "event", "") for r in caplog.records])


async def test_a_lost_reply_to_a_claim_is_found_and_given_back(conninfo: str) -> None:
    """As with a thread: the claim is compared, and the job runs, its attempt not charged."""
    ran: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        ran.append(job.attempt)

    with fault_proxy(conninfo) as (proxy, through):
        worker = triojobs.Worker(plain, handler)
        async with triojobs.open_worker_group(
            through, [worker], poll_interval=0.1, beat_interval=0.3
        ) as group:
            await group.client.enqueue(plain, 1)
            await group.wait_idle()
            lost = proxy.lose_reply(b'INSERT INTO "triojobs".leases')
            await group.client.enqueue(plain, 2)
            await trio.to_thread.run_sync(lost.answered.wait)
            await until(conninfo, "SELECT count(*) = 2 FROM triojobs.outcomes")
    assert ran == [1, 1]


# They are sharp.

MUTANTS: dict[str, tuple[Patch, Callable[..., Any]]] = {
    "an answer that is not read is waited for": (
        code(Breaker, "_break", ("if unread and now < call.unread_until:", "if unread:")),
        test_while_the_loop_is_blocked_an_answer_that_does_not_fit_holds_its_locks_for_a_bounded_time,
    ),
    "nothing is booked": (
        code(Line, "_exchange", ("on_commit(result)", "...")),
        test_what_was_claimed_is_booked_however_late_the_cancel_comes,
    ),
    "a claim is cancelled on its way": (
        code(Line, "exchange", ("trio.CancelScope(shield=True)", "trio.CancelScope()")),
        test_what_was_claimed_is_booked_however_late_the_cancel_comes,
    ),
    "nobody looks whether the loop turns while a claim is under way": (
        code(LiveRegistration, "claim_is_sent", ("self.beacon.light()", "...")),
        test_from_the_sending_of_a_claim_on_the_loop_must_turn,
    ),
    "a settlement counts as written when a part of it is": (
        code(PostgresStore, "_settle_now", ("if found:", "if True:"), ("return bool(found)", "return True")),
        test_of_a_batch_with_a_stale_claim_the_others_are_written_and_said,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mutant_is_noticed(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mutant: str
) -> None:
    monkeypatch.setitem(PATIENCE, "seconds", 4.0)
    change, test = MUTANTS[mutant]
    change(monkeypatch)
    await noticed(test, conninfo=conninfo, caplog=caplog)
