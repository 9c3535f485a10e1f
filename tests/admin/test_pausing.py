"""Pause and resume against claims, in both orders."""

from __future__ import annotations

from collections.abc import Callable

from tools import SCHEMA, Connection, Group, blocked, count, put, put_one

from triojobs._sql import pausing

Connect = Callable[[], Connection]


def lock_group(conn: Connection, group: Group) -> None:
    """Hold the group's row as closing does: a claim that starts now has its snapshot, and waits."""
    conn.execute("SELECT FROM triojobs.worker_groups WHERE id = %s FOR UPDATE", [group.id])


def test_a_claim_that_begins_after_the_pause_takes_nothing(db: Connection) -> None:
    put(db, 3)
    group = Group(db)
    assert pausing.pause(db, SCHEMA, "q", "maintenance")
    assert group.claim(db) == []
    assert (count(db, "ready"), count(db, "leases")) == (3, 0)
    assert pausing.resume(db, SCHEMA, "q")
    assert len(group.claim(db)) == 3


def test_a_pause_that_is_not_committed_holds_nobody_up(connect: Connect, db: Connection) -> None:
    put(db, 3)
    group = Group(db)
    with (a := connect()).transaction():
        pausing.pause(a, SCHEMA, "q", "maintenance")
        assert len(group.claim(db, 2)) == 2
    assert group.claim(db) == []


def test_the_first_reason_stays_and_a_queue_is_resumed_once(db: Connection) -> None:
    assert pausing.pause(db, SCHEMA, "q", "first")
    assert not pausing.pause(db, SCHEMA, "q", "second")
    assert db.execute("SELECT reason FROM triojobs.paused_queues").fetchall() == [("first",)]
    assert pausing.resume(db, SCHEMA, "q")
    assert not pausing.resume(db, SCHEMA, "q")


def test_a_claim_with_an_older_snapshot_is_named_until_it_has_ended(connect: Connect, db: Connection) -> None:
    put_one(db)
    group, gate, a = Group(db), connect(), connect()
    assert pausing.claims_in_flight(db, SCHEMA) == set()
    with gate.transaction():
        lock_group(gate, group)
        late = blocked(db, a, group.claim)
        pausing.pause(db, SCHEMA, "q", "maintenance")
        found = pausing.claims_in_flight(db, SCHEMA)
        assert len(found) == 2  # the gate's and the claim's
    assert len(late.result()) == 1  # its snapshot is older than the pause
    assert pausing.claims_in_flight(db, SCHEMA) & found == set()
    assert group.claim(db) == []


def test_a_transaction_of_the_application_is_not_taken_for_a_claim(connect: Connect, db: Connection) -> None:
    (job_id,) = put(db, 1)
    with (a := connect()).transaction():
        put_one(a)
        a.execute("SELECT * FROM triojobs.job_status WHERE id = %s", [job_id])
        assert pausing.claims_in_flight(db, SCHEMA) == set()


def test_claims_of_another_schema_are_not_looked_at(connect: Connect, db: Connection) -> None:
    group = Group(db)
    with (a := connect()).transaction():
        group.claim(a)
        assert len(pausing.claims_in_flight(db, SCHEMA)) == 1
        assert pausing.claims_in_flight(db, "another") == set()
