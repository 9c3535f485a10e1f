"""Who sleeps, who is woken, and by what. Notifications of one database arrive in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from contract_rig import Group, Recorder, enqueue, enqueue_one, row

import triojobs
from triojobs._model import Outcome
from triojobs._store import Store

AUDIT: triojobs.Queue[int, Any] = triojobs.Queue("q", int)


async def test_a_group_that_sleeps_is_woken_by_an_enqueue(store: Store, group: Group, rival: Group) -> None:
    async with group.listening("q") as events:
        await store.mark_waiting(group.id, ["q"], True)
        await enqueue_one(rival.store)
        await events.wait_for(lambda: events.heard == ["q"])


async def expect(events: Recorder, store: Store, *heard: str) -> None:
    """Wait until the marker queue is heard, and check what came before it."""
    await enqueue_one(store, queue="marker")
    await events.wait_for(lambda: "marker" in events.heard)
    assert tuple(events.heard) == (*heard, "marker")
    events.heard.clear()


Act = Callable[[Group], Awaitable[Any]]


async def act_enqueue_later(rival: Group) -> None:
    await enqueue_one(rival.store, delay=60.0)


async def act_enqueue_each(rival: Group) -> None:
    await rival.store.enqueue_each([row(1), row(2)])


@pytest.mark.parametrize("act", [act_enqueue_later, act_enqueue_each])
async def test_every_enqueue_is_heard(store: Store, group: Group, rival: Group, act: Act) -> None:
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        await act(rival)
        await expect(events, rival.store, "q")


async def end(rival: Group, outcome: Outcome) -> None:
    await rival.end(await rival.claim_one(), outcome, delay=60.0)


@pytest.mark.parametrize(
    ("outcome", "heard"),
    [
        (Outcome.RELEASED, True),
        (Outcome.FAILED, True),
        (Outcome.SNOOZED, True),
        (Outcome.DONE, False),
        (Outcome.KILLED, False),
        (Outcome.CANCELLED, False),
    ],
)
async def test_settling_is_heard_when_something_becomes_claimable(
    store: Store, group: Group, rival: Group, outcome: Outcome, heard: bool
) -> None:
    await enqueue_one(store)
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        await end(rival, outcome)
        await expect(events, rival.store, *(["q"] if heard else []))


async def test_closing_and_sweeping_are_heard(store: Store, group: Group, rival: Group) -> None:
    await enqueue_one(store)
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        await rival.claim()
        await rival.compare()
        await expect(events, rival.store, "q")
        await rival.claim()
        await rival.close()
        await expect(events, rival.store, "q")


async def test_a_rescue_is_heard(store: Store, group: Group, rival: Group) -> None:
    await enqueue_one(store)
    dead = await Group(store, lease_duration=0.02).register()
    await dead.claim()
    await trio.sleep(0.04)  # time itself
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        async with rival.beating():
            await events.wait_for(lambda: "q" in events.heard)


async def test_a_promotion_of_more_than_it_claims_is_heard(store: Store, group: Group, rival: Group) -> None:
    await enqueue(store, row(1, delay=0.05), row(2, delay=0.05))
    await trio.sleep(0.1)  # time itself: both are due
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        assert len(await rival.claim(1, promote=True)) == 1
        await expect(events, rival.store, "q")
        assert len(await rival.claim(1, promote=True)) == 1
        await expect(events, rival.store)


async def test_who_does_not_sleep_is_not_woken(store: Store, group: Group, rival: Group) -> None:
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["marker"], True)
        await enqueue_one(rival.store)
        await expect(events, rival.store)


async def test_a_mark_is_taken_back(store: Store, group: Group, rival: Group) -> None:
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        await store.mark_waiting(group.id, ["q", "marker"], True)  # twice is once
        await store.mark_waiting(group.id, ["q"], False)
        await store.mark_waiting(group.id, ["q"], False)
        await enqueue_one(rival.store)
        await expect(events, rival.store)


async def test_the_mark_of_a_closed_or_dead_group_does_not_count(
    store: Store, group: Group, rival: Group
) -> None:
    closed = await Group(store).register()
    await store.mark_waiting(closed.id, ["q"], True)
    await closed.close()
    dead = await Group(store, lease_duration=0.02).register()
    await store.mark_waiting(dead.id, ["q"], True)
    await trio.sleep(0.04)  # time itself
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["marker"], True)
        await enqueue_one(rival.store)
        await expect(events, rival.store)


async def test_only_the_queues_that_were_asked_for_are_heard(
    store: Store, group: Group, rival: Group
) -> None:
    async with group.listening("marker") as events:
        await store.mark_waiting(group.id, ["q", "marker"], True)
        await enqueue_one(rival.store)
        await expect(events, rival.store)


async def test_what_a_commit_enqueues_is_heard_without_a_mark(
    store: Store, group: Group, rival: Group
) -> None:
    await enqueue_one(store, queue="mine")
    [claim] = await rival.claim(1, "mine")
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["marker"], True)
        await rival.store.commit_work(
            claim,
            lambda conn: triojobs.enqueue_on(conn, AUDIT, 1),
            lambda value: (b"\xf6", "cbor"),
            lambda: None,
        )
        await expect(events, rival.store, "q")


async def test_a_cancel_wakes_the_group_that_runs_the_job_alone(
    store: Store, group: Group, rival: Group
) -> None:
    mine, theirs = await enqueue(store, row(queue="mine"), row(queue="theirs"))
    await group.claim(1, "mine")
    await rival.claim(1, "theirs")
    async with group.listening("q", "marker") as events:
        await store.mark_waiting(group.id, ["marker"], True)
        await rival.store.cancel_job(theirs, "x")
        await expect(events, rival.store)
        await rival.store.cancel_job(mine, "x")
        await events.wait_for(lambda: events.heard == ["group"])


async def test_a_listener_that_is_cancelled_says_that_it_no_longer_listens(
    store: Store, group: Group
) -> None:
    async with group.listening("q") as events:
        pass
    assert events.heard == ["deaf"]
