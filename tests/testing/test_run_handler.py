"""`triojobs.testing` for users: one handler against a made-up job, memory groups, and draining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from triojobs import testing


@dataclass(frozen=True)
class Mail:
    to: str


mails: triojobs.Queue[Mail, str] = triojobs.Queue("mails", Mail, result=str)
notes: triojobs.Queue[str, Any] = triojobs.Queue("notes", str)


async def run(handler: Any, **options: Any) -> testing.HandlerRun[str]:
    return await testing.run_handler(triojobs.Worker(mails, handler, timeout=30.0), Mail("ada"), **options)


async def test_a_handler_that_returns_is_done_with_its_result() -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        return f"{job.payload.to} {job.attempt} {job.key} {job.metadata['x']} {job.priority}"

    ended = await run(handler, key="k", metadata={"x": 1}, priority=3)
    assert (ended.outcome, ended.result) == ("done", "ada 1 k 1 3")
    assert (ended.error, ended.exception, ended.delay) == (None, None, None)
    assert ended.job.status == "done"


async def test_a_handler_alone_gets_a_queue_of_its_payloads_class() -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        return f"to {job.payload.to}"

    assert (await testing.run_handler(handler, Mail("ada"))).result == "to ada"


async def test_a_handler_sees_the_attempt_that_was_asked_for_and_the_error_before_it() -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        return f"{job.attempt} of {job.max_attempts} after {job.last_error}"

    ended = await run(handler, attempt=3, max_attempts=4, last_error="no route")
    assert ended.result == "3 of 4 after no route"


@pytest.mark.parametrize(("attempt", "outcome"), [(2, "failed"), (3, "killed")])
async def test_a_handler_that_raises_fails_or_kills_by_its_attempt(attempt: int, outcome: str) -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        raise ValueError("no such mailbox")

    ended = await run(handler, attempt=attempt, max_attempts=3)
    assert ended.outcome == outcome
    assert isinstance(ended.exception, ValueError)
    assert ended.error is not None
    assert "no such mailbox" in ended.error
    assert (ended.delay is not None) == (outcome == "failed")


async def test_signals_have_their_outcome_and_delay(autojump_clock: trio.testing.MockClock) -> None:
    async def snoozes(job: triojobs.Job[Mail]) -> str:
        raise triojobs.Snooze(60)

    async def retries(job: triojobs.Job[Mail]) -> str:
        raise triojobs.RetryAfter(70)

    snoozed, retried = await run(snoozes, attempt=2), await run(retries)
    assert (snoozed.outcome, snoozed.delay, snoozed.error) == ("snoozed", pytest.approx(60, abs=1), None)
    assert (retried.outcome, retried.delay) == ("failed", pytest.approx(70, abs=1))


async def test_the_workers_timeout_holds(autojump_clock: trio.testing.MockClock) -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        await trio.sleep(31)
        return "late"

    ended = await run(handler)
    assert ended.outcome == "failed"
    assert ended.error is not None
    assert "30" in ended.error


async def test_what_a_commit_wrote_and_enqueued_is_shown() -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        def work(transaction: Any) -> str:
            transaction.writes.append(job.payload.to)
            triojobs.enqueue_on(transaction, notes, "sent")
            return "receipt"

        return await job.commit(work)

    ended = await run(handler)
    assert (ended.outcome, ended.result, list(ended.writes)) == ("done", "receipt", ["ada"])
    assert [(job.queue, job.payload) for job in ended.enqueued] == [("notes", "sent")]


async def test_a_follow_up_in_the_same_queue_is_not_run() -> None:
    calls = 0

    async def handler(job: triojobs.Job[Mail]) -> str:
        nonlocal calls
        calls += 1
        await job.transact(lambda transaction: triojobs.enqueue_on(transaction, mails, Mail("bob")))
        return "x"

    ended = await run(handler)
    assert calls == 1
    assert [job.status for job in ended.enqueued] == ["pending"]


async def test_a_job_that_is_never_started_is_told_too() -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        raise AssertionError("never called")

    database = testing.MemoryDatabase()
    ended = await run(handler, deadline=database.utc_now(), database=database)
    assert (ended.outcome, ended.exception) == ("killed", None)


async def test_system_exit_goes_on_up() -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await run(handler)


@pytest.mark.parametrize(("attempt", "most"), [(0, 5), (6, 5), (1, 0)])
async def test_attempts_out_of_range_are_refused(attempt: int, most: int) -> None:
    async def handler(job: triojobs.Job[Mail]) -> str:
        return ""

    with pytest.raises(triojobs.OptionError):
        await run(handler, attempt=attempt, max_attempts=most)


# Draining.


def tried_twice(done: list[str]) -> triojobs.Worker[Mail, str]:
    async def handler(job: triojobs.Job[Mail]) -> str:
        if job.attempt < 3:
            raise ConnectionError("busy")
        done.append(job.payload.to)
        return "sent"

    return triojobs.Worker(mails, handler, retry=triojobs.Backoff(first=0.05, factor=1.0))


async def test_draining_memory_runs_retries_and_later_jobs_in_no_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    done: list[str] = []
    database = testing.MemoryDatabase()
    async with testing.open_memory_client(database) as client:
        await client.enqueue(mails, Mail("ada"))
        job_id = await client.enqueue(mails, Mail("bob"), delay=7200)
        report = await testing.drain(database, [tried_twice(done)])
        assert await client.result(job_id, mails) == "sent"
    assert done == ["ada", "bob"]
    assert (report.settled["failed"], report.settled["done"]) == (4, 2)


async def test_draining_postgres_runs_retries(conninfo: str) -> None:
    done: list[str] = []
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue_many(mails, [Mail("ada"), Mail("bob")])
    with trio.fail_after(60):
        await testing.drain(conninfo, [tried_twice(done)])
    assert sorted(done) == ["ada", "bob"]


@pytest.mark.parametrize("in_memory", [True, False])
async def test_draining_may_leave_what_is_due_later(in_memory: bool, conninfo: str) -> None:
    database = testing.MemoryDatabase()
    opened = testing.open_memory_client(database) if in_memory else triojobs.open_client(conninfo)
    done: list[str] = []
    async with opened as client:
        job_id = await client.enqueue(mails, Mail("ada"), delay=7200)
        with trio.fail_after(60):
            await testing.drain(database if in_memory else conninfo, [tried_twice(done)], scheduled=False)
        info = await client.get(job_id)
    assert info is not None
    assert (info.status, done) == ("pending", [])
