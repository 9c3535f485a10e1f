"""Pause and resume against claims, in both orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import trio
from faces import FACES, Face, open_face
from tools import SCHEMA, Connection, Group, blocked, count, put, put_one

import triojobs
from triojobs._sql import notify, pausing
from triojobs._sql.pausing import claims_in_flight

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


# The admin's methods.


async def test_a_queue_is_paused_and_resumed_by_name_or_as_a_queue(
    db: Connection, group: Group, face: Face
) -> None:
    put(db, 3)
    queue: triojobs.Queue[Any, Any] = triojobs.Queue("q")
    assert await face("pause", "q", reason="maintenance")
    assert not await face("pause", queue)
    assert group.claim(db) == []
    assert await face("resume", queue)
    assert not await face("resume", "q")
    assert len(group.claim(db)) == 3


async def test_resuming_wakes_who_waits(db: Connection, group: Group, face: Face) -> None:
    await face("pause", "q")
    notify.mark_waiting(db, SCHEMA, group.id, ["q"])
    db.execute("LISTEN triojobs")
    await face("resume", "q")
    assert [n.payload for n in db.notifies(timeout=30, stop_after=1)] == ["q"]


@pytest.mark.parametrize("name", FACES)
async def test_pause_returns_after_the_claims_that_began_before_it(
    name: str, database: str, connect: Connect, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[set[str]] = []

    def look(conn: Connection, schema: str) -> set[str]:
        looks.append(claims_in_flight(conn, schema))
        return looks[-1]

    monkeypatch.setattr(pausing, "claims_in_flight", look)
    put_one(db)
    group, gate, a = Group(db), connect(), connect()
    async with open_face(name, database) as face, trio.open_nursery() as nursery:
        returned = trio.Event()

        async def pause() -> None:
            await face("pause", "q")
            returned.set()

        with gate.transaction():
            lock_group(gate, group)
            late = blocked(db, a, group.claim)
            nursery.start_soon(pause)
            while len(looks) < 3:
                await trio.sleep(0.001)
            # The pause is committed. The claim with the older snapshot may still take the job.
            assert count(db, "paused_queues") == 1
            assert not returned.is_set()
            assert count(db, "leases") == 0
        with trio.fail_after(30):
            await returned.wait()
        assert count(db, "leases") == 1
    assert len(late.result()) == 1
    assert group.claim(db) == []


async def test_a_claim_that_hangs_is_not_waited_for_for_ever(
    connect: Connect, db: Connection, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "CLAIMS_TIME", 0.0)
    with (gate := connect()).transaction():
        lock_group(gate, Group(db))
        with pytest.raises(triojobs.DatabaseError) as caught:
            await face("pause", "q")
        assert (caught.value.transient, caught.value.committed) == (True, True)
        assert count(db, "paused_queues") == 1


def test_inside_a_transaction_a_pause_comes_with_the_commit_and_waits_for_nobody(
    database: str, connect: Connect, db: Connection
) -> None:
    put(db, 2)
    group = Group(db)
    with (gate := connect()).transaction():
        lock_group(gate, Group(db))
        with psycopg.connect(database) as conn:
            assert triojobs.admin_on(conn).pause("q")
            assert len(group.claim(db, 1)) == 1
        assert group.claim(db, 1) == []
    with psycopg.connect(database) as conn:
        assert triojobs.admin_on(conn).resume("q")
        conn.rollback()
    assert group.claim(db, 1) == []


@pytest.mark.parametrize("queue", ["", "x" * 256, 7, None], ids=repr)
async def test_what_is_no_queue_is_refused(face: Face, queue: Any) -> None:
    for method in ("pause", "resume"):
        with pytest.raises(triojobs.OptionError) as caught:
            await face(method, queue)
        assert caught.value.field == "queue"
