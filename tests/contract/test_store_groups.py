"""Registrations: close, sweep, rescue, beat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from contract_rig import Group, World, enqueue, enqueue_one, number_of, read, row, status

from triojobs._errors import DatabaseError
from triojobs._model import Outcome, Settled
from triojobs._store import Compared, Store

SHORT = 0.02  # seconds: a lease that is over before anybody looks


async def dead_group(store: Store, lease_duration: float = SHORT) -> Group:
    """Return a group that claimed everything and then fell silent for longer than its lease."""
    group = await Group(store, lease_duration=lease_duration).register()
    await group.claim()
    await trio.sleep(2 * lease_duration)  # time itself
    return group


async def test_registering_confirms_the_lease(store: Store) -> None:
    group = Group(store)
    before = store.now()
    await group.register()
    assert before <= group.lease.until - 50.0 <= store.now()  # 60 s less the margin of 10 s


async def test_a_registration_is_made_once(store: Store, group: Group) -> None:
    with pytest.raises(DatabaseError) as caught:
        await group.register()
    assert caught.value.sqlstate == "23505"


# Closing.


async def test_closing_gives_everything_back_with_refund(store: Store, group: Group, rival: Group) -> None:
    ids = await enqueue(store, *(row(n) for n in range(3)))
    claims = await group.claim()
    await group.end(claims[0], Outcome.DONE)
    assert await group.close() == [Settled(i, 1, Outcome.RELEASED) for i in ids[1:]]
    assert [await status(store, i) for i in ids] == ["done", "pending", "pending"]
    again = await rival.claim()
    assert [(c.job_id, c.attempt) for c in again] == [(i, 1) for i in ids[1:]]


async def test_closing_ends_what_somebody_asked_to_cancel(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.claim()
    await store.cancel_job(answer.id, "why")
    assert await group.close() == [Settled(answer.id, 1, Outcome.CANCELLED)]
    job = await read(store, answer.id)
    assert (job.status, job.last_error, job.attempts) == ("cancelled", "why", 1)


async def test_closing_may_be_repeated(store: Store, group: Group) -> None:
    await enqueue_one(store)
    await group.claim()
    await group.close()
    assert await group.close() == []


async def test_closing_what_was_never_registered_does_nothing(store: Store) -> None:
    assert await Group(store).close() == []


async def test_nothing_can_be_settled_after_the_closing(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    await group.close()
    assert await group.end(claim, Outcome.DONE) is None
    assert await status(store, answer.id) == "pending"


# Comparison.


async def test_a_comparison_releases_what_the_ledger_does_not_know(store: Store, group: Group) -> None:
    ids = await enqueue(store, *(row(n) for n in range(3)))
    claims = await group.claim()
    known = [claims[0], replace(claims[1], claim_no=99)]
    assert await group.compare(*known) == (Compared(epoch=2, released=2), [(ids[1], 99)])
    assert [await status(store, i) for i in ids] == ["running", "pending", "pending"]
    assert await group.end(claims[0], Outcome.DONE) is Outcome.DONE
    assert [(c.job_id, c.attempt) for c in await group.claim()] == [(ids[1], 1), (ids[2], 1)]


async def test_a_comparison_leaves_other_groups_alone(store: Store, group: Group, rival: Group) -> None:
    answer = await enqueue_one(store)
    await rival.claim()
    await group.compare()
    assert await status(store, answer.id) == "running"


async def test_an_unknown_row_that_somebody_asked_to_cancel_is_cancelled(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.claim()
    await store.cancel_job(answer.id, "why")
    assert await group.compare() == (Compared(epoch=2, released=0), [])
    assert await status(store, answer.id) == "cancelled"


async def test_a_registration_that_is_over_is_not_compared(store: Store, group: Group) -> None:
    assert await Group(store).compare() == (None, [])
    await group.close()
    assert await group.compare() == (None, [])


async def test_after_a_crash_nothing_is_claimed_until_ledger_and_leases_were_compared(
    world: World, store: Store, group: Group
) -> None:
    ids = await enqueue(store, row(0), row(1))
    [kept] = await group.claim(1)
    [lost] = await group.claim(1)
    await enqueue(store, row(2))
    world.crash(lost)
    assert await group.claim() == []
    assert group.reply.refused
    assert await group.compare(kept, lost) == (Compared(epoch=2, released=0), [(ids[1], 2)])
    assert [(number_of(c), c.attempt) for c in await group.claim()] == [(1, 1), (2, 1)]
    assert await group.end(lost, Outcome.DONE) is None  # its outcome is stale: another claim runs the job
    assert await group.end(kept, Outcome.DONE) is Outcome.DONE


async def test_a_beat_tells_that_a_comparison_is_due(world: World, store: Store, group: Group) -> None:
    async with group.beating() as events:
        await late_beat(group, events)
        assert events.doubts == 0
        world.crash()
        store.beat_now(group.id)
        await events.wait_for(lambda: events.doubts == 1)
        await group.compare()
        await late_beat(group, events)
        assert events.doubts == 1


async def test_what_has_ended_is_not_missing(store: Store, group: Group) -> None:
    done, snoozed = await enqueue(store, row(0), row(1))
    claims = await group.claim()
    await group.end(claims[0], Outcome.DONE)
    await group.end(claims[1], Outcome.SNOOZED, delay=60.0)
    # A snooze leaves no outcome: the ledger knows that it has ended, and looks no further.
    assert await group.compare(*claims) == (Compared(epoch=2, released=0), [(snoozed, 1)])
    assert await status(store, done) == "done"


async def test_a_clean_registration_claims_at_once(store: Store, group: Group) -> None:
    assert await group.claim() == []
    assert not group.reply.refused


# Rescue.


async def test_jobs_of_a_dead_group_go_on_as_failed_attempts(store: Store, rival: Group) -> None:
    once, twice, cancelled = await enqueue(store, row(1, max_attempts=1), row(2, max_attempts=2), row(3))
    dead = await dead_group(store)
    await store.cancel_job(cancelled, "why")
    async with rival.beating() as events:
        await events.wait_for(lambda: events.jobs_rescued == 3)
    text = f"rescued: the lease of worker group {dead.id} ended"
    for job_id, expected in (
        (once, ("killed", text, 1)),
        (twice, ("failed", text, 1)),
        (cancelled, ("cancelled", "why", 1)),
    ):
        job = await read(store, job_id)
        assert (job.status, job.last_error, job.attempts) == expected
    claim = await rival.claim_one()
    assert (claim.job_id, claim.attempt, claim.last_error) == (twice, 2, text.encode())


async def test_a_dead_group_learns_that_it_was_closed(store: Store, rival: Group) -> None:
    answer = await enqueue_one(store)
    dead = await Group(store, lease_duration=SHORT).register()
    claim = await dead.claim_one()
    await trio.sleep(2 * SHORT)
    async with rival.beating() as events:
        await events.wait_for(lambda: events.jobs_rescued == 1)
    assert await dead.end(claim, Outcome.DONE) is None
    assert await dead.end(claim, Outcome.FAILED, error="mine") is None
    assert await dead.claim() == []
    async with dead.beating() as news:
        await news.wait_for(lambda: news.lost == 1)
    assert dead.lease.lost
    assert not dead.lease.provable(store.now())
    assert await status(store, answer.id) == "failed"


async def test_a_living_group_is_left_alone(store: Store, group: Group, rival: Group) -> None:
    answer = await enqueue_one(store)
    await group.claim()
    dead = await enqueue_one(store, queue="dead")
    lapsed = await Group(store, lease_duration=SHORT).register()
    await lapsed.claim(1, "dead")
    await trio.sleep(2 * SHORT)
    async with rival.beating() as events:
        await events.wait_for(lambda: events.jobs_rescued == 1)
    assert await status(store, dead.id) == "failed"
    assert await status(store, answer.id) == "running"


async def test_a_beat_that_comes_before_the_rescue_keeps_the_jobs(store: Store) -> None:
    answer = await enqueue_one(store)
    late = await dead_group(store, lease_duration=0.5)  # longer than from its beat to its rescue
    async with late.beating() as events:  # beats first, then looks for dead groups
        await late_beat(late, events)
    assert await status(store, answer.id) == "running"
    assert not late.lease.lost


async def late_beat(group: Group, events: object) -> None:
    """Return once the group's lease has been confirmed anew."""
    before = group.lease.until
    while group.lease.until == before:
        await trio.lowlevel.checkpoint()


# Beats.


async def test_each_beat_brings_the_cancel_requests_of_its_group(
    store: Store, group: Group, rival: Group
) -> None:
    mine, theirs = await enqueue_one(store), await enqueue_one(store, queue="theirs")
    claim = await group.claim_one()
    await rival.claim(1, "theirs")
    await store.cancel_job(theirs.id, "not ours")
    async with group.beating() as events:
        await store.cancel_job(mine.id, "why")
        store.beat_now(group.id)
        await events.wait_for(lambda: bool(events.requests))
        await group.end(claim, Outcome.CANCELLED)
    assert {(r.job_id, r.claim_no, r.reason) for r in events.requests} == {(mine.id, 1, "why")}


async def test_a_group_whose_row_was_closed_has_lost_its_lease(
    store: Store, other_store: Store, group: Group
) -> None:
    async with group.beating() as events:
        await late_beat(group, events)
        closer = Group(other_store)
        closer.id = group.id
        await closer.close()
        store.beat_now(group.id)
        await events.wait_for(lambda: events.lost == 1)
    assert group.lease.lost


async def test_once_released_the_lease_is_held_no_longer_and_nothing_is_lost(
    store: Store, group: Group
) -> None:
    async with group.beating() as events:
        store.release_lease(group.id)
        await group.close()
    assert (events.lost, group.lease.lost) == (0, False)


async def test_a_lease_that_was_released_before_is_not_held(store: Store, group: Group) -> None:
    store.release_lease(group.id)
    async with group.beating():
        pass


async def test_a_beat_for_nobody_is_ignored(store: Store) -> None:
    store.beat_now(Group(store).id)
