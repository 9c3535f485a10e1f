"""Cancelled before it starts, or done: no call of a store lies in between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import trio
from contract_rig import Group, enqueue_one, row, status

from triojobs._lease import Lease
from triojobs._model import Outcome, Registration, Settled, Settlement
from triojobs._store import Store

CALLS: dict[str, Callable[[Store, Group, int], Awaitable[Any]]] = {
    "open": lambda store, group, job_id: store.open(),
    "register": lambda store, group, job_id: store.register(
        Registration(group.id, "twin", "host", 1, "0", 60.0), Lease(duration=60.0, margin=1.0, interval=5.0)
    ),
    "claim": lambda store, group, job_id: group.claim(1, "waiting"),
    "compare": lambda store, group, job_id: store.compare(group.id, list, lambda missing: None),
    "mark_waiting": lambda store, group, job_id: store.mark_waiting(group.id, ["q"], True),
    "settle": lambda store, group, job_id: group.settle(Settlement(job_id, 1, Outcome.DONE)),
    "close_group": lambda store, group, job_id: group.close(),
    "idle": lambda store, group, job_id: store.idle(["q"]),
    "enqueue": lambda store, group, job_id: store.enqueue([row()]),
    "enqueue_each": lambda store, group, job_id: store.enqueue_each([row(), row()]),
    "new_job_ids": lambda store, group, job_id: store.new_job_ids(1),
    "read_jobs": lambda store, group, job_id: store.read_jobs([job_id]),
    "ended": lambda store, group, job_id: store.ended([job_id]),
    "cancel_job": lambda store, group, job_id: store.cancel_job(job_id, "x"),
}


@pytest.mark.parametrize("name", list(CALLS))
async def test_in_a_cancelled_scope_nothing_happens(store: Store, group: Group, name: str) -> None:
    running = await enqueue_one(store)
    waiting = await enqueue_one(store, queue="waiting")
    await group.claim()
    before = await store.read_jobs([running.id, waiting.id])
    with trio.CancelScope() as scope:
        scope.cancel()
        await CALLS[name](store, group, running.id)
    assert scope.cancelled_caught
    assert await store.read_jobs([running.id, waiting.id]) == before
    assert (await enqueue_one(store)).id > waiting.id
    assert len(await group.claim()) == 1


async def test_a_commit_in_a_cancelled_scope_does_not_begin(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    calls: list[Any] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.commit_work(claim, calls.append, lambda value: (b"\xf6", "cbor"), lambda: None)
    assert scope.cancelled_caught
    assert calls == []
    assert await status(store, answer.id) == "running"


async def test_a_result_that_has_come_about_arrives_in_spite_of_a_cancel(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    rows: list[Settled] = []

    def written(found: Sequence[Settled]) -> None:
        rows.extend(found)
        cancel_from_anywhere(scope)

    returned = False
    with trio.CancelScope() as scope:
        await store.settle(group.id, [Settlement(claim.job_id, claim.claim_no, Outcome.DONE)], written)
        returned = True
    assert returned
    assert len(rows) == 1
    assert await status(store, answer.id) == "done"


def cancel_from_anywhere(scope: trio.CancelScope) -> None:
    """Cancel from where the store calls back: on the loop, or in a thread of the bridge."""
    if trio.lowlevel.in_trio_run():
        scope.cancel()
    else:
        trio.from_thread.run_sync(scope.cancel)
