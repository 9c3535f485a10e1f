"""Each transition leaves a job in exactly one place, with exact attempts."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from tools import (
    SCHEMA,
    Connection,
    Group,
    clean,
    count,
    ended,
    history,
    make_due,
    open_session,
    place,
    put,
    put_one,
    read,
)

from triojobs._errors import DuplicateJobError, JobNotFoundError
from triojobs._model import CancelRequest, Outcome
from triojobs._sql import claim as claim_sql
from triojobs._sql import groups, inspect, operate, settle

ENDS = [Outcome.DONE, Outcome.KILLED, Outcome.CANCELLED]


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    """One database for all tests of this file, emptied after each."""
    yield shared_database
    clean(shared_database)


@pytest.fixture
def group(db: Connection) -> Group:
    return Group(db)


def test_a_due_job_is_enqueued_into_ready_and_a_later_one_into_scheduled(db: Connection) -> None:
    assert place(db, put_one(db)) == ("ready", 0)
    assert place(db, put_one(db, delay=60.0)) == ("scheduled", 0)
    assert place(db, put_one(db, run_at=dt.datetime(2000, 1, 1, tzinfo=dt.UTC))) == ("ready", 0)
    assert place(db, put_one(db, run_at=dt.datetime(2100, 1, 1, tzinfo=dt.UTC))) == ("scheduled", 0)


def test_a_claim_moves_the_job_to_leases_and_counts_the_attempt(db: Connection, group: Group) -> None:
    job_id = put_one(db, payload=b"body", priority=3, max_attempts=7, timeout=1.5, metadata='{"a": 1}')
    claimed = group.claim_one(db)
    assert place(db, job_id) == ("leases", 1)
    assert (claimed.job_id, claimed.claim_no, claimed.group_id) == (job_id, 1, group.id)
    assert (claimed.queue, claimed.attempt, claimed.max_attempts, claimed.priority) == ("q", 1, 7, 3)
    assert (claimed.payload, claimed.encoding, claimed.timeout) == (b"body", b"cbor", 1.5)
    assert (claimed.key, claimed.metadata, claimed.last_error) == (None, b'{"a": 1}', None)
    assert (claimed.deadline, claimed.deadline_in) == (None, None)
    assert claimed.enqueued_at is not None
    assert abs(claimed.run_at - claimed.enqueued_at) < 1


def test_a_claim_says_key_deadline_and_last_error(db: Connection, group: Group) -> None:
    deadline = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    put_one(db, key="k", deadline=deadline)
    group.settle(db, group.claim_one(db), Outcome.FAILED, error="first")
    make_due(db)
    group.settle(db, group.claim_one(db), Outcome.FAILED, error="second")
    make_due(db)
    claimed = group.claim_one(db)
    assert (claimed.attempt, claimed.key, claimed.last_error) == (3, b"k", b"second")
    assert claimed.deadline == pytest.approx(deadline.timestamp())
    assert claimed.deadline_in == pytest.approx(3600, abs=60)


def test_a_missing_body_comes_out_as_a_row_without_payload(db: Connection, group: Group) -> None:
    lost, kept = put(db, 2)
    db.execute("DELETE FROM triojobs.jobs WHERE id = %s", [lost])
    claims = group.claim(db)
    assert [(c.job_id, c.payload, c.encoding) for c in claims] == [(lost, None, None), (kept, b"x", b"cbor")]
    assert place(db, lost) == ("leases", 1)


def test_claims_come_by_priority_then_run_at_then_id(db: Connection, group: Group) -> None:
    base = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    late = put_one(db, run_at=base + dt.timedelta(hours=1))
    first, second = put(db, 2, run_at=base)
    high = put_one(db, priority=9, run_at=base + dt.timedelta(hours=2))
    assert [c.job_id for c in group.claim(db, 2)] == [high, first]
    assert [c.job_id for c in group.claim(db, 2)] == [second, late]


def test_each_queue_of_a_claim_has_its_own_limit(db: Connection, group: Group) -> None:
    a, b = put(db, 5, queue="a"), put(db, 5, queue="b")
    put(db, 5, queue="other")
    claims = group.claim(db, wants={"a": 2, "b": 3, "empty": 4})
    assert sorted(c.job_id for c in claims if c.queue == "a") == a[:2]
    assert sorted(c.job_id for c in claims if c.queue == "b") == b[:3]
    assert len(claims) == 5
    assert {c.claim_no for c in claims} == {1}


@pytest.mark.parametrize("why", ["epoch", "unknown", "closed", "witness"])
def test_a_claim_that_is_not_entitled_takes_nothing_and_deletes_nothing(
    db: Connection, group: Group, why: str
) -> None:
    put(db, 3)
    if why == "epoch":
        group.epoch = 2
    elif why == "unknown":
        group.id = uuid.uuid4()
    elif why == "closed":
        groups.close_group(db, SCHEMA, group.id)
    else:
        db.execute("TRUNCATE triojobs.witnesses")  # as a crash does
    assert group.claim(db) == []
    assert not claim_sql.may_claim(db, SCHEMA, group_id=group.id, epoch=group.epoch)
    assert (count(db, "ready"), count(db, "leases")) == (3, 0)


def test_done_ends_the_job_with_its_result(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    claimed = group.claim_one(db)
    (written,) = group.settle(db, claimed, Outcome.DONE, result=b"r", encoding="cbor")
    assert (written.job_id, written.claim_no, written.outcome) == (job_id, 1, Outcome.DONE)
    assert place(db, job_id) == ("done", 1)
    job = read(db, job_id)
    assert (job.status, job.attempts, job.result, job.result_encoding) == ("done", 1, b"r", "cbor")
    assert (job.group_id, job.last_error) == (group.id, None)
    assert job.claimed_at is not None
    assert job.finished_at is not None
    assert job.enqueued_at <= job.claimed_at <= job.finished_at


def test_failed_waits_in_scheduled_for_its_delay(db: Connection, group: Group) -> None:
    job_id = put_one(db, priority=4, max_attempts=3)
    claimed = group.claim_one(db)
    written, queues = settle.settle(
        db, SCHEMA, group.id, [ended(claimed, Outcome.FAILED, error="boom", delay=100.0)]
    )
    assert ([w.outcome for w in written], queues) == ([Outcome.FAILED], {"q"})
    assert place(db, job_id) == ("scheduled", 1)
    seconds = "extract(epoch FROM run_at - clock_timestamp())"
    row = db.execute(f"SELECT priority, max_attempts, {seconds} FROM triojobs.scheduled").fetchone()
    assert row is not None
    assert row[:2] == (4, 3)
    assert 60 < row[2] <= 100
    assert history(db, job_id) == [(1, "failed", "boom")]
    assert read(db, job_id).status == "failed"


def test_killed_and_cancelled_end_the_job_with_their_reason(db: Connection, group: Group) -> None:
    killed, cancelled = put(db, 2)
    first, second = group.claim(db)
    group.settle(db, first, Outcome.KILLED, error="no more")
    group.settle(db, second, Outcome.CANCELLED, error="not wanted")
    assert (place(db, killed), place(db, cancelled)) == (("killed", 1), ("cancelled", 1))
    assert read(db, killed).last_error == "no more"
    assert read(db, cancelled).last_error == "not wanted"


def test_a_result_is_kept_for_done_only(db: Connection, group: Group) -> None:
    put_one(db)
    group.settle(db, group.claim_one(db), Outcome.KILLED, result=b"r", encoding="cbor")
    assert db.execute("SELECT result, encoding FROM triojobs.outcomes").fetchall() == [(None, None)]


def test_snoozed_waits_and_the_attempt_is_not_counted(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    group.settle(db, group.claim_one(db), Outcome.SNOOZED, delay=50.0)
    assert place(db, job_id) == ("scheduled", 0)
    assert history(db, job_id) == []
    assert read(db, job_id).status == "pending"


def test_release_gives_the_attempt_back_and_keeps_the_place_in_line(db: Connection, group: Group) -> None:
    first, second = put(db, 2, priority=2)
    before = db.execute("SELECT * FROM triojobs.ready WHERE id = %s", [first]).fetchone()
    (claimed,) = group.claim(db, 1)
    assert claimed.job_id == first
    group.settle(db, claimed, Outcome.RELEASED)
    assert place(db, first) == ("ready", 0)
    assert db.execute("SELECT * FROM triojobs.ready WHERE id = %s", [first]).fetchone() == before
    assert [c.job_id for c in group.claim(db)] == [first, second]


def test_a_second_settle_of_one_claim_writes_nothing(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    claimed = group.claim_one(db)
    group.settle(db, claimed, Outcome.FAILED, error="one")
    for outcome in Outcome:
        assert group.settle(db, claimed, outcome) == []
    assert place(db, job_id) == ("scheduled", 1)
    assert history(db, job_id) == [(1, "failed", "one")]


@pytest.mark.parametrize("other", ["group", "claim_no", "job"])
def test_a_settle_matches_job_group_and_claim(db: Connection, group: Group, other: str) -> None:
    job_id = put_one(db)
    claimed = group.claim_one(db)
    if other == "group":
        assert Group(db).settle(db, claimed, Outcome.DONE) == []
    else:
        if other == "claim_no":
            claimed.claim_no += 1
        else:
            claimed.job_id += 1
        assert group.settle(db, claimed, Outcome.DONE) == []
    assert place(db, job_id) == ("leases", 1)


def test_one_batch_settles_each_claim_in_its_own_way(db: Connection, group: Group) -> None:
    ids = put(db, len(Outcome))
    claims = group.claim(db)
    batch = [ended(c, outcome, delay=9.0) for c, outcome in zip(claims, Outcome, strict=True)]
    written, queues = settle.settle(db, SCHEMA, group.id, batch)
    assert {w.job_id: w.outcome for w in written} == dict(zip(ids, Outcome, strict=True))
    assert queues == {"q"}
    expected = {
        Outcome.DONE: ("done", 1),
        Outcome.FAILED: ("scheduled", 1),
        Outcome.KILLED: ("killed", 1),
        Outcome.CANCELLED: ("cancelled", 1),
        Outcome.SNOOZED: ("scheduled", 0),
        Outcome.RELEASED: ("ready", 0),
    }
    assert {o: place(db, i) for i, o in zip(ids, Outcome, strict=True)} == expected


def test_an_empty_batch_settles_nothing(db: Connection, group: Group) -> None:
    assert settle.settle(db, SCHEMA, group.id, []) == ([], set())


def test_a_settle_that_makes_nothing_claimable_names_no_queue(db: Connection, group: Group) -> None:
    put_one(db)
    claimed = group.claim_one(db)
    assert settle.settle(db, SCHEMA, group.id, [ended(claimed, Outcome.DONE)])[1] == set()


def test_promotion_moves_what_is_due_and_says_when_the_next_is(db: Connection) -> None:
    past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    soon, other = put_one(db, delay=100.0, priority=5), put_one(db, delay=100.0, queue="other")
    put_one(db, delay=1000.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = %s WHERE id = ANY (%s)", [past, [soon, other]])
    moved, due = claim_sql.promote(db, SCHEMA, queues=["q", "empty"])
    assert moved == {"q": 1}
    assert due == pytest.approx(1000, abs=60)
    assert (place(db, soon), place(db, other)) == (("ready", 0), ("scheduled", 0))
    assert db.execute("SELECT priority, run_at FROM triojobs.ready").fetchall() == [(5, past)]


def test_promotion_takes_the_earliest_over_all_queues_up_to_its_limit(db: Connection) -> None:
    for minute, queue in enumerate("abab"):
        put_one(db, delay=600.0, queue=queue)
        db.execute(
            "UPDATE triojobs.scheduled SET run_at = clock_timestamp() - %s * interval '1 min'"
            " WHERE run_at > clock_timestamp()",
            [10 - minute],
        )
    assert claim_sql.promote(db, SCHEMA, queues=["a", "b"], limit=3)[0] == {"a": 2, "b": 1}
    moved, due = claim_sql.promote(db, SCHEMA, queues=["a", "b"], limit=3)
    assert (moved, due) == ({"b": 1}, None)


def test_promotion_says_how_late_the_earliest_left_behind_is(db: Connection) -> None:
    put(db, 2, delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = clock_timestamp() - interval '10 s'")
    _, due = claim_sql.promote(db, SCHEMA, queues=["q"], limit=1)
    assert due is not None
    assert due <= -10


def test_a_beat_prolongs_the_lease_and_a_closed_group_learns_it(db: Connection, group: Group) -> None:
    group.lapse(db)
    assert groups.beat(db, SCHEMA, group.id) == groups.Beat([], witnessed=True)
    left = db.execute(
        "SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM triojobs.worker_groups"
    ).fetchone()
    assert left is not None
    assert 500 < left[0] <= 600
    groups.close_group(db, SCHEMA, group.id)
    assert groups.beat(db, SCHEMA, group.id) is None
    assert groups.beat(db, SCHEMA, uuid.uuid4()) is None


def requests_of(db: Connection, group: Group) -> list[CancelRequest]:
    found = groups.beat(db, SCHEMA, group.id)
    assert found is not None
    return found.requests


def test_a_beat_brings_the_cancel_requests_of_its_own_group(db: Connection, group: Group) -> None:
    other = Group(db)
    mine = put_one(db)
    claimed = group.claim_one(db)
    theirs = put_one(db)
    other.claim_one(db)
    operate.cancel(db, SCHEMA, mine, "stop")
    operate.cancel(db, SCHEMA, theirs, "halt")
    assert requests_of(db, group) == [CancelRequest(mine, claimed.claim_no, "stop")]
    assert requests_of(db, other) == [CancelRequest(theirs, 1, "halt")]


def test_close_releases_everything_with_refund_and_keeps_the_row(db: Connection, group: Group) -> None:
    ids = put(db, 3)
    group.claim(db)
    foreign = put_one(db, queue="other")
    Group(db).claim_one(db, queue="other")
    db.execute("INSERT INTO triojobs.waiting VALUES (%s, 'q')", [group.id])
    written, queues = groups.close_group(db, SCHEMA, group.id)
    assert {(w.job_id, w.claim_no, w.outcome) for w in written} == {(i, 1, Outcome.RELEASED) for i in ids}
    assert queues == {"q"}
    assert [place(db, i) for i in ids] == [("ready", 0)] * 3
    assert place(db, foreign) == ("leases", 1)
    assert count(db, "waiting") == 0
    closed = db.execute("SELECT closed_at IS NOT NULL FROM triojobs.worker_groups WHERE id = %s", [group.id])
    assert closed.fetchone() == (True,)


def test_close_ends_a_job_whose_cancel_was_asked_for(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    group.claim_one(db)
    operate.cancel(db, SCHEMA, job_id, "stop")
    written, queues = groups.close_group(db, SCHEMA, group.id)
    assert ([w.outcome for w in written], queues) == ([Outcome.CANCELLED], set())
    assert history(db, job_id) == [(1, "cancelled", "stop")]


def test_closing_twice_and_closing_nothing_is_no_error(db: Connection, group: Group) -> None:
    for group_id in (group.id, group.id, uuid.uuid4()):
        assert groups.close_group(db, SCHEMA, group_id) == ([], set())


def test_a_comparison_releases_what_the_ledger_does_not_know_and_raises_the_epoch(
    db: Connection, group: Group
) -> None:
    known, stray, cancelled = put(db, 3)
    claims = {c.job_id: c for c in group.claim(db)}
    operate.cancel(db, SCHEMA, cancelled, "stop")
    found = groups.compare(db, SCHEMA, group.id, lambda: [(known, claims[known].claim_no)])
    assert found == groups.Comparison(epoch=2, missing=[], released=1, queues={"q"})
    assert place(db, known) == ("leases", 1)
    assert place(db, stray) == ("ready", 0)
    assert history(db, cancelled) == [(1, "cancelled", "stop")]
    assert group.claim(db) == []  # the old epoch
    group.epoch = 2
    assert [c.job_id for c in group.claim(db)] == [stray]


def test_a_comparison_tells_claims_of_one_job_apart(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    claimed = group.claim_one(db)
    other = (job_id, claimed.claim_no + 1)
    found = groups.compare(db, SCHEMA, group.id, lambda: [other])
    assert found is not None
    assert found.missing == [other]
    assert place(db, job_id) == ("ready", 0)


def test_a_comparison_misses_known_claims_without_lease_and_outcome(db: Connection, group: Group) -> None:
    put(db, 3)
    running, done, lost = group.claim(db)
    group.settle(db, done, Outcome.DONE)
    db.execute("DELETE FROM triojobs.leases WHERE id = %s", [lost.job_id])
    db.execute("TRUNCATE triojobs.witnesses")
    known = [(c.job_id, c.claim_no) for c in (running, done, lost)]
    found = groups.compare(db, SCHEMA, group.id, lambda: known)
    assert found == groups.Comparison(epoch=2, missing=[(lost.job_id, 1)], released=0, queues=set())
    assert claim_sql.may_claim(db, SCHEMA, group_id=group.id, epoch=2)


@pytest.mark.parametrize("over", ["closed", "gone"])
def test_there_is_nothing_to_compare_for_a_group_that_is_over(db: Connection, over: str) -> None:
    group = Group(db)
    if over == "closed":
        groups.close_group(db, SCHEMA, group.id)
    else:
        db.execute("DELETE FROM triojobs.worker_groups")
    assert groups.compare(db, SCHEMA, group.id, lambda: [(1, 1)]) is None
    assert count(db, "witnesses") == (1 if over == "gone" else 0)


def test_rescue_puts_jobs_back_as_failed_attempts(db: Connection, group: Group) -> None:
    job_id = put_one(db, priority=6)
    group.claim_one(db)
    group.lapse(db)
    found = groups.rescue(db, SCHEMA)
    assert (found.groups, found.jobs, found.queues) == ((group.id,), 1, frozenset({"q"}))
    assert place(db, job_id) == ("ready", 1)
    assert history(db, job_id) == [(1, "failed", f"rescued: the lease of worker group {group.id} ended")]
    assert read(db, job_id).status == "failed"
    assert groups.beat(db, SCHEMA, group.id) is None
    again = groups.rescue(db, SCHEMA)
    assert (again.groups, again.jobs, again.queues) == ((), 0, frozenset())


def test_rescue_kills_when_attempts_are_used_up_and_obeys_a_cancel(db: Connection, group: Group) -> None:
    used_up, cancelled = put(db, 2, max_attempts=1)
    group.claim(db)
    operate.cancel(db, SCHEMA, cancelled, "stop")
    group.lapse(db)
    found = groups.rescue(db, SCHEMA)
    assert (found.jobs, found.queues) == (2, frozenset())
    assert place(db, used_up) == ("killed", 1)
    assert history(db, cancelled) == [(1, "cancelled", "stop")]


def test_rescue_leaves_living_groups_alone(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    group.claim_one(db)
    found = groups.rescue(db, SCHEMA)
    assert (found.groups, found.jobs) == ((), 0)
    assert place(db, job_id) == ("leases", 1)


@pytest.mark.parametrize("how", ["closed", "missing"])
def test_rescue_finds_leases_under_a_closed_or_missing_group(db: Connection, group: Group, how: str) -> None:
    job_id = put_one(db)
    group.claim_one(db)
    if how == "closed":
        db.execute("UPDATE triojobs.worker_groups SET closed_at = now()")
    else:
        db.execute("DELETE FROM triojobs.worker_groups")
    assert groups.rescue(db, SCHEMA).jobs == 1
    assert place(db, job_id) == ("ready", 1)


@pytest.mark.parametrize("delay", [None, 60.0])
def test_cancel_ends_a_waiting_job_at_once(db: Connection, delay: float | None) -> None:
    job_id = put_one(db, delay=delay)
    assert operate.cancel(db, SCHEMA, job_id, "no") is operate.CANCELLED_WAITING
    assert place(db, job_id) == ("cancelled", 0)
    job = read(db, job_id)
    assert (job.status, job.attempts, job.last_error, job.group_id) == ("cancelled", 0, "no", None)


def test_cancel_asks_the_group_of_a_running_job_and_the_first_reason_stays(
    db: Connection, group: Group
) -> None:
    job_id = put_one(db)
    group.claim_one(db)
    assert operate.cancel(db, SCHEMA, job_id, "first") == group.id
    assert operate.cancel(db, SCHEMA, job_id, "second") == group.id
    assert place(db, job_id) == ("leases", 1)
    assert requests_of(db, group) == [CancelRequest(job_id, 1, "first")]


@pytest.mark.parametrize("outcome", list(Outcome))
def test_whatever_ends_a_claim_after_a_cancel_it_is_done_or_cancelled(
    db: Connection, group: Group, outcome: Outcome
) -> None:
    job_id = put_one(db)
    claimed = group.claim_one(db)
    operate.cancel(db, SCHEMA, job_id, "stop")
    (written,) = group.settle(db, claimed, outcome, error="own")
    if outcome is Outcome.DONE:
        assert written.outcome is Outcome.DONE
        assert place(db, job_id) == ("done", 1)
    else:
        assert written.outcome is Outcome.CANCELLED
        assert history(db, job_id) == [(1, "cancelled", "stop")]
        assert place(db, job_id) == ("cancelled", 1)


@pytest.mark.parametrize("outcome", ENDS)
def test_cancel_of_an_ended_job_changes_nothing(db: Connection, group: Group, outcome: Outcome) -> None:
    job_id = put_one(db)
    group.settle(db, group.claim_one(db), outcome)
    assert operate.cancel(db, SCHEMA, job_id, "late") is operate.ENDED_BEFORE
    assert len(history(db, job_id)) == 1


def test_cancel_and_retry_of_an_unknown_job_say_so(db: Connection) -> None:
    with pytest.raises(JobNotFoundError, match="while cancelling: there is no job 12345"):
        operate.cancel(db, SCHEMA, 12345, "no")
    with pytest.raises(JobNotFoundError, match="while retrying: there is no job 12345"):
        operate.retry(db, SCHEMA, 12345)


@pytest.mark.parametrize("outcome", ENDS)
def test_an_operator_may_retry_an_ended_job_with_all_its_attempts(
    db: Connection, group: Group, outcome: Outcome
) -> None:
    job_id = put_one(db, priority=3, max_attempts=2)
    group.settle(db, group.claim_one(db), Outcome.FAILED)
    make_due(db)
    group.settle(db, group.claim_one(db), outcome, error="why")
    assert operate.retry(db, SCHEMA, job_id) is True
    assert place(db, job_id) == ("ready", 0)
    assert db.execute("SELECT priority, max_attempts FROM triojobs.ready").fetchall() == [(3, 2)]
    assert read(db, job_id).status == "pending"
    assert operate.retry(db, SCHEMA, job_id) is False
    assert group.claim_one(db).attempt == 1
    assert len(history(db, job_id)) == 2


def test_a_job_that_was_cancelled_while_it_waited_may_be_retried_and_cancelled_again(db: Connection) -> None:
    job_id = put_one(db)
    for _ in range(3):
        operate.cancel(db, SCHEMA, job_id, "no")
        assert operate.retry(db, SCHEMA, job_id) is True
    assert len(history(db, job_id)) == 3
    assert place(db, job_id) == ("ready", 0)


@pytest.mark.parametrize("where", ["ready", "scheduled", "leases"])
def test_retry_of_a_job_that_has_not_ended_is_false(db: Connection, group: Group, where: str) -> None:
    job_id = put_one(db, delay=60.0 if where == "scheduled" else None)
    if where == "leases":
        group.claim_one(db)
    before = place(db, job_id)
    assert operate.retry(db, SCHEMA, job_id) is False
    assert place(db, job_id) == before
    assert before[0] == where


def test_retry_of_a_job_whose_key_has_passed_on_is_refused(db: Connection, group: Group) -> None:
    old = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim_one(db), Outcome.DONE)
    new = put_one(db, key="k")
    with pytest.raises(DuplicateJobError) as caught:
        operate.retry(db, SCHEMA, old)
    assert (caught.value.job_id, caught.value.key, caught.value.operation) == (new, "k", "retrying")
    assert place(db, old) == ("done", 1)


def test_retry_of_a_running_job_whose_key_has_passed_on_is_false(db: Connection, group: Group) -> None:
    old = put_one(db, key="k", hold="until", hold_seconds=0.0)
    group.claim_one(db)
    assert put_one(db, key="k") != old
    assert operate.retry(db, SCHEMA, old) is False


def test_a_retried_job_takes_its_forgotten_key_again(db: Connection, group: Group) -> None:
    job_id = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim_one(db), Outcome.KILLED)
    db.execute("DELETE FROM triojobs.keys")
    assert operate.retry(db, SCHEMA, job_id) is True
    with pytest.raises(DuplicateJobError):
        put_one(db, key="k")


def test_the_history_has_one_row_per_ended_attempt(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    for outcome in (Outcome.FAILED, Outcome.SNOOZED, Outcome.RELEASED, Outcome.FAILED, Outcome.DONE):
        group.settle(db, group.claim_one(db), outcome, error=None if outcome is Outcome.DONE else "no")
        make_due(db)
    assert history(db, job_id) == [(1, "failed", "no"), (2, "failed", "no"), (3, "done", None)]
    assert read(db, job_id).attempts == 3


def test_the_view_shows_every_status(db: Connection, group: Group) -> None:
    done, killed, cancelled, failed, running, ready = put(db, 6)
    scheduled = put_one(db, delay=60.0)
    claims = {c.job_id: c for c in group.claim(db, 5)}
    group.settle(db, claims[done], Outcome.DONE)
    group.settle(db, claims[killed], Outcome.KILLED, error="k")
    group.settle(db, claims[cancelled], Outcome.CANCELLED, error="c")
    group.settle(db, claims[failed], Outcome.FAILED, error="f", delay=60.0)
    rows = db.execute(
        "SELECT id, status, attempts, last_error, group_id, claimed_at IS NULL, finished_at IS NULL"
        " FROM triojobs.job_status"
    ).fetchall()
    assert {row[0]: row[1:] for row in rows} == {
        done: ("done", 1, None, group.id, False, False),
        killed: ("killed", 1, "k", group.id, False, False),
        cancelled: ("cancelled", 1, "c", group.id, False, False),
        failed: ("failed", 1, "f", None, True, True),
        running: ("running", 1, None, group.id, False, True),
        ready: ("pending", 0, None, None, True, True),
        scheduled: ("pending", 0, None, None, True, True),
    }


def test_ended_says_which_jobs_neither_wait_nor_run(db: Connection, group: Group) -> None:
    done, running = put(db, 2)
    group.settle(db, group.claim(db)[:1], Outcome.DONE)
    ready, scheduled = put_one(db), put_one(db, delay=60.0)
    assert sorted(inspect.ended(db, SCHEMA, [done, running, ready, scheduled, 99])) == sorted([done, 99])


def test_idle_looks_at_due_and_running_jobs_of_its_queues(db: Connection, group: Group) -> None:
    assert inspect.idle(db, SCHEMA, ["q", "r"])
    put_one(db, delay=60.0)
    assert inspect.idle(db, SCHEMA, ["q"])
    db.execute("UPDATE triojobs.scheduled SET run_at = now()")
    assert not inspect.idle(db, SCHEMA, ["q"])
    assert inspect.idle(db, SCHEMA, ["r"])
    claim_sql.promote(db, SCHEMA, queues=["q"])
    assert not inspect.idle(db, SCHEMA, ["q"])
    claimed = group.claim_one(db)
    assert not inspect.idle(db, SCHEMA, ["q"])
    group.settle(db, claimed, Outcome.DONE)
    assert inspect.idle(db, SCHEMA, ["q"])


def test_commit_ends_its_claim_once(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    claimed = group.claim_one(db)
    fence = {"job_id": job_id, "group_id": group.id, "claim_no": claimed.claim_no}
    assert settle.hold_lease(db, SCHEMA, **fence)
    assert settle.outcome_of_claim(db, SCHEMA, **fence) is None
    assert settle.settle_one_done(db, SCHEMA, **fence, result=b"r", encoding="cbor")
    assert place(db, job_id) == ("done", 1)
    assert read(db, job_id).result == b"r"
    assert settle.outcome_of_claim(db, SCHEMA, **fence) == "done"
    assert not settle.hold_lease(db, SCHEMA, **fence)
    assert not settle.settle_one_done(db, SCHEMA, **fence, result=b"r", encoding="cbor")


@pytest.mark.parametrize("wrong", ["group_id", "claim_no", "job_id"])
def test_commit_matches_job_group_and_claim(db: Connection, group: Group, wrong: str) -> None:
    job_id = put_one(db)
    fence = {"job_id": job_id, "group_id": group.id, "claim_no": group.claim_one(db).claim_no}
    fence[wrong] = uuid.uuid4() if wrong == "group_id" else fence[wrong] + 1  # type: ignore[operator]
    assert not settle.hold_lease(db, SCHEMA, **fence)  # type: ignore[arg-type]
    assert not settle.settle_one_done(db, SCHEMA, **fence, result=b"r", encoding="cbor")  # type: ignore[arg-type]
    assert place(db, job_id) == ("leases", 1)


GROUP = "'00000000-0000-0000-0000-000000000001'"


@pytest.mark.parametrize(
    ("constraint", "statement"),
    [
        ("unique", "INSERT INTO triojobs.ready SELECT * FROM triojobs.ready"),
        ("unique", "INSERT INTO triojobs.jobs SELECT * FROM triojobs.jobs"),
        (
            "unique",
            "INSERT INTO triojobs.scheduled SELECT r.* FROM triojobs.ready r, generate_series(1, 2)",
        ),
        (
            "unique",
            f"INSERT INTO triojobs.outcomes (job_id, group_id, claim_no, attempt, status)"
            f" SELECT 1, {GROUP}, 1, 1, 'done' FROM generate_series(1, 2)",
        ),
        (
            "unique",
            "INSERT INTO triojobs.leases"
            " (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at)"
            f" SELECT 1, n, {GROUP}, 1, 1, 'q', 0, now() FROM generate_series(1, 2) n",
        ),
        (
            "unique",
            "INSERT INTO triojobs.keys (queue, key, job_id, hold)"
            " SELECT 'q', 'k', n, 'kept' FROM generate_series(1, 2) n",
        ),
        ("check", "INSERT INTO triojobs.keys (queue, key, job_id, hold) VALUES ('q', 'k', 1, 'until')"),
        ("check", "INSERT INTO triojobs.keys VALUES ('q', 'k', 1, 'kept', now())"),
        ("check", "INSERT INTO triojobs.keys (queue, key, job_id, hold) VALUES ('q', 'k', 1, 'for ever')"),
        ("check", "INSERT INTO triojobs.outcomes (job_id, attempt, status) VALUES (1, 1, 'lost')"),
        ("check", "UPDATE triojobs.jobs SET queue = ''"),
        ("check", "UPDATE triojobs.jobs SET queue = repeat('ä', 128)"),
        ("check", "UPDATE triojobs.jobs SET key = repeat('ä', 513)"),
        ("check", "UPDATE triojobs.jobs SET metadata = '[]'"),
        ("check", "UPDATE triojobs.jobs SET priority = -1"),
        ("check", "UPDATE triojobs.jobs SET max_attempts = 0"),
        ("check", "UPDATE triojobs.jobs SET timeout = 0"),
        ("check", "UPDATE triojobs.worker_groups SET lease_duration = 0"),
    ],
)
def test_a_constraint_refuses(db: Connection, group: Group, constraint: str, statement: str) -> None:
    put_one(db)
    error = psycopg.errors.UniqueViolation if constraint == "unique" else psycopg.errors.CheckViolation
    with pytest.raises(error):
        db.execute(statement)  # type: ignore[call-overload]


def test_a_group_id_registers_once(db: Connection, group: Group) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation):
        groups.register(db, SCHEMA, groups.Registration(group.id, "again", "h", 1, "0", 5.0))


def test_a_session_reads_committed_with_generic_plans_whatever_the_role_says(database: str) -> None:
    with open_session(database) as conn:
        settings = ("default_transaction_isolation", "plan_cache_mode", "jit", "lock_timeout")
        values = [conn.execute(f"SHOW {name}").fetchone() for name in settings]  # type: ignore[arg-type]
    assert values == [("read committed",), ("force_generic_plan",), ("off",), ("2s",)]
