"""`client.get`, `result` and `as_completed` through groups: what waiters are told, when, and in which order."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import rows, value
from tests.tools.running import AT_ONCE, outcomes, plain
from triojobs._client import READ_AT_ONCE
from triojobs._model import RawJob
from triojobs._postgres import PostgresStore
from triojobs._sql import operate


@dataclass(frozen=True)
class Order:
    number: int


@dataclass(frozen=True)
class Receipt:
    paid_at: dt.datetime


orders: triojobs.Queue[Order, Receipt] = triojobs.Queue("orders", Order, result=Receipt)
PAID = Receipt(dt.datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=dt.UTC))


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


async def pay(job: triojobs.Job[Order]) -> Receipt:
    return PAID


class Doors:
    """A handler that stays in each job until its door is opened."""

    def __init__(self, n: int) -> None:
        self._doors = [trio.Event() for _ in range(n)]

    async def handler(self, job: triojobs.Job[int]) -> int:
        await self._doors[job.payload].wait()
        return job.payload

    def open(self, n: int) -> None:
        self._doors[n].set()


# Typed by the queue, plain without.


async def test_a_result_is_typed_by_its_queue_and_plain_without(conninfo: str) -> None:
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(orders, pay)]) as group:
        job_id = await group.client.enqueue(orders, Order(7))
        with trio.fail_after(15):
            assert await group.client.result(job_id, orders) == PAID
            assert await group.client.result(job_id) == {"paid_at": PAID.paid_at}
        typed = await group.client.get(job_id, orders)
        untyped = await group.client.get(job_id)
    assert typed is not None
    assert untyped is not None
    assert (typed.payload, typed.result) == (Order(7), PAID)
    assert (untyped.payload, untyped.result) == ({"number": 7}, {"paid_at": PAID.paid_at})


async def test_another_process_reads_what_a_group_has_done(conninfo: str) -> None:
    async with (
        triojobs.open_client(conninfo) as client,
        triojobs.open_worker_group(conninfo, [triojobs.Worker(orders, pay)]),
    ):
        with trio.fail_after(15):
            assert await client.result(await client.enqueue(orders, Order(1)), orders) == PAID


async def test_the_queue_of_another_job_is_refused(conninfo: str) -> None:
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(orders, pay)]) as group:
        job_id = await group.client.enqueue(orders, Order(1))
        with trio.fail_after(15):
            await group.client.result(job_id)
        for method in (group.client.get, group.client.result):
            with pytest.raises(triojobs.OptionError, match="'orders'") as caught:
                await method(job_id, plain)
            assert caught.value.field == "queue"
        with pytest.raises(triojobs.OptionError):
            async with group.client.as_completed([job_id], plain) as completions:
                async for _ in completions:
                    pass


@pytest.mark.parametrize("what", ["payload", "result"])
async def test_what_does_not_fit_the_readers_type_is_a_codec_error(conninfo: str, what: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        return "text"

    declared: dict[str, Any] = {"payload": int} if what == "payload" else {"result": int}
    reader: triojobs.Queue[Any, Any] = triojobs.Queue(plain.name, **declared)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        job_id = await group.client.enqueue(plain, "text")
        with trio.fail_after(15):
            assert await group.client.result(job_id) == "text"
        with pytest.raises(triojobs.CodecError, match=f"{what} of job {job_id} does not fit") as caught:
            await group.client.get(job_id, reader)
        assert caught.value.__cause__ is not None
        if what == "result":
            with pytest.raises(triojobs.CodecError, match=f"job {job_id}"):
                await group.client.result(job_id, reader)
        else:
            assert await group.client.result(job_id, reader) == "text"  # its payload is not looked at


async def test_get_shows_a_job_at_each_stage(conninfo: str) -> None:
    doors = Doors(1)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, doors.handler)]) as group:
        client = group.client
        later = await client.enqueue(plain, 0, delay=3600.0, priority=3, key="k", metadata={"a": 1})
        info = await client.get(later)
        assert info is not None
        assert (info.status, info.attempts, info.priority, info.key) == ("pending", 0, 3, "k")
        assert (info.claimed_at, info.finished_at, info.group, info.fence) == (None, None, None, None)
        assert info.metadata == {"a": 1}
        assert dt.timedelta(minutes=59) < info.run_at - info.enqueued_at < dt.timedelta(minutes=61)

        running = await client.enqueue(plain, 0)
        with trio.fail_after(15):
            while (info := await client.get(running)) and info.status != "running":
                await trio.sleep(0.01)
        assert info is not None
        assert (info.attempts, info.group, info.result) == (1, group.group_id, None)
        assert info.fence is not None
        assert info.claimed_at is not None
        doors.open(0)
        with trio.fail_after(15):
            assert await client.result(running) == 0
        done = await client.get(running)
        assert done is not None
        assert (done.status, done.result, done.error, done.fence) == ("done", 0, None, info.fence)
        assert done.finished_at is not None
        assert done.enqueued_at <= info.claimed_at <= done.finished_at


# What a waiter is told.


async def test_a_job_without_a_value_has_none_for_its_result(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        job_id = await group.client.enqueue(plain, 1)
        with trio.fail_after(15):
            assert await group.client.result(job_id) is None


async def test_a_retried_job_is_waited_for_until_its_last_attempt(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> int:
        if job.attempt < job.payload:
            raise ValueError(f"attempt {job.attempt}")
        return job.attempt

    workers = [triojobs.Worker(plain, handler, retry=AT_ONCE)]
    async with triojobs.open_worker_group(conninfo, workers) as group:
        succeeds = await group.client.enqueue(plain, 3, max_attempts=3)
        fails = await group.client.enqueue(plain, 99, max_attempts=2)
        with trio.fail_after(15):
            assert await group.client.result(succeeds) == 3
            with pytest.raises(triojobs.JobFailedError) as caught:
                await group.client.result(fails)
    assert (caught.value.job_id, caught.value.attempts) == (fails, 2)
    assert "ValueError: attempt 2" in (caught.value.error or "")
    assert str(fails) in str(caught.value)


async def test_a_cancelled_job_tells_its_reason(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await trio.sleep_forever()

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        client = group.client
        waits = await client.enqueue(plain, 1, delay=3600.0)
        runs = await client.enqueue(plain, 2)
        with trio.fail_after(15):
            while not group.statistics().running:
                await trio.sleep(0.01)
        for job_id, attempts in ((waits, 0), (runs, 1)):
            assert await client.cancel(job_id, reason="sold out")
            with trio.fail_after(15), pytest.raises(triojobs.JobCancelledError, match="sold out") as caught:
                await client.result(job_id)
            assert (caught.value.job_id, caught.value.attempts) == (job_id, attempts)
            assert caught.value.reason == "sold out"


async def test_a_job_that_was_never_enqueued_is_not_found(conninfo: str) -> None:
    with psycopg.connect(conninfo) as conn:
        undone = triojobs.enqueue_on(conn, plain, 1)
        conn.rollback()
    async with triojobs.open_client(conninfo) as client:
        for job_id in (undone, 0, -1, 2**63 - 1):
            assert await client.get(job_id) is None
            with pytest.raises(triojobs.JobNotFoundError) as caught:
                await client.result(job_id)
            assert caught.value.job_id == job_id
            with pytest.raises(triojobs.JobNotFoundError):
                async with client.as_completed([job_id]) as completions:
                    async for _ in completions:
                        pass


async def test_many_ended_jobs_are_read_a_few_at_a_time_and_come_in_the_order_of_their_ends(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_jobs = PostgresStore.read_jobs

    async def counted(store: PostgresStore, ids: Sequence[int]) -> list[RawJob]:
        read.append(len(ids))
        return await read_jobs(store, ids)

    async with triojobs.open_client(conninfo) as client:
        ids = await client.enqueue_many(plain, range(READ_AT_ONCE + 5))
        for job_id in reversed(ids):
            await client.cancel(job_id)
        monkeypatch.setattr(PostgresStore, "read_jobs", counted)
        async with client.as_completed(ids) as completions:
            with trio.fail_after(15):
                assert [info.id async for info in completions] == ids[::-1]
    assert read == [READ_AT_ONCE, 5]


@pytest.mark.parametrize("job_id", ["7", 7.0, True, None, 2**63])
async def test_what_is_no_id_is_refused(conninfo: str, job_id: Any) -> None:
    async with triojobs.open_client(conninfo) as client:
        for method in (client.get, client.result, client.cancel):
            with pytest.raises(triojobs.OptionError) as caught:
                await method(job_id)
            assert caught.value.field == "job_id"
        with pytest.raises(triojobs.OptionError):
            client.as_completed([job_id])


async def test_giving_up_waiting_leaves_the_job_alone(conninfo: str) -> None:
    doors = Doors(1)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, doors.handler)]) as group:
        job_id = await group.client.enqueue(plain, 0)
        with trio.move_on_after(0.2) as scope:
            await group.client.result(job_id)
        assert scope.cancelled_caught
        doors.open(0)
        with trio.fail_after(15):
            assert await group.client.result(job_id) == 0
    assert outcomes(conninfo, job_id) == [(1, "done")]


# As they complete.


async def test_jobs_come_in_the_order_in_which_they_end(conninfo: str) -> None:
    doors = Doors(5)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, doors.handler)]) as group:
        ids = await group.client.enqueue_many(plain, range(5))
        came: list[int] = []
        order = [3, 1, 4, 0, 2]
        with trio.fail_after(15):
            async with group.client.as_completed(ids) as completions:
                for n in order:
                    doors.open(n)
                    info = await anext(completions)
                    assert (info.id, info.status, info.result) == (ids[n], "done", n)
                    came.append(n)
                with pytest.raises(StopAsyncIteration):
                    await anext(completions)
    assert came == order


async def test_jobs_that_ended_before_come_first_and_in_their_order(conninfo: str) -> None:
    doors = Doors(4)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, doors.handler)]) as group:
        ids = await group.client.enqueue_many(plain, range(4))
        with trio.fail_after(15):
            for n in (2, 0, 1):
                doors.open(n)
                await group.client.result(ids[n])
            async with group.client.as_completed(ids) as completions:
                assert [(await anext(completions)).id for _ in range(3)] == [ids[2], ids[0], ids[1]]
                doors.open(3)
                assert [info.id async for info in completions] == [ids[3]]


async def test_every_kind_of_end_comes(conninfo: str) -> None:
    async def handler(job: triojobs.Job[str]) -> str:
        if job.payload == "killed":
            raise triojobs.Kill("no use")
        return job.payload

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        done, killed, cancelled = await group.client.enqueue_many(
            plain, ["done", "killed", triojobs.NewJob("cancelled", delay=3600.0)]
        )
        assert await group.client.cancel(cancelled, reason="enough")
        found = {}
        with trio.fail_after(15):
            async with group.client.as_completed([done, killed, cancelled]) as completions:
                async for info in completions:
                    found[info.id] = (info.status, info.result, info.error)
    assert found == {
        done: ("done", "done", None),
        killed: ("killed", None, "no use"),
        cancelled: ("cancelled", None, "enough"),
    }


async def test_an_id_that_is_given_twice_comes_once(conninfo: str) -> None:
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(orders, pay)]) as group:
        job_id = await group.client.enqueue(orders, Order(1))
        with trio.fail_after(15):
            async with group.client.as_completed([job_id, job_id], orders) as completions:
                assert [(info.payload, info.result) async for info in completions] == [(Order(1), PAID)]


async def test_no_ids_end_at_once_without_the_database(conninfo: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through) as client:
            proxy.cut()
            async with client.as_completed([]) as completions:
                assert [info async for info in completions] == []


async def test_an_unknown_id_among_others_is_named(conninfo: str) -> None:
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(orders, pay)]) as group:
        job_id = await group.client.enqueue(orders, Order(1))
        with trio.fail_after(15), pytest.raises(triojobs.JobNotFoundError) as caught:
            async with group.client.as_completed([job_id, 12345]) as completions:
                async for _ in completions:
                    pass
    assert caught.value.job_id == 12345


async def test_leaving_early_leaves_no_task_and_no_connection(conninfo: str) -> None:
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'triojobs client'"
    doors = Doors(2)
    async with (
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, doors.handler)]),
        triojobs.open_client(conninfo) as client,
    ):
        ids = await client.enqueue_many(plain, range(2))
        before = trio.lowlevel.current_statistics().tasks_living, value(conninfo, sessions)
        doors.open(1)
        with trio.fail_after(15):
            async with client.as_completed(ids) as completions:
                assert (await anext(completions)).id == ids[1]
        assert (trio.lowlevel.current_statistics().tasks_living, value(conninfo, sessions)) == before
        with pytest.raises(StopAsyncIteration):
            await anext(completions)
        doors.open(0)
        with trio.fail_after(15):
            assert await client.result(ids[0]) == 0


async def test_a_job_that_an_operator_retries_at_this_moment_has_not_ended(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had ended when the waiter looked who has; before it is read, it waits again."""

    async def handler(job: triojobs.Job[int]) -> int:
        runs.append(job.id)
        return len(runs)

    runs: list[int] = []
    statuses: list[str] = []
    workers = [triojobs.Worker(plain, handler)]
    async with triojobs.open_worker_group(conninfo, workers) as group:
        job_id = await group.client.enqueue(plain, None)
        with trio.fail_after(15):
            assert await group.client.result(job_id) == 1

    async with triojobs.open_client(conninfo) as client:
        read_jobs = client._store.read_jobs

        async def retried_first(ids: Any) -> Any:
            if not statuses:
                with psycopg.connect(conninfo) as conn:
                    assert operate.retry(conn, "triojobs", job_id)
            found = await read_jobs(ids)
            statuses.append(found[0].status)
            return found

        monkeypatch.setattr(client._store, "read_jobs", retried_first)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def run_it_again() -> None:
                while not statuses:
                    await trio.sleep(0.01)
                async with triojobs.open_worker_group(conninfo, workers) as second:
                    await second.wait_idle()

            with trio.fail_after(15):
                assert await client.result(job_id) == 2
    assert statuses[0] == "pending"
    assert outcomes(conninfo, job_id) == [(1, "done"), (1, "done")]


@pytest.mark.parametrize("outage", ["cut", "stall"])
async def test_an_outage_in_the_middle_is_waited_out(
    conninfo: str, caplog: pytest.LogCaptureFixture, outage: str
) -> None:
    doors = Doors(2)
    with fault_proxy(conninfo) as (proxy, through):
        async with (
            triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, doors.handler)]) as group,
            triojobs.open_client(through, call_timeout=0.5) as client,
        ):
            ids = await group.client.enqueue_many(plain, range(2))
            doors.open(0)
            with trio.fail_after(30):
                async with client.as_completed(ids) as completions:
                    assert (await anext(completions)).result == 0
                    getattr(proxy, outage)()
                    doors.open(1)
                    async with trio.open_nursery() as nursery:

                        @nursery.start_soon
                        async def heal() -> None:
                            while "wait_failed" not in [getattr(r, "event", "") for r in caplog.records]:
                                await trio.sleep(0.01)
                            proxy.heal()

                        assert (await anext(completions)).result == 1


async def test_an_error_that_does_not_heal_by_waiting_is_raised(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None, delay=3600.0)
        rows(conninfo, "ALTER TABLE triojobs.leases RENAME TO taken_away")
        with trio.fail_after(15), pytest.raises(triojobs.SchemaError):
            await client.result(job_id)


async def test_a_thousand_ids_are_waited_for_at_once(conninfo: str) -> None:
    async def handler(job: triojobs.Job[int]) -> int:
        return job.payload

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        ids = await group.client.enqueue_many(plain, range(1000))
        with trio.fail_after(60):
            async with group.client.as_completed(ids) as completions:
                found = {info.id: info.result async for info in completions}
    assert found == dict(zip(ids, range(1000), strict=True))


async def test_a_closed_client_does_not_wait_on(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
    for method in (client.get, client.result, client.cancel):
        with pytest.raises(trio.ClosedResourceError):
            await method(job_id)
    with pytest.raises(trio.ClosedResourceError):
        client.as_completed([job_id])
