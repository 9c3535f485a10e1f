"""`job.commit` and `job.transact` through a group: what is written together, and what changes nothing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.commit_proxy import commit_proxy
from tests.tools.looking import places, rows, until, value
from tests.tools.running import (
    NOTES,
    follow_ups,
    note,
    notes,
    outcomes,
    plain,
    retire_groups,
    run_job,
    waiting_in,
)

Work = Callable[["psycopg.Connection[Any]"], Any]


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "event", "") for record in caplog.records]


# What is written together.


def visible(conninfo: str) -> tuple[list[str], int, str]:
    """What others see of the user's rows, of the follow-ups, and of the job."""
    status = value(conninfo, "SELECT status FROM triojobs.job_status WHERE queue = 'plain'")
    return notes(conninfo), waiting_in(conninfo, follow_ups), status


@pytest.mark.parametrize("completing", [True, False], ids=["commit", "transact"])
async def test_writes_and_follow_up_and_completion_become_visible_together(
    conninfo: str, completing: bool
) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        def work(conn: psycopg.Connection[Any]) -> str:
            note(conn, job)
            triojobs.enqueue_on(conn, follow_ups, job.id)
            return "worked"

        return await (job.commit(work) if completing else job.transact(work))

    with commit_proxy(conninfo) as (proxy, through):
        workers = [triojobs.Worker(plain, handler)]
        async with triojobs.open_worker_group(through, workers) as group:
            before = proxy.gate("before")
            job_id = await group.client.enqueue(plain, None)
            await before.reached()
            assert visible(conninfo) == ([], 0, "running")
            after = proxy.gate("after")
            before.let_pass()
            await after.reached()
            assert visible(conninfo) == (["work"], 1, "done" if completing else "running")
            after.let_pass()
            with trio.fail_after(15):
                assert await group.client.result(job_id) == "worked"
    assert group.report.settled["done"] == 1


async def test_work_gets_a_connection_in_a_thread_and_the_handler_its_value(conninfo: str) -> None:
    seen: list[Any] = []

    async def handler(job: triojobs.Job[Any]) -> Any:
        value = object()

        def work(conn: psycopg.Connection[Any]) -> None:
            seen.append(isinstance(conn, psycopg.Connection))
            seen.append(trio.lowlevel.in_trio_task())

        assert await job.transact(lambda conn: value) is value
        await job.commit(work)

    await run_job(conninfo, handler)
    assert seen == [True, False]


async def test_transact_commits_its_writes_and_the_job_goes_on(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        await job.transact(lambda conn: note(conn, job, "first"))
        await job.transact(lambda conn: note(conn, job, "second"))
        assert notes(conninfo) == ["first", "second"]
        assert places(conninfo)["leases"] == 1
        return "returned"

    ended = await run_job(conninfo, handler)
    assert (ended.info.status, ended.info.result) == ("done", "returned")


async def test_what_transact_wrote_survives_the_handlers_failure(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            triojobs.enqueue_on(conn, follow_ups, job.id)

        await job.transact(work)
        raise ValueError("later")

    ended = await run_job(conninfo, handler, job={"max_attempts": 1})
    assert ended.info.status == "killed"
    assert "ValueError: later" in (ended.info.error or "")
    assert notes(conninfo) == ["work"]
    assert waiting_in(conninfo, follow_ups) == 1


async def test_transact_then_commit_write_both(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await job.transact(lambda conn: note(conn, job, "first"))
        await job.commit(lambda conn: note(conn, job, "second"))

    ended = await run_job(conninfo, handler)
    assert ended.info.status == "done"
    assert notes(conninfo) == ["first", "second"]


async def test_a_follow_up_wakes_who_sleeps_on_its_queue(conninfo: str) -> None:
    """Its enqueue is part of our transaction, and so is the notification: nobody polls meanwhile."""
    followed: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: triojobs.enqueue_on(conn, follow_ups, job.id))

    async def follow(job: triojobs.Job[Any]) -> None:
        followed.append(job.payload)

    workers = [triojobs.Worker(plain, handler), triojobs.Worker(follow_ups, follow)]
    async with triojobs.open_worker_group(conninfo, workers, listening_poll_interval=3600.0) as group:
        await until(conninfo, "SELECT count(*) = 2 FROM triojobs.waiting")
        await trio.testing.wait_all_tasks_blocked()
        job_id = await group.client.enqueue(plain, None)
        with trio.fail_after(15):
            while not followed:
                await trio.sleep(0.005)
    assert followed == [job_id]


# What the handler does after its commit.


async def test_the_result_is_what_work_returned_not_what_the_handler_returns(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        await job.commit(lambda conn: "of work")
        return "of the handler"

    ended = await run_job(conninfo, handler)
    assert (ended.info.status, ended.info.result) == ("done", "of work")
    assert ended.report.settled["done"] == 1


@pytest.mark.parametrize(
    "error", [ValueError("afterwards"), triojobs.Kill("afterwards"), triojobs.RetryAfter(0, "afterwards")]
)
async def test_an_exception_after_the_commit_is_logged_and_changes_nothing(
    conninfo: str, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: note(conn, job))
        raise error

    ended = await run_job(conninfo, handler)
    assert outcomes(conninfo, ended.info.id) == [(1, "done")]
    assert ended.info.error is None
    assert notes(conninfo) == ["work"]
    (record,) = [r for r in caplog.records if getattr(r, "event", "") == "error_aside"]
    assert "afterwards" in record.getMessage()
    assert str(ended.info.id) in record.getMessage()


async def test_a_snooze_after_the_commit_changes_nothing(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: None)
        raise triojobs.Snooze(0)

    ended = await run_job(conninfo, handler)
    assert outcomes(conninfo, ended.info.id) == [(1, "done")]
    assert places(conninfo) == {"jobs": 1, "outcomes": 1}


async def test_a_timeout_after_the_commit_changes_nothing(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: "in time")
        await trio.sleep_forever()

    ended = await run_job(conninfo, handler, job={"timeout": 3.0, "max_attempts": 1})
    assert (ended.info.status, ended.info.result, ended.info.attempts) == ("done", "in time", 1)
    assert ended.report.settled == {"done": 1, "failed": 0, "killed": 0, "cancelled": 0, "snoozed": 0}
    assert "stale" not in events(caplog)


async def test_a_slot_is_used_again_after_a_commit(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: job.payload)
        if job.payload == 1:
            await trio.sleep_forever()  # until its timeout

    workers = [triojobs.Worker(plain, handler, concurrency=1)]
    async with triojobs.open_worker_group(conninfo, workers) as group:
        first = await group.client.enqueue(plain, 1, timeout=3.0)
        ids = await group.client.enqueue_many(plain, [2, 3])
        with trio.fail_after(15):
            assert [await group.client.result(job_id) for job_id in (first, *ids)] == [1, 2, 3]


# What undoes everything.


async def test_an_error_of_work_reaches_the_handler_as_it_was_raised(conninfo: str) -> None:
    error = ZeroDivisionError("in work")
    caught: list[BaseException] = []

    async def handler(job: triojobs.Job[Any]) -> Any:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            triojobs.enqueue_on(conn, follow_ups, job.id)
            raise error

        for method in (job.commit, job.transact):
            try:
                await method(work)
            except ZeroDivisionError as exc:
                caught.append(exc)
        return "went on"

    ended = await run_job(conninfo, handler)
    assert caught == [error, error]
    assert ended.info.result == "went on"
    assert notes(conninfo) == []
    assert waiting_in(conninfo, follow_ups) == 0


async def test_a_database_error_of_work_reaches_the_handler_as_psycopg_raised_it(conninfo: str) -> None:
    caught: list[psycopg.Error] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            conn.execute("SELECT 1/0")

        try:
            await job.commit(work)
        except psycopg.errors.DivisionByZero as exc:
            caught.append(exc)
        await job.commit(lambda conn: note(conn, job, "then"))  # the connection is as good as new

    await run_job(conninfo, handler)
    assert len(caught) == 1
    assert notes(conninfo) == ["then"]


async def test_an_uncaught_error_of_work_fails_the_attempt_and_the_next_one_commits(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job, f"attempt {job.attempt}")
            if job.attempt == 1:
                raise ValueError("once")

        await job.commit(work)

    ended = await run_job(conninfo, handler)
    assert outcomes(conninfo, ended.info.id) == [(1, "failed"), (2, "done")]
    assert notes(conninfo) == ["attempt 2"]


async def test_work_that_asks_for_a_rollback_has_not_committed(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            raise psycopg.Rollback

        for method in (job.transact, job.commit):
            with pytest.raises(psycopg.Rollback):
                await method(work)
        raise triojobs.Kill("seen")

    ended = await run_job(conninfo, handler)
    assert (ended.info.status, ended.info.error) == ("killed", "seen")
    assert notes(conninfo) == []


@dataclass
class Receipt:
    number: int


async def test_a_value_that_is_no_result_of_the_queue_undoes_everything(conninfo: str) -> None:
    typed: triojobs.Queue[Any, Receipt] = triojobs.Queue("typed", result=Receipt)
    caught: list[triojobs.CodecError] = []

    async def handler(job: triojobs.Job[Any]) -> Any:
        def work(conn: psycopg.Connection[Any]) -> Any:
            note(conn, job)
            return {"number": 1}

        with pytest.raises(triojobs.CodecError) as refused:
            await job.commit(work)
        caught.append(refused.value)
        return await job.commit(lambda conn: Receipt(2))

    ended = await run_job(conninfo, handler, queue=typed)
    assert isinstance(caught[0], triojobs.OptionError)
    assert caught[0].field == "result"
    assert ended.info.result == {"number": 2}  # read without its queue
    assert notes(conninfo) == []


async def test_a_result_over_the_limit_undoes_everything(conninfo: str) -> None:
    small: triojobs.Queue[Any, Any] = triojobs.Queue("small", result_limit=100)

    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> bytes:
            note(conn, job)
            return b"x" * 101

        await job.commit(work)

    ended = await run_job(conninfo, handler, queue=small, job={"max_attempts": 1})
    assert ended.info.status == "killed"
    assert "at most 100 bytes" in (ended.info.error or "")
    assert notes(conninfo) == []


async def test_transact_encodes_nothing(conninfo: str) -> None:
    thing = object()

    async def handler(job: triojobs.Job[Any]) -> bool:
        return await job.transact(lambda conn: thing) is thing

    assert (await run_job(conninfo, handler)).info.result is True


async def test_a_constraint_that_fails_at_the_commit_undoes_everything(conninfo: str) -> None:
    rows(conninfo, "CREATE TABLE unique_late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    caught: list[triojobs.DatabaseError] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            conn.execute("INSERT INTO unique_late VALUES (1), (1)")

        try:
            await job.commit(work)
        except triojobs.DatabaseError as exc:
            caught.append(exc)
            raise

    ended = await run_job(conninfo, handler, job={"max_attempts": 1})
    assert ended.info.status == "killed"
    assert (caught[0].sqlstate, caught[0].committed) == ("23505", False)
    assert notes(conninfo) == []


# Transactions inside.


async def test_savepoints_inside_work_are_the_users(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job, "kept")
            with conn.transaction():
                note(conn, job, "inner")
            with pytest.raises(psycopg.errors.DivisionByZero), conn.transaction():
                note(conn, job, "undone")
                conn.execute("SELECT 1/0")
            with conn.transaction() as inner:
                note(conn, job, "given up")
                raise psycopg.Rollback(inner)

        await job.commit(work)

    ended = await run_job(conninfo, handler)
    assert ended.info.status == "done"
    assert notes(conninfo) == ["inner", "kept"]


async def test_a_conflict_of_a_follow_up_undoes_the_follow_up_alone(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            triojobs.enqueue_on(conn, follow_ups, 1, key="same")
            with pytest.raises(triojobs.DuplicateJobError):
                triojobs.enqueue_on(conn, follow_ups, 2, key="same")
            note(conn, job)

        await job.commit(work)

    assert (await run_job(conninfo, handler)).info.status == "done"
    assert waiting_in(conninfo, follow_ups) == 1
    assert notes(conninfo) == ["work"]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("method", ["commit", "transact"])
async def test_work_that_ends_the_transaction_itself_is_told_so(
    conninfo: str, method: str, statement: Any
) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            conn.execute(statement)

        with pytest.raises(triojobs.TriojobsError, match="ended the transaction itself") as caught:
            await getattr(job, method)(work)
        assert caught.value.hint
        assert places(conninfo)["leases"] == 1
        raise triojobs.Kill("seen")

    ended = await run_job(conninfo, handler)
    assert (ended.info.status, ended.info.error) == ("killed", "seen")
    # What work committed by itself is committed; nobody can undo it.
    assert notes(conninfo) == (["work"] if statement == "COMMIT" else [])


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_psycopgs_own_commit_and_rollback_are_refused_and_undo_everything(
    conninfo: str, end: str
) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            getattr(conn, end)()

        await job.commit(work)

    ended = await run_job(conninfo, handler, job={"max_attempts": 1})
    assert ended.info.status == "killed"
    assert "ProgrammingError" in (ended.info.error or "")
    assert notes(conninfo) == []


async def test_work_that_swallows_a_database_error_outside_of_a_savepoint_is_told_so(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            with pytest.raises(psycopg.errors.DivisionByZero):
                conn.execute("SELECT 1/0")

        await job.commit(work)

    ended = await run_job(conninfo, handler, job={"max_attempts": 1})
    assert ended.info.status == "killed"
    assert "savepoint" in (ended.info.error or "")
    assert notes(conninfo) == []


async def test_work_that_closes_its_connection_has_written_nothing(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            conn.close()

        if job.attempt == 1:
            await job.commit(work)
        await job.commit(lambda conn: note(conn, job, "second attempt"))

    ended = await run_job(conninfo, handler)
    assert outcomes(conninfo, ended.info.id) == [(1, "failed"), (2, "done")]
    assert notes(conninfo) == ["second attempt"]


# Claims that have ended.


async def test_a_second_commit_is_stale_and_writes_nothing(conninfo: str) -> None:
    worked: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: "first")
        for method in (job.commit, job.transact):
            with pytest.raises(triojobs.StaleClaimError) as caught:
                await method(lambda conn: worked.append("again"))
            assert caught.value.job_id == job.id

    ended = await run_job(conninfo, handler)
    assert ended.info.result == "first"
    assert worked == []
    assert ended.statistics.stale == 0


async def test_of_two_commits_at_once_one_is_done_and_one_stale(conninfo: str) -> None:
    both_at_work = trio.Event()
    at_work: list[str] = []
    ends: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        token = trio.lowlevel.current_trio_token()

        def work(name: str, conn: psycopg.Connection[Any]) -> str:
            note(conn, job, name)
            at_work.append(name)
            if len(at_work) == 2:
                trio.from_thread.run_sync(both_at_work.set, trio_token=token)
            trio.from_thread.run(both_at_work.wait, trio_token=token)
            return name

        async def commit(name: str) -> None:
            try:
                ends.append(await job.commit(functools.partial(work, name)))
            except triojobs.StaleClaimError:
                ends.append("stale")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit, "one")
            nursery.start_soon(commit, "other")

    ended = await run_job(conninfo, handler)
    (done,) = set(ends) - {"stale"}
    assert sorted(ends) == sorted([done, "stale"])
    assert notes(conninfo) == [done]
    assert ended.info.result == done
    assert outcomes(conninfo, ended.info.id) == [(1, "done")]


async def test_after_its_handler_has_ended_a_job_can_write_nothing(conninfo: str) -> None:
    kept: list[triojobs.Job[Any]] = []
    worked: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        kept.append(job)
        return "returned"

    workers = [triojobs.Worker(plain, handler)]
    async with triojobs.open_worker_group(conninfo, workers) as group:
        job_id = await group.client.enqueue(plain, None)
        with trio.fail_after(15):
            await group.client.result(job_id)
        for method in (kept[0].commit, kept[0].transact):
            with pytest.raises(triojobs.StaleClaimError):
                await method(lambda conn: worked.append("late"))
    assert worked == []


async def test_when_the_job_was_rescued_from_us_everything_is_undone(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        if job.attempt > 1:
            return "second"

        def work(conn: psycopg.Connection[Any]) -> None:
            note(conn, job)
            triojobs.enqueue_on(conn, follow_ups, job.id)

        assert retire_groups(conninfo) == 1
        for method, doing in ((job.transact, "transacting"), (job.commit, "committing")):
            with pytest.raises(triojobs.StaleClaimError, match=doing) as caught:
                await method(work)
            assert caught.value.job_id == job.id
        return "first"

    ended = await run_job(conninfo, handler, beat_interval=0.1)
    assert ended.info.result == "second"
    assert notes(conninfo) == []
    assert waiting_in(conninfo, follow_ups) == 0
    assert ended.statistics.stale == 1


# The wrong place, the wrong function.


@pytest.mark.parametrize("method", ["commit", "transact"])
async def test_in_a_thread_it_is_refused_with_what_to_do_instead(conninfo: str, method: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        def in_thread() -> None:
            with pytest.raises(triojobs.TriojobsError, match=f"job.{method}") as caught:
                getattr(job, method)(lambda conn: None)
            assert "from the handler's task" in caught.value.hint

        await trio.to_thread.run_sync(in_thread)
        await job.commit(lambda conn: in_thread())  # in work, too

    assert (await run_job(conninfo, handler)).info.status == "done"


class AsyncCall:
    async def __call__(self, conn: Any) -> None: ...


async def coroutine_function(conn: Any) -> None: ...


def generator_function(conn: Any) -> Any:
    yield


@pytest.mark.parametrize("method", ["commit", "transact"])
@pytest.mark.parametrize(
    "work",
    [
        coroutine_function,
        functools.partial(coroutine_function),
        AsyncCall(),
        lambda conn: coroutine_function(conn),
        generator_function,
        None,
        "select 1",
    ],
    ids=["async", "partial", "object", "lambda", "generator", "None", "text"],
)
async def test_what_is_no_synchronous_function_is_refused(conninfo: str, method: str, work: Any) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        with pytest.raises(triojobs.OptionError, match="synchronous function") as caught:
            await getattr(job, method)(work)
        assert caught.value.field == "work"
        assert places(conninfo)["leases"] == 1
        raise triojobs.Kill("seen")

    ended = await run_job(conninfo, handler)
    assert (ended.info.status, ended.info.error) == ("killed", "seen")


async def test_a_fence_names_the_claim_for_tables_of_the_users_own(conninfo: str) -> None:
    fences: list[tuple[Any, int]] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        fences.append(job.fence)
        if job.attempt == 1:
            raise ValueError("again")
        await job.commit(lambda conn: None)

    ended = await run_job(conninfo, handler)
    assert len(set(fences)) == 2
    assert ended.info.fence == fences[1]
    written = rows(conninfo, "SELECT group_id, claim_no FROM triojobs.outcomes ORDER BY no")
    assert written == fences
    assert value(conninfo, "SELECT count(*) FROM triojobs.leases") == 0
