"""Rows that share a commit succeed or fail one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import trio
from forms import other, plain
from tools import SCHEMA, Connection, count, new_row, place, put_one

import triojobs
from tests.tools.looking import anybody_blocked, rows
from triojobs._errors import DatabaseError, DuplicateJobError, OptionError
from triojobs._model import Enqueued, NewRow
from triojobs._sql import enqueue_each
from triojobs._sql.enqueue_each import Answer, SharedEnqueue
from triojobs._sql.failures import translate

Connect = Callable[[], Connection]


def nothing() -> None:
    """Pause for nothing."""


def share(conn: Connection, *given: NewRow, pause: Callable[[], None] = nothing) -> list[Answer]:
    """Enqueue as the flusher's calls do."""
    shared = SharedEnqueue(SCHEMA, given)
    shared.run(conn, pause)
    assert shared.queues == {
        row.queue for row, a in zip(given, shared.answers(), strict=True) if isinstance(a, Enqueued)
    }
    return shared.answers()


def commits(conn: Connection) -> int:
    """Return how many transactions have inserted the bodies that are there."""
    row = conn.execute("SELECT count(DISTINCT xmin::text) FROM triojobs.jobs").fetchone()
    assert row is not None
    return row[0]


def refuse_seven(conn: Connection) -> None:
    """Have the server refuse rows of priority 7, for a reason that we cannot know before."""
    conn.execute("ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")


def test_rows_of_a_kind_share_one_commit(db: Connection) -> None:
    answers = share(db, *[new_row(key=None if n % 2 else f"k{n}") for n in range(50)])
    assert len({a.id for a in answers if isinstance(a, Enqueued)}) == 50
    assert commits(db) == 2


def test_one_bad_row_of_each_kind_among_good_ones_is_answered_alone(db: Connection) -> None:
    holder = put_one(db, key="taken")
    refuse_seven(db)
    good = [new_row(payload=b"%d" % n) for n in range(6)]
    answers = share(
        db,
        *good[:3],
        new_row(priority=7),
        *good[3:],
        new_row(key="free"),
        new_row(key="taken"),
        new_row(key="bad", priority=7),
        new_row(job_id=10**9),
        new_row(key="taken", on_conflict="return"),
    )
    plain_answers, refused = [*answers[:3], *answers[4:7]], answers[3]
    assert [read_payload(db, a) for a in plain_answers] == [row.payload for row in good]
    assert isinstance(refused, DatabaseError)
    assert (refused.sqlstate, refused.committed) == ("23514", False)
    free, taken, bad, unknown, returned = answers[7:]
    assert isinstance(free, Enqueued)
    assert isinstance(taken, DuplicateJobError)
    assert (taken.job_id, taken.index) == (holder, None)
    assert isinstance(bad, DatabaseError)
    assert (bad.sqlstate, bad.committed) == ("23514", False)
    assert isinstance(bad.__cause__, psycopg.errors.CheckViolation)
    assert isinstance(unknown, OptionError)
    assert unknown.field == "job_id"
    assert returned == Enqueued(holder, created=False)
    assert count(db, "jobs") == 1 + len(good) + 1


def read_payload(conn: Connection, answer: Answer) -> bytes:
    assert isinstance(answer, Enqueued)
    row = conn.execute("SELECT payload FROM triojobs.jobs WHERE id = %s", [answer.id]).fetchone()
    assert row is not None
    return row[0]


def test_many_refused_rows_are_all_told_apart(db: Connection) -> None:
    refuse_seven(db)
    answers = share(db, *[new_row(priority=7 if n % 3 == 0 else 1) for n in range(64)])
    assert [isinstance(a, DatabaseError) for a in answers] == [n % 3 == 0 for n in range(64)]
    assert count(db, "jobs") == sum(isinstance(a, Enqueued) for a in answers)


def test_a_locked_key_fails_alone_and_its_neighbours_go_through(db: Connection, connect: Connect) -> None:
    stranger = connect()
    db.execute("SET lock_timeout = '50ms'")
    with stranger.transaction(force_rollback=True):
        put_one(stranger, key="locked")
        pauses: list[int] = []
        first, locked, same, last, unkeyed = share(
            db,
            new_row(key="a"),
            new_row(key="locked"),
            new_row(key="locked"),
            new_row(key="z"),
            new_row(),
            pause=lambda: pauses.append(1),
        )
    assert [isinstance(a, Enqueued) for a in (first, last, unkeyed)] == [True] * 3
    for answer in (locked, same):
        assert isinstance(answer, DatabaseError)
        assert (answer.sqlstate, answer.committed, answer.transient) == ("55P03", False, True)
    # plain, all keys, the others, the locked one again: nobody waits for the lock a third time
    assert len(pauses) == 4
    assert count(db, "jobs") == 3


def test_a_key_that_is_let_go_meanwhile_is_enqueued(db: Connection, connect: Connect) -> None:
    stranger = connect()
    stranger.execute("BEGIN")
    put_one(stranger, key="locked")
    db.execute("SET lock_timeout = '50ms'")
    pauses: list[int] = []

    def let_go_at_the_third() -> None:
        pauses.append(1)
        if len(pauses) == 3:  # the locked key's turn again
            stranger.execute("ROLLBACK")

    answers = share(db, new_row(key="a"), new_row(key="locked"), pause=let_go_at_the_third)
    assert [isinstance(a, Enqueued) for a in answers] == [True, True]


def test_a_key_that_keeps_changing_hands_fails_alone(db: Connection) -> None:
    nowhere = put_one(db, key="k")
    db.execute("DELETE FROM triojobs.ready WHERE id = %s", [nowhere])
    replaced, good = share(db, new_row(key="k", on_conflict="replace"), new_row(key="z"))
    assert isinstance(replaced, DatabaseError)
    assert (replaced.sqlstate, replaced.committed, replaced.transient) == ("40001", False, True)
    assert isinstance(good, Enqueued)


@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_race_is_repeated(db: Connection, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    send = enqueue_each.enqueue_plain
    lost: list[int] = []

    def deadlock(*args: Any, **options: Any) -> list[int]:
        if len(lost) < times:
            lost.append(1)
            db.execute("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")
        return send(*args, **options)

    monkeypatch.setattr(enqueue_each, "enqueue_plain", deadlock)
    answers = share(db, new_row(), new_row())
    assert [isinstance(a, Enqueued) for a in answers] == [True, True]
    assert count(db, "jobs") == 2


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE triojobs.ready RENAME TO elsewhere",  # the schema is not ours
        "CREATE ROLE triojobs_nobody; SET ROLE triojobs_nobody",  # permission denied
        "SET default_transaction_read_only = on",
    ],
)
def test_what_no_row_is_guilty_of_is_not_tried_with_fewer_rows(db: Connection, change: Any) -> None:
    pauses: list[int] = []
    try:
        db.execute(change)
        with pytest.raises(psycopg.Error):
            share(db, *[new_row() for _ in range(8)], pause=lambda: pauses.append(1))
    finally:
        db.execute("RESET ROLE")
        db.execute("RESET default_transaction_read_only")
        db.execute("DROP ROLE IF EXISTS triojobs_nobody")
    assert len(pauses) == 1


@pytest.mark.parametrize("at", [1, 2])
def test_a_connection_that_breaks_leaves_the_answers_that_are_known(
    db: Connection, connect: Connect, at: int
) -> None:
    doomed = connect()
    shared = SharedEnqueue(SCHEMA, [new_row(), new_row(key="k"), new_row(payload=b"2")])
    pauses: list[int] = []

    def end_it() -> None:
        pauses.append(1)
        if len(pauses) == at:
            db.execute("SELECT pg_terminate_backend(%s, 10000)", [doomed.info.backend_pid])

    with pytest.raises(psycopg.OperationalError) as caught:
        shared.run(doomed, end_it)
    lost = translate(caught.value, operation="enqueueing")
    lost.__cause__ = caught.value
    shared.give_up(lost)
    one, keyed, two = shared.answers()
    assert isinstance(keyed, DatabaseError)
    assert keyed.committed is False  # its COMMIT was not sent
    if at == 2:
        assert [place(db, a.id) for a in (one, two) if isinstance(a, Enqueued)] == [("ready", 0)] * 2
    else:
        for answer in (one, two):
            assert isinstance(answer, DatabaseError)
            assert answer.committed is None  # the statement commits by itself
            assert isinstance(answer.__cause__, psycopg.OperationalError)


def test_inside_a_poolers_transaction_nothing_is_certain_before_its_commit(db: Connection) -> None:
    holder = put_one(db, key="taken")
    shared = SharedEnqueue(SCHEMA, [new_row(), new_row(key="k"), new_row(key="taken")])
    with db.transaction(force_rollback=True):
        shared.run(db, nothing)
    shared.give_up(DatabaseError("the reply is lost", committed=None))
    one, keyed, taken = shared.answers()
    for answer in (one, keyed):
        assert isinstance(answer, DatabaseError)
        assert answer.committed is None
    assert isinstance(taken, DuplicateJobError)
    assert taken.job_id == holder


async def test_a_locked_key_does_not_hold_up_who_has_none(conninfo: str) -> None:
    async with triojobs.open_client(conninfo, call_timeout=60.0) as client:
        with psycopg.connect(conninfo) as stranger:
            held = triojobs.enqueue_on(stranger, plain, "theirs", key="k")
            async with trio.open_nursery() as nursery:
                entries: list[triojobs.Enqueued] = []

                @nursery.start_soon
                async def wait_for_the_key() -> None:
                    entries.append(await client.try_enqueue(plain, "mine", key="k"))

                await anybody_blocked(conninfo)
                await client.enqueue(other, "unkeyed")
                assert entries == []
                stranger.commit()
    assert entries == [triojobs.Enqueued(held, created=False)]
    assert rows(conninfo, "SELECT queue FROM triojobs.ready ORDER BY queue") == [("other",), ("plain",)]
