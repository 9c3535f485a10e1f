"""Slots without fetcher and database: how they wake, and a slot's cancel scope from job to job."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from tests.tools.mutants import code, noticed
from triojobs._handling import Slots
from triojobs._lease import Lease
from triojobs._model import CancelRequest, Claim, Outcome, Registration
from triojobs._registration import LiveRegistration

QUEUE: triojobs.Queue[Any, Any] = triojobs.Queue("q")


class FewSlots:
    """A worker with one slot or a few, and claims that are handed to them directly."""

    def __init__(self, handler: Any, concurrency: int) -> None:
        record = Registration(uuid.uuid4(), "test", "localhost", 1, "0", lease_duration=30.0)
        self.live = LiveRegistration(record, Lease(duration=30.0, margin=5.0, interval=6.0))
        store: Any = None
        self.slots = Slots(
            triojobs.Worker(QUEUE, handler, concurrency=concurrency),
            self.live,
            store,
            busy_ids=set(),
            on_free=lambda: None,
        )

    def hand_in(self, *job_ids: int, timeout: float | None = None) -> None:
        """Claim jobs and give them to the slots, busy or not."""
        self.live.ledger.book([self._claim(job_id, timeout) for job_id in job_ids])
        self.slots.hand_in(self.live.ledger.take_booked(), trio.current_time())

    def _claim(self, job_id: int, timeout: float | None) -> Claim:
        return Claim(
            job_id=job_id,
            claim_no=job_id,
            group_id=self.live.group_id,
            queue=QUEUE.name,
            attempt=1,
            max_attempts=5,
            priority=0,
            run_at=0.0,
            enqueued_at=0.0,
            payload=QUEUE.encode_payload(None),
            encoding=b"cbor",
            timeout=timeout,
            deadline=None,
            claimed_at=0.0,
            key=None,
            metadata=None,
            last_error=None,
        )

    def ended(self) -> dict[int, Outcome]:
        return {s.job_id: s.outcome for s in self.live.ledger.ended(100)}


@asynccontextmanager
async def few_slots(handler: Any, *, concurrency: int = 1) -> AsyncIterator[FewSlots]:
    slot = FewSlots(handler, concurrency)
    async with trio.open_nursery() as nursery:
        for _ in range(concurrency):
            nursery.start_soon(slot.slots.slot)
        await trio.testing.wait_all_tasks_blocked()
        yield slot
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("returns", [True, False], ids=["returns", "is cancelled"])
@pytest.mark.parametrize("why", ["timeout", "request"])
async def test_the_next_job_does_not_meet_a_scope_that_was_used_up(
    autojump_clock: Any, why: str, returns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there already when the cancelled one ends, so that the slot takes it without a checkpoint."""
    monkeypatch.setattr("triojobs._handling.YIELD_AFTER", 3600.0)  # however slow this machine is
    running, let_go = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        if job.id == 1:
            running.set()
            with trio.CancelScope(shield=True):
                await let_go.wait()
            if returns:
                return
        await trio.lowlevel.checkpoint()

    async with few_slots(handler) as slot:
        slot.hand_in(1, timeout=1.0 if why == "timeout" else None)
        await running.wait()
        if why == "timeout":
            await trio.sleep(2.0)
        else:
            slot.slots.cancel(CancelRequest(1, 1, "enough"))
        slot.hand_in(2)
        let_go.set()
        await trio.testing.wait_all_tasks_blocked()
    first = Outcome.FAILED if why == "timeout" else Outcome.CANCELLED
    assert slot.ended() == {1: Outcome.DONE if returns else first, 2: Outcome.DONE}


async def test_a_job_that_ended_in_time_takes_its_deadline_with_it(autojump_clock: Any) -> None:
    started: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        started.append(job.id)
        await trio.sleep(0.5 if job.id == 1 else 5.0)

    async with few_slots(handler) as slot:
        slot.hand_in(1, timeout=1.0)
        slot.hand_in(2)
        await trio.sleep(10.0)
    assert started == [1, 2]
    assert slot.ended() == {1: Outcome.DONE, 2: Outcome.DONE}


async def test_a_request_for_an_older_claim_cancels_nobody(autojump_clock: Any) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        await trio.sleep(1.0)

    async with few_slots(handler) as slot:
        slot.hand_in(7)
        await trio.testing.wait_all_tasks_blocked()
        assert not slot.slots.cancel(CancelRequest(7, 6, "of the last attempt"))
        assert not slot.slots.cancel(CancelRequest(8, 7, "of another job"))
        await trio.sleep(2.0)
    assert slot.ended() == {7: Outcome.DONE}


async def test_jobs_that_wait_hold_up_none_of_those_behind_them(autojump_clock: Any) -> None:
    started: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        started.append(job.id)
        await trio.sleep_forever()

    async with few_slots(handler, concurrency=7) as slots:
        slots.hand_in(1, 2, 3, 4, 5)
        slots.hand_in(6)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(started) == [1, 2, 3, 4, 5, 6]
        slots.hand_in(7)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(started) == [1, 2, 3, 4, 5, 6, 7]


MUTANTS = {
    "a slot that takes a job wakes nobody": (
        code(Slots, "slot", ("self.wake_some()", "pass")),
        test_jobs_that_wait_hold_up_none_of_those_behind_them,
        {},
    ),
    "a slot that woke counts as waking for ever": (
        code(Slots, "_sleep", ("self._waking -= 1", "pass")),
        test_jobs_that_wait_hold_up_none_of_those_behind_them,
        {},
    ),
    "a slot keeps a scope that is used up": (
        code(Slots, "slot", ("if running.may_be_cancelled and scope.cancel_called:", "if False:")),
        test_the_next_job_does_not_meet_a_scope_that_was_used_up,
        {"why": "timeout", "returns": True},
    ),
    "a deadline stays on the scope": (
        code(Slots, "_run", ("scope.deadline = math.inf", "pass")),
        test_a_job_that_ended_in_time_takes_its_deadline_with_it,
        {},
    ),
    "a request is known by its job alone": (
        code(Slots, "cancel", (" or running.claim.claim_no != request.claim_no", "")),
        test_a_request_for_an_older_claim_cancels_nobody,
        {},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mutant_is_noticed(mutant: str, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, test, values = MUTANTS[mutant]
    patch(monkeypatch)
    await noticed(test, autojump_clock=autojump_clock, monkeypatch=monkeypatch, **values)
