"""Two actors at one job, in both orders. One holds a transaction open, the other is seen to wait for it.

The claims, settles and rescues are the production functions; an enclosing transaction of the test keeps
one of them from committing until the other has run into it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import psycopg
import pytest
from psycopg import sql
from tools import (
    SCHEMA,
    Connection,
    Group,
    Running,
    blocked,
    clean,
    count,
    ended,
    history,
    make_due,
    new_row,
    open_session,
    place,
    put,
    put_one,
    read,
    rolled_back,
    together,
)

from triojobs._errors import DuplicateJobError
from triojobs._model import Enqueued, Outcome
from triojobs._sql import claim as claim_sql
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import groups, operate, settle

Connect = Callable[[], Connection]


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    """One database for all tests of this file, emptied after each."""
    yield shared_database
    clean(shared_database)


def enqueue_one(conn: Connection, **options: object) -> Enqueued:
    """Enqueue one job as `try_enqueue` does, and return its answer."""
    row = new_row(**options)  # type: ignore[arg-type]
    with conn.transaction():
        (answer,) = enqueue_sql.enqueue(conn, SCHEMA, [row], notify_inside=False)
    assert isinstance(answer, Enqueued)
    return answer


def lock_group(conn: Connection, group: Group) -> None:
    """Hold the group's row as closing does: a claim that starts now has its snapshot, and waits."""
    conn.execute("SELECT FROM triojobs.worker_groups WHERE id = %s FOR UPDATE", [group.id])


# Claim against claim.


def test_claims_side_by_side_take_each_row_once_and_lose_none(connect: Connect, db: Connection) -> None:
    ids = put(db, 1500)

    def drain(conn: Connection, group: Group) -> Callable[[], list[int]]:
        def run() -> list[int]:
            taken: list[int] = []
            while claims := group.claim(conn, 7):
                taken += [c.job_id for c in claims]
            return taken

        return run

    shared = Group(db)
    taken = together(*(drain(connect(), group) for group in (Group(db), Group(db), Group(db), shared)))
    assert sorted(job_id for each in taken for job_id in each) == ids
    assert (count(db, "ready"), count(db, "leases")) == (0, len(ids))


def test_a_claim_passes_over_rows_of_an_open_claim_and_finds_them_when_it_is_rolled_back(
    connect: Connect, db: Connection
) -> None:
    ids = put(db, 4)
    first, second = Group(db), Group(db)
    with rolled_back(a := connect()):
        assert [c.job_id for c in first.claim(a, 2)] == ids[:2]
        assert [c.job_id for c in second.claim(db, 4)] == ids[2:]
    assert [c.job_id for c in second.claim(db, 4)] == ids[:2]


def test_beats_and_claims_of_one_group_do_not_wait_for_each_other(connect: Connect, db: Connection) -> None:
    put(db, 2)
    group = Group(db)
    with (a := connect()).transaction():
        groups.beat(a, SCHEMA, group.id)
        assert len(group.claim(db, 1)) == 1
    with a.transaction():
        assert len(group.claim(a, 1)) == 1
        assert groups.beat(db, SCHEMA, group.id) == groups.Beat([], witnessed=True)


# A claim whose client gave up, against comparison and close.


def test_a_comparison_waits_for_a_late_claim_and_releases_its_rows(connect: Connect, db: Connection) -> None:
    ids = put(db, 2)
    group, a, b = Group(db), connect(), connect()
    with a.transaction():
        assert len(group.claim(a)) == 2
        comparison = blocked(db, b, groups.compare, SCHEMA, group.id, list)
    assert comparison.result() == groups.Comparison(epoch=2, missing=[], released=2, queues={"q"})
    assert [place(db, i) for i in ids] == [("ready", 0)] * 2
    assert group.claim(a) == []  # still the old epoch: it arrives after the comparison


def test_a_claim_that_waits_for_a_comparison_takes_nothing(connect: Connect, db: Connection) -> None:
    put(db, 2)
    group, a, b = Group(db), connect(), connect()
    with a.transaction():
        assert groups.compare(a, SCHEMA, group.id, list) is not None
        late = blocked(db, b, group.claim)
    assert late.result() == []
    assert (count(db, "ready"), count(db, "leases")) == (2, 0)


def close_against_open_claim(db: Connection, a: Connection, b: Connection) -> None:
    ids = put(db, 2)
    group = Group(db)
    with a.transaction():
        assert len(group.claim(a)) == 2
        closing = blocked(db, b, groups.close_group, SCHEMA, group.id)
    written, _ = closing.result()
    assert sorted(w.job_id for w in written) == ids
    assert [place(db, i) for i in ids] == [("ready", 0)] * 2
    assert count(db, "leases") == 0


def test_close_waits_for_an_open_claim_and_sweeps_what_it_took(connect: Connect, db: Connection) -> None:
    close_against_open_claim(db, connect(), connect())


def test_close_sweeps_under_a_role_whose_default_is_repeatable_read(
    database: str, connect: Connect, db: Connection
) -> None:
    role = sql.SQL("ALTER ROLE CURRENT_USER IN DATABASE {} ").format(sql.Identifier(db.info.dbname))
    db.execute(role + sql.SQL("SET default_transaction_isolation = 'repeatable read'"))
    try:
        with psycopg.connect(database) as plain:
            assert plain.execute("SHOW transaction_isolation").fetchone() == ("repeatable read",)
        with open_session(database) as a, open_session(database) as b:
            close_against_open_claim(db, a, b)
    finally:
        db.execute(role + sql.SQL("RESET default_transaction_isolation"))


def test_a_claim_that_waits_for_a_close_takes_nothing(connect: Connect, db: Connection) -> None:
    put(db, 2)
    group, a, b = Group(db), connect(), connect()
    with a.transaction():
        groups.close_group(a, SCHEMA, group.id)
        late = blocked(db, b, group.claim)
    assert late.result() == []
    assert (count(db, "ready"), count(db, "leases")) == (2, 0)


def test_rescue_passes_over_a_group_with_an_open_claim_and_takes_it_next_time(
    connect: Connect, db: Connection
) -> None:
    job_id = put_one(db)
    group = Group(db)
    group.lapse(db)
    with (a := connect()).transaction():
        group.claim_one(a)
        found = groups.rescue(db, SCHEMA)
        assert (found.groups, found.jobs) == ((), 0)
    found = groups.rescue(db, SCHEMA)
    assert (found.groups, found.jobs) == ((group.id,), 1)
    assert place(db, job_id) == ("ready", 1)


def test_a_claim_that_waits_for_a_rescue_takes_nothing(connect: Connect, db: Connection) -> None:
    put(db, 2)
    group, a, b = Group(db), connect(), connect()
    group.lapse(db)
    with a.transaction():
        assert groups.rescue(a, SCHEMA).groups == (group.id,)
        late = blocked(db, b, group.claim)
    assert late.result() == []
    assert (count(db, "ready"), count(db, "leases")) == (2, 0)


# Settle and release against rescue and close.


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_settle_that_waits_for_a_rescue_writes_nothing(
    connect: Connect, db: Connection, outcome: Outcome
) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    claimed = group.claim_one(db)
    group.lapse(db)
    with a.transaction():
        assert groups.rescue(a, SCHEMA).jobs == 1
        late = blocked(db, b, group.settle, claimed, outcome)
    assert late.result() == []
    assert place(db, job_id) == ("ready", 1)
    assert [status for _, status, _ in history(db, job_id)] == ["failed"]


@pytest.mark.parametrize(
    ("outcome", "where"),
    [
        (Outcome.DONE, ("done", 1)),
        (Outcome.FAILED, ("scheduled", 1)),
        (Outcome.KILLED, ("killed", 1)),
        (Outcome.SNOOZED, ("scheduled", 0)),
        (Outcome.RELEASED, ("ready", 0)),
    ],
)
def test_a_rescue_beside_a_settle_does_not_resurrect_what_it_ended(
    connect: Connect, db: Connection, outcome: Outcome, where: tuple[str, int]
) -> None:
    job_id = put_one(db)
    group = Group(db)
    claimed = group.claim_one(db)
    group.lapse(db)
    with (a := connect()).transaction():
        assert len(group.settle(a, claimed, outcome, delay=60.0)) == 1
        assert groups.rescue(db, SCHEMA).jobs == 0
    assert groups.rescue(db, SCHEMA).jobs == 0
    assert place(db, job_id) == where


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED, Outcome.RELEASED])
def test_a_close_that_waits_for_a_settle_finds_the_rest(
    connect: Connect, db: Connection, outcome: Outcome
) -> None:
    first, second = put(db, 2)
    group, a, b = Group(db), connect(), connect()
    claims = group.claim(db)
    with a.transaction():
        group.settle(a, claims[0], outcome, delay=60.0)
        closing = blocked(db, b, groups.close_group, SCHEMA, group.id)
    assert [w.job_id for w in closing.result()[0]] == [second]
    assert place(db, second) == ("ready", 0)
    assert place(db, first)[0] == {"done": "done", "failed": "scheduled", "released": "ready"}[outcome]


def test_rescues_side_by_side_take_each_job_once(connect: Connect, db: Connection) -> None:
    ids = put(db, 300)
    for _ in range(30):
        group = Group(db)
        group.claim(db, 10)
        group.lapse(db)
    rounds = together(*(partial(groups.rescue, connect(), SCHEMA) for _ in range(4)))
    assert sum(each.jobs for each in rounds) == len(ids)
    assert sum(len(each.groups) for each in rounds) == 30
    assert {place(db, i) for i in ids} == {("ready", 1)}
    assert count(db, "outcomes") == len(ids)


def test_a_rescue_does_not_wait_for_another_one(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group = Group(db)
    group.claim_one(db)
    group.lapse(db)
    with (a := connect()).transaction():
        assert groups.rescue(a, SCHEMA).jobs == 1
        found = groups.rescue(db, SCHEMA)
        assert (found.groups, found.jobs) == ((), 0)
    assert groups.rescue(db, SCHEMA).jobs == 0
    assert place(db, job_id) == ("ready", 1)


# Who locks leases in which order.


def two_leases_against_their_order(db: Connection, group: Group) -> tuple[int, int]:
    """Lease two jobs so that the one with the greater id comes first in the table."""
    db.execute("TRUNCATE triojobs.leases")  # no free space of earlier rows to fall into
    low = put_one(db, priority=0)
    high = put_one(db, priority=9)
    assert [c.job_id for c in group.claim(db, 1) + group.claim(db, 1)] == [high, low]
    return low, high


def run_into_each_other(
    db: Connection, connect: Connect, low: int, high: int, first: Callable[[Connection], object],
    second: Callable[[Connection], object],
) -> None:  # fmt: skip
    """Let `first` begin with the low lease and `second` elsewhere, then let both go on.

    If `second` begins with the high lease they now hold what the other one needs: a deadlock.
    """
    gates = {low: connect(), high: connect()}
    for job_id, gate in gates.items():
        gate.execute("BEGIN")
        gate.execute("SELECT FROM triojobs.leases WHERE id = %s FOR UPDATE", [job_id])
    ahead = connect()
    one: Running[object] = blocked(db, ahead, first)
    two: Running[object] = blocked(db, connect(), second)
    gates[low].execute("COMMIT")
    # Until it stands before the high lease: a gate opened earlier would let it barge through both.
    moved_on = "SELECT pg_blocking_pids(%s) && %s::int[] OR pg_blocking_pids(%s) = '{}'"
    pid, gate = ahead.info.backend_pid, gates[low].info.backend_pid
    while not one.ended and db.execute(moved_on, [pid, [gate], pid]).fetchone() == (True,):
        pass
    gates[high].execute("COMMIT")
    one.result()
    two.result()


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.KILLED])
def test_settle_and_close_do_not_lock_leases_in_different_orders(
    connect: Connect, db: Connection, outcome: Outcome
) -> None:
    group = Group(db)
    low, high = two_leases_against_their_order(db, group)
    batch = [settle.Settlement(low, 2, outcome), settle.Settlement(high, 1, outcome)]
    run_into_each_other(
        db, connect, low, high,
        lambda conn: settle.settle(conn, SCHEMA, group.id, batch),
        lambda conn: groups.close_group(conn, SCHEMA, group.id),
    )  # fmt: skip
    assert count(db, "leases") == 0
    assert count(db, "outcomes") + count(db, "ready") == 2


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.KILLED])
def test_two_settles_of_the_same_claims_lock_them_in_one_order(
    connect: Connect, db: Connection, outcome: Outcome
) -> None:
    group = Group(db)
    low, high = two_leases_against_their_order(db, group)
    batch = [settle.Settlement(low, 2, outcome), settle.Settlement(high, 1, outcome)]
    run_into_each_other(
        db, connect, low, high,
        lambda conn: settle.settle(conn, SCHEMA, group.id, batch),
        lambda conn: settle.settle(conn, SCHEMA, group.id, batch[::-1]),
    )  # fmt: skip
    assert count(db, "leases") == 0
    assert count(db, "outcomes") == 2


# Replace against claim and promotion.


def replace(conn: Connection, **options: object) -> Enqueued:
    return enqueue_one(conn, key="k", payload=b"new", on_conflict="replace", **options)


def test_a_claim_passes_over_a_row_that_is_being_replaced(connect: Connect, db: Connection) -> None:
    job_id = put_one(db, key="k", payload=b"old")
    group, a = Group(db), connect()
    with a.transaction():
        assert replace(a) == Enqueued(job_id, created=False, replaced=True)
        assert group.claim(db) == []
    assert [c.payload for c in group.claim(db)] == [b"new"]


def test_a_claim_that_began_before_a_replacement_never_runs_the_old_body(
    connect: Connect, db: Connection
) -> None:
    job_id = put_one(db, key="k", payload=b"old")
    group, gate, b = Group(db), connect(), connect()
    with gate.transaction():
        lock_group(gate, group)
        waiting = blocked(db, b, group.claim)  # its snapshot is older than the replacement
        assert replace(db) == Enqueued(job_id, created=False, replaced=True)
    claims = waiting.result() or group.claim(db)
    assert [c.payload for c in claims] == [b"new"]


def test_a_claim_that_began_before_a_replacement_never_runs_the_old_body_that_was_put_off(
    connect: Connect, db: Connection
) -> None:
    put_one(db, key="k", payload=b"old")
    group, gate, b = Group(db), connect(), connect()
    with gate.transaction():
        lock_group(gate, group)
        waiting = blocked(db, b, group.claim)
        assert replace(db, delay=60.0).replaced
    assert waiting.result() == []
    make_due(db)
    assert [c.payload for c in group.claim(db)] == [b"new"]


@pytest.mark.parametrize("committed", [True, False])
def test_a_replacement_that_waits_for_a_claim_reports_what_became_of_it(
    connect: Connect, db: Connection, committed: bool
) -> None:
    job_id = put_one(db, key="k", payload=b"old")
    group, a, b = Group(db), connect(), connect()
    with a.transaction(force_rollback=not committed):
        assert group.claim_one(a).payload == b"old"
        waiting = blocked(db, b, replace)
    assert waiting.result() == Enqueued(job_id, created=False, replaced=not committed)
    assert read(db, job_id).payload == (b"old" if committed else b"new")


@pytest.mark.parametrize("delay", [None, 60.0])
def test_a_replacement_follows_a_job_that_is_promoted_meanwhile(
    connect: Connect, db: Connection, delay: float | None
) -> None:
    job_id = put_one(db, key="k", payload=b"old", delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    a, b = connect(), connect()
    with a.transaction():
        claim_sql.promote(a, SCHEMA, queues=["q"])
        waiting = blocked(db, b, replace, delay=delay)
    assert waiting.result() == Enqueued(job_id, created=False, replaced=True)
    assert place(db, job_id) == ("ready" if delay is None else "scheduled", 0)


def test_promotion_passes_over_a_row_that_is_being_replaced(connect: Connect, db: Connection) -> None:
    job_id = put_one(db, key="k", payload=b"old", delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    with (a := connect()).transaction():
        assert replace(a, delay=60.0).replaced
        assert claim_sql.promote(db, SCHEMA, queues=["q"])[0] == {}
    assert claim_sql.promote(db, SCHEMA, queues=["q"])[0] == {}
    assert place(db, job_id) == ("scheduled", 0)


def test_promotions_side_by_side_move_each_row_once(connect: Connect, db: Connection) -> None:
    ids = put(db, 900, delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")

    def drain(conn: Connection) -> int:
        moved = 0
        while count(conn, "scheduled"):
            moved += claim_sql.promote(conn, SCHEMA, queues=["q"], limit=50)[0]["q"]
        return moved

    assert sum(together(*(partial(drain, connect()) for _ in range(4)))) == len(ids)
    assert count(db, "ready") == len(ids)


# Cancel against everything.


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_settle_that_waits_for_a_cancel_sees_it(connect: Connect, db: Connection, outcome: Outcome) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    claimed = group.claim_one(db)
    with a.transaction():
        assert operate.cancel(a, SCHEMA, job_id, "stop") == group.id
        late = blocked(db, b, group.settle, claimed, outcome, error="own")
    (written,) = late.result()
    if outcome is Outcome.DONE:
        assert (written.outcome, place(db, job_id)) == (Outcome.DONE, ("done", 1))
    else:
        assert written.outcome is Outcome.CANCELLED
        assert history(db, job_id) == [(1, "cancelled", "stop")]
        assert place(db, job_id) == ("cancelled", 1)


def test_a_commit_that_waits_for_a_cancel_stays_done(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    fence = {"job_id": job_id, "group_id": group.id, "claim_no": group.claim_one(db).claim_no}
    with a.transaction():
        operate.cancel(a, SCHEMA, job_id, "stop")
        late = blocked(db, b, settle.settle_one_done, SCHEMA, **fence, result=b"", encoding="cbor")
    assert late.result() is True
    assert place(db, job_id) == ("done", 1)


@pytest.mark.parametrize(
    ("outcome", "answer"),
    [
        (Outcome.DONE, operate.ENDED_BEFORE),
        (Outcome.KILLED, operate.ENDED_BEFORE),
        (Outcome.FAILED, operate.CANCELLED_WAITING),
        (Outcome.SNOOZED, operate.CANCELLED_WAITING),
        (Outcome.RELEASED, operate.CANCELLED_WAITING),
    ],
)
def test_a_cancel_that_waits_for_a_settle_follows_the_job(
    connect: Connect, db: Connection, outcome: Outcome, answer: object
) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    claimed = group.claim_one(db)
    with a.transaction():
        group.settle(a, claimed, outcome, delay=60.0)
        late = blocked(db, b, operate.cancel, SCHEMA, job_id, "stop")
    assert late.result() is answer
    expected = str(outcome) if answer is operate.ENDED_BEFORE else "cancelled"
    assert place(db, job_id)[0] == expected


def test_a_cancel_that_waits_for_a_claim_asks_its_group(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    with a.transaction():
        group.claim_one(a)
        late = blocked(db, b, operate.cancel, SCHEMA, job_id, "stop")
    assert late.result() == group.id
    found = groups.beat(db, SCHEMA, group.id)
    assert found is not None
    assert found.requests == [groups.CancelRequest(job_id, 1, "stop")]


def test_a_cancel_that_waits_for_a_promotion_finds_the_job_in_ready(connect: Connect, db: Connection) -> None:
    job_id = put_one(db, delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    a, b = connect(), connect()
    with a.transaction():
        claim_sql.promote(a, SCHEMA, queues=["q"])
        late = blocked(db, b, operate.cancel, SCHEMA, job_id, "stop")
    assert late.result() is operate.CANCELLED_WAITING
    assert place(db, job_id) == ("cancelled", 0)


def test_a_claim_passes_over_a_job_that_is_being_cancelled(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group = Group(db)
    with (a := connect()).transaction():
        operate.cancel(a, SCHEMA, job_id, "stop")
        assert group.claim(db) == []
    assert group.claim(db) == []
    assert place(db, job_id) == ("cancelled", 0)


def test_a_close_that_waits_for_a_cancel_obeys_it(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    group.claim_one(db)
    with a.transaction():
        operate.cancel(a, SCHEMA, job_id, "stop")
        closing = blocked(db, b, groups.close_group, SCHEMA, group.id)
    assert [w.outcome for w in closing.result()[0]] == [Outcome.CANCELLED]
    assert history(db, job_id) == [(1, "cancelled", "stop")]


def test_a_rescue_leaves_a_lease_that_is_being_cancelled_for_the_next_round(
    connect: Connect, db: Connection
) -> None:
    job_id = put_one(db)
    group = Group(db)
    group.claim_one(db)
    group.lapse(db)
    with (a := connect()).transaction():
        operate.cancel(a, SCHEMA, job_id, "stop")
        assert groups.rescue(db, SCHEMA).jobs == 0
    assert groups.rescue(db, SCHEMA).jobs == 1
    assert history(db, job_id) == [(1, "cancelled", "stop")]


# Keys.


@pytest.mark.parametrize("hold", ["kept", "ended", "until"])
def test_eight_enqueues_of_one_key_have_one_winner_and_all_answers_name_it(
    connect: Connect, db: Connection, hold: str
) -> None:
    keys = [f"k{n}" for n in range(40)]

    def run(seed: int, conn: Connection) -> dict[str, Enqueued]:
        order = random.Random(seed).sample(keys, len(keys))
        seconds = 600.0 if hold == "until" else None
        return {
            key: enqueue_one(conn, key=key, hold=hold, hold_seconds=seconds, on_conflict="return")
            for key in order
        }

    answers = together(*(partial(run, n, connect()) for n in range(8)))
    for key in keys:
        assert len({each[key].id for each in answers}) == 1
        assert sum(each[key].created for each in answers) == 1
    assert count(db, "jobs") == count(db, "ready") == count(db, "keys") == len(keys)


def test_bulk_enqueues_of_the_same_keys_in_any_order_do_not_deadlock(
    connect: Connect, db: Connection
) -> None:
    keys = [f"k{n}" for n in range(60)]

    def run(seed: int, conn: Connection) -> list[int]:
        order = random.Random(seed).sample(keys, len(keys))
        rows = [new_row(key=key, on_conflict="return") for key in order]
        with conn.transaction():
            answers = enqueue_sql.enqueue(conn, SCHEMA, rows, notify_inside=False)
        return [a.id for _, a in sorted(zip(order, answers, strict=True))]  # type: ignore[union-attr]

    answers = together(*(partial(run, n, connect()) for n in range(6)))
    assert all(each == answers[0] for each in answers)
    assert count(db, "jobs") == count(db, "ready") == len(keys)


@pytest.mark.parametrize("committed", [True, False])
def test_a_second_enqueue_of_a_key_waits_for_the_first(
    connect: Connect, db: Connection, committed: bool
) -> None:
    a, b = connect(), connect()
    with a.transaction(force_rollback=not committed):
        first = enqueue_one(a, key="k")
        waiting = blocked(db, b, enqueue_one, key="k", on_conflict="return")
    second = waiting.result()
    assert second.created is not committed
    assert (second.id == first.id) is committed
    assert count(db, "jobs") == count(db, "ready") == 1


def ended_holder(db: Connection, group: Group, hold: str) -> int:
    """Enqueue and end a job that no longer holds its key."""
    seconds = 0.0 if hold == "until" else None
    job_id = put_one(db, key="k", hold=hold, hold_seconds=seconds)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    return job_id


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("hold", ["ended", "until"])
def test_of_two_takers_of_a_key_one_gets_it(
    connect: Connect, db: Connection, hold: str, committed: bool
) -> None:
    old = ended_holder(db, Group(db), hold)
    a, b = connect(), connect()
    with a.transaction(force_rollback=not committed):
        first = enqueue_one(a, key="k")
        assert first.created
        waiting = blocked(db, b, enqueue_one, key="k", on_conflict="return")
    second = waiting.result()
    assert second.created is not committed
    assert (second.id == first.id) is committed
    assert old not in (first.id, second.id)
    assert count(db, "keys") == 1


def lock_key(conn: Connection) -> None:
    """Hold the key's row: a taker looks whether the key is free, and then waits to take it."""
    conn.execute("SELECT FROM triojobs.keys FOR UPDATE")


@pytest.mark.parametrize("hold", ["ended", "until"])
def test_a_taker_that_looked_before_another_one_took_the_key_looks_again(
    connect: Connect, db: Connection, hold: str
) -> None:
    ended_holder(db, Group(db), hold)
    a, b = connect(), connect()
    with a.transaction():
        lock_key(a)
        waiting = blocked(db, b, enqueue_one, key="k", on_conflict="return")
        first = enqueue_one(a, key="k")
    assert first.created
    assert waiting.result() == Enqueued(first.id, created=False)
    assert count(db, "ready") == 1


def test_a_taker_that_looked_before_a_retry_looks_again(connect: Connect, db: Connection) -> None:
    old = ended_holder(db, Group(db), "ended")
    a, b = connect(), connect()
    with a.transaction():
        lock_key(a)
        waiting = blocked(db, b, enqueue_one, key="k", on_conflict="return")
        assert operate.retry(a, SCHEMA, old)
    assert waiting.result() == Enqueued(old, created=False)
    assert count(db, "ready") == 1


@pytest.mark.parametrize("hold", ["ended", "until"])
def test_many_takers_of_a_key_have_one_winner(connect: Connect, db: Connection, hold: str) -> None:
    old = ended_holder(db, Group(db), hold)
    takers = [partial(enqueue_one, connect(), key="k", on_conflict="return") for _ in range(6)]
    answers = together(*takers)
    assert sum(a.created for a in answers) == 1
    assert len({a.id for a in answers}) == 1
    assert answers[0].id != old


def test_a_taker_that_waits_for_a_retry_leaves_the_key(connect: Connect, db: Connection) -> None:
    old = ended_holder(db, Group(db), "ended")
    a, b = connect(), connect()
    with a.transaction():
        assert operate.retry(a, SCHEMA, old)
        waiting = blocked(db, b, enqueue_one, key="k", on_conflict="return")
    assert waiting.result() == Enqueued(old, created=False)
    assert count(db, "ready") == 1


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("hold", ["ended", "until"])
def test_a_retry_that_waits_for_a_taker_is_refused_when_the_key_has_passed_on(
    connect: Connect, db: Connection, hold: str, committed: bool
) -> None:
    old = ended_holder(db, Group(db), hold)
    a, b = connect(), connect()
    with a.transaction(force_rollback=not committed):
        taken = enqueue_one(a, key="k")
        waiting = blocked(db, b, operate.retry, SCHEMA, old)
    if committed:
        with pytest.raises(DuplicateJobError) as caught:
            waiting.result()
        assert caught.value.job_id == taken.id
        assert place(db, old) == ("done", 1)
    else:
        assert waiting.result() is True
        assert place(db, old) == ("ready", 0)


# Operators.


@pytest.mark.parametrize("committed", [True, False])
def test_of_two_operators_who_retry_a_job_one_does(connect: Connect, db: Connection, committed: bool) -> None:
    job_id = put_one(db)
    operate.cancel(db, SCHEMA, job_id, "no")
    a, b = connect(), connect()
    with a.transaction(force_rollback=not committed):
        assert operate.retry(a, SCHEMA, job_id)
        second = blocked(db, b, operate.retry, SCHEMA, job_id)
    assert second.result() is not committed
    assert place(db, job_id) == ("ready", 0)


# Commit of a handler's own transaction.


@pytest.mark.parametrize("committed", [True, False])
def test_rescue_passes_over_a_running_commit_and_finds_the_job_if_it_is_rolled_back(
    connect: Connect, db: Connection, committed: bool
) -> None:
    job_id = put_one(db)
    group, a = Group(db), connect()
    fence = {"job_id": job_id, "group_id": group.id, "claim_no": group.claim_one(db).claim_no}
    group.lapse(db)
    with a.transaction(force_rollback=not committed):
        assert settle.settle_one_done(a, SCHEMA, **fence, result=b"", encoding="cbor")
        found = groups.rescue(db, SCHEMA)
        assert (found.groups, found.jobs) == ((group.id,), 0)
    assert groups.rescue(db, SCHEMA).jobs == (0 if committed else 1)
    assert place(db, job_id) == (("done", 1) if committed else ("ready", 1))


@pytest.mark.parametrize("committed", [True, False])
def test_close_waits_for_a_running_commit(connect: Connect, db: Connection, committed: bool) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    fence = {"job_id": job_id, "group_id": group.id, "claim_no": group.claim_one(db).claim_no}
    with a.transaction(force_rollback=not committed):
        assert settle.settle_one_done(a, SCHEMA, **fence, result=b"", encoding="cbor")
        closing = blocked(db, b, groups.close_group, SCHEMA, group.id)
    assert len(closing.result()[0]) == (0 if committed else 1)
    assert place(db, job_id) == (("done", 1) if committed else ("ready", 0))


@pytest.mark.parametrize("committed", [True, False])
def test_the_outcome_of_a_claim_waits_for_a_commit_that_is_on_its_way(
    connect: Connect, db: Connection, committed: bool
) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    fence = {"job_id": job_id, "group_id": group.id, "claim_no": group.claim_one(db).claim_no}
    with a.transaction(force_rollback=not committed):
        settle.settle_one_done(a, SCHEMA, **fence, result=b"", encoding="cbor")
        waiting = blocked(db, b, settle.outcome_of_claim, SCHEMA, **fence)
    assert waiting.result() == ("done" if committed else None)


def test_a_held_lease_does_not_end_before_the_transaction(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    claimed = group.claim_one(db)
    with a.transaction():
        assert settle.hold_lease(a, SCHEMA, job_id=job_id, group_id=group.id, claim_no=claimed.claim_no)
        waiting = blocked(db, b, group.settle, claimed, Outcome.DONE)
    assert len(waiting.result()) == 1


def test_one_batch_that_waits_in_the_middle_ends_every_claim_once(connect: Connect, db: Connection) -> None:
    ids = put(db, 5)
    group, a, b = Group(db), connect(), connect()
    claims = group.claim(db)
    batch = [ended(c, Outcome.FAILED, delay=60.0) for c in claims]
    with a.transaction():
        operate.cancel(a, SCHEMA, ids[1], "stop")
        assert settle.settle_one_done(
            a, SCHEMA, job_id=ids[3], group_id=group.id, claim_no=1, result=b"", encoding="cbor"
        )
        waiting = blocked(db, b, settle.settle, SCHEMA, group.id, batch)
    written, _ = waiting.result()
    assert {w.job_id: str(w.outcome) for w in written} == {
        ids[0]: "failed", ids[1]: "cancelled", ids[2]: "failed", ids[3]: "done", ids[4]: "failed"
    }  # fmt: skip
    assert place(db, ids[3]) == ("done", 1)
