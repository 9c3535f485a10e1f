"""Enqueue in all its forms."""

from __future__ import annotations

import datetime as dt

import pytest
from contract_rig import Group, World, enqueue, enqueue_one, number_of, read, row, status

from triojobs._errors import DuplicateJobError, OptionError
from triojobs._model import Enqueued, Outcome
from triojobs._store import Store


async def test_answers_come_in_the_order_of_the_call(store: Store) -> None:
    answers = await store.enqueue([row(n) for n in range(5)])
    assert [a.created for a in answers] == [True] * 5
    ids = [a.id for a in answers]
    assert ids == sorted(ids)
    jobs = {job.id: number_of(job) for job in await store.read_jobs(ids)}
    assert [jobs[i] for i in ids] == [0, 1, 2, 3, 4]


async def test_keyed_and_plain_rows_keep_their_places_in_the_answer(store: Store) -> None:
    rows = [row(0, key="b"), row(1), row(2, key="a"), row(3)]
    answers = await store.enqueue(rows)
    jobs = {job.id: number_of(job) for job in await store.read_jobs([a.id for a in answers])}
    assert [jobs[a.id] for a in answers] == [0, 1, 2, 3]


async def test_nothing_is_enqueued_by_nothing(store: Store) -> None:
    assert await store.enqueue([]) == []


async def test_everything_that_was_given_is_read_back(store: Store, world: World) -> None:
    run_at = world.now() + dt.timedelta(hours=1)
    deadline = world.now() + dt.timedelta(hours=2)
    new = row(
        7,
        run_at=run_at,
        priority=3,
        max_attempts=2,
        timeout=1.5,
        deadline=deadline,
        key="k",
        metadata='{"a":[1]}',
    )
    [job_id] = await enqueue(store, new)
    job = await read(store, job_id)
    assert (job.queue, number_of(job), job.encoding, job.key) == ("q", 7, "cbor", "k")
    assert (job.status, job.attempts, job.max_attempts, job.priority) == ("pending", 0, 2, 3)
    assert (job.run_at, job.deadline, job.metadata) == (run_at, deadline, {"a": [1]})
    assert (job.group_id, job.claimed_at, job.finished_at, job.last_error) == (None, None, None, None)
    assert abs(job.enqueued_at - world.now()) < dt.timedelta(seconds=30)


async def test_a_delay_is_counted_from_the_servers_present(store: Store, group: Group) -> None:
    answer = await enqueue_one(store, delay=60.0)
    job = await read(store, answer.id)
    assert job.run_at - job.enqueued_at == pytest.approx(
        dt.timedelta(seconds=60), abs=dt.timedelta(seconds=1)
    )
    assert await group.claim(promote=True) == []


async def test_a_time_in_the_past_is_due_at_once(store: Store, group: Group, world: World) -> None:
    answer = await enqueue_one(store, run_at=world.now() - dt.timedelta(days=1))
    assert [c.job_id for c in await group.claim()] == [answer.id]


async def test_reserved_ids_are_new_each_time(store: Store) -> None:
    ids = await store.new_job_ids(3) + await store.new_job_ids(2) + await enqueue(store, row())
    assert len(set(ids)) == 6


async def test_the_same_job_id_again_changes_nothing(store: Store, group: Group) -> None:
    [job_id] = await store.new_job_ids(1)
    assert await store.enqueue([row(1, job_id=job_id)]) == [Enqueued(job_id, created=True)]
    assert await store.enqueue([row(2, job_id=job_id)]) == [Enqueued(job_id, created=False)]
    assert [number_of(c) for c in await group.claim()] == [1]
    assert await store.enqueue([row(3, job_id=job_id)]) == [Enqueued(job_id, created=False)]
    assert await status(store, job_id) == "running"


async def test_the_same_job_id_with_its_own_key_is_no_duplicate(store: Store) -> None:
    [job_id] = await store.new_job_ids(1)
    assert (await enqueue_one(store, job_id=job_id, key="k")).created
    assert await enqueue_one(store, job_id=job_id, key="k") == Enqueued(job_id, created=False)


async def test_an_id_that_was_not_handed_out_is_refused_and_nothing_is_written(
    store: Store, group: Group
) -> None:
    [job_id] = await store.new_job_ids(1)
    with pytest.raises(OptionError) as caught:
        await store.enqueue([row(), row(job_id=job_id + 1000)])
    assert caught.value.field == "job_id"
    assert caught.value.value == job_id + 1000
    assert await group.claim() == []


@pytest.mark.parametrize("key", [None, "k"])
async def test_the_id_of_another_queues_job_is_refused_and_nothing_is_written(
    store: Store, group: Group, key: str | None
) -> None:
    [job_id] = await store.new_job_ids(1)
    await store.enqueue([row(job_id=job_id, queue="other")])
    with pytest.raises(OptionError, match="queue 'other' has it") as caught:
        await store.enqueue([row(), row(job_id=job_id, key=key)])
    assert (caught.value.field, caught.value.value) == ("job_id", job_id)
    [alone] = await store.enqueue_each([row(job_id=job_id, key=key)])
    assert isinstance(alone, OptionError)
    assert await group.claim() == []


# Keys.


async def test_a_taken_key_raises_names_the_holder_and_undoes_the_whole_call(
    store: Store, group: Group
) -> None:
    holder = await enqueue_one(store, key="k")
    with pytest.raises(DuplicateJobError) as caught:
        await store.enqueue([row(1), row(2, key="free"), row(3, key="k")])
    assert (caught.value.job_id, caught.value.key, caught.value.queue, caught.value.index) == (
        holder.id,
        "k",
        "q",
        2,
    )
    assert [c.job_id for c in await group.claim()] == [holder.id]
    assert (await enqueue_one(store, key="free")).created


async def test_alone_a_taken_key_has_no_index(store: Store) -> None:
    await enqueue_one(store, key="k")
    with pytest.raises(DuplicateJobError) as caught:
        await enqueue_one(store, key="k")
    assert caught.value.index is None


async def test_one_call_cannot_take_a_key_twice(store: Store, group: Group) -> None:
    with pytest.raises(DuplicateJobError) as caught:
        await store.enqueue([row(1, key="k"), row(2, key="k")])
    assert caught.value.index == 1
    assert await group.claim() == []


async def test_return_gives_the_holder(store: Store) -> None:
    holder = await enqueue_one(store, key="k", number=1)
    assert await enqueue_one(store, key="k", number=2, on_conflict="return") == Enqueued(
        holder.id, created=False
    )
    assert number_of(await read(store, holder.id)) == 1


async def test_keys_belong_to_their_queue_and_are_case_sensitive_and_may_be_empty(store: Store) -> None:
    await enqueue_one(store, key="k")
    for other in ({"key": "K"}, {"key": ""}, {"key": "k", "queue": "other"}):
        assert (await enqueue_one(store, **other)).created
    with pytest.raises(DuplicateJobError):
        await enqueue_one(store, key="")


async def test_replace_changes_the_body_of_a_job_that_has_not_started(
    store: Store, group: Group, world: World
) -> None:
    holder = await enqueue_one(store, key="k", number=1)
    deadline = world.now() + dt.timedelta(hours=1)
    answer = await enqueue_one(
        store,
        key="k",
        number=2,
        priority=5,
        max_attempts=1,
        timeout=2.0,
        deadline=deadline,
        metadata='{"a": 1}',
        on_conflict="replace",
    )
    assert answer == Enqueued(holder.id, created=False, replaced=True)
    claim = await group.claim_one()
    assert (number_of(claim), claim.priority, claim.max_attempts, claim.timeout) == (2, 5, 1, 2.0)
    assert claim.deadline == pytest.approx(deadline.timestamp())
    assert claim.key == b"k"
    assert (await read(store, holder.id)).metadata == {"a": 1}


async def test_replace_moves_a_job_out_of_the_line_and_back(store: Store, group: Group) -> None:
    holder = await enqueue_one(store, key="k")
    assert (await enqueue_one(store, key="k", delay=60.0, on_conflict="replace")).replaced
    assert await group.claim(promote=True) == []
    assert (await enqueue_one(store, key="k", on_conflict="replace")).replaced
    assert (await group.claim_one()).job_id == holder.id


async def test_replace_leaves_a_job_alone_once_it_has_started(store: Store, group: Group) -> None:
    holder = await enqueue_one(store, key="k", number=1)
    untouched = Enqueued(holder.id, created=False)

    claim = await group.claim_one()
    assert await enqueue_one(store, key="k", number=2, on_conflict="replace") == untouched
    await group.end(claim, Outcome.FAILED, error="x")
    assert await enqueue_one(store, key="k", number=2, on_conflict="replace") == untouched
    assert number_of(await read(store, holder.id)) == 1


async def test_replace_reaches_a_job_that_was_given_back_untouched(store: Store, group: Group) -> None:
    await enqueue_one(store, key="k", number=1)
    await group.end(await group.claim_one(), Outcome.RELEASED)
    assert (await enqueue_one(store, key="k", number=2, on_conflict="replace")).replaced
    claim = await group.claim_one()
    assert (number_of(claim), claim.attempt) == (2, 1)


async def test_a_kept_key_outlives_its_job(store: Store, group: Group) -> None:
    await enqueue_one(store, key="k")
    await group.end(await group.claim_one(), Outcome.DONE)
    with pytest.raises(DuplicateJobError):
        await enqueue_one(store, key="k")


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.KILLED, Outcome.CANCELLED])
async def test_a_key_held_until_ended_is_free_after_the_end(
    store: Store, group: Group, outcome: Outcome
) -> None:
    holder = await enqueue_one(store, key="k", hold="ended")
    with pytest.raises(DuplicateJobError):
        await enqueue_one(store, key="k")
    claim = await group.claim_one()
    with pytest.raises(DuplicateJobError):
        await enqueue_one(store, key="k")
    await group.end(claim, outcome)
    successor = await enqueue_one(store, key="k", hold="ended")
    assert successor.created
    assert successor.id != holder.id
    assert await enqueue_one(store, key="k", on_conflict="return") == Enqueued(successor.id, created=False)


async def test_a_key_held_until_ended_survives_a_failed_attempt(store: Store, group: Group) -> None:
    await enqueue_one(store, key="k", hold="ended")
    await group.end(await group.claim_one(), Outcome.FAILED, error="x", delay=60.0)
    with pytest.raises(DuplicateJobError):
        await enqueue_one(store, key="k")


async def test_a_key_held_for_seconds_is_taken_over_when_they_have_passed(store: Store) -> None:
    holder = await enqueue_one(store, key="k", hold="until", hold_seconds=60.0)
    with pytest.raises(DuplicateJobError):
        await enqueue_one(store, key="k")
    passed = await enqueue_one(store, key="passed", hold="until", hold_seconds=0.0)
    successor = await enqueue_one(store, key="passed")
    assert successor.created
    assert len({holder.id, passed.id, successor.id}) == 3


# Rows that have nothing to do with each other.


async def test_each_row_gets_an_answer_of_its_own(store: Store, group: Group) -> None:
    holder = await enqueue_one(store, key="k")
    good, duplicate, wrong, keyed = await store.enqueue_each(
        [row(1), row(2, key="k"), row(3, job_id=holder.id + 1000), row(4, key="free")]
    )
    assert isinstance(good, Enqueued)
    assert isinstance(duplicate, DuplicateJobError)
    assert (duplicate.job_id, duplicate.index) == (holder.id, None)
    assert isinstance(wrong, OptionError)
    assert isinstance(keyed, Enqueued)
    assert {c.job_id for c in await group.claim()} == {holder.id, good.id, keyed.id}


async def test_a_row_alone_gets_its_answer_and_no_exception(store: Store) -> None:
    [good] = await store.enqueue_each([row(key="k")])
    [duplicate] = await store.enqueue_each([row(key="k")])
    assert isinstance(good, Enqueued)
    assert isinstance(duplicate, DuplicateJobError)
