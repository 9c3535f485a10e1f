"""A paused queue is claimed by nobody; everything else about it goes on."""

from __future__ import annotations

import trio
from contract_rig import Group, World, enqueue, enqueue_one, number_of, row, status

from triojobs._model import Outcome
from triojobs._store import Store


async def test_nobody_claims_from_a_paused_queue(
    store: Store, group: Group, rival: Group, world: World
) -> None:
    answer = await enqueue_one(store)
    world.pause("q")
    assert await group.claim() == []
    assert await rival.claim() == []
    assert group.reply.got == {"q": 0}
    assert await status(store, answer.id) == "pending"


async def test_other_queues_of_the_same_claim_are_served(store: Store, group: Group, world: World) -> None:
    await enqueue(store, row(1, queue="a"), row(2, queue="b"), row(3, queue="c"))
    world.pause("b")
    assert [number_of(c) for c in await group.claim(10, "a", "b", "c")] == [1, 3]


async def test_what_runs_when_its_queue_is_paused_ends_as_ever(
    store: Store, group: Group, world: World
) -> None:
    done, failed = await enqueue(store, row(1), row(2))
    first, second = await group.claim()
    world.pause("q")
    assert await group.end(first, Outcome.DONE) is Outcome.DONE
    assert await group.end(second, Outcome.FAILED, error="x", delay=0.0) is Outcome.FAILED
    assert [await status(store, i) for i in (done, failed)] == ["done", "failed"]
    assert await group.claim(promote=True) == []


async def test_enqueue_and_promotion_go_on_while_a_queue_is_paused(
    store: Store, group: Group, world: World
) -> None:
    await group.claim()
    world.pause("q")
    answer = await enqueue_one(store, delay=0.02)
    while not group.reply.promoted:
        assert await group.claim(promote=True) == []
        await trio.sleep(max(0.0, group.reply.next_due_in or 0.0))  # time itself
    world.resume("q")
    assert [c.job_id for c in await group.claim()] == [answer.id]


async def test_a_resumed_queue_is_served_in_its_old_order(store: Store, group: Group, world: World) -> None:
    await enqueue(store, row(2), row(1, priority=5), row(3))
    world.pause("q")
    assert await group.claim() == []
    world.resume("q")
    assert [number_of(c) for c in await group.claim()] == [1, 2, 3]


async def test_resuming_wakes_the_group_that_sleeps(store: Store, group: Group, world: World) -> None:
    await enqueue_one(store)
    world.pause("q")
    async with group.listening("q") as events:
        assert await group.claim() == []
        await store.mark_waiting(group.id, ["q"], True)
        world.resume("q")
        await events.wait_for(lambda: events.heard == ["q"])
    assert len(await group.claim()) == 1
