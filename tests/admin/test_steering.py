"""One job at a time: what each act does to a job in each place."""

from __future__ import annotations

import datetime as dt
from typing import Any

import psycopg
import pytest
from faces import Face, every_status
from psycopg.rows import dict_row
from tools import SCHEMA, Connection, Group, count, history, make_due, place, put_one, read

import triojobs
from triojobs._model import Outcome
from triojobs._sql import notify

WORDS = (
    "done",
    "killed",
    "failed",
    "cancelled running",
    "running",
    "cancelled waiting",
    "scheduled",
    "ready",
)
WAITING = {"failed", "scheduled", "ready"}
ENDED = {"done", "killed", "cancelled running", "cancelled waiting"}
numbers: triojobs.Queue[int, Any] = triojobs.Queue("q", int)


def everything(db: Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of all tables, but for the groups, whose beats go on."""
    tables = ("jobs", "ready", "scheduled", "leases", "outcomes", "keys")
    return {
        table: sorted(db.execute(f"SELECT * FROM triojobs.{table}").fetchall(), key=repr) for table in tables
    }  # type: ignore[arg-type]


ACTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "cancel": ({"reason": "no"}, WAITING | {"running"}),
    "retry": ({}, ENDED),
    "reschedule": ({"delay": 60.0}, WAITING),
    "edit": ({"priority": 7}, {"scheduled", "ready"}),
    "delete": ({}, WAITING | ENDED),
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("act", ACTS)
def test_an_act_changes_a_job_that_is_where_it_can_be_changed_and_nothing_else(
    db: Connection, group: Group, admin: triojobs.SyncAdmin, act: str, word: str
) -> None:
    jobs = every_status(db, group)
    every_status(db, group)
    before = everything(db)
    options, possible = ACTS[act]
    assert getattr(admin, act)(jobs[word], **options) is (word in possible)
    after = everything(db)
    if word not in possible:
        assert after == before
    else:
        mine = repr(jobs[word])
        for table, rows in before.items():
            kept = [row for row in rows if repr(row[0]) != mine]
            assert [row for row in after[table] if repr(row[0]) != mine] == kept, table
        assert after != before


@pytest.mark.parametrize("act", ACTS)
async def test_an_unknown_job_is_named(face: Face, act: str) -> None:
    with pytest.raises(triojobs.JobNotFoundError) as caught:
        await face(act, 4711, **ACTS[act][0])
    assert caught.value.job_id == 4711
    with pytest.raises(triojobs.OptionError) as refused:
        await face(act, "4711", **ACTS[act][0])
    assert refused.value.field == "job_id"


# Cancel.


async def test_a_cancelled_job_ends_or_is_asked_to(db: Connection, group: Group, face: Face) -> None:
    jobs = every_status(db, group)
    db.execute(f'LISTEN "{notify.group_channel(group.id)}"')  # type: ignore[call-overload]
    assert await face("cancel", jobs["ready"], reason="not needed")
    assert await face("cancel", jobs["running"], reason="too slow")
    assert history(db, jobs["ready"]) == [(0, "cancelled", "not needed")]
    assert read(db, jobs["running"]).cancel_reason == "too slow"
    assert [n.payload for n in db.notifies(timeout=30, stop_after=1)] == [""]


# Retry.


async def test_a_retried_job_waits_with_all_its_attempts_and_is_heard(
    db: Connection, group: Group, face: Face
) -> None:
    job_id = put_one(db, max_attempts=1, priority=3)
    group.settle(db, group.claim_one(db), Outcome.KILLED, error="boom")
    notify.mark_waiting(db, SCHEMA, group.id, ["q"])
    db.execute("LISTEN triojobs")
    assert await face("retry", job_id)
    assert [n.payload for n in db.notifies(timeout=30, stop_after=1)] == ["q"]
    again = group.claim_one(db)
    assert (again.job_id, again.attempt, again.max_attempts, again.priority) == (job_id, 1, 1, 3)
    assert not await face("retry", job_id)


async def test_a_job_whose_key_has_passed_on_is_not_retried(db: Connection, group: Group, face: Face) -> None:
    first = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim_one(db), Outcome.KILLED)
    second = put_one(db, key="k", hold="ended")
    with pytest.raises(triojobs.DuplicateJobError) as caught:
        await face("retry", first)
    assert (caught.value.key, caught.value.job_id) == ("k", second)
    assert place(db, first) == ("killed", 1)


# Reschedule.


@pytest.mark.parametrize("word", sorted(WAITING))
@pytest.mark.parametrize(
    ("options", "table", "seconds"),
    [
        ({"delay": 600.0}, "scheduled", 600),
        ({"delay": 0.0}, "ready", 0),
        ({}, "ready", 0),
        ({"run_at": dt.datetime(2024, 1, 1, tzinfo=dt.UTC)}, "ready", None),
        ({"run_at": dt.datetime(2100, 1, 1, tzinfo=dt.UTC)}, "scheduled", None),
    ],
    ids=["later", "now", "default", "past", "future"],
)
def test_a_rescheduled_job_waits_where_its_time_says(
    db: Connection,
    group: Group,
    admin: triojobs.SyncAdmin,
    word: str,
    options: dict[str, Any],
    table: str,
    seconds: float | None,
) -> None:
    job_id = every_status(db, group)[word]
    attempts = place(db, job_id)[1]
    assert admin.reschedule(job_id, **options)
    assert place(db, job_id) == (table, attempts)
    run_at = read(db, job_id).run_at
    if seconds is None:
        assert run_at == options["run_at"]
    else:
        assert (run_at - dt.datetime.now(dt.UTC)).total_seconds() == pytest.approx(seconds, abs=60)
    body = db.execute("SELECT run_at FROM triojobs.jobs WHERE id = %s", [job_id]).fetchone()
    assert (body == (run_at,)) == (word != "failed")  # the body of a job that has started stays


async def test_a_rescheduled_job_is_heard(db: Connection, group: Group, face: Face) -> None:
    job_id = put_one(db, delay=3600.0)
    notify.mark_waiting(db, SCHEMA, group.id, ["q"])
    db.execute("LISTEN triojobs")
    assert await face("reschedule", job_id, delay=1800.0)  # the group's timer has to be set anew
    assert [n.payload for n in db.notifies(timeout=30, stop_after=1)] == ["q"]


# Edit.


@pytest.mark.parametrize("word", ["ready", "scheduled"])
async def test_an_edited_job_is_claimed_as_it_was_edited(
    db: Connection, group: Group, face: Face, word: str
) -> None:
    job_id = put_one(db, delay=3600.0 if word == "scheduled" else None)
    assert await face("edit", job_id, queue=numbers, payload=7, priority=5, max_attempts=2)
    assert place(db, job_id) == (word, 0)
    make_due(db)
    claim = group.claim_one(db)
    assert claim.payload is not None
    assert numbers.decode_payload(claim.payload, str(claim.encoding, "ascii")) == 7  # type: ignore[arg-type]
    assert (claim.priority, claim.max_attempts) == (5, 2)
    job = read(db, job_id)
    assert (job.priority, job.max_attempts) == (5, 2)
    assert not await face("edit", job_id, priority=1)


async def test_what_is_left_out_stays(db: Connection, face: Face) -> None:
    job_id = put_one(db, payload=b"\x07", priority=3, max_attempts=4, key="k")
    assert await face("edit", job_id, priority=0)
    job = read(db, job_id)
    assert (job.payload, job.priority, job.max_attempts, job.key) == (b"\x07", 0, 4, "k")
    assert await face("edit", job_id, queue=triojobs.Queue("q"), payload=None)
    job = read(db, job_id)
    assert (job.payload, job.priority, job.max_attempts) == (b"\xf6", 0, 4)


async def test_a_job_that_was_tried_before_is_not_edited(db: Connection, group: Group, face: Face) -> None:
    job_id = put_one(db)
    group.settle(db, group.claim_one(db), Outcome.KILLED)
    assert await face("retry", job_id)
    assert not await face("edit", job_id, priority=1)  # pending, but its payload has run


async def test_a_job_that_was_given_back_has_not_started(db: Connection, group: Group, face: Face) -> None:
    job_id = put_one(db)
    group.settle(db, group.claim_one(db), Outcome.RELEASED)
    assert await face("edit", job_id, priority=1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "priority"),
        ({"priority": -1}, "priority"),
        ({"priority": True}, "priority"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"payload": 7}, "queue"),
        ({"payload": 7, "queue": "q"}, "queue"),
        ({"queue": numbers}, "queue"),
        ({"queue": triojobs.Queue("other", int), "payload": 7}, "queue"),
    ],
    ids=repr,
)
async def test_a_change_that_cannot_be_meant_is_refused(
    db: Connection, face: Face, options: dict[str, Any], field: str
) -> None:
    job_id = put_one(db)
    before = everything(db)
    with pytest.raises(triojobs.OptionError) as caught:
        await face("edit", job_id, **options)
    assert caught.value.field == field
    assert everything(db) == before


async def test_a_payload_that_does_not_fit_is_refused(db: Connection, face: Face) -> None:
    job_id = put_one(db)
    with pytest.raises(triojobs.TriojobsError):
        await face("edit", job_id, queue=numbers, payload="seven")
    assert read(db, job_id).payload == b"x"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"delay": -1.0}, "delay"),
        ({"delay": "1"}, "delay"),
        ({"run_at": dt.datetime(2024, 1, 1)}, "run_at"),
        ({"run_at": dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "delay": 1.0}, "run_at"),
    ],
    ids=["negative", "text", "naive", "both"],
)
async def test_a_time_that_cannot_be_meant_is_refused(
    face: Face, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        await face("reschedule", 1, **options)
    assert caught.value.field == field


# Delete.


@pytest.mark.parametrize("word", [w for w in WORDS if w != "running"])
def test_of_a_deleted_job_nothing_is_left(
    db: Connection, group: Group, admin: triojobs.SyncAdmin, word: str
) -> None:
    jobs = every_status(db, group)
    assert admin.delete(jobs[word])
    for table, column in (("jobs", "id"), ("ready", "id"), ("scheduled", "id"), ("outcomes", "job_id")):
        query = f"SELECT count(*) FROM triojobs.{table} WHERE {column} = %s"
        assert db.execute(query, [jobs[word]]).fetchone() == (0,)  # type: ignore[arg-type]
    with pytest.raises(triojobs.JobNotFoundError):
        admin.delete(jobs[word])


@pytest.mark.parametrize("hold", ["kept", "ended", "until"])
async def test_the_key_of_a_deleted_job_is_free(db: Connection, group: Group, face: Face, hold: str) -> None:
    seconds = 3600.0 if hold == "until" else None
    job_id = put_one(db, key="k", hold=hold, hold_seconds=seconds)
    other = put_one(db, key="other")
    assert await face("delete", job_id)
    assert db.execute("SELECT key, job_id FROM triojobs.keys").fetchall() == [("other", other)]
    assert put_one(db, key="k") > job_id


async def test_a_key_that_has_passed_on_is_left_to_its_new_job(
    db: Connection, group: Group, face: Face
) -> None:
    first = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim_one(db), Outcome.DONE)
    second = put_one(db, key="k", hold="ended")
    assert await face("delete", first)
    assert db.execute("SELECT key, job_id FROM triojobs.keys").fetchall() == [("k", second)]


# In the caller's transaction.


def test_in_a_transaction_everything_comes_with_its_commit(
    database: str, db: Connection, group: Group
) -> None:
    jobs = every_status(db, group)
    before = everything(db)
    db.execute("LISTEN triojobs")
    db.execute(f'LISTEN "{notify.group_channel(group.id)}"')  # type: ignore[call-overload]
    with psycopg.connect(database, row_factory=dict_row, cursor_factory=psycopg.ClientCursor) as conn:

        def act() -> None:
            admin = triojobs.admin_on(conn)
            assert admin.retry(jobs["killed"])
            assert admin.reschedule(jobs["scheduled"])
            assert admin.cancel(jobs["running"])
            assert admin.edit(jobs["ready"], priority=9)
            assert admin.delete(jobs["done"])
            assert not admin.delete(jobs["running"])
            many = admin.cancel_many(triojobs.JobFilter(status="failed"))
            assert many == triojobs.BulkResult(1, 0)

        act()
        conn.rollback()
        assert everything(db) == before
        assert list(db.notifies(timeout=0)) == []
        act()
        assert everything(db) == before
        conn.commit()
    assert place(db, jobs["killed"]) == place(db, jobs["scheduled"]) == ("ready", 0)
    assert place(db, jobs["failed"]) == ("cancelled", 1)
    assert {n.payload for n in db.notifies(timeout=30, stop_after=2)} == {"q", ""}


def test_a_call_that_fails_in_a_transaction_is_undone_alone(
    database: str, db: Connection, group: Group
) -> None:
    jobs = every_status(db, group)
    with psycopg.connect(database) as conn:
        admin = triojobs.admin_on(conn)
        assert admin.retry(jobs["killed"])
        with pytest.raises(triojobs.JobNotFoundError):
            admin.cancel(4711)
        assert admin.cancel(jobs["scheduled"])
    assert place(db, jobs["killed"]) == ("ready", 0)
    assert place(db, jobs["scheduled"]) == ("cancelled", 0)


@pytest.mark.parametrize(
    "level", [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE]
)
def test_steering_is_refused_where_it_cannot_see_what_others_do(
    database: str, db: Connection, group: Group, level: psycopg.IsolationLevel
) -> None:
    jobs = every_status(db, group)
    with psycopg.connect(database) as conn:
        conn.isolation_level = level
        admin = triojobs.admin_on(conn)
        for act, (options, _) in ACTS.items():
            with pytest.raises(triojobs.TriojobsError, match="READ COMMITTED"):
                getattr(admin, act)(jobs["ready"], **options)
        assert len(admin.jobs().items) == len(jobs)


def test_what_is_no_connection_is_refused() -> None:
    for conn in (None, "dbname=x", object()):
        with pytest.raises(triojobs.OptionError):
            triojobs.admin_on(conn)  # type: ignore[arg-type]


def test_a_broken_connection_is_a_database_error_that_committed_nothing(
    database: str, db: Connection
) -> None:
    job_id = put_one(db)
    with psycopg.connect(database) as conn:
        conn.execute("SELECT 1")
        db.execute("SELECT pg_terminate_backend(%s)", [conn.info.backend_pid])
        with pytest.raises(triojobs.DatabaseError) as caught:
            triojobs.admin_on(conn).cancel(job_id)
        assert caught.value.committed is False
        conn.close()
    assert count(db, "ready") == 1
