"""A job that was handed to a slot is not started any more once handlers are being cancelled.

A process that goes on after a stop beyond its lease would begin what others have begun long ago.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from triojobs._handling import Slots
from triojobs._lease import Lease
from triojobs._model import Claim, Registration
from triojobs._registration import LiveRegistration

QUEUE: triojobs.Queue[Any, Any] = triojobs.Queue("q")


def claim(job_id: int, group_id: uuid.UUID) -> Claim:
    return Claim(
        job_id=job_id,
        claim_no=1,
        group_id=group_id,
        queue=QUEUE.name,
        attempt=1,
        max_attempts=5,
        priority=0,
        run_at=0.0,
        enqueued_at=0.0,
        payload=QUEUE.encode_payload(None),
        encoding=b"cbor",
        timeout=None,
        deadline=None,
        claimed_at=0.0,
        key=None,
        metadata=None,
        last_error=None,
    )


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_no_handler_starts_after_the_lease_was_given_up(isolation: str) -> None:
    started = []

    async def handler(job: triojobs.Job[Any]) -> None:
        started.append(job.id)

    record = Registration(uuid.uuid4(), "test", "localhost", 1, "0", lease_duration=30.0)
    live = LiveRegistration(record, Lease(duration=30.0, margin=5.0, interval=6.0))
    store: Any = None
    slots = Slots(
        triojobs.Worker(QUEUE, handler, concurrency=2),
        live,
        store,
        busy_ids=set(),
        on_free=lambda: None,
    )
    claims = [claim(job_id, live.group_id) for job_id in (1, 2)]
    live.ledger.book(claims)
    async with trio.open_nursery() as nursery:

        async def run_slots() -> None:
            with live.handler_scope:
                async with trio.open_nursery() as handlers:
                    if isolation == "task":
                        await slots.dispatch(handlers)
                    for _ in range(2):
                        handlers.start_soon(slots.slot)

        nursery.start_soon(run_slots)
        await trio.testing.wait_all_tasks_blocked()
        slots.hand_in(live.ledger.take_booked(), trio.current_time())
        # The slots are awake and take their turns in the next pass.
        if isolation == "task":
            await trio.lowlevel.checkpoint()  # the dispatcher has started the tasks
        live.lose("the process was stopped beyond its lease")
    assert started == []
    assert live.ledger.held_ids() == [1, 2]
