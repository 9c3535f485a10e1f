"""What handlers return, raise and refuse to do, and what the rows say afterwards."""

from __future__ import annotations

import contextvars
import datetime as dt
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import rows

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
AT_ONCE = triojobs.Backoff(first=0.0, jitter=0.0)
Handler = Callable[[triojobs.Job[Any]], Awaitable[Any]]


def worker(handler: Handler, **options: Any) -> triojobs.Worker[Any, Any]:
    return triojobs.Worker(plain, handler, **({"retry": AT_ONCE} | options))


async def run_one(
    conninfo: str, handler: Handler, *, job: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Run one job until it has ended and return its info."""
    async with triojobs.open_worker_group(conninfo, [worker(handler, **options)]) as group:
        job_id = await group.client.enqueue(plain, None, **(job or {}))
        with trio.fail_after(20):
            async with group.client.as_completed([job_id]) as completions:
                async for info in completions:
                    return info


def attempts_of(conninfo: str) -> list[tuple[int, str, str | None]]:
    with psycopg.connect(conninfo) as conn:
        return conn.execute("SELECT attempt, status, error FROM triojobs.outcomes ORDER BY no").fetchall()


def places(conninfo: str) -> dict[str, int]:
    with psycopg.connect(conninfo) as conn:
        tables = ("ready", "scheduled", "leases", "outcomes")
        return {t: conn.execute(f"SELECT count(*) FROM triojobs.{t}").fetchone()[0] for t in tables}


async def test_a_result_is_kept_and_typed(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        return {"attempt": job.attempt, "id": job.id}

    info = await run_one(conninfo, handler)
    assert (info.status, info.result) == ("done", {"attempt": 1, "id": info.id})


async def test_a_failed_attempt_is_retried_with_its_error_shown_to_the_next(conninfo: str) -> None:
    seen = []

    async def handler(job: triojobs.Job[Any]) -> str:
        seen.append((job.attempt, job.last_error))
        if job.attempt == 1:
            raise ValueError("first")
        return "second"

    info = await run_one(conninfo, handler)
    assert info.attempts == 2
    assert seen[0] == (1, None)
    assert seen[1][0] == 2
    assert "ValueError: first" in seen[1][1]
    assert [(a, s) for a, s, _ in attempts_of(conninfo)] == [(1, "failed"), (2, "done")]


async def test_a_job_whose_attempts_are_used_up_is_killed(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise RuntimeError(f"attempt {job.attempt}")

    info = await run_one(conninfo, handler, job={"max_attempts": 3})
    assert (info.status, info.attempts) == ("killed", 3)
    assert "RuntimeError: attempt 3" in info.error
    assert [s for _, s, _ in attempts_of(conninfo)] == ["failed", "failed", "killed"]


async def test_the_retry_delay_is_stored_with_the_job(conninfo: str) -> None:
    failed = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        failed.set()
        raise ValueError

    patient = worker(handler, retry=triojobs.Backoff(first=100.0, jitter=0.0))
    async with triojobs.open_worker_group(conninfo, [patient]) as group:
        job_id = await group.client.enqueue(plain, None)
        await failed.wait()
    with psycopg.connect(conninfo) as conn:
        row = conn.execute(
            "SELECT s.attempts, extract(epoch FROM s.run_at - o.finished_at)::float8 FROM triojobs.scheduled s"
            " JOIN triojobs.outcomes o ON o.job_id = s.id WHERE s.id = %s",
            [job_id],
        ).fetchone()
    assert row[0] == 1
    assert row[1] == pytest.approx(100.0, abs=0.5)


async def test_kill_ends_the_job_whatever_attempts_are_left(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise triojobs.Kill("no use")

    info = await run_one(conninfo, handler)
    assert (info.status, info.error, info.attempts) == ("killed", "no use", 1)


async def test_retry_after_counts_the_attempt_and_sets_its_own_delay(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        if job.attempt == 1:
            raise triojobs.RetryAfter(0.0)

    info = await run_one(conninfo, handler, retry=triojobs.Backoff(first=3600.0))
    assert (info.status, info.attempts) == ("done", 2)


async def test_snooze_does_not_count_the_attempt(conninfo: str) -> None:
    calls = []

    async def handler(job: triojobs.Job[Any]) -> None:
        calls.append(job.attempt)
        if len(calls) < 3:
            raise triojobs.Snooze(0.0)

    info = await run_one(conninfo, handler, job={"max_attempts": 1})
    assert (info.status, info.attempts, calls) == ("done", 1, [1, 1, 1])


async def test_a_signal_raised_inside_a_nursery_is_still_a_signal(conninfo: str) -> None:
    async def raise_kill() -> None:
        raise triojobs.Kill("from a child")

    async def handler(job: triojobs.Job[Any]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_kill)

    info = await run_one(conninfo, handler)
    assert (info.status, info.error) == ("killed", "from a child")


async def test_an_exception_group_fails_the_attempt_and_names_its_members(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise ExceptionGroup("two", [ValueError("one"), KeyError("other")])

    info = await run_one(conninfo, handler, job={"max_attempts": 1})
    assert info.status == "killed"
    assert "ValueError: one" in info.error
    assert "KeyError: 'other'" in info.error


async def test_a_handler_that_is_no_coroutine_function_fails_the_attempt(conninfo: str) -> None:
    def handler(job: triojobs.Job[Any]) -> Any:
        return None

    info = await run_one(conninfo, handler, job={"max_attempts": 1})
    assert info.status == "killed"
    assert "async" in info.error


async def test_a_payload_that_does_not_fit_the_type_is_a_failed_attempt(conninfo: str) -> None:
    numbers: triojobs.Queue[int, Any] = triojobs.Queue("plain", int)

    async def handler(job: triojobs.Job[int]) -> None:
        raise AssertionError("must not run")

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(numbers, handler, retry=AT_ONCE)]
    ) as group:
        job_id = await group.client.enqueue(plain, "no number", max_attempts=2)
        with trio.fail_after(10), pytest.raises(triojobs.JobFailedError, match="does not fit") as caught:
            await group.client.result(job_id)
    assert caught.value.attempts == 2


async def test_a_timeout_is_a_failed_attempt(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await trio.sleep_forever()

    info = await run_one(conninfo, handler, job={"max_attempts": 1, "timeout": 0.05})
    assert (info.status, info.error) == ("killed", "timed out after 0.05 s")


async def test_a_timed_out_slot_is_used_again(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        if job.payload == "slow":
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return "fine"

    slow = worker(handler, concurrency=1, timeout=0.05)
    async with triojobs.open_worker_group(conninfo, [slow]) as group:
        ids = await group.client.enqueue_many(
            plain, [triojobs.NewJob(p, max_attempts=1) for p in ("slow", "quick", "slow", "quick")]
        )
        with trio.fail_after(10):
            for job_id in (ids[1], ids[3]):
                assert await group.client.result(job_id) == "fine"
            await group.wait_idle()
        assert group.statistics().free == 1
    assert sorted(s for _, s, _ in attempts_of(conninfo)) == ["done", "done", "killed", "killed"]


async def test_a_handler_that_returns_after_its_timeout_is_done(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return "late"

    info = await run_one(conninfo, handler, job={"timeout": 0.05})
    assert (info.status, info.result) == ("done", "late")


async def test_a_job_past_its_deadline_is_killed_unstarted(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise AssertionError("must not run")

    past = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=5)
    info = await run_one(conninfo, handler, job={"deadline": past})
    assert info.status == "killed"
    assert "past its deadline" in info.error


async def test_a_running_job_is_killed_at_its_deadline(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        assert job.deadline is not None
        await trio.sleep_forever()

    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.4)
    info = await run_one(conninfo, handler, job={"deadline": soon})
    assert (info.status, info.error) == ("killed", "past its deadline")


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_context_variables_of_one_job_are_not_seen_by_the_next(conninfo: str, isolation: Any) -> None:
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")
    outside: contextvars.ContextVar[str] = contextvars.ContextVar("outside", default="unset")
    outside.set("kept")
    seen = []

    async def handler(job: triojobs.Job[Any]) -> None:
        seen.append((colour.get(), outside.get()))
        colour.set(f"of job {job.id}")
        outside.set("changed")
        if job.payload == "waits":
            await trio.lowlevel.checkpoint()

    async with triojobs.open_worker_group(
        conninfo, [worker(handler, concurrency=1)], isolation=isolation
    ) as group:
        await group.client.enqueue_many(plain, ["waits", "not", "waits", "not", "not"])
        with trio.fail_after(10):
            await group.wait_idle()
    assert seen == [("none", "kept")] * 5


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_cancel_gives_every_row_back_without_charging_an_attempt(conninfo: str, isolation: Any) -> None:
    running = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        running.set()
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(
            conninfo, [worker(handler, concurrency=3)], isolation=isolation
        ) as group:
            await group.client.enqueue_many(plain, range(5))
            await running.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert places(conninfo) == {"ready": 5, "scheduled": 0, "leases": 0, "outcomes": 0}
    assert group.report.released == group.statistics().claimed > 0
    with psycopg.connect(conninfo) as conn:
        assert conn.execute("SELECT max(attempts) FROM triojobs.ready").fetchone() == (0,)
        assert conn.execute(
            "SELECT bool_and(closed_at IS NOT NULL) FROM triojobs.worker_groups"
        ).fetchone() == (True,)


async def test_a_graceful_stop_lets_handlers_end(conninfo: str) -> None:
    running, go_on = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        running.set()
        await go_on.wait()
        return "ended"

    async with triojobs.open_worker_group(conninfo, [worker(handler, concurrency=1)]) as group:
        ids = await group.client.enqueue_many(plain, range(3))
        await running.wait()
        group.stop()
        go_on.set()
        await group.wait_stopped()
        assert group.report.settled["done"] == 1
    assert places(conninfo) == {"ready": 2, "scheduled": 0, "leases": 0, "outcomes": 1}
    assert len(ids) == 3


async def test_handlers_that_outlast_the_grace_period_are_cancelled_and_released(conninfo: str) -> None:
    running = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        running.set()
        await trio.sleep_forever()

    async with triojobs.open_worker_group(conninfo, [worker(handler)], grace_period=0.05) as group:
        await group.client.enqueue(plain, None)
        await running.wait()
    assert group.report.released == 1
    assert places(conninfo)["ready"] == 1


async def test_stop_does_not_cancel_the_body_and_its_client_closes(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
        group.stop()
        await group.wait_stopped()
        await trio.lowlevel.checkpoint()
        with pytest.raises(trio.ClosedResourceError):
            await group.client.enqueue(plain, None)
        with pytest.raises(trio.ClosedResourceError):
            await group.wait_idle()


async def test_a_handler_that_swallows_the_cancel_and_returns_is_done(conninfo: str) -> None:
    running = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        running.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return "all the same"

    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            await group.client.enqueue(plain, None)
            await running.wait()
            scope.cancel()
    assert group.report.settled["done"] == 1
    assert attempts_of(conninfo) == [(1, "done", None)]


async def test_a_handler_that_shields_its_clean_up_is_waited_for(conninfo: str) -> None:
    running, cleaned = trio.Event(), []

    async def handler(job: triojobs.Job[Any]) -> None:
        running.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
                cleaned.append(job.id)

    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            job_id = await group.client.enqueue(plain, None)
            await running.wait()
            scope.cancel()
    assert cleaned == [job_id]
    assert group.report.released == 1
    assert places(conninfo)["ready"] == 1


async def test_a_handler_that_never_ends_keeps_its_lease_and_its_stack_is_logged(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("triojobs._stubborn.STUBBORN_INTERVAL", 0.05)
    running, let_go = trio.Event(), trio.Event()

    async def stubborn(job: triojobs.Job[Any]) -> None:
        running.set()
        with trio.CancelScope(shield=True):
            await let_go.wait()

    def logged() -> bool:
        return any("does not end" in r.getMessage() for r in caplog.records)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def watch() -> None:
                with trio.CancelScope(shield=True):
                    while not logged():
                        await trio.sleep(0.01)
                    assert places(conninfo)["leases"] == 1
                    let_go.set()

            async with triojobs.open_worker_group(conninfo, [worker(stubborn)]) as group:
                await group.client.enqueue(plain, None)
                await running.wait()
                scope.cancel()
    assert logged()
    assert any("in stubborn" in r.getMessage() for r in caplog.records)
    assert group.report.settled["done"] == 1  # it returned in the end


async def test_a_handler_that_raises_while_being_cancelled_is_released_and_its_error_logged(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        running.set()
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while being cancelled")

    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            await group.client.enqueue(plain, None)
            await running.wait()
            scope.cancel()
    assert group.report.released == 1
    assert places(conninfo) == {"ready": 1, "scheduled": 0, "leases": 0, "outcomes": 0}
    assert any("ValueError: while being cancelled" in r.getMessage() for r in caplog.records)


async def test_a_group_that_mixes_cancelled_with_errors_is_split(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = trio.Event()

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("from a child")

    async def handler(job: triojobs.Job[Any]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(trio.sleep_forever)
            running.set()

    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            await group.client.enqueue(plain, None)
            await running.wait()
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert group.report.released == 1
    assert any("from a child" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("fatal", [SystemExit(3), GeneratorExit()])
async def test_system_exit_counts_the_attempt_propagates_and_releases_the_others(
    conninfo: str, fatal: BaseException
) -> None:
    waiting = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        if job.payload == "exit":
            await waiting.wait()
            raise fatal
        waiting.set()
        await trio.sleep_forever()

    with pytest.raises(type(fatal)) as caught:
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            await group.client.enqueue_many(plain, ["exit", "other"])
            await trio.sleep_forever()
    assert caught.value is fatal
    assert [(a, s) for a, s, _ in attempts_of(conninfo)] == [(1, "failed")]
    assert places(conninfo) == {"ready": 1, "scheduled": 1, "leases": 0, "outcomes": 1}
    assert group.report.released == 1


async def test_keyboard_interrupt_in_a_handler_releases_and_propagates(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            await group.client.enqueue(plain, None)
            await trio.sleep_forever()
    assert places(conninfo) == {"ready": 1, "scheduled": 0, "leases": 0, "outcomes": 0}
    assert group.report.released == 1


async def test_an_error_of_the_body_comes_bare_and_releases_the_rows(conninfo: str) -> None:
    running = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        running.set()
        await trio.sleep_forever()

    with pytest.raises(ZeroDivisionError):
        async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
            await group.client.enqueue(plain, None)
            await running.wait()
            raise ZeroDivisionError
    assert group.report.released >= 1  # a claim on its way may take what was just given back
    assert rows(conninfo, "SELECT attempts FROM triojobs.ready") == [(0,)]


async def test_the_attempts_a_job_used_show_in_its_report(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        match job.payload:
            case "kill":
                raise triojobs.Kill
            case "snooze" if job.id not in snoozed:
                snoozed.add(job.id)
                raise triojobs.Snooze(0)
            case "fail" if job.attempt == 1:
                raise ValueError

    snoozed: set[int] = set()
    async with triojobs.open_worker_group(conninfo, [worker(handler)]) as group:
        ids = await group.client.enqueue_many(plain, ["kill", "snooze", "fail", "done", "done"])
        with trio.fail_after(10):
            async with group.client.as_completed(ids) as completions:
                ended = [info.id async for info in completions]
    assert sorted(ended) == sorted(ids)
    assert group.report.settled == {"done": 4, "failed": 1, "killed": 1, "cancelled": 0, "snoozed": 1}
    with psycopg.connect(conninfo) as conn:
        rows = conn.execute(
            "SELECT status, count(*) FROM triojobs.outcomes WHERE group_id = ANY (%s) GROUP BY 1",
            [list(group.report.group_ids)],
        ).fetchall()
    assert dict(rows) == {"done": 4, "failed": 1, "killed": 1}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")
