"""An operator and a worker, or two operators, at one job, in both orders.

Whoever comes first holds its transaction open; the other one is seen to wait for it, or to pass by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tools import (
    SCHEMA,
    Connection,
    Group,
    blocked,
    count,
    history,
    make_due,
    new_row,
    place,
    put,
    put_one,
    read,
    together,
)

import triojobs
from triojobs import BulkResult, JobFilter, JobNotFoundError, admin_on
from triojobs._model import Enqueued, Outcome
from triojobs._sql import claim as claim_sql
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import groups, settle

Connect = Callable[[], Connection]
Act = Callable[[Connection, int], Any]

numbers: triojobs.Queue[int, Any] = triojobs.Queue("q", int)
NEW = numbers.encode_payload(7)

ACTS: dict[str, Act] = {
    "cancel": lambda conn, job_id: admin_on(conn).cancel(job_id, reason="no"),
    "retry": lambda conn, job_id: admin_on(conn).retry(job_id),
    "put off": lambda conn, job_id: admin_on(conn).reschedule(job_id, delay=600.0),
    "hurry": lambda conn, job_id: admin_on(conn).reschedule(job_id),
    "edit": lambda conn, job_id: admin_on(conn).edit(job_id, queue=numbers, payload=7),
    "delete": lambda conn, job_id: admin_on(conn).delete(job_id),
}
AT_WAITING = ("cancel", "put off", "hurry", "edit", "delete")
AT_ENDED = ("retry", "delete")


def answer_of(call: Callable[[], Any]) -> Any:
    """Return what the call returns; an unknown job is an answer too."""
    try:
        return call()
    except JobNotFoundError:
        return JobNotFoundError


def lock_group(conn: Connection, group: Group) -> None:
    """Hold the group's row as closing does: a claim that starts now has its snapshot, and waits."""
    conn.execute("SELECT FROM triojobs.worker_groups WHERE id = %s FOR UPDATE", [group.id])


# A worker first.


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("act", ["put off", "hurry", "edit", "delete"])
def test_an_act_that_waits_for_a_claim_leaves_a_job_that_runs(
    connect: Connect, db: Connection, act: str, committed: bool
) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    with a.transaction(force_rollback=not committed):
        group.claim_one(a)
        late = blocked(db, b, ACTS[act], job_id)
    assert late.result() is not committed
    if committed:
        assert place(db, job_id) == ("leases", 1)
        assert read(db, job_id).payload == b"x"
    else:
        where = {"put off": "scheduled", "hurry": "ready", "edit": "ready", "delete": "nowhere"}
        assert place(db, job_id) == (where[act], 0)


@pytest.mark.parametrize("act", AT_WAITING)
def test_an_act_that_waits_for_a_promotion_follows_the_job(
    connect: Connect, db: Connection, act: str
) -> None:
    job_id = put_one(db, delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    a, b = connect(), connect()
    with a.transaction():
        claim_sql.promote(a, SCHEMA, queues=["q"])
        late = blocked(db, b, ACTS[act], job_id)
    assert late.result() is True
    where = {"cancel": "cancelled", "put off": "scheduled", "delete": "nowhere"}
    assert place(db, job_id) == (where.get(act, "ready"), 0)
    if act == "edit":
        assert read(db, job_id).payload == NEW


@pytest.mark.parametrize("act", AT_WAITING)
def test_an_act_that_waits_for_a_replacement_comes_after_it(
    connect: Connect, db: Connection, act: str
) -> None:
    job_id = put_one(db, key="k")
    a, b = connect(), connect()
    with a.transaction():
        row = new_row(payload=b"replaced", key="k", on_conflict="replace", priority=5)
        assert enqueue_sql.enqueue(a, SCHEMA, [row], notify_inside=False) == [
            Enqueued(job_id, created=False, replaced=True)
        ]
        late = blocked(db, b, ACTS[act], job_id)
    assert late.result() is True
    if act == "delete":
        assert count(db, "jobs") == count(db, "keys") == 0
    else:
        job = read(db, job_id)
        assert (job.payload, job.priority) == (NEW if act == "edit" else b"replaced", 5)


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("act", ["put off", "hurry", "edit", "delete", "retry"])
def test_beside_an_open_settle_a_job_runs(
    connect: Connect, db: Connection, act: str, outcome: Outcome
) -> None:
    job_id = put_one(db)
    group, a = Group(db), connect()
    claimed = group.claim_one(db)
    with a.transaction():
        assert len(group.settle(a, claimed, outcome, delay=60.0)) == 1
        assert ACTS[act](db, job_id) is False
        assert place(db, job_id) == ("leases", 1)
    where = {Outcome.FAILED: "scheduled", Outcome.SNOOZED: "scheduled", Outcome.RELEASED: "ready"}
    assert place(db, job_id)[0] == where.get(outcome, str(outcome))
    assert len(history(db, job_id)) == (0 if outcome in (Outcome.SNOOZED, Outcome.RELEASED) else 1)


@pytest.mark.parametrize("act", ["put off", "hurry", "edit", "delete", "retry"])
def test_beside_an_open_rescue_a_job_runs(connect: Connect, db: Connection, act: str) -> None:
    job_id = put_one(db)
    group, a = Group(db), connect()
    group.claim_one(db)
    group.lapse(db)
    with a.transaction():
        assert groups.rescue(a, SCHEMA).jobs == 1
        assert ACTS[act](db, job_id) is False
    assert place(db, job_id) == ("ready", 1)
    assert history(db, job_id)[0][1] == "failed"


# An operator first.


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("act", AT_WAITING)
def test_a_claim_passes_over_a_job_that_is_being_steered(
    connect: Connect, db: Connection, act: str, committed: bool
) -> None:
    job_id = put_one(db)
    group, a = Group(db), connect()
    with a.transaction(force_rollback=not committed):
        assert ACTS[act](a, job_id) is True
        assert group.claim(db) == []
    claimed = [(c.job_id, c.payload) for c in group.claim(db)]
    if not committed:
        assert claimed == [(job_id, b"x")]
    else:
        assert claimed == {"hurry": [(job_id, b"x")], "edit": [(job_id, NEW)]}.get(act, [])


@pytest.mark.parametrize("act", AT_WAITING)
def test_a_claim_that_began_before_an_act_does_not_undo_it(
    connect: Connect, db: Connection, act: str
) -> None:
    job_id = put_one(db)
    group, gate, b = Group(db), connect(), connect()
    with gate.transaction():
        lock_group(gate, group)
        waiting = blocked(db, b, group.claim)  # its snapshot is older than the act
        assert ACTS[act](db, job_id) is True
    claims = waiting.result()
    if act in ("cancel", "put off", "delete"):
        assert claims == []
        assert count(db, "leases") == 0
    else:
        claims = claims or group.claim(db)
        assert [c.payload for c in claims] == [NEW if act == "edit" else b"x"]


def test_a_claim_that_began_before_an_edit_in_bulk_reads_the_edited_body(
    connect: Connect, db: Connection
) -> None:
    ids = put(db, 3, max_attempts=2)
    group, gate, b = Group(db), connect(), connect()
    with gate.transaction():
        lock_group(gate, group)
        waiting = blocked(db, b, group.claim)
        assert admin_on(db).edit_many(JobFilter(ids=ids), max_attempts=9) == BulkResult(3, 0)
    claims = waiting.result() or group.claim(db)
    assert [c.max_attempts for c in claims] == [9, 9, 9]


@pytest.mark.parametrize("act", AT_WAITING)
def test_a_promotion_passes_over_a_job_that_is_being_steered(
    connect: Connect, db: Connection, act: str
) -> None:
    job_id = put_one(db, delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    with (a := connect()).transaction():
        assert ACTS[act](a, job_id) is True
        claim_sql.promote(db, SCHEMA, queues=["q"])
    where = {"cancel": "cancelled", "hurry": "ready", "delete": "nowhere"}
    assert place(db, job_id) == (where.get(act, "scheduled"), 0)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_settle_that_waits_for_a_cancel_in_bulk_sees_it(
    connect: Connect, db: Connection, outcome: Outcome
) -> None:
    first, second = put(db, 2)
    group, a, b = Group(db), connect(), connect()
    claims = group.claim(db)
    with a.transaction():
        result = admin_on(a).cancel_many(JobFilter(ids=[first]), reason="stop")
        assert result == BulkResult(1, 0)
        late = blocked(db, b, group.settle, claims, outcome)
    written = {w.job_id: w.outcome for w in late.result()}
    assert written == {
        first: Outcome.DONE if outcome is Outcome.DONE else Outcome.CANCELLED,
        second: outcome,
    }


def test_a_rescue_that_waits_for_a_cancel_in_bulk_sees_it(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    group.claim_one(db)
    group.lapse(db)
    with a.transaction():
        admin_on(a).cancel_many(JobFilter(ids=[job_id]), reason="stop")
        # A rescue passes over leases that are locked; the next round finds them.
        assert groups.rescue(b, SCHEMA).jobs == 0
    assert groups.rescue(b, SCHEMA).jobs == 1
    assert history(db, job_id) == [(1, "cancelled", "stop")]


def test_a_cancel_in_bulk_does_not_wait_for_a_transaction_of_the_handler(
    connect: Connect, db: Connection
) -> None:
    job_id = put_one(db)
    group = Group(db)
    claim_no = group.claim_one(db).claim_no
    with (a := connect()).transaction():
        assert settle.hold_lease(a, SCHEMA, job_id=job_id, group_id=group.id, claim_no=claim_no)
        assert admin_on(db).cancel_many(JobFilter(ids=[job_id])) == BulkResult(1, 0)


# Two operators.

# What the second one answers, and where the job is in the end.
AFTER: dict[tuple[str, str], tuple[Any, str]] = {
    ("cancel", "cancel"): (False, "cancelled"),
    ("cancel", "put off"): (False, "cancelled"),
    ("cancel", "hurry"): (False, "cancelled"),
    ("cancel", "edit"): (False, "cancelled"),
    ("cancel", "delete"): (True, "nowhere"),
    ("put off", "cancel"): (True, "cancelled"),
    ("put off", "put off"): (True, "scheduled"),
    ("put off", "hurry"): (True, "ready"),
    ("put off", "edit"): (True, "scheduled"),
    ("put off", "delete"): (True, "nowhere"),
    ("hurry", "cancel"): (True, "cancelled"),
    ("hurry", "put off"): (True, "scheduled"),
    ("hurry", "hurry"): (True, "ready"),
    ("hurry", "edit"): (True, "ready"),
    ("hurry", "delete"): (True, "nowhere"),
    ("edit", "cancel"): (True, "cancelled"),
    ("edit", "put off"): (True, "scheduled"),
    ("edit", "hurry"): (True, "ready"),
    ("edit", "edit"): (True, "ready"),
    ("edit", "delete"): (True, "nowhere"),
    ("delete", "cancel"): (JobNotFoundError, "nowhere"),
    ("delete", "put off"): (JobNotFoundError, "nowhere"),
    ("delete", "hurry"): (JobNotFoundError, "nowhere"),
    ("delete", "edit"): (JobNotFoundError, "nowhere"),
    ("delete", "delete"): (JobNotFoundError, "nowhere"),
}


@pytest.mark.parametrize("delay", [None, 60.0], ids=["due", "later"])
@pytest.mark.parametrize(("first", "second"), AFTER, ids="-".join)
def test_of_two_operators_at_a_waiting_job_the_second_sees_what_the_first_did(
    connect: Connect, db: Connection, first: str, second: str, delay: float | None
) -> None:
    job_id = put_one(db, delay=delay, key="k")
    a, b = connect(), connect()
    with a.transaction():
        assert ACTS[first](a, job_id) is True
        late = blocked(db, b, ACTS[second], job_id)
    answer, where = AFTER[first, second]
    assert answer_of(late.result) == answer
    if where == "ready" and "hurry" not in (first, second) and delay:
        where = "scheduled"
    assert place(db, job_id) == (where, 0)
    assert len(history(db, job_id)) == (1 if where == "cancelled" else 0)
    if where == "nowhere":
        assert [count(db, table) for table in ("jobs", "keys", "outcomes")] == [0, 0, 0]
    elif "edit" in (first, second):
        assert read(db, job_id).payload == (b"x" if answer is False else NEW)


@pytest.mark.parametrize(
    ("first", "second", "answer", "where"),
    [
        ("retry", "retry", False, "ready"),
        ("retry", "delete", True, "nowhere"),
        ("delete", "retry", JobNotFoundError, "nowhere"),
        ("delete", "delete", JobNotFoundError, "nowhere"),
    ],
)
@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.KILLED])
def test_of_two_operators_at_an_ended_job_the_second_sees_what_the_first_did(
    connect: Connect, db: Connection, first: str, second: str, answer: Any, where: str, outcome: Outcome
) -> None:
    job_id = put_one(db, key="k")
    group, a, b = Group(db), connect(), connect()
    group.settle(db, group.claim_one(db), outcome)
    with a.transaction():
        assert ACTS[first](a, job_id) is True
        late = blocked(db, b, ACTS[second], job_id)
    assert answer_of(late.result) == answer
    assert place(db, job_id) == (where, 0)
    if where == "nowhere":
        assert [count(db, t) for t in ("jobs", "keys", "outcomes", "ready")] == [0, 0, 0, 0]


@pytest.mark.parametrize("act", AT_ENDED)
def test_an_act_that_changes_nothing_keeps_nothing_locked(connect: Connect, db: Connection, act: str) -> None:
    """In the caller's transaction its next look would wait for the waiting row with the body in hand: a deadlock."""
    job_id = put_one(db)
    Group(db).claim(db, 1)
    with db.transaction():
        assert not ACTS[act](db, job_id)
        connect().execute("SELECT FROM triojobs.jobs WHERE id = %s FOR UPDATE NOWAIT", [job_id])


def test_of_two_operators_who_retry_in_bulk_one_does(connect: Connect, db: Connection) -> None:
    job_id = put_one(db)
    group, a, b = Group(db), connect(), connect()
    group.settle(db, group.claim_one(db), Outcome.KILLED)

    def retry(conn: Connection) -> BulkResult:
        return admin_on(conn).retry_many(JobFilter(status="killed"))

    with a.transaction():
        assert retry(a) == BulkResult(1, 0)
        late = blocked(db, b, retry)
    assert late.result() == BulkResult(0, 1)
    assert place(db, job_id) == ("ready", 0)


def test_a_job_deleted_beside_a_taker_of_its_key_leaves_the_key_to_him(
    connect: Connect, db: Connection
) -> None:
    old = put_one(db, key="k", hold="ended")
    group, a = Group(db), connect()
    group.settle(db, group.claim_one(db), Outcome.DONE)
    with a.transaction():
        new = put_one(a, key="k", hold="ended")
        assert admin_on(db).delete(old)
    assert db.execute("SELECT key, job_id FROM triojobs.keys").fetchall() == [("k", new)]
    assert [place(db, i)[0] for i in (old, new)] == ["nowhere", "ready"]


def test_a_taker_that_waits_for_the_deletion_of_a_keys_job_has_the_key(
    connect: Connect, db: Connection
) -> None:
    old = put_one(db, key="k")
    a, b = connect(), connect()
    with a.transaction():
        assert admin_on(a).delete(old)
        late = blocked(db, b, put_one, key="k")
    new = late.result()
    assert db.execute("SELECT key, job_id FROM triojobs.keys").fetchall() == [("k", new)]
    assert place(db, new) == ("ready", 0)


# Many at once.


@pytest.mark.parametrize("act", ["cancel_many", "retry_many", "delete_many"])
def test_operators_side_by_side_change_each_job_once(connect: Connect, db: Connection, act: str) -> None:
    ids = put(db, 400)
    if act == "retry_many":
        admin_on(db).cancel_many(JobFilter(ids=ids))
    which = JobFilter(ids=ids, status="cancelled" if act == "retry_many" else "pending")

    def work(conn: Connection, batch: int) -> BulkResult:
        result: BulkResult = getattr(admin_on(conn), act)(which, batch=batch)
        return result

    results = together(*(partial(work, connect(), batch) for batch in (7, 30, 400)))
    assert sum(r.touched for r in results) == 400
    if act == "delete_many":
        assert count(db, "jobs") == count(db, "ready") == 0
    else:
        where = "cancelled" if act == "cancel_many" else "ready"
        assert {place(db, job_id) for job_id in ids} == {(where, 0)}
        assert count(db, "outcomes") == 400


@pytest.mark.parametrize("act", ["cancel_many", "delete_many", "reschedule_many"])
def test_of_operators_and_claims_side_by_side_each_job_has_one_end(
    connect: Connect, db: Connection, act: str
) -> None:
    ids = put(db, 600)
    options: dict[str, Any] = {"delay": 600.0} if act == "reschedule_many" else {}

    def steer(conn: Connection) -> int:
        which = JobFilter(ids=ids, status="pending")
        result: BulkResult = getattr(admin_on(conn), act)(which, batch=10, **options)
        return result.touched

    def drain(conn: Connection, group: Group) -> int:
        taken = 0
        while claims := group.claim(conn, 7):
            taken += len(claims)
        return taken

    numbers = together(partial(steer, connect()), *(partial(drain, connect(), Group(db)) for _ in range(2)))
    places = [place(db, job_id) for job_id in ids]
    where = {"cancel_many": "cancelled", "delete_many": "nowhere", "reschedule_many": "scheduled"}[act]
    assert places.count((where, 0)) == numbers[0]
    assert places.count(("leases", 1)) == sum(numbers[1:])
    assert sum(numbers) == 600


def test_a_bulk_act_passes_over_what_others_hold_and_waits_for_it_holding_nothing(
    connect: Connect, db: Connection
) -> None:
    first, second, third = put(db, 3)
    group, gate, b = Group(db), connect(), connect()
    gate.execute("BEGIN")
    gate.execute("SELECT FROM triojobs.ready WHERE id = %s FOR UPDATE", [second])
    late = blocked(db, b, lambda conn: admin_on(conn).reschedule_many(JobFilter(queue="q"), delay=600.0))
    # What the batch changed is committed, and nothing of it locked.
    with (other := connect()).transaction():
        locked = other.execute("SELECT id FROM triojobs.scheduled ORDER BY id FOR UPDATE NOWAIT").fetchall()
    assert locked == [(first,), (third,)]
    gate.execute("ROLLBACK")
    assert late.result() == BulkResult(3, 0)
    make_due(db)
    assert [c.job_id for c in group.claim(db)] == [first, second, third]
