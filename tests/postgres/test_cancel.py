"""`client.cancel` through groups: what it answers, what the handler learns, and what becomes of the job."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.looking import blocked, locked, places, until
from tests.tools.running import AT_ONCE, outcomes, plain
from triojobs._sql import notify

# No beat comes by itself while a test lasts: a request arrives by its notification or not at all.
RARE_BEATS: dict[str, Any] = {"lease_duration": 7200.0, "beat_interval": 3500.0}
DEAF: dict[str, Any] = RARE_BEATS | {"notify": False, "poll_interval": 0.1}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


class Sleeper:
    """A handler that sleeps until it is cancelled, and remembers what it was told."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.reasons: list[str | None] = []

    async def handler(self, job: triojobs.Job[Any]) -> None:
        assert job.cancel_reason is None
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.reasons.append(job.cancel_reason)


async def cancelled(client: triojobs.Client, job_id: int) -> triojobs.JobCancelledError:
    """Wait until the job is cancelled; return what its waiters are told."""
    with trio.fail_after(15), pytest.raises(triojobs.JobCancelledError) as caught:
        await client.result(job_id)
    return caught.value


# Waiting jobs.


@pytest.mark.parametrize("delay", [None, 3600.0], ids=["due", "scheduled"])
async def test_a_waiting_job_is_cancelled_at_once_and_never_runs(conninfo: str, delay: float | None) -> None:
    ran: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        ran.append(job.id)

    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None, delay=delay)
        assert await client.cancel(job_id, reason="sold out")
        info = await client.get(job_id)
        assert info is not None
        assert (info.status, info.error, info.cancel_reason) == ("cancelled", "sold out", "sold out")
        assert (info.attempts, info.group, info.fence) == (0, None, None)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        with trio.fail_after(15):
            await group.wait_idle()
    assert ran == []
    assert places(conninfo) == {"jobs": 1, "outcomes": 1}


async def test_a_job_that_waits_for_its_next_attempt_is_cancelled(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise ValueError("first")

    patient = triojobs.Worker(plain, handler, retry=triojobs.Backoff(first=3600.0))
    async with triojobs.open_worker_group(conninfo, [patient]) as group:
        job_id = await group.client.enqueue(plain, None)
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.scheduled")
        assert await group.client.cancel(job_id, reason="enough")
        told = await cancelled(group.client, job_id)
    assert (told.attempts, told.reason) == (1, "enough")
    assert outcomes(conninfo, job_id) == [(1, "failed"), (1, "cancelled")]


# Running jobs.


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_a_running_handler_is_cancelled_and_told_the_reason(conninfo: str, isolation: Any) -> None:
    sleeper = Sleeper()
    workers = [triojobs.Worker(plain, sleeper.handler)]
    async with triojobs.open_worker_group(conninfo, workers, isolation=isolation) as group:
        job_id = await group.client.enqueue(plain, None)
        await sleeper.started.wait()
        assert await group.client.cancel(job_id, reason="sold out")
        told = await cancelled(group.client, job_id)
        info = await group.client.get(job_id)
        assert group.statistics().running == 0
    assert sleeper.reasons == ["sold out"]
    assert (told.attempts, told.reason) == (1, "sold out")
    assert info is not None
    assert (info.status, info.cancel_reason, info.group) == ("cancelled", "sold out", group.group_id)
    assert outcomes(conninfo, job_id) == [(1, "cancelled")]
    assert group.report.settled["cancelled"] == 1


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_other_jobs_and_the_slot_are_not_touched(conninfo: str, isolation: Any) -> None:
    started: list[Any] = []
    go_on = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> Any:
        started.append(job.payload)
        if job.payload == "victim":
            await trio.sleep_forever()
        await go_on.wait()
        return job.payload

    workers = [triojobs.Worker(plain, handler, concurrency=2)]
    async with triojobs.open_worker_group(conninfo, workers, isolation=isolation) as group:
        victim, beside, *after = await group.client.enqueue_many(plain, ["victim", "beside", 1, 2, 3])
        with trio.fail_after(15):
            while len(started) < 2:
                await trio.sleep(0.005)
        await group.client.cancel(victim)
        await cancelled(group.client, victim)
        go_on.set()
        with trio.fail_after(15):
            assert [await group.client.result(i) for i in (beside, *after)] == ["beside", 1, 2, 3]


async def test_a_handler_that_returns_in_spite_of_it_is_done(conninfo: str) -> None:
    started = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str | None:
        started.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return job.cancel_reason
        return "not cancelled"

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        job_id = await group.client.enqueue(plain, None)
        await started.wait()
        assert await group.client.cancel(job_id, reason="too late")
        with trio.fail_after(15):
            assert await group.client.result(job_id) == "too late"
    assert outcomes(conninfo, job_id) == [(1, "done")]


async def test_an_error_while_being_cancelled_is_logged_as_itself_and_the_job_cancelled(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    started = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in the clean-up")

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        job_id = await group.client.enqueue(plain, None)
        await started.wait()
        await group.client.cancel(job_id, reason="sold out")
        assert (await cancelled(group.client, job_id)).reason == "sold out"
    (record,) = [r for r in caplog.records if getattr(r, "event", "") == "error_aside"]
    assert "ValueError: in the clean-up" in record.getMessage()


@pytest.mark.parametrize("end", [ValueError("x"), triojobs.RetryAfter(0.0)], ids=["error", "RetryAfter"])
async def test_an_attempt_that_fails_after_the_request_is_not_retried(conninfo: str, end: Exception) -> None:
    """Whatever the handler has heard: the end of the claim finds the request on its lease."""
    started, go_on = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        started.set()
        await go_on.wait()
        raise end

    workers = [triojobs.Worker(plain, handler, retry=AT_ONCE)]
    async with triojobs.open_worker_group(conninfo, workers, **DEAF) as group:
        job_id = await group.client.enqueue(plain, None)
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.leases")
        await started.wait()
        assert await group.client.cancel(job_id, reason="enough")
        go_on.set()
        assert (await cancelled(group.client, job_id)).reason == "enough"
    assert outcomes(conninfo, job_id) == [(1, "cancelled")]
    assert group.report.settled["cancelled"] == 1


async def test_another_process_may_ask(conninfo: str) -> None:
    sleeper = Sleeper()
    async with (
        triojobs.open_client(conninfo) as client,
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, sleeper.handler)], **RARE_BEATS),
    ):
        job_id = await client.enqueue(plain, None)
        with trio.fail_after(15):
            await sleeper.started.wait()
        assert await client.cancel(job_id, reason="from afar")
        await cancelled(client, job_id)
    assert sleeper.reasons == ["from afar"]


async def test_the_notification_brings_it_without_waiting_for_a_beat(conninfo: str) -> None:
    sleeper = Sleeper()
    workers = [triojobs.Worker(plain, sleeper.handler)]
    async with triojobs.open_worker_group(conninfo, workers, **RARE_BEATS) as group:
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.waiting")  # it listens
        job_id = await group.client.enqueue(plain, None)
        await sleeper.started.wait()
        await group.client.cancel(job_id)
        await cancelled(group.client, job_id)


async def test_a_lost_notification_costs_one_beat(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "notify_group", lambda conn, group_id: None)
    sleeper = Sleeper()
    workers = [triojobs.Worker(plain, sleeper.handler)]
    async with triojobs.open_worker_group(conninfo, workers, beat_interval=0.3) as group:
        job_id = await group.client.enqueue(plain, None)
        await sleeper.started.wait()
        await group.client.cancel(job_id, reason="by a beat")
        await cancelled(group.client, job_id)
    assert sleeper.reasons == ["by a beat"]


async def test_of_two_cancels_the_first_reason_stays(conninfo: str) -> None:
    started, let_go = trio.Event(), trio.Event()

    async def stubborn(job: triojobs.Job[Any]) -> None:
        started.set()
        with trio.CancelScope(shield=True):
            await let_go.wait()
        await trio.sleep_forever()  # until the request arrives, whenever that is

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, stubborn)]) as group:
        runs = await group.client.enqueue(plain, None)
        await started.wait()
        waits = await group.client.enqueue(plain, None, delay=3600.0)
        assert await group.client.cancel(runs, reason="first")
        assert await group.client.cancel(runs, reason="second")
        let_go.set()
        assert (await cancelled(group.client, runs)).reason == "first"
        assert await group.client.cancel(waits, reason="first")
        assert not await group.client.cancel(waits, reason="second")
        assert (await cancelled(group.client, waits)).reason == "first"
    assert outcomes(conninfo, runs) == [(1, "cancelled")]


# Ended and unknown jobs.


async def test_an_ended_job_is_left_as_it_is(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        if job.payload == "killed":
            raise triojobs.Kill
        return "done"

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        ids = await group.client.enqueue_many(plain, ["done", "killed"])
        with trio.fail_after(15):
            await group.wait_idle()
        for job_id in ids:
            before = await group.client.get(job_id)
            assert not await group.client.cancel(job_id, reason="too late")
            assert await group.client.get(job_id) == before


async def test_an_unknown_job_is_not_found(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.JobNotFoundError) as caught:
            await client.cancel(12345)
    assert caught.value.job_id == 12345


@pytest.mark.parametrize("reason", ["x" * 8193, "nul\0", 7, None])
async def test_a_reason_out_of_range_is_refused(conninfo: str, reason: Any) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
        with pytest.raises(triojobs.OptionError) as caught:
            await client.cancel(job_id, reason=reason)
        assert caught.value.field == "reason"
        info = await client.get(job_id)
        assert info is not None
        assert info.status == "pending"


@pytest.mark.parametrize("reason", ["", "é" * 4096])
async def test_a_reason_within_the_range_is_kept(conninfo: str, reason: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
        assert await client.cancel(job_id, reason=reason)
        assert (await cancelled(client, job_id)).reason == reason


# Races.


async def test_a_cancel_that_waits_for_a_claim_reaches_its_handler(conninfo: str) -> None:
    """The claim stands inside its statement; the cancel waits for the row that it has taken."""
    sleeper = Sleeper()
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, None)
        # A lease of the same id, not committed: the claim's insert waits for it.
        gate = (
            "INSERT INTO triojobs.leases (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at)"
            " VALUES (%s, 0, gen_random_uuid(), 1, 1, 'gate', 0, now())"
        )
        with locked(conninfo, gate, job_id) as held:
            async with (
                triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, sleeper.handler)]),
                trio.open_nursery() as nursery,
            ):
                await blocked(conninfo, "claim")
                answers: list[bool] = []

                @nursery.start_soon
                async def cancel() -> None:
                    answers.append(await client.cancel(job_id, reason="caught"))

                await blocked(conninfo, "client")
                held.rollback()
                assert (await cancelled(client, job_id)).reason == "caught"
    assert answers == [True]
    assert sleeper.reasons in ([], ["caught"])  # [] when it was cancelled before its first step
    assert outcomes(conninfo, job_id) == [(1, "cancelled")]


@pytest.mark.parametrize("first", ["settle", "cancel"])
async def test_a_cancel_and_a_settlement_that_wait_for_the_same_lease(conninfo: str, first: str) -> None:
    """Whichever comes first, the answer of `cancel` and the rows agree."""
    returning, go_on = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        returning.set()
        await go_on.wait()
        return "returned"

    async with (
        triojobs.open_client(conninfo) as client,
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], **DEAF),
        trio.open_nursery() as nursery,
    ):
        job_id = await client.enqueue(plain, None)
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.leases", seconds=15)
        await returning.wait()
        answers: list[bool] = []

        async def cancel() -> None:
            answers.append(await client.cancel(job_id, reason="meanwhile"))

        with locked(conninfo, "SELECT FROM triojobs.leases FOR UPDATE") as held:
            if first == "settle":
                go_on.set()
                await blocked(conninfo, "settle")
                nursery.start_soon(cancel)
                await blocked(conninfo, "client")
            else:
                nursery.start_soon(cancel)
                await blocked(conninfo, "client")
                go_on.set()
                await blocked(conninfo, "settle")
            held.rollback()
            with trio.fail_after(15):
                assert await client.result(job_id) == "returned"
    assert answers == [first == "cancel"]
    assert outcomes(conninfo, job_id) == [(1, "done")]


async def test_a_released_job_whose_cancel_was_asked_for_does_not_run_again(conninfo: str) -> None:
    """The group stops between the request and the beat that would have brought it."""
    sleeper = Sleeper()
    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(plain, sleeper.handler)], **DEAF
        ) as group:
            job_id = await group.client.enqueue(plain, None)
            await until(conninfo, "SELECT count(*) = 1 FROM triojobs.leases")
            await sleeper.started.wait()
            assert await group.client.cancel(job_id, reason="enough")
            scope.cancel()
    assert outcomes(conninfo, job_id) == [(1, "cancelled")]
    assert places(conninfo) == {"jobs": 1, "outcomes": 1}
    assert (group.report.settled["cancelled"], group.report.released) == (1, 0)
