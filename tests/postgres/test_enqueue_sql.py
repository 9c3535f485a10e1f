"""Enqueueing: in bulk, by job_id, by key, from plain SQL, and what is told to whom."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from tools import (
    SCHEMA,
    Connection,
    Group,
    count,
    make_due,
    new_row,
    open_session,
    place,
    put,
    put_one,
    read,
    together,
)

from triojobs._errors import DuplicateJobError, OptionError
from triojobs._model import Enqueued, NewRow, Outcome, Registration
from triojobs._sql import claim as claim_sql
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import groups, notify, operate
from triojobs._sql.schema import migrate


def enqueue(conn: Connection, rows: list[NewRow], **options: Any) -> list[Any]:
    """Enqueue in a transaction, as the client does."""
    with conn.transaction():
        return enqueue_sql.enqueue(conn, SCHEMA, rows, **{"notify_inside": False, **options})


# In bulk.


def test_ids_come_in_the_order_of_the_call_and_say_which_row(db: Connection) -> None:
    rows = [new_row(payload=b"%d" % n, priority=n % 3, delay=60.0 * (n % 2)) for n in range(50)]
    ids = [a.id for a in enqueue(db, rows)]
    assert ids == sorted(ids)
    assert [read(db, i).payload for i in ids] == [r.payload for r in rows]
    assert [place(db, i)[0] for i in ids] == ["ready", "scheduled"] * 25


def test_jobs_of_one_call_run_in_its_order(db: Connection) -> None:
    ids = [a.id for a in enqueue(db, [new_row() for _ in range(200)])]
    assert [c.job_id for c in Group(db).claim(db, 200)] == ids


def test_every_field_arrives(db: Connection) -> None:
    deadline = dt.datetime(2100, 1, 2, tzinfo=dt.UTC)
    run_at = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
    plain = new_row(
        queue="ä", payload=b"\x00\xff", priority=2**31 - 1, max_attempts=9, timeout=0.5, deadline=deadline,
        run_at=run_at, metadata='{"a": [1, "ü"]}',
    )  # fmt: skip
    keyed = new_row(
        queue="ä", payload=b"\x00\xff", priority=2**31 - 1, max_attempts=9, timeout=0.5, deadline=deadline,
        run_at=run_at, metadata='{"a": [1, "ü"]}', key="k",
    )  # fmt: skip
    for answer in enqueue(db, [plain, keyed]):
        job = read(db, answer.id)
        assert (job.queue, job.payload, job.priority, job.max_attempts) == ("ä", b"\x00\xff", 2**31 - 1, 9)
        assert (job.deadline, job.run_at, job.metadata) == (deadline, run_at, {"a": [1, "ü"]})
        timeout = db.execute("SELECT timeout FROM triojobs.jobs WHERE id = %s", [job.id]).fetchone()
        assert timeout == (0.5,)


def test_a_large_call_goes_in_chunks_with_a_pause_between(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enqueue_sql, "CHUNK", 10)
    pauses: list[int] = []
    answers = enqueue(
        db, [new_row() for _ in range(35)], between_chunks=lambda: pauses.append(count(db, "jobs"))
    )
    assert pauses == [10, 20, 30]
    assert [a.id for a in answers] == sorted(a.id for a in answers)


def test_a_call_that_is_given_up_between_chunks_leaves_nothing(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GivenUp(Exception):
        pass

    def give_up() -> None:
        raise GivenUp

    monkeypatch.setattr(enqueue_sql, "CHUNK", 10)
    monkeypatch.setattr(enqueue_sql, "KEYED_CHUNK", 10)
    for key in (None, "k"):
        rows = [new_row(key=key and f"{key}{n}") for n in range(11)]
        with pytest.raises(GivenUp):
            enqueue(db, rows, between_chunks=give_up)
    assert (count(db, "jobs"), count(db, "ready"), count(db, "keys")) == (0, 0, 0)


def test_an_empty_call_enqueues_nothing(db: Connection) -> None:
    assert enqueue(db, []) == []


def test_plain_and_keyed_rows_of_one_call_keep_their_places(db: Connection) -> None:
    rows = [
        new_row(payload=b"0"),
        new_row(key="z", payload=b"1"),
        new_row(payload=b"2"),
        new_row(key="a", payload=b"3"),
    ]
    answers = enqueue(db, rows)
    assert [read(db, a.id).payload for a in answers] == [b"0", b"1", b"2", b"3"]
    assert [read(db, a.id).key for a in answers] == [None, "z", None, "a"]


def test_the_callers_row_factory_and_cursor_class_do_not_matter(database: str) -> None:
    with psycopg.connect(database, row_factory=dict_row, cursor_factory=psycopg.ClientCursor) as conn:
        answers = enqueue(conn, [new_row(), new_row(key="k")])
        assert [a.created for a in answers] == [True, True]


def test_ten_thousand_jobs_half_of_them_later_in_one_statement(db: Connection) -> None:
    answers = enqueue(db, [new_row(delay=60.0 * (n % 2)) for n in range(10_000)])
    assert len({a.id for a in answers}) == 10_000
    assert (count(db, "ready"), count(db, "scheduled")) == (5000, 5000)


# By job_id.


@pytest.mark.parametrize("key", [None, "k"])
def test_a_repeated_job_id_is_a_no_op(db: Connection, key: str | None) -> None:
    (job_id,) = enqueue_sql.new_job_ids(db, SCHEMA, 1)
    row = new_row(job_id=job_id, key=key, payload=b"first")
    again = new_row(job_id=job_id, key=key, payload=b"second")
    assert enqueue(db, [row]) == [Enqueued(job_id, created=True)]
    for _ in range(2):
        assert enqueue(db, [again]) == [Enqueued(job_id, created=False)]
    assert read(db, job_id).payload == b"first"
    group = Group(db)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    assert enqueue(db, [again]) == [Enqueued(job_id, created=False)]
    assert place(db, job_id) == ("done", 1)


@pytest.mark.parametrize("job_id", [0, -5, 1_000_000_000])
def test_a_job_id_that_was_not_handed_out_is_refused(db: Connection, job_id: int) -> None:
    enqueue_sql.new_job_ids(db, SCHEMA, 3)
    with pytest.raises(OptionError, match=f"job_id is {job_id}, but must be an id that new_job_id"):
        enqueue(db, [new_row(job_id=job_id)])
    assert count(db, "jobs") == 0


def test_no_job_id_has_been_handed_out_by_a_new_database(db: Connection) -> None:
    with pytest.raises(OptionError):
        enqueue(db, [new_row(job_id=1)])
    assert enqueue_sql.new_job_ids(db, SCHEMA, 3) == [1, 2, 3]


def test_job_ids_within_a_call_are_used_as_given(db: Connection) -> None:
    ids = enqueue_sql.new_job_ids(db, SCHEMA, 2)
    rows = [new_row(job_id=ids[1], delay=60.0), new_row(), new_row(job_id=ids[0], key="k")]
    assert [a.id for a in enqueue(db, rows)] == [ids[1], 3, ids[0]]
    assert place(db, ids[1])[0] == "scheduled"


# By key.


def test_a_taken_key_raises_names_holder_and_index_and_undoes_the_call(db: Connection) -> None:
    holder = put_one(db, key="k")
    with pytest.raises(DuplicateJobError) as caught:
        enqueue(db, [new_row(), new_row(key="free"), new_row(key="k")])
    assert (caught.value.key, caught.value.job_id, caught.value.index) == ("k", holder, 2)
    assert (count(db, "jobs"), count(db, "keys")) == (1, 1)
    with pytest.raises(DuplicateJobError) as caught:
        enqueue(db, [new_row(key="k")])
    assert caught.value.index is None


def test_a_key_twice_in_one_call_is_a_conflict_of_the_second(db: Connection) -> None:
    with pytest.raises(DuplicateJobError) as caught:
        enqueue(db, [new_row(key="a"), new_row(key="k"), new_row(key="k")])
    assert caught.value.index == 2
    first, second = enqueue(
        db, [new_row(key="k", on_conflict="return"), new_row(key="k", on_conflict="return")]
    )
    assert (first.created, second.created, first.id == second.id) == (True, False, True)


def test_a_conflict_inside_a_savepoint_undoes_only_this_call(db: Connection) -> None:
    holder = put_one(db, key="k")
    with db.transaction():
        kept = put_one(db)
        with pytest.raises(DuplicateJobError), db.transaction():
            enqueue_sql.enqueue(db, SCHEMA, [new_row(), new_row(key="k")], notify_inside=True)
        also_kept = put_one(db, key="other")
    assert [place(db, i) for i in (holder, kept, also_kept)] == [("ready", 0)] * 3
    assert count(db, "jobs") == 3


@pytest.mark.parametrize("keys", [("k", "K"), ("", " "), ("ä", "a\u0308")])
def test_keys_are_compared_byte_by_byte_and_the_empty_one_is_a_key(
    db: Connection, keys: tuple[str, str]
) -> None:
    for key in keys:
        put_one(db, key=key)
    for key in keys:
        with pytest.raises(DuplicateJobError):
            put_one(db, key=key)


def test_a_key_belongs_to_its_queue(db: Connection) -> None:
    put_one(db, key="k", queue="a")
    put_one(db, key="k", queue="b")
    with pytest.raises(DuplicateJobError, match="key 'k' of queue 'b'"):
        put_one(db, key="k", queue="b")


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.KILLED, Outcome.CANCELLED])
def test_a_kept_key_outlives_its_job_and_ends_with_its_body(db: Connection, outcome: Outcome) -> None:
    job_id = put_one(db, key="k")
    group = Group(db)
    group.settle(db, group.claim_one(db), outcome)
    with pytest.raises(DuplicateJobError):
        put_one(db, key="k")
    db.execute("DELETE FROM triojobs.jobs WHERE id = %s", [job_id])
    assert put_one(db, key="k") != job_id


def test_an_ended_key_is_held_while_the_job_waits_or_runs(db: Connection) -> None:
    job_id = put_one(db, key="k", hold="ended", delay=60.0)
    group = Group(db)

    def holds() -> bool:
        (answer,) = enqueue(db, [new_row(key="k", on_conflict="return", hold="ended")])
        return answer == Enqueued(job_id, created=False)

    assert holds()
    make_due(db)
    assert holds()
    claimed = group.claim_one(db)
    assert holds()
    group.settle(db, claimed, Outcome.FAILED, delay=60.0)
    assert holds()
    make_due(db)
    group.settle(db, group.claim_one(db), Outcome.KILLED)
    assert not holds()
    assert count(db, "jobs") == 2


def test_a_key_for_seconds_is_held_for_so_long_whatever_the_job_does(db: Connection) -> None:
    job_id = put_one(db, key="k", hold="until", hold_seconds=100.0)
    group = Group(db)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    with pytest.raises(DuplicateJobError):
        put_one(db, key="k")
    db.execute("UPDATE triojobs.keys SET until = now() - interval '1 s'")
    assert put_one(db, key="k", hold="until", hold_seconds=100.0) != job_id
    with pytest.raises(DuplicateJobError):
        put_one(db, key="k")


def test_a_new_holder_brings_its_own_key_life(db: Connection) -> None:
    put_one(db, key="k", hold="until", hold_seconds=0.0)
    put_one(db, key="k", hold="kept")
    row = db.execute("SELECT hold, until, generation FROM triojobs.keys").fetchone()
    assert row == ("kept", None, 2)


REPLACEMENT = {
    "payload": b"new", "priority": 7, "max_attempts": 2, "timeout": 3.0, "metadata": '{"new": true}',
    "deadline": dt.datetime(2100, 1, 1, tzinfo=dt.UTC), "key": "k", "on_conflict": "replace",
}  # fmt: skip


@pytest.mark.parametrize("new_delay", [None, 60.0])
@pytest.mark.parametrize("old_delay", [None, 60.0])
def test_replace_changes_body_and_waiting_row_of_a_job_that_has_not_started(
    db: Connection, old_delay: float | None, new_delay: float | None
) -> None:
    job_id = put_one(db, key="k", payload=b"old", delay=old_delay)
    answer = enqueue(db, [new_row(delay=new_delay, **REPLACEMENT)])  # type: ignore[arg-type]
    assert answer == [Enqueued(job_id, created=False, replaced=True)]
    assert place(db, job_id) == ("ready" if new_delay is None else "scheduled", 0)
    make_due(db)
    (claimed,) = Group(db).claim(db)
    assert (claimed.payload, claimed.priority, claimed.max_attempts, claimed.timeout) == (b"new", 7, 2, 3.0)
    assert (claimed.metadata, claimed.deadline) == (b'{"new": true}', REPLACEMENT["deadline"].timestamp())  # type: ignore[attr-defined]
    assert count(db, "jobs") == 1


@pytest.mark.parametrize("state", ["running", "failed", "done", "cancelled"])
def test_replace_of_a_job_that_has_started_changes_nothing(db: Connection, state: str) -> None:
    job_id = put_one(db, key="k", payload=b"old")
    group = Group(db)
    if state == "cancelled":
        operate.cancel(db, SCHEMA, job_id, "no")
    else:
        claimed = group.claim_one(db)
        if state != "running":
            group.settle(db, claimed, Outcome(state))
    assert enqueue(db, [new_row(**REPLACEMENT)]) == [Enqueued(job_id, created=False, replaced=False)]  # type: ignore[arg-type]
    assert read(db, job_id).payload == b"old"


def test_a_released_job_may_be_replaced(db: Connection) -> None:
    job_id = put_one(db, key="k", payload=b"old")
    group = Group(db)
    group.settle(db, group.claim_one(db), Outcome.RELEASED)
    assert enqueue(db, [new_row(**REPLACEMENT)]) == [Enqueued(job_id, created=False, replaced=True)]  # type: ignore[arg-type]


def test_replace_of_a_free_key_creates(db: Connection) -> None:
    (answer,) = enqueue(db, [new_row(**REPLACEMENT)])  # type: ignore[arg-type]
    assert (answer.created, answer.replaced) == (True, False)


def test_a_job_that_is_nowhere_is_not_replaced_but_reported(db: Connection) -> None:
    job_id = put_one(db, key="k")
    db.execute("DELETE FROM triojobs.ready WHERE id = %s", [job_id])
    with pytest.raises(psycopg.errors.SerializationFailure, match="the job under key 'k' is changing hands"):
        enqueue(db, [new_row(**REPLACEMENT)])  # type: ignore[arg-type]


# From plain SQL.


def call(conn: Connection, arguments: str, values: dict[str, Any] | None = None) -> int:
    row = conn.execute(f"SELECT triojobs.enqueue({arguments})", values).fetchone()  # type: ignore[call-overload]
    assert row is not None
    return row[0]


def test_sql_enqueue_has_the_defaults_of_the_api(db: Connection) -> None:
    job_id = call(db, "'q', '{\"to\": \"ada\"}'")
    job = read(db, job_id)
    assert (job.payload, job.encoding, job.queue) == (b'{"to": "ada"}', "json", "q")
    assert (job.priority, job.max_attempts, job.key, job.metadata) == (0, 5, None, {})
    assert place(db, job_id) == ("ready", 0)
    assert [c.encoding for c in Group(db).claim(db)] == [b"json"]


def test_sql_enqueue_passes_everything_on(db: Connection) -> None:
    job_id = call(
        db,
        "queue => 'q', payload => '1', run_at => now() + interval '1 h', priority => 4, max_attempts => 2,"
        " key => 'k', metadata => '{\"a\": 1}'",
    )
    job = read(db, job_id)
    assert (job.priority, job.max_attempts, job.key, job.metadata) == (4, 2, "k", {"a": 1})
    assert place(db, job_id) == ("scheduled", 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("NULL, '1'", "queue is NULL, but must be 1 to 255 bytes"),
        ("'', '1'", "queue is '', but must be 1 to 255 bytes"),
        ("repeat('ä', 128), '1'", "queue is 'ää"),
        ("'q', NULL", "payload is NULL, but must be a JSON value"),
        (
            "'q', to_jsonb(repeat('x', 1048576))",
            "payload is 1048578 bytes, but must be at most 1048576",
        ),
        ("'q', '1', run_at => NULL", "run_at is NULL, but must be a finite time"),
        ("'q', '1', run_at => 'infinity'", "run_at is 'infinity', but must be a finite time"),
        ("'q', '1', priority => -1", "priority is '-1', but must be 0 to 2147483647"),
        ("'q', '1', priority => NULL", "priority is NULL, but must be"),
        ("'q', '1', max_attempts => 0", "max_attempts is '0', but must be at least 1"),
        ("'q', '1', key => repeat('ä', 513)", "key is 1026 bytes, but must be at most 1024"),
        ("'q', '1', on_conflict => 'maybe'", "on_conflict is 'maybe', but must be raise, return or replace"),
        ("'q', '1', on_conflict => NULL", "on_conflict is NULL, but must be"),
        ("'q', '1', metadata => '[]'", "metadata must be a JSON object"),
        ("'q', '1', metadata => NULL", "metadata must be a JSON object"),
        (
            "'q', '1', metadata => jsonb_build_object('a', repeat('x', 8192))",
            "metadata is 8201 bytes, but must be at most 8192",
        ),
    ],
)
def test_sql_enqueue_names_field_value_and_limit(db: Connection, arguments: str, text: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        call(db, arguments)
    assert str(caught.value).startswith(f"while enqueueing: {text}")
    assert count(db, "jobs") == 0


@pytest.mark.parametrize("run_at", ["1899-12-31 23:59:59.9+00", "9000-01-01 00:00:00+00"])
def test_sql_enqueue_refuses_the_years_that_python_refuses(db: Connection, run_at: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="must be in the years 1900 to 8999"):
        call(db, f"'q', '1', run_at => '{run_at}'")
    assert place(db, call(db, "'q', '1', run_at => '8999-12-31 23:59:59+00'")) == ("scheduled", 0)


@pytest.mark.parametrize(
    "arguments",
    [
        "repeat('x', 255), '1'",
        "'q', to_jsonb(repeat('x', 1048574))",
        "'q', '1', priority => 2147483647, max_attempts => 2147483647",
        "'q', '1', key => repeat('x', 1024)",
        "'q', '1', key => ''",
        "'q', 'null'",
        "'q', '1', metadata => jsonb_build_object('a', repeat('x', 8183))",
        "'q', '1', run_at => '1900-01-01 00:00:00+00'",
    ],
)
def test_sql_enqueue_takes_what_is_just_within_the_limits(db: Connection, arguments: str) -> None:
    assert place(db, call(db, arguments)) == ("ready", 0)


def test_sql_enqueue_on_a_taken_key_raises_returns_or_replaces(db: Connection) -> None:
    holder = call(db, "'q', '\"old\"', key => 'k'")
    with pytest.raises(
        psycopg.errors.UniqueViolation,
        match=f"while enqueueing: key 'k' of queue 'q' is held by job {holder}",
    ):
        call(db, "'q', '\"new\"', key => 'k'")
    assert call(db, "'q', '\"new\"', key => 'k', on_conflict => 'return'") == holder
    assert read(db, holder).payload == b'"old"'
    assert call(db, "'q', '\"new\"', key => 'k', on_conflict => 'replace'") == holder
    assert read(db, holder).payload == b'"new"'
    assert count(db, "jobs") == 1


def test_sql_enqueue_and_the_api_share_their_keys(db: Connection) -> None:
    holder = put_one(db, key="k")
    assert call(db, "'q', '1', key => 'k', on_conflict => 'return'") == holder


def test_a_caught_conflict_leaves_the_callers_transaction_alive(db: Connection) -> None:
    call(db, "'q', '1', key => 'k'")
    with db.transaction():
        kept = call(db, "'q', '1'")
        with pytest.raises(psycopg.errors.UniqueViolation), db.transaction():
            call(db, "'q', '1', key => 'k'")
    assert place(db, kept) == ("ready", 0)


# Notifications.


def heard(listener: Connection) -> list[tuple[str, str]]:
    """Return what has arrived; a round trip of the listener's own delivers what was committed before."""
    listener.execute("SELECT 1")
    return [(n.channel, n.payload) for n in listener.notifies(timeout=0)]


@pytest.fixture
def listener(connect: Callable[[], Connection]) -> Connection:
    conn = connect()
    conn.execute("LISTEN triojobs")
    return conn


def test_enqueue_notifies_inside_the_transaction_when_asked_to(db: Connection, listener: Connection) -> None:
    rows = [new_row(queue="a"), new_row(queue="a"), new_row(queue="b"), new_row(queue="c", key="k")]
    with db.transaction():
        enqueue_sql.enqueue(db, SCHEMA, rows, notify_inside=True)
        assert heard(listener) == []
    assert sorted(heard(listener)) == [("triojobs", "a"), ("triojobs", "b"), ("triojobs", "c")]
    enqueue(db, rows[:3])
    assert heard(listener) == []


def test_sql_enqueue_notifies_when_it_commits(db: Connection, listener: Connection) -> None:
    with db.transaction():
        call(db, "'q', '1'")
        assert heard(listener) == []
    assert heard(listener) == [("triojobs", "q")]


def test_only_queues_on_which_a_living_group_sleeps_are_woken(db: Connection, listener: Connection) -> None:
    alive, also, lapsed, closed = (Group(db) for _ in range(4))
    notify.mark_waiting(db, SCHEMA, alive.id, ["a", "b"])
    notify.mark_waiting(db, SCHEMA, also.id, ["a"])
    notify.mark_waiting(db, SCHEMA, lapsed.id, ["c"])
    notify.mark_waiting(db, SCHEMA, closed.id, ["d"])
    lapsed.lapse(db)
    db.execute("UPDATE triojobs.worker_groups SET closed_at = now() WHERE id = %s", [closed.id])
    notify.notify_waiting(db, SCHEMA, ["a", "c", "d", "nobody"])
    assert heard(listener) == [("triojobs", "a")]
    notify.mark_waiting(db, SCHEMA, alive.id, ["a", "b"])  # again, as after a reconnect
    notify.unmark_waiting(db, SCHEMA, alive.id, ["b"])
    notify.notify_waiting(db, SCHEMA, ["b"])
    assert heard(listener) == []


def test_rescue_and_close_forget_who_waits(db: Connection) -> None:
    lapsed, closed, alive = (Group(db) for _ in range(3))
    for group in (lapsed, closed, alive):
        notify.mark_waiting(db, SCHEMA, group.id, ["q"])
    lapsed.lapse(db)
    groups.rescue(db, SCHEMA)
    groups.close_group(db, SCHEMA, closed.id)
    assert db.execute("SELECT group_id FROM triojobs.waiting").fetchall() == [(alive.id,)]


def test_a_group_hears_of_its_cancels_on_a_channel_of_its_own(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    group, ear = Group(db), connect()
    ear.execute(sql.SQL("LISTEN {}").format(sql.Identifier(notify.group_channel(group.id))))
    notify.notify_group(db, group.id)
    assert heard(ear) == [(notify.group_channel(group.id), "")]


@pytest.fixture
def elsewhere(empty_database: str) -> Iterator[Connection]:
    """A session on a database whose schema has a name that SQL must quote."""
    migrate(empty_database, schema="user")
    with open_session(empty_database) as conn:
        yield conn


def test_a_schema_whose_name_must_be_quoted_works_throughout(
    elsewhere: Connection, empty_database: str
) -> None:
    conn = elsewhere
    with open_session(empty_database) as ear:
        ear.execute('LISTEN "user"')
        with conn.transaction():
            enqueue_sql.enqueue(conn, "user", [new_row(), new_row(key="k")], notify_inside=True)
        assert heard(ear) == [("user", "q")]
        conn.execute("SELECT \"user\".enqueue('sql', '1', key => 'k')")
        assert heard(ear) == [("user", "sql")]
    assert groups.add_partitions(conn, "user") == 0
    group_id, wants = uuid.uuid4(), {"q": 9, "sql": 9}
    groups.register(conn, "user", Registration(group_id, "g", "h", 1, "0", 60.0))
    claims = claim_sql.claim(conn, "user", group_id=group_id, epoch=1, claim_no=1, wants=wants)
    assert len(claims) == 3


# Partitions.


def partitions(conn: Connection) -> list[str]:
    rows = conn.execute(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent IN ('triojobs.jobs'::regclass, 'triojobs.outcomes'::regclass) ORDER BY 1"
    ).fetchall()
    return [name for (name,) in rows]


def stored_in(conn: Connection, job_id: int) -> str:
    """Return the partition that holds a body."""
    query = "SELECT c.relname FROM triojobs.jobs j JOIN pg_class c ON c.oid = j.tableoid WHERE j.id = %s"
    row = conn.execute(query, [job_id]).fetchone()
    assert row is not None
    return row[0]


def move_ids_to(conn: Connection, last: int) -> None:
    """Let the sequence have handed out ids up to `last`."""
    conn.execute("SELECT setval('triojobs.job_ids', %s)", [last])


def run_through(conn: Connection, job_id: int) -> None:
    group = Group(conn)
    group.settle(conn, group.claim_one(conn), Outcome.FAILED)
    make_due(conn)
    group.settle(conn, group.claim_one(conn), Outcome.DONE)
    assert place(conn, job_id) == ("done", 2)
    assert read(conn, job_id).status == "done"


def test_a_new_schema_has_this_range_and_two_ahead(db: Connection) -> None:
    names = [f"{table}_{part}" for table in ("jobs", "outcomes") for part in (0, 1, 2, "default")]
    assert partitions(db) == names
    assert groups.add_partitions(db, SCHEMA) == 0


def test_ranges_are_added_as_the_ids_grow(db: Connection) -> None:
    move_ids_to(db, 2_000_000)
    assert groups.add_partitions(db, SCHEMA) == 4
    assert {"jobs_3", "jobs_4", "outcomes_3", "outcomes_4"} <= set(partitions(db))
    assert groups.add_partitions(db, SCHEMA) == 0
    job_id = put_one(db)
    assert (job_id, stored_in(db, job_id)) == (2_000_001, "jobs_2")
    run_through(db, job_id)


def test_ids_past_the_ranges_live_in_the_default_partition_and_work(db: Connection) -> None:
    move_ids_to(db, 7_500_000)
    job_id = put_one(db)
    assert stored_in(db, job_id) == "jobs_default"
    run_through(db, job_id)
    assert groups.add_partitions(db, SCHEMA) == 4  # the next two ranges
    assert stored_in(db, job_id) == "jobs_default"
    assert "jobs_7" not in partitions(db)
    assert {"jobs_8", "jobs_9", "outcomes_8", "outcomes_9"} <= set(partitions(db))
    run_through(db, put_one(db))


def test_the_edge_of_a_range_is_where_the_partitions_say(db: Connection) -> None:
    move_ids_to(db, 999_998)
    ids = put(db, 2)
    assert [stored_in(db, i) for i in ids] == ["jobs_0", "jobs_1"]


def test_adding_partitions_gives_way_to_a_reader_at_once(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    move_ids_to(db, 2_000_000)
    with (reader := connect()).transaction():
        reader.execute("SELECT count(*) FROM triojobs.jobs")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            groups.add_partitions(db, SCHEMA)
    assert groups.add_partitions(db, SCHEMA) == 4


def test_groups_that_add_partitions_side_by_side_make_each_once(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    move_ids_to(db, 5_000_000)

    def add(conn: Connection) -> int:
        try:
            return groups.add_partitions(conn, SCHEMA)
        except psycopg.errors.LockNotAvailable:
            return 0  # gave way

    made = together(*(partial(add, connect()) for _ in range(4)))
    assert sum(made) + groups.add_partitions(db, SCHEMA) == 6


def test_an_old_range_can_be_dropped_with_its_waiting_jobs_kept(db: Connection) -> None:
    done, waiting, running, later = put(db, 4)
    group = Group(db)
    claims = {c.job_id: c for c in group.claim(db)}
    group.settle(db, [claims[done]], Outcome.DONE)
    group.settle(db, [claims[waiting]], Outcome.RELEASED)
    group.settle(db, [claims[later]], Outcome.SNOOZED, delay=60.0)
    move_ids_to(db, 1_000_000)
    places = ("ready", "scheduled", "leases")
    living = " UNION ".join(f"SELECT id FROM triojobs.{name}" for name in places)
    keep = f"INSERT INTO triojobs.jobs SELECT * FROM triojobs.jobs_0 WHERE id IN ({living})"
    with db.transaction():
        db.execute("ALTER TABLE triojobs.jobs DETACH PARTITION triojobs.jobs_0")
        db.execute(keep)  # type: ignore[call-overload]
        db.execute("DROP TABLE triojobs.jobs_0")
    assert db.execute("SELECT id FROM triojobs.jobs ORDER BY id").fetchall() == [
        (waiting,),
        (running,),
        (later,),
    ]
    assert stored_in(db, waiting) == "jobs_default"
    make_due(db)
    again = group.claim(db)
    assert {c.job_id: c.payload for c in again} == {waiting: b"x", later: b"x"}
    group.settle(db, [claims[running], *again], Outcome.DONE)
    assert {read(db, i).status for i in (waiting, running, later)} == {"done"}
    assert groups.add_partitions(db, SCHEMA) == 2  # range 3; the dropped range stays dropped
