"""Groups beside each other and inside each other, their numbers, and the ways to stop and to wait."""

from __future__ import annotations

import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, places, rows, until, value
from tests.tools.running import AT_ONCE, follow_ups, outcomes, plain, retire_groups
from triojobs._sql import groups as groups_sql


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


async def done(job: triojobs.Job[Any]) -> Any:
    return job.payload


class Holding:
    """A handler that holds its job until let go."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.go_on = trio.Event()

    async def handler(self, job: triojobs.Job[Any]) -> Any:
        self.started.set()
        await self.go_on.wait()
        return job.payload


# Numbers.


REGISTERED: LiteralString = "SELECT id FROM triojobs.worker_groups ORDER BY registered_at"
WRITTEN: LiteralString = """
SELECT status, count(*)::int FROM triojobs.outcomes WHERE group_id = ANY (%s) GROUP BY 1
"""


async def test_statistics_and_report_equal_the_rows(conninfo: str) -> None:
    """Every way in which a claim can end, in one group."""
    asleep: list[int] = []
    snoozed: set[int] = set()

    async def handler(job: triojobs.Job[Any]) -> Any:
        match job.payload:
            case "fails once" if job.attempt == 1:
                raise ValueError
            case "killed":
                raise triojobs.Kill
            case "snoozes" if job.id not in snoozed:
                snoozed.add(job.id)
                raise triojobs.Snooze(0.0)
            case "sleeps":
                asleep.append(job.id)
                await trio.sleep_forever()
            case "commits":
                return await job.commit(lambda conn: "committed")
            case "commits and fails":
                await job.commit(lambda conn: "committed")
                raise ValueError("afterwards")
        return job.payload

    kinds = ["done", "fails once", "killed", "snoozes", "commits", "commits and fails", "poison"]
    numbers: triojobs.Queue[Any, Any] = triojobs.Queue("numbers", int)
    workers = [
        triojobs.Worker(plain, handler, concurrency=20, retry=AT_ONCE),
        triojobs.Worker(numbers, done, retry=AT_ONCE),
    ]
    async with triojobs.open_worker_group(conninfo, workers, grace_period=0.0) as group:
        client = group.client
        sleeping = await client.enqueue_many(plain, ["sleeps"] * 3)
        with trio.fail_after(15):
            while len(asleep) < 3:
                await trio.sleep(0.005)
        ids = await client.enqueue_many(plain, kinds[:-1] * 2)
        other: triojobs.Queue[Any, Any] = triojobs.Queue("numbers")
        ids += await client.enqueue_many(other, [triojobs.NewJob("no number", max_attempts=2)])
        await client.cancel(sleeping[0])
        with trio.fail_after(30):
            async with client.as_completed([*ids, sleeping[0]]) as completions:
                async for _ in completions:
                    pass
            while group.statistics().unsettled or group.statistics().running > 2:
                await trio.sleep(0.005)
        live = group.statistics()
        assert (live.running, live.free) == (2, 18 + numbers_free(workers))
        assert live.claimed == live.settled + live.running
        assert live.lease_until > 0
    written = dict(rows(conninfo, WRITTEN, list(group.report.group_ids)))
    reported = {k: n for k, n in group.report.settled.items() if n}
    assert reported == written | {"snoozed": 2}
    assert reported == {"done": 10, "failed": 3, "killed": 3, "cancelled": 1, "snoozed": 2}
    assert group.report.released == value(conninfo, "SELECT count(*) FROM triojobs.ready") == 2
    ended = group.statistics()
    assert ended.claimed == ended.settled + ended.released == sum(reported.values()) + 2
    assert (ended.running, ended.free, ended.unsettled, ended.stale) == (0, 0, 0, 0)
    assert (ended.registrations, group.report.abandoned, group.report.unknown_claims) == (1, (), 0)
    assert [i for (i,) in rows(conninfo, REGISTERED)] == list(group.report.group_ids)
    assert value(conninfo, "SELECT count(*) FROM triojobs.leases") == 0


async def test_the_report_of_an_open_group_is_what_was_done_until_then(conninfo: str) -> None:
    go_on = trio.Event()

    async def wait_for_the_second(job: triojobs.Job[Any]) -> None:
        if job.payload == "second":
            await go_on.wait()

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, wait_for_the_second)]) as group:
        before = group.report
        first = await group.client.enqueue(plain, "first")
        await group.client.enqueue(plain, "second")
        await group.client.result(first)
        meanwhile, ids = group.report, (group.group_id,)
        go_on.set()
    assert (before.settled["done"], before.group_ids, before.duration) == (0, ids, 0.0)
    assert (meanwhile.settled["done"], meanwhile.group_ids, meanwhile.duration) == (1, ids, 0.0)
    assert group.report.settled["done"] == 2
    assert group.report is group.report


async def test_a_scope_cannot_be_entered_twice(conninfo: str) -> None:
    for opened in (
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, done)]),
        triojobs.open_client(conninfo),
    ):
        async with opened as first:
            with pytest.raises(triojobs.TriojobsError, match="entered twice; call open_"):
                await opened.__aenter__()
            assert await first_client(first).enqueue(plain, None)
        with pytest.raises(triojobs.TriojobsError, match="entered twice"):
            await opened.__aenter__()


def first_client(opened: triojobs.WorkerGroup | triojobs.Client) -> triojobs.Client:
    return opened.client if isinstance(opened, triojobs.WorkerGroup) else opened


def numbers_free(workers: list[triojobs.Worker[Any, Any]]) -> int:
    return workers[1].concurrency


async def test_after_a_lost_lease_the_numbers_are_those_of_all_registrations(conninfo: str) -> None:
    attempts: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        attempts.append(job.attempt)
        if len(attempts) == 1:
            await trio.sleep_forever()

    workers = [triojobs.Worker(plain, handler)]
    async with triojobs.open_worker_group(conninfo, workers, beat_interval=0.1) as group:
        first = group.group_id
        job_id = await group.client.enqueue(plain, None)
        with trio.fail_after(15):
            while not attempts:
                await trio.sleep(0.005)
        assert retire_groups(conninfo) == 1
        with trio.fail_after(15):
            await group.client.result(job_id)
        second = group.group_id
    assert attempts == [1, 2]
    assert group.report.group_ids == (first, second)
    assert [i for (i,) in rows(conninfo, REGISTERED)] == [first, second]
    assert group.report.settled["done"] == 1
    statistics = group.statistics()
    assert (statistics.claimed, statistics.settled, statistics.stale) == (2, 1, 1)
    assert statistics.registrations == 2


async def test_jobs_of_a_retired_group_whose_attempts_are_used_up_are_killed(conninfo: str) -> None:
    holding = Holding()
    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, holding.handler)], beat_interval=0.1
    ) as group:
        job_id = await group.client.enqueue(plain, None, max_attempts=1)
        await holding.started.wait()
        assert retire_groups(conninfo) == 1
        with pytest.raises(triojobs.JobFailedError, match="rescued: the lease of worker group") as caught:
            await group.client.result(job_id)
    assert caught.value.attempts == 1
    assert outcomes(conninfo, job_id) == [(1, "killed")]


# Waiting.


async def test_wait_stopped_returns_when_the_report_is_complete(conninfo: str) -> None:
    holding = Holding()
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, holding.handler)]) as group:
        await group.client.enqueue(plain, None)
        await holding.started.wait()
        assert group.report.settled["done"] == 0
        group.stop()
        async with trio.open_nursery() as nursery:
            stopped = trio.Event()

            @nursery.start_soon
            async def wait() -> None:
                await group.wait_stopped()
                stopped.set()

            await trio.testing.wait_all_tasks_blocked()
            assert not stopped.is_set()
            holding.go_on.set()
        assert group.report.settled["done"] == 1
        assert group.report.group_ids == (group.group_id,)
        assert value(conninfo, "SELECT count(*) FROM triojobs.worker_groups WHERE closed_at IS NULL") == 0
        await group.wait_stopped()  # again, and after the stop: at once


async def test_wait_idle_looks_at_all_groups_and_at_its_own_queues_only(conninfo: str) -> None:
    holding = Holding()
    async with (
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, holding.handler)]) as busy,
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, done, concurrency=1)]) as idle,
        triojobs.open_worker_group(conninfo, [triojobs.Worker(follow_ups, done)]) as elsewhere,
    ):
        idle.stop()  # so that the other one gets the job
        await idle.wait_stopped()
        await busy.client.enqueue(plain, None)
        await holding.started.wait()
        with trio.fail_after(15):
            await elsewhere.wait_idle()
        async with trio.open_nursery() as nursery:
            returned = trio.Event()

            @nursery.start_soon
            async def wait() -> None:
                await busy.wait_idle()
                returned.set()

            await trio.testing.wait_all_tasks_blocked()
            assert not returned.is_set()
            holding.go_on.set()
            with trio.fail_after(15):
                await returned.wait()


async def test_wait_idle_waits_an_outage_out(conninfo: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_worker_group(through, [triojobs.Worker(plain, done)]) as group:
            await group.client.enqueue(plain, None)
            proxy.cut()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group.wait_idle)
                with pytest.raises(triojobs.DatabaseError):
                    await group.client.get(1)
                proxy.heal()
    assert places(conninfo) == {"jobs": 1, "outcomes": 1}


# Stopping.


async def test_a_thread_may_stop_the_group(conninfo: str) -> None:
    holding = Holding()
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, holding.handler)]) as group:
        await group.client.enqueue(plain, None)
        await holding.started.wait()
        for _ in range(2):
            thread = threading.Thread(target=group.stop_from_thread)
            thread.start()
            await trio.to_thread.run_sync(thread.join)
        holding.go_on.set()
        with trio.fail_after(15):
            await group.wait_stopped()
    assert group.report.settled["done"] == 1


async def test_a_signal_handler_may_stop_the_group(conninfo: str) -> None:
    with calling(signal.SIGUSR1) as stop:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, done)]) as group:
            stop.append(group.stop_from_thread)
            signal.raise_signal(signal.SIGUSR1)
            with trio.fail_after(15):
                await group.wait_stopped()


@contextmanager
def calling(number: int) -> Iterator[list[Any]]:
    """Have what is in the list called when the signal arrives."""
    wanted: list[Any] = []
    before = signal.signal(number, lambda *_: [call() for call in wanted])
    try:
        yield wanted
    finally:
        signal.signal(number, before)


def test_after_the_end_of_the_program_stopping_does_nothing(conninfo: str) -> None:
    async def main() -> triojobs.WorkerGroup:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, done)]) as group:
            return group

    group = trio.run(main)
    group.stop_from_thread()


async def test_a_beat_that_finds_the_group_closed_during_the_closing_is_no_lease_loss(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A rescuer holds the group's row; a beat waits for it, and the closing waits for the beat."""
    close = "UPDATE triojobs.worker_groups SET closed_at = now()"
    with locked(conninfo, close) as rescuer, trio.CancelScope() as scope:
        workers = [triojobs.Worker(plain, done)]
        opening = triojobs.open_worker_group(conninfo, workers, beat_interval=0.1)
        async with opening as group:
            rescuer.execute(close)  # the row that it has inserted meanwhile
            await blocked(conninfo, "heartbeat")
            scope.cancel()
            live = group._registrations[-1]

            async def let_the_beat_go_on() -> None:
                # The closing has begun when it has asked the beat thread to end.
                while not group._store._beats[live.group_id].stopped:  # type: ignore[attr-defined]
                    await trio.sleep(0.005)
                rescuer.commit()

            trio.lowlevel.spawn_system_task(let_the_beat_go_on)
    assert not live.lost.value
    assert not live.lease.lost
    assert len(group.report.group_ids) == 1
    assert not {"lease_lost", "registered_again"} & {getattr(r, "event", "") for r in caplog.records}


# Groups beside each other.


async def test_two_groups_of_one_name_do_not_disturb_each_other(conninfo: str) -> None:
    holding = Holding()
    opened: list[triojobs.WorkerGroup] = []

    async def open_and_leave(queue: Any, handler: Any, leave: trio.Event) -> None:
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(queue, handler)], name="web", beat_interval=0.1
        ) as group:
            opened.append(group)
            await leave.wait()

    leave_first, leave_second = trio.Event(), trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:  # both at once
            nursery.start_soon(open_and_leave, plain, holding.handler, leave_first)
            nursery.start_soon(open_and_leave, follow_ups, done, leave_second)
            while len(opened) < 2:
                await trio.sleep(0.005)
            assert {group.name for group in opened} == {"web"}
            assert opened[0].group_id != opened[1].group_id
            first = next(g for g in opened if g._workers[0].queue is plain)
            second = next(g for g in opened if g is not first)
            job_id = await first.client.enqueue(plain, "held")
            await holding.started.wait()
            # The end of one leaves lease, jobs and beats of the other alone.
            leave_second.set()
            await second.wait_stopped()
            await until(
                conninfo,
                "SELECT lease_until > now() FROM triojobs.worker_groups WHERE id = %s",
                first.group_id,
            )
            assert first.statistics().registrations == 1
            holding.go_on.set()
            assert await first.client.result(job_id) == "held"
            leave_first.set()
    assert rows(conninfo, "SELECT name, closed_at IS NOT NULL FROM triojobs.worker_groups") == [
        ("web", True),
        ("web", True),
    ]


async def test_a_restart_does_not_wait_for_a_predecessor_that_left_no_word(conninfo: str) -> None:
    """The row of a process that was killed: its lease lives on for an hour."""
    rows(
        conninfo,
        "INSERT INTO triojobs.worker_groups (id, name, host, pid, version, lease_duration, lease_until)"
        " VALUES (gen_random_uuid(), 'web', 'here', 1, '0', 3600, now() + interval '1 hour')",
    )
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, done)], name="web") as group:
        with trio.fail_after(15):
            assert await group.client.result(await group.client.enqueue(plain, "at once")) == "at once"


async def test_groups_may_be_nested(conninfo: str) -> None:
    seen: Counter[str] = Counter()

    def named(name: str) -> Any:
        async def handler(job: triojobs.Job[Any]) -> str:
            seen[name] += 1
            return name

        return handler

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, named("outer"))]) as outer:
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(follow_ups, named("inner"))]
        ) as inner:
            with trio.fail_after(15):
                assert await outer.client.result(await inner.client.enqueue(plain, 1)) == "outer"
                assert await inner.client.result(await outer.client.enqueue(follow_ups, 2)) == "inner"
        assert inner.report.settled["done"] == 1
        with pytest.raises(trio.ClosedResourceError):
            await inner.client.enqueue(plain, 3)
        with trio.fail_after(15):
            assert await outer.client.result(await outer.client.enqueue(plain, 4)) == "outer"
    assert seen == {"outer": 2, "inner": 1}
    assert outer.report.settled["done"] == 2


async def test_a_handler_may_open_a_group(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(follow_ups, done)]) as inner:
            return await inner.client.result(await inner.client.enqueue(follow_ups, "inner"))

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        with trio.fail_after(15):
            assert await group.client.result(await group.client.enqueue(plain, None)) == "inner"
    assert rows(conninfo, "SELECT count(*), count(closed_at) FROM triojobs.worker_groups") == [(2, 2)]


@pytest.mark.parametrize("why", ["cancel", "error"])
async def test_an_inner_group_that_is_cancelled_leaves_the_outer_one_alone(conninfo: str, why: str) -> None:
    outer_holds, inner_holds = Holding(), Holding()

    class Boom(Exception):
        pass

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, outer_holds.handler)]) as outer:
        held = await outer.client.enqueue(plain, "outer")
        await outer_holds.started.wait()
        with trio.CancelScope() as scope:
            try:
                async with triojobs.open_worker_group(
                    conninfo, [triojobs.Worker(follow_ups, inner_holds.handler)]
                ) as inner:
                    await inner.client.enqueue(follow_ups, "inner")
                    await inner_holds.started.wait()
                    if why == "error":
                        raise Boom
                    scope.cancel()
                    await trio.sleep_forever()
            except Boom:
                assert why == "error"
        assert inner.report.released == 1
        assert outer.statistics().running == 1
        outer_holds.go_on.set()
        with trio.fail_after(15):
            assert await outer.client.result(held) == "outer"
    assert rows(conninfo, "SELECT queue, attempts FROM triojobs.ready") == [(follow_ups.name, 0)]


async def test_a_group_rescues_what_a_dead_one_held_and_runs_its_jobs(conninfo: str) -> None:
    """Beside a group that lives under the same name."""
    with psycopg.connect(conninfo) as conn:
        job_id = triojobs.enqueue_on(conn, plain, "left behind")
        conn.execute(
            "INSERT INTO triojobs.worker_groups (id, name, host, pid, version, lease_duration, lease_until)"
            " VALUES ('00000000-0000-0000-0000-000000000001', 'web', 'h', 1, '0', 30, now() - interval '1 s')"
        )
        conn.execute(
            "WITH taken AS (DELETE FROM triojobs.ready RETURNING *) INSERT INTO triojobs.leases"
            " (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at) SELECT id, 1,"
            " '00000000-0000-0000-0000-000000000001', 1, max_attempts, queue, priority, run_at FROM taken"
        )
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, done)], name="web") as group:
        with trio.fail_after(15):
            assert await group.client.result(job_id) == "left behind"
        assert group.statistics().rescued == 1
    assert outcomes(conninfo, job_id) == [(1, "failed"), (2, "done")]
    with psycopg.connect(conninfo) as conn:
        assert groups_sql.rescue(conn, "triojobs").jobs == 0
