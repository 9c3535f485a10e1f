"""Claim, promote, settle, release: one job's way."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import trio
from contract_rig import Group, World, enqueue, enqueue_one, number_of, read, row, status

from triojobs._errors import JobNotFoundError
from triojobs._model import Outcome, Settled, Settlement
from triojobs._store import Store


async def test_a_claim_carries_what_the_handler_needs(store: Store, group: Group, world: World) -> None:
    deadline = world.now() + dt.timedelta(hours=1)
    answer = await enqueue_one(
        store,
        number=7,
        priority=2,
        max_attempts=3,
        timeout=1.5,
        deadline=deadline,
        key="ü",
        metadata='{"a": 1}',
    )
    claim = await group.claim_one()
    assert (claim.job_id, claim.claim_no, claim.group_id) == (answer.id, 1, group.id)
    assert claim.fence == (group.id, 1)
    assert (claim.queue, number_of(claim), claim.encoding) == ("q", 7, b"cbor")
    assert (claim.attempt, claim.max_attempts, claim.priority, claim.timeout) == (1, 3, 2, 1.5)
    assert (claim.key, claim.metadata, claim.last_error) == ("ü".encode(), b'{"a": 1}', None)
    assert claim.deadline == pytest.approx(deadline.timestamp(), abs=1e-3)
    assert claim.deadline_in == pytest.approx(3600, abs=30)
    job = await read(store, answer.id)
    assert claim.run_at == pytest.approx(job.run_at.timestamp(), abs=1e-3)
    assert claim.enqueued_at == pytest.approx(job.enqueued_at.timestamp(), abs=1e-3)


async def test_what_was_not_given_is_none(store: Store, group: Group) -> None:
    await enqueue_one(store)
    claim = await group.claim_one()
    assert (claim.timeout, claim.deadline, claim.deadline_in, claim.key, claim.metadata) == (None,) * 5


async def test_a_claimed_job_runs(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.claim_one()
    job = await read(store, answer.id)
    assert (job.status, job.attempts, job.group_id, job.finished_at) == ("running", 1, group.id, None)
    assert job.claimed_at is not None
    assert job.claimed_at >= job.enqueued_at


async def test_the_order_is_priority_then_time_then_id(store: Store, group: Group, world: World) -> None:
    def ago(seconds: float) -> dt.datetime:
        return world.now() - dt.timedelta(seconds=seconds)

    early, late = ago(100), ago(50)
    await store.enqueue(
        [
            row(4, run_at=late),
            row(5, run_at=late),
            row(3, run_at=early),
            row(1, run_at=late, priority=5),
            row(0, run_at=early, priority=5),
            row(2, run_at=late, priority=1),
        ]
    )
    assert [number_of(c) for c in await group.claim(4)] == [0, 1, 2, 3]
    assert [number_of(c) for c in await group.claim(4)] == [4, 5]


async def test_each_queue_has_a_limit_of_its_own(store: Store, group: Group) -> None:
    for queue in ("a", "b", "c"):
        await store.enqueue([row(n, queue=queue) for n in range(3)])
    claims = await group.claim(2, "a", "b")
    assert sorted((c.queue, number_of(c)) for c in claims) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert group.reply.got == {"a": 2, "b": 2}
    assert group.reply.promoted == {}
    assert group.reply.next_due_in is None


async def test_a_claimed_row_is_nobody_elses(store: Store, group: Group, rival: Group) -> None:
    await store.enqueue([row(n) for n in range(3)])
    assert [number_of(c) for c in await group.claim(2)] == [0, 1]
    assert [number_of(c) for c in await rival.claim()] == [2]


async def test_what_waits_and_is_due_is_claimed_and_nothing_else(
    store: Store, group: Group, world: World
) -> None:
    """One job in each state; `attempts` are those made before this claim."""
    now = world.now()
    states = {
        "due": row(1),
        "due since long": row(2, run_at=now - dt.timedelta(days=1)),
        "due just now": row(3, run_at=now),
        "in a sibling queue": row(4, queue="sibling"),
        "later": row(5, delay=3600.0),
        "failed once of three": row(6, max_attempts=3),
        "failed twice of three": row(7, max_attempts=3),
        "failed once, retried later": row(8),
        "released": row(9),
        "snoozed": row(10),
        "running": row(11),
        "done": row(12),
        "killed, attempts used up": row(13, max_attempts=1),
        "cancelled": row(14),
    }
    ids = dict(zip(states, await enqueue(store, *states.values()), strict=True))
    ends = {
        "failed once of three": [(Outcome.FAILED, 0.0)],
        "failed twice of three": [(Outcome.FAILED, 0.0), (Outcome.FAILED, 0.0)],
        "failed once, retried later": [(Outcome.FAILED, 3600.0)],
        "released": [(Outcome.RELEASED, 0.0)],
        "snoozed": [(Outcome.SNOOZED, 0.0)],
        "done": [(Outcome.DONE, 0.0)],
        "killed, attempts used up": [(Outcome.KILLED, 0.0)],
    }
    for _ in range(2):
        for claim in await group.claim(promote=True):
            name = next(name for name, job_id in ids.items() if job_id == claim.job_id)
            if ends.get(name):
                outcome, delay = ends[name].pop(0)
                await group.end(claim, outcome, delay=delay)
            elif name != "running":
                await group.end(claim, Outcome.RELEASED)
    await store.cancel_job(ids["cancelled"], "enough")

    names = {job_id: name for name, job_id in ids.items()}
    claimed = {names[c.job_id]: c.attempt - 1 for c in await group.claim(promote=True)}
    assert claimed == {
        "due": 0,
        "due since long": 0,
        "due just now": 0,
        "failed once of three": 1,
        "failed twice of three": 2,
        "released": 0,
        "snoozed": 0,
    }
    assert await group.claim(promote=True) == []
    assert [names[c.job_id] for c in await group.claim(5, "sibling")] == ["in a sibling queue"]


async def test_an_empty_queue_gives_nothing_and_a_long_one_what_was_asked_for(
    store: Store, group: Group
) -> None:
    assert await group.claim(5) == []
    await store.enqueue([row(n) for n in range(5)])
    assert [number_of(c) for c in await group.claim(2)] == [0, 1]
    assert [number_of(c) for c in await group.claim(5)] == [2, 3, 4]


async def test_only_an_open_registration_of_this_epoch_claims(store: Store, group: Group) -> None:
    await enqueue_one(store)
    assert await Group(store).claim() == []  # never registered
    closed = await Group(store).register()
    await closed.close()
    assert await closed.claim() == []
    assert closed.reply.refused
    await store.compare(group.id, list, lambda missing: None)
    assert await group.claim() == []
    assert group.reply.refused
    group.epoch = 2
    assert len(await group.claim()) == 1


# Promotion.


async def test_due_rows_are_promoted_and_the_timer_says_when_the_next_is_due(
    store: Store, group: Group
) -> None:
    await store.enqueue([row(1, delay=0.05), row(2, delay=60.0), row(3, queue="other", delay=0.0)])
    await group.claim(promote=True)
    while not (claims := await group.claim(promote=True)):
        assert group.reply.next_due_in is not None
        await trio.sleep(max(0.0, group.reply.next_due_in))
    assert [number_of(c) for c in claims] == [1]
    assert group.reply.promoted == {"q": 1}
    assert group.reply.next_due_in == pytest.approx(60, abs=30)


async def test_without_rows_there_is_no_timer(store: Store, group: Group) -> None:
    await group.claim(promote=True)
    assert group.reply.next_due_in is None
    assert group.reply.promoted == {}


async def test_a_promotion_moves_at_most_a_thousand_rows(store: Store, group: Group) -> None:
    await store.enqueue([row(n, delay=0.2) for n in range(1100)])
    await trio.sleep(0.25)  # time itself: all are due
    moved = 0
    for expected in (1000, 100):
        await group.claim(1, promote=True)
        moved += expected
        assert group.reply.promoted == {"q": expected}
    assert group.reply.next_due_in is None


# Settling.


@pytest.mark.parametrize(
    ("outcome", "then"),
    [
        (Outcome.DONE, "done"),
        (Outcome.FAILED, "failed"),
        (Outcome.KILLED, "killed"),
        (Outcome.CANCELLED, "cancelled"),
        (Outcome.SNOOZED, "pending"),
        (Outcome.RELEASED, "pending"),
    ],
)
async def test_each_outcome_leads_to_its_status(
    store: Store, group: Group, outcome: Outcome, then: str
) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    error = "why" if outcome in (Outcome.FAILED, Outcome.KILLED, Outcome.CANCELLED) else None
    assert await group.end(claim, outcome, error=error, delay=60.0) is outcome
    job = await read(store, answer.id)
    assert (job.status, job.last_error) == (then, error)
    refunded = outcome in (Outcome.SNOOZED, Outcome.RELEASED)
    assert job.attempts == (0 if refunded else 1)
    ended = then in ("done", "killed", "cancelled")
    assert (job.group_id == group.id) == ended
    assert (job.finished_at is not None) == ended
    assert await store.ended([answer.id]) == ([answer.id] if ended else [])


async def test_a_result_is_kept_with_its_encoding(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.end(await group.claim_one(), Outcome.DONE, result=b"\xf6", encoding="cbor")
    job = await read(store, answer.id)
    assert (job.result, job.result_encoding) == (b"\xf6", "cbor")


async def test_only_a_done_job_has_a_result(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.end(await group.claim_one(), Outcome.KILLED, result=b"\xf6", encoding="cbor")
    job = await read(store, answer.id)
    assert (job.result, job.result_encoding) == (None, None)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SNOOZED])
async def test_a_delay_is_counted_from_the_settlement(store: Store, group: Group, outcome: Outcome) -> None:
    answer = await enqueue_one(store)
    await group.end(await group.claim_one(), outcome, error=None, delay=60.0)
    assert await group.claim(promote=True) == []
    assert group.reply.next_due_in == pytest.approx(60, abs=30)
    job = await read(store, answer.id)
    assert job.run_at - job.enqueued_at >= dt.timedelta(seconds=59)


async def test_a_failed_job_comes_back_with_its_last_error(store: Store, group: Group) -> None:
    await enqueue_one(store, priority=3)
    await group.end(await group.claim_one(), Outcome.FAILED, error="it broke: ü")
    [claim] = await group.claim(promote=True)
    assert (claim.attempt, claim.claim_no, claim.priority) == (2, 2, 3)
    assert claim.last_error == "it broke: ü".encode()


async def test_release_gives_attempt_and_place_back(store: Store, group: Group) -> None:
    await store.enqueue([row(n, priority=2) for n in range(2)])
    [first] = await group.claim(1)
    await group.end(first, Outcome.RELEASED)
    again, _ = await group.claim()
    assert (again.job_id, again.attempt, again.priority) == (first.job_id, 1, 2)
    assert again.run_at == first.run_at


async def test_a_job_that_was_released_after_a_failure_still_reads_failed(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.end(await group.claim_one(), Outcome.FAILED, error="x")
    [claim] = await group.claim(promote=True)
    await group.end(claim, Outcome.RELEASED)
    job = await read(store, answer.id)
    assert (job.status, job.attempts) == ("failed", 1)


async def test_a_batch_may_mix_outcomes_and_stale_claims(store: Store, group: Group) -> None:
    ids = await enqueue(store, *(row(n) for n in range(4)))
    claims = await group.claim()
    wanted = [Outcome.DONE, Outcome.FAILED, Outcome.RELEASED]
    batch = [Settlement(c.job_id, c.claim_no, o) for c, o in zip(claims, wanted, strict=False)]
    written = await group.settle(
        *batch, Settlement(ids[3], 99, Outcome.DONE), Settlement(10**9, 1, Outcome.DONE)
    )
    expected = [Settled(i, 1, o) for i, o in zip(ids, wanted, strict=False)]
    assert sorted(written, key=lambda s: s.job_id) == expected
    assert [await status(store, i) for i in ids] == ["done", "failed", "pending", "running"]


async def test_an_empty_batch_writes_nothing(group: Group) -> None:
    assert await group.settle() == []


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_an_older_claim_is_stale(store: Store, group: Group, outcome: Outcome) -> None:
    answer = await enqueue_one(store)
    old = await group.claim_one()
    await group.end(old, Outcome.RELEASED)
    new = await group.claim_one()
    assert await group.end(old, outcome) is None
    assert await status(store, answer.id) == "running"
    assert await group.end(new, Outcome.DONE) is Outcome.DONE


async def test_another_group_cannot_settle(store: Store, group: Group, rival: Group) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    assert await rival.end(claim, Outcome.DONE) is None
    assert await status(store, answer.id) == "running"


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        (Outcome.DONE, {}),
        (Outcome.FAILED, {"error": "x"}),
        (Outcome.KILLED, {"error": "x"}),
        (Outcome.CANCELLED, {"error": "x"}),
    ],
)
async def test_a_settlement_may_be_repeated_after_a_lost_reply(
    store: Store, group: Group, outcome: Outcome, changes: Any
) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    assert await group.end(claim, outcome, **changes) is outcome
    before = await read(store, answer.id)
    assert await group.end(claim, outcome, **changes) is outcome
    assert await read(store, answer.id) == before


async def test_an_ended_claim_does_not_end_otherwise(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    await group.end(claim, Outcome.FAILED, error="x")
    assert await group.end(claim, Outcome.DONE) is None
    assert await group.end(claim, Outcome.RELEASED) is None
    assert await group.end(claim, Outcome.FAILED, error="y") is None
    assert await status(store, answer.id) == "failed"


@pytest.mark.parametrize("asked", [Outcome.FAILED, Outcome.KILLED, Outcome.RELEASED, Outcome.SNOOZED])
async def test_whatever_is_asked_for_a_claim_that_is_done_the_answer_is_done(
    store: Store, group: Group, asked: Outcome
) -> None:
    """Only the group itself writes done: the reply to its commit was lost."""
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    await group.end(claim, Outcome.DONE)
    before = await read(store, answer.id)
    assert await group.end(claim, asked, error="x" if asked is Outcome.FAILED else None) is Outcome.DONE
    assert await read(store, answer.id) == before


# Cancelling by id.


async def test_a_waiting_job_is_cancelled_at_once(store: Store, group: Group) -> None:
    ids = await enqueue(store, row(1), row(2, delay=60.0))
    for job_id in ids:
        assert await store.cancel_job(job_id, "not needed")
        job = await read(store, job_id)
        assert (job.status, job.last_error, job.attempts) == ("cancelled", "not needed", 0)
        assert (job.group_id, job.claimed_at) == (None, None)
        assert job.finished_at is not None
    assert await group.claim(promote=True) == []


async def test_a_job_that_waits_for_its_next_attempt_is_cancelled_at_once(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.end(await group.claim_one(), Outcome.FAILED, error="x", delay=60.0)
    assert await store.cancel_job(answer.id, "enough")
    job = await read(store, answer.id)
    assert (job.status, job.last_error, job.attempts) == ("cancelled", "enough", 1)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.KILLED, Outcome.SNOOZED, Outcome.RELEASED])
async def test_a_running_job_that_is_asked_to_end_ends_cancelled_with_the_first_reason(
    store: Store, group: Group, outcome: Outcome
) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    assert await store.cancel_job(answer.id, "first")
    assert await store.cancel_job(answer.id, "second")
    assert await status(store, answer.id) == "running"
    assert await group.end(claim, outcome, error="x") is Outcome.CANCELLED
    job = await read(store, answer.id)
    assert (job.status, job.last_error, job.attempts) == ("cancelled", "first", 1)


async def test_a_handler_that_returned_is_done_although_somebody_asked_to_cancel(
    store: Store, group: Group
) -> None:
    answer = await enqueue_one(store)
    claim = await group.claim_one()
    await store.cancel_job(answer.id, "too late")
    assert await group.end(claim, Outcome.DONE) is Outcome.DONE
    assert (await read(store, answer.id)).last_error is None


async def test_an_ended_job_cannot_be_cancelled(store: Store, group: Group) -> None:
    answer = await enqueue_one(store)
    await group.end(await group.claim_one(), Outcome.DONE)
    assert not await store.cancel_job(answer.id, "late")
    assert await status(store, answer.id) == "done"


async def test_an_unknown_job_cannot_be_cancelled(store: Store) -> None:
    with pytest.raises(JobNotFoundError) as caught:
        await store.cancel_job(12345, "x")
    assert caught.value.job_id == 12345


# Reading.


async def test_unknown_ids_are_not_read_and_count_as_ended(store: Store) -> None:
    answer = await enqueue_one(store)
    assert [job.id for job in await store.read_jobs([answer.id, 12345])] == [answer.id]
    assert await store.read_jobs([]) == []
    assert await store.ended([answer.id, 12345]) == [12345]
    assert await store.ended([]) == []


async def test_ended_jobs_are_told_in_the_order_of_their_ends_after_the_unknown(store: Store) -> None:
    ids = await enqueue(store, *(row(n) for n in range(3)))
    group = await Group(store).register()
    claims = {claim.job_id: claim for claim in await group.claim(3)}
    for job_id in (ids[1], ids[2], ids[0]):
        await group.end(claims[job_id], Outcome.DONE)
    assert await store.ended([*ids, 12345]) == [12345, ids[1], ids[2], ids[0]]


async def test_a_queue_is_idle_when_nothing_due_or_running_is_left(store: Store, group: Group) -> None:
    assert await store.idle(["q"])
    await store.enqueue([row(delay=60.0)])
    assert await store.idle(["q"])
    await store.enqueue([row()])
    assert not await store.idle(["other", "q"])
    assert await store.idle(["other"])
    claim = await group.claim_one()
    assert not await store.idle(["q"])
    await group.end(claim, Outcome.FAILED, delay=60.0)
    assert await store.idle(["q"])


async def test_this_process_may_use_its_store(store: Store) -> None:
    store.check_owner()
    assert store.now() <= store.now()
