"""What MemoryStore has beyond the contract: its seams, its clock, and the eyes of a test."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import outcome
import pytest
import trio
import trio.testing

import triojobs
from triojobs._beacon import Beacon
from triojobs._lease import Lease
from triojobs._memory import MemoryDatabase, MemoryStore, MemoryTransaction
from triojobs._model import Claim, JobStatus, NewRow, Outcome, Registration, Settled, Settlement
from triojobs._store import ClaimOrder, Compared

T = TypeVar("T")
ROW = NewRow("q", b"\0", "cbor", max_attempts=2)


class Faulty:
    """Fails one operation, once, before or after its effect."""

    def __init__(self, operation: str, when: str) -> None:
        self._wanted = (operation, when)
        self.seen: list[tuple[str, str]] = []

    def __call__(self, operation: str, when: str) -> None:
        first = (operation, when) not in self.seen
        self.seen.append((operation, when))
        if (operation, when) == self._wanted and first:
            committed = False if when == "before" else None
            raise triojobs.DatabaseError("injected", transient=True, committed=committed)


async def register(store: MemoryStore, *, lease_duration: float = 30.0) -> Registration:
    registration = Registration(uuid.uuid4(), "g", "h", 1, "0", lease_duration)
    await store.register(registration, lease_of(registration))
    return registration


def lease_of(registration: Registration) -> Lease:
    duration = registration.lease_duration
    return Lease(duration=duration, margin=duration / 6, interval=duration / 5)


async def claim(store: MemoryStore, group_id: uuid.UUID, claim_no: int, *, epoch: int = 1) -> list[Claim]:
    booked: list[Claim] = []
    await store.claim(ClaimOrder(group_id, epoch, claim_no, {"q": 10}), booked.extend)
    return booked


class Events:
    """BeatEvents that count."""

    def __init__(self) -> None:
        self.lost = trio.Event()
        self.jobs = 0

    def cancel_requests(self, requests: Any) -> None: ...

    def lease_lost(self) -> None:
        self.lost.set()

    def must_compare(self) -> None: ...

    def loop_blocked(self, seconds: float) -> None: ...

    def loop_dead(self, seconds: float) -> None: ...

    def rescued(self, jobs: int) -> None:
        self.jobs += jobs

    def drain_requested(self, reason: str) -> None: ...


# Seams.


async def test_a_call_that_is_refused_has_no_effect() -> None:
    store = MemoryStore(fault=Faulty("enqueue", "before"))
    with pytest.raises(triojobs.DatabaseError) as caught:
        await store.enqueue([ROW])
    assert caught.value.committed is False
    assert store.database.tables.jobs == {}


async def test_a_claim_whose_reply_is_lost_is_nobodys_until_it_is_swept() -> None:
    store = MemoryStore(fault=Faulty("claim", "after"))
    group_id = (await register(store)).group_id
    [job] = await store.enqueue([ROW])
    booked: list[Claim] = []
    with pytest.raises(triojobs.DatabaseError) as caught:
        await store.claim(ClaimOrder(group_id, 1, 1, {"q": 1}), booked.extend)
    assert caught.value.committed is None
    assert booked == []
    assert store.rows_running(group_id) == [job.id]
    assert await store.compare(group_id, list, lambda missing: None) == Compared(epoch=2, released=1)
    assert store.rows_running(group_id) == []
    assert await claim(store, group_id, 2) == []  # the old epoch
    [again] = await claim(store, group_id, 3, epoch=2)
    assert again.attempt == 1
    store.check_invariants()


async def test_a_settlement_whose_reply_is_lost_is_found_by_its_repetition() -> None:
    store = MemoryStore(fault=Faulty("settle", "after"))
    group_id = (await register(store)).group_id
    [job] = await store.enqueue([ROW])
    await claim(store, group_id, 1)
    written: list[Settled] = []
    done = Settlement(job.id, 1, Outcome.DONE)
    with pytest.raises(triojobs.DatabaseError):
        await store.settle(group_id, [done], written.extend)
    assert written == []
    await store.settle(group_id, [done], written.extend)
    assert written == [Settled(job.id, 1, Outcome.DONE)]
    assert len(store.outcomes_of(job.id)) == 1


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_commit_of_unknown_fate_is_resolved_by_its_outcome(when: str) -> None:
    faulty = Faulty("commit_work", when)
    store = MemoryStore(fault=faulty)
    group_id = (await register(store)).group_id
    [job] = await store.enqueue([ROW])
    [one] = await claim(store, group_id, 1)
    commits: list[int] = []

    def work(transaction: MemoryTransaction) -> int:
        transaction.writes.append("mine")
        return 5

    async def commit() -> int:
        return await store.commit_work(one, work, lambda value: (b"\5", "cbor"), lambda: commits.append(1))

    if when == "before":
        with pytest.raises(triojobs.DatabaseError):
            await commit()
        assert (commits, store.database.writes, store.status_of(job.id)) == ([], [], JobStatus.RUNNING)
    else:
        assert await commit() == 5
        assert ("outcome_of_claim", "before") in faulty.seen
        assert (commits, store.database.writes, store.status_of(job.id)) == ([1], ["mine"], JobStatus.DONE)


async def test_the_crossing_hears_which_operation_crosses_and_takes_its_time() -> None:
    seen: list[str] = []

    async def crossing(operation: str, fn: Callable[[], T], /) -> T:
        seen.append(operation)
        await trio.lowlevel.checkpoint()
        result = outcome.capture(fn)
        for _ in range(3):
            await trio.lowlevel.cancel_shielded_checkpoint()
        return result.unwrap()

    store = MemoryStore(crossing=crossing)
    await store.open()
    await store.enqueue([ROW])
    await store.new_job_ids(1)
    assert seen == ["open", "enqueue", "new_job_ids"]


async def test_calls_of_one_line_wait_for_each_other_and_the_wait_is_cancellable() -> None:
    release = trio.Event()
    inside: list[str] = []

    async def crossing(operation: str, fn: Callable[[], T], /) -> T:
        inside.append(operation)
        with trio.CancelScope(shield=True):
            await release.wait()
        return fn()

    store = MemoryStore(crossing=crossing)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.compare, uuid.uuid4(), list, list)
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                nursery.start_soon(trio.testing.wait_all_tasks_blocked)
                scope.cancel()
                await store.mark_waiting(uuid.uuid4(), ["q"], True)
            assert scope.cancelled_caught
            nursery.start_soon(store.enqueue, [ROW])  # another line
            await trio.testing.wait_all_tasks_blocked()
            assert inside == ["compare", "enqueue"]
            release.set()
    assert store.database.tables.waiting == set()


async def test_a_call_without_time_left_is_broken_off() -> None:
    store = MemoryStore()
    with pytest.raises(triojobs.DatabaseError) as caught:
        await store.enqueue([ROW], deadline=store.now())
    assert (caught.value.transient, caught.value.committed) == (True, False)


# Time.


async def test_a_mock_clock_moves_delays(autojump_clock: trio.testing.MockClock) -> None:
    store = MemoryStore()
    group_id = (await register(store)).group_id
    await store.enqueue([ROW._replace(delay=3600.0)])
    order = ClaimOrder(group_id, 1, 1, {"q": 1}, promote=["q"])
    reply = await store.claim(order, lambda claims: None)
    assert reply.next_due_in == 3600.0
    await trio.sleep(3600.0)
    reply = await store.claim(replace(order, claim_no=2), lambda claims: None)
    assert (reply.got, reply.promoted) == ({"q": 1}, {"q": 1})


async def test_times_are_told_on_a_fixed_calendar(autojump_clock: trio.testing.MockClock) -> None:
    store = MemoryStore()
    noon = dt.datetime(2000, 1, 1, 12, tzinfo=dt.UTC)
    [job] = await store.enqueue([ROW._replace(run_at=noon)])
    assert store.database.utc_now() == store.database.at(0.0) == dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
    await trio.sleep(12 * 3600.0)
    assert store.database.utc_now() == noon
    [raw] = await store.read_jobs([job.id])
    assert raw.run_at == noon


async def test_beats_keep_a_lease_that_a_silent_group_loses(autojump_clock: trio.testing.MockClock) -> None:
    store = MemoryStore()
    living, silent = await register(store), await register(store)
    await store.enqueue([ROW])
    await claim(store, silent.group_id, 1)
    events = Events()
    lease = lease_of(living)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.hold_lease, living, lease, Beacon(), events)
        await trio.sleep(29.0)
        assert events.jobs == 0
        await trio.sleep(7.0)  # the lease of 30 s, and a round of rescue
        assert events.jobs == 1
        assert lease.provable(store.now())
        store.retire(living.group_id)
        await events.lost.wait()
    assert lease.lost
    store.check_invariants()


async def test_failed_beats_are_repeated_soon(autojump_clock: trio.testing.MockClock) -> None:
    failing = True

    def fault(operation: str, when: str) -> None:
        if failing and operation in ("beat", "rescue") and when == "before":
            raise triojobs.DatabaseError("away", transient=True)

    store = MemoryStore(fault=fault)
    registration = await register(store)
    lease = lease_of(registration)
    lease.confirm(store.now())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.hold_lease, registration, lease, Beacon(), Events())
        await trio.sleep(20.0)
        assert lease.until == 25.0  # still the first one
        failing = False
        await trio.sleep(2.0)
        assert lease.until >= 45.0
        store.release_lease(registration.group_id)


async def test_broken_listeners_connect_again(autojump_clock: trio.testing.MockClock) -> None:
    store = MemoryStore()
    group_id = (await register(store)).group_id
    heard: list[str] = []

    class Listen:
        def listening(self, healthy: bool) -> None:
            heard.append("listening" if healthy else "deaf")

        def queue_woken(self, queue: str) -> None:
            heard.append(queue)

        def group_woken(self) -> None: ...

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.listen, group_id, ["q"], Listen())
        await store.mark_waiting(group_id, ["q"], True)
        await trio.sleep(1.0)
        store.database.break_listeners()
        await store.enqueue([ROW])
        await trio.sleep(10.0)
        await store.enqueue([ROW])
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    assert heard[:3] == ["listening", "deaf", "listening"]
    assert heard[3:] == ["q", "deaf"]  # what was told in between is lost, as it is in PostgreSQL


# The eyes of a test.


async def test_retiring_a_group_puts_its_jobs_back_as_failed_attempts() -> None:
    store = MemoryStore()
    group_id = (await register(store)).group_id
    [job] = await store.enqueue([ROW])
    await claim(store, group_id, 1)
    assert store.retire(group_id) == 1
    assert store.status_of(job.id) is JobStatus.FAILED
    assert [(o.status, o.attempt, o.claim_no) for o in store.outcomes_of(job.id)] == [("failed", 1, 1)]
    assert await claim(store, group_id, 2) == []
    store.check_invariants()


async def test_two_stores_share_a_database() -> None:
    database = MemoryDatabase()
    [job] = await MemoryStore(database).enqueue([ROW])
    assert MemoryStore(database).status_of(job.id) is JobStatus.PENDING


def lose(store: MemoryStore) -> None:
    store.database.tables.leases.clear()


def duplicate(store: MemoryStore) -> None:
    tables = store.database.tables
    [lease] = tables.leases.values()
    tables.ready[lease.id] = lease.waiting(0)


def miscount(store: MemoryStore) -> None:
    tables = store.database.tables
    [lease] = tables.leases.values()
    tables.leases[lease.id] = replace(lease, attempt=2)


def forget_refund(store: MemoryStore) -> None:
    tables = store.database.tables
    [lease] = tables.leases.values()
    del tables.leases[lease.id]
    tables.ready[lease.id] = lease.waiting(lease.attempt)


def orphan(store: MemoryStore) -> None:
    tables = store.database.tables
    [group] = tables.groups.values()
    tables.groups[group.registration.group_id] = replace(group, closed_at=0.0)


def drop_body(store: MemoryStore) -> None:
    store.database.tables.jobs.clear()


@pytest.mark.parametrize("corrupt", [lose, duplicate, miscount, forget_refund, orphan, drop_body])
async def test_the_invariants_are_sharp(corrupt: Callable[[MemoryStore], None]) -> None:
    store = MemoryStore()
    group_id = (await register(store)).group_id
    await store.enqueue([ROW])
    await claim(store, group_id, 1)
    store.check_invariants()
    corrupt(store)
    with pytest.raises(AssertionError):
        store.check_invariants()


async def test_a_claim_number_is_never_used_twice() -> None:
    store = MemoryStore()
    group_id = (await register(store)).group_id
    [job] = await store.enqueue([ROW])
    await claim(store, group_id, 1)
    await store.settle(group_id, [Settlement(job.id, 1, Outcome.RELEASED)], lambda rows: None)
    with pytest.raises(AssertionError, match="was made before"):
        await claim(store, group_id, 1)
