"""The outbox: a job exists if and only if the caller's transaction commits, whatever its connection is like."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import trio
from forms import other, plain
from psycopg import rows as row_factories
from psycopg.adapt import Dumper, Loader

import triojobs
from tests.tools.looking import places, rows, value

Connection = psycopg.Connection[Any]
HOUR = dt.timedelta(hours=1)
IDLE = psycopg.pq.TransactionStatus.IDLE
INTRANS = psycopg.pq.TransactionStatus.INTRANS


@pytest.fixture
def orders(conninfo: str) -> str:
    """A database with a table of the business, which the outbox writes beside."""
    rows(conninfo, "CREATE TABLE orders (id int PRIMARY KEY)")
    return conninfo


def write(conn: Connection, order: int) -> None:
    conn.execute("INSERT INTO orders VALUES (%s)", [order])


def found(conninfo: str) -> tuple[int, int]:
    """Return how many business rows and how many jobs there are."""
    return (
        value(conninfo, "SELECT count(*) FROM orders"),
        value(conninfo, "SELECT count(*) FROM triojobs.jobs"),
    )


# Together or not at all.


def test_a_commit_shows_one_job_and_one_business_row(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        write(conn, 1)
        job_id = triojobs.enqueue_on(conn, plain, "x")
        assert found(orders) == (0, 0)
    assert found(orders) == (1, 1)
    assert rows(orders, "SELECT id FROM triojobs.ready") == [(job_id,)]


def test_a_rollback_shows_neither_although_the_enqueue_succeeded(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        write(conn, 1)
        assert triojobs.enqueue_on(conn, plain, "x") > 0
        assert triojobs.enqueue_many_on(conn, plain, ["y", triojobs.NewJob("z", key="k")])
        conn.rollback()
    assert found(orders) == (0, 0)
    assert places(orders) == {}


def test_an_enqueue_on_an_idle_connection_begins_the_transaction_as_any_statement_does(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        triojobs.enqueue_on(conn, plain, "x")
        assert conn.info.transaction_status == INTRANS
        write(conn, 1)
        conn.rollback()
    assert found(orders) == (0, 0)


def test_all_options_are_kept_exactly(orders: str) -> None:
    at = dt.datetime.now(dt.UTC) + HOUR
    with psycopg.connect(orders) as conn:
        (given,) = conn.execute("SELECT nextval('triojobs.job_ids')").fetchone() or (0,)
        job_id = triojobs.enqueue_on(
            conn, plain, 1, job_id=given, priority=5, max_attempts=9, run_at=at, metadata={"a": [1]}, key="k"
        )
    assert job_id == given
    assert rows(
        orders, "SELECT id, priority, max_attempts, run_at, metadata, key FROM triojobs.job_status"
    ) == [(given, 5, 9, at, {"a": [1]}, "k")]


def test_a_conflict_undoes_this_call_alone(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        holder = triojobs.enqueue_on(conn, plain, "first", key="k")
    with psycopg.connect(orders) as conn:
        write(conn, 1)
        kept = triojobs.enqueue_on(conn, plain, "kept")
        with pytest.raises(triojobs.DuplicateJobError) as caught:
            triojobs.enqueue_many_on(conn, plain, ["undone", triojobs.NewJob("second", key="k")])
        assert (caught.value.job_id, caught.value.key, caught.value.index) == (holder, "k", 1)
        also_kept = triojobs.enqueue_on(conn, plain, "also kept")
        write(conn, 2)
    assert found(orders) == (2, 3)
    assert rows(orders, "SELECT id FROM triojobs.ready ORDER BY id") == [(holder,), (kept,), (also_kept,)]


def test_a_refusal_of_the_server_undoes_this_call_alone(orders: str) -> None:
    rows(orders, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
    with psycopg.connect(orders) as conn:
        write(conn, 1)
        with pytest.raises(triojobs.DatabaseError) as caught:
            triojobs.enqueue_many_on(conn, plain, ["undone", triojobs.NewJob("x", priority=7)])
        assert (caught.value.committed, caught.value.sqlstate) == (False, "23514")
        write(conn, 2)
    assert found(orders) == (2, 0)


def test_a_refused_argument_leaves_the_transaction_as_it_was(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        write(conn, 1)
        with pytest.raises(triojobs.OptionError):
            triojobs.enqueue_on(conn, plain, "x", priority=-1)
        with pytest.raises(triojobs.OptionError):
            triojobs.enqueue_on(conn, plain, "x", job_id=10**9)
        with pytest.raises(triojobs.OptionError):
            triojobs.enqueue_on(conn, plain, "x", schema="No Schema")
        with pytest.raises(triojobs.SchemaError):
            triojobs.enqueue_on(conn, plain, "x", schema="elsewhere")
    assert found(orders) == (1, 0)


def test_each_try_says_what_it_did(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        first = triojobs.try_enqueue_on(conn, plain, 1, key="k")
        assert first.created
        assert triojobs.try_enqueue_on(conn, plain, 2, key="k") == triojobs.Enqueued(first.id, created=False)
        replaced = triojobs.try_enqueue_on(conn, plain, 3, key="k", on_conflict="replace")
        assert replaced == triojobs.Enqueued(first.id, created=False, replaced=True)
        with pytest.raises(triojobs.DuplicateJobError):
            triojobs.try_enqueue_on(conn, plain, 4, key="k", on_conflict="raise")
        many = triojobs.try_enqueue_many_on(
            conn, plain, [5, triojobs.NewJob(6, key="k", on_conflict="return")]
        )
        assert [entry.created for entry in many] == [True, False]
        assert many[1].id == first.id
    assert found(orders) == (0, 2)


def test_inner_transactions_decide_for_themselves(orders: str) -> None:
    with psycopg.connect(orders) as conn, conn.transaction():
        triojobs.enqueue_on(conn, plain, "outer")
        with conn.transaction(force_rollback=True):
            triojobs.enqueue_on(conn, plain, "undone")
        with conn.transaction():
            triojobs.enqueue_on(conn, plain, "inner")
            with pytest.raises(ZeroDivisionError), conn.transaction():
                triojobs.enqueue_on(conn, plain, "undone as well")
                raise ZeroDivisionError
    assert found(orders) == (0, 2)


def test_a_rolled_back_enqueue_leaves_its_key_free(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        triojobs.enqueue_on(conn, plain, "undone", key="k")
        conn.rollback()
        assert triojobs.try_enqueue_on(conn, plain, "x", key="k").created


def test_in_autocommit_the_call_is_a_transaction_of_its_own(orders: str) -> None:
    with psycopg.connect(orders, autocommit=True) as conn:
        triojobs.enqueue_many_on(conn, plain, [1, triojobs.NewJob(2, key="k")])
        assert conn.info.transaction_status == IDLE
        assert found(orders) == (0, 2)
        with pytest.raises(triojobs.DuplicateJobError):
            triojobs.enqueue_many_on(conn, plain, [3, triojobs.NewJob(4, key="k")])
        assert found(orders) == (0, 2)
        with conn.transaction(force_rollback=True):
            triojobs.enqueue_on(conn, plain, "undone")
        assert found(orders) == (0, 2)


# Notifications.


@contextmanager
def listening(conninfo: str) -> Iterator[Callable[[], list[str]]]:
    """Yield a function that returns what was notified since the last look."""
    with psycopg.connect(conninfo, autocommit=True) as ear:
        ear.execute("LISTEN triojobs")

        def heard() -> list[str]:
            ear.execute("SELECT 1")  # the round trip delivers what was committed before
            return sorted(n.payload for n in ear.notifies(timeout=0))

        yield heard


def test_the_notification_goes_out_with_the_outer_commit_and_not_before(orders: str) -> None:
    with listening(orders) as heard, psycopg.connect(orders) as conn:
        with conn.transaction():
            with conn.transaction():
                triojobs.enqueue_on(conn, plain, 1)
                triojobs.enqueue_on(conn, other, 1, key="k", delay=60.0)
            with conn.transaction(force_rollback=True):
                triojobs.enqueue_on(conn, triojobs.Queue("undone"), 1)
            assert heard() == []
        assert heard() == ["other", "plain"]


def test_what_is_rolled_back_notifies_nobody(orders: str) -> None:
    with listening(orders) as heard, psycopg.connect(orders) as conn:
        triojobs.enqueue_on(conn, plain, 1)
        conn.rollback()
        assert heard() == []


def test_a_conflict_notifies_nobody_of_what_it_undid(orders: str) -> None:
    with listening(orders) as heard, psycopg.connect(orders) as conn:
        triojobs.enqueue_on(conn, other, 1, key="k")
        conn.commit()
        assert heard() == ["other"]
        with pytest.raises(triojobs.DuplicateJobError):
            triojobs.enqueue_many_on(conn, other, [1, triojobs.NewJob(2, key="k")])
        conn.commit()
        assert heard() == []


# The caller's connection may have any settings, and keeps them.


class Shouting(Dumper):
    def dump(self, obj: Any) -> bytes:
        raise AssertionError("the caller's adapters are not ours")


class Wrong(Loader):
    def load(self, data: Any) -> Any:
        return "wrong"


def customized(conn: Connection) -> None:
    for kind in (str, int, bytes, float, list, dt.datetime):
        conn.adapters.register_dumper(kind, Shouting)
    for name in ("int8", "bool", "text"):
        conn.adapters.register_loader(name, Wrong)


SETTINGS: dict[str, Callable[[Connection], Any]] = {
    "row_factory=scalar_row": lambda c: setattr(c, "row_factory", row_factories.scalar_row),
    "row_factory=dict_row": lambda c: setattr(c, "row_factory", row_factories.dict_row),
    "row_factory of their own": lambda c: setattr(c, "row_factory", lambda cursor: lambda values: "row"),
    "cursor_factory=ClientCursor": lambda c: setattr(c, "cursor_factory", psycopg.ClientCursor),
    "cursor_factory=RawCursor": lambda c: setattr(c, "cursor_factory", psycopg.RawCursor),
    "adapters": customized,
    "prepare_threshold=0": lambda c: setattr(c, "prepare_threshold", 0),
    "prepare_threshold=None": lambda c: setattr(c, "prepare_threshold", None),
    **{
        f"isolation {level.name}": lambda c, level=level: setattr(c, "isolation_level", level)  # type: ignore[misc]
        for level in psycopg.IsolationLevel
    },
}
OPTIONS = [
    "-c search_path=",
    "-c search_path=pg_temp,public",
    "-c datestyle=sql,dmy -c intervalstyle=iso_8601",
    "-c timezone=Asia/Kathmandu",
    "-c default_transaction_isolation=serializable",
    "-c standard_conforming_strings=off",
    "-c bytea_output=escape",
]


def enqueue_everything(conn: Connection, conninfo: str) -> None:
    """Enqueue with all kinds of values, in bulk and by key, and check that they arrived."""
    at = dt.datetime(2031, 2, 3, 4, 5, 6, 789, tzinfo=dt.UTC)
    payload = b"\x00\\x41'\"\xff"
    options: dict[str, Any] = {
        "run_at": at,
        "metadata": {"q": "'\"\\", "ü": 1},
        "timeout": 1.5,
        "deadline": at,
    }
    job_ids = triojobs.enqueue_many_on(
        conn, plain, [triojobs.NewJob(payload, **options), triojobs.NewJob(payload, key="k\\'", **options)]
    )
    assert all(isinstance(job_id, int) for job_id in job_ids)
    assert triojobs.try_enqueue_on(conn, plain, 2, key="k\\'") == triojobs.Enqueued(job_ids[1], created=False)
    with pytest.raises(triojobs.DuplicateJobError):
        triojobs.enqueue_on(conn, plain, 3, key="k\\'")
    conn.commit()

    async def look() -> list[triojobs.JobInfo[Any] | None]:
        async with triojobs.open_client(conninfo) as client:
            return [await client.get(job_id) for job_id in job_ids]

    for info, key in zip(trio.run(look), (None, "k\\'"), strict=True):
        assert info is not None
        assert (info.payload, info.run_at, info.deadline, info.metadata) == (
            payload,
            at,
            at,
            options["metadata"],
        )
        assert info.key == key


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_settings_of_the_connection_do_not_matter(conninfo: str, setting: str, autocommit: bool) -> None:
    with psycopg.connect(conninfo, autocommit=autocommit) as conn:
        SETTINGS[setting](conn)
        before = (conn.row_factory, conn.cursor_factory, conn.isolation_level, conn.autocommit)
        enqueue_everything(conn, conninfo)
        assert (conn.row_factory, conn.cursor_factory, conn.isolation_level, conn.autocommit) == before


@pytest.mark.parametrize("options", OPTIONS)
def test_the_settings_of_the_session_do_not_matter(conninfo: str, options: str) -> None:
    with psycopg.connect(conninfo, options=options) as conn:
        enqueue_everything(conn, conninfo)


def test_tables_of_the_caller_that_are_named_like_ours_are_not_touched(conninfo: str) -> None:
    with psycopg.connect(conninfo, options="-c search_path=pg_temp") as conn:
        for name in ("jobs", "ready", "scheduled", "keys", "job_ids"):
            conn.execute(f"CREATE TEMP TABLE {name} (x int)")  # type: ignore[call-overload]
        enqueue_everything(conn, conninfo)


@pytest.mark.parametrize("autocommit", [False, True])
def test_pipeline_mode_is_kept(orders: str, autocommit: bool) -> None:
    with psycopg.connect(orders, autocommit=autocommit) as conn:
        with conn.pipeline():
            write(conn, 1)
            job_id = triojobs.enqueue_on(conn, plain, "x", key="k")
            write(conn, 2)
            with pytest.raises(triojobs.DuplicateJobError):
                triojobs.enqueue_on(conn, plain, "y", key="k")
            triojobs.enqueue_on(conn, plain, "z")
            write(conn, 3)
            assert conn.pgconn.pipeline_status
        conn.commit()
    assert found(orders) == (3, 2)
    assert rows(orders, "SELECT job_id FROM triojobs.keys") == [(job_id,)]


def test_in_pipeline_mode_a_refusal_of_the_server_undoes_this_call_alone(orders: str) -> None:
    rows(orders, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
    with psycopg.connect(orders) as conn:
        with conn.pipeline():
            write(conn, 1)
            with pytest.raises(triojobs.DatabaseError) as caught:
                triojobs.enqueue_on(conn, plain, "x", priority=7)
            assert (caught.value.committed, caught.value.sqlstate) == (False, "23514")
            write(conn, 2)
            triojobs.enqueue_on(conn, plain, "y")
        conn.commit()
    assert found(orders) == (2, 1)


@pytest.mark.parametrize(
    "level", [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE]
)
@pytest.mark.parametrize("on_conflict", ["raise", "return", "replace"])
def test_a_key_that_the_snapshot_cannot_see_is_a_serialization_failure(
    orders: str, level: psycopg.IsolationLevel, on_conflict: Any
) -> None:
    with psycopg.connect(orders) as conn:
        conn.isolation_level = level
        write(conn, 1)  # the snapshot
        with psycopg.connect(orders) as rival:
            triojobs.enqueue_on(rival, plain, "theirs", key="k")
        with pytest.raises(triojobs.DatabaseError) as caught:
            triojobs.enqueue_on(conn, plain, "ours", key="k", on_conflict=on_conflict)
        assert (caught.value.sqlstate, caught.value.transient, caught.value.committed) == (
            "40001",
            True,
            False,
        )
        write(conn, 2)
        triojobs.enqueue_on(conn, plain, "without a key")
    assert found(orders) == (2, 2)


def test_an_encoding_that_cannot_express_the_call_is_told(orders: str) -> None:
    with psycopg.connect(orders, client_encoding="latin1") as conn:
        write(conn, 1)
        triojobs.enqueue_on(conn, triojobs.Queue("é"), "x", key="ü", metadata={"a": "ß"})
        with pytest.raises(triojobs.DatabaseError, match=r"client_encoding is latin-1.*utf8") as caught:
            triojobs.enqueue_on(conn, triojobs.Queue("日本"), "x")
        assert caught.value.committed is False
        write(conn, 2)
    assert found(orders) == (2, 1)
    assert rows(orders, "SELECT queue, key, metadata FROM triojobs.jobs") == [("é", "ü", {"a": "ß"})]


# What is no usable connection.


def test_a_closed_connection_is_told_as_such(conninfo: str) -> None:
    conn = psycopg.connect(conninfo)
    conn.close()
    with pytest.raises(triojobs.DatabaseError, match=r"connection is closed.*new connection") as caught:
        triojobs.enqueue_on(conn, plain, "x")
    assert (caught.value.committed, caught.value.transient) == (False, True)


def test_a_lost_connection_has_committed_nothing(orders: str) -> None:
    with psycopg.connect(orders) as conn:
        write(conn, 1)
        rows(orders, "SELECT pg_terminate_backend(%s, 10000)", conn.info.backend_pid)
        for _ in range(2):
            with pytest.raises(triojobs.DatabaseError) as caught:
                triojobs.enqueue_on(conn, plain, "x")
            assert (caught.value.committed, caught.value.transient) == (False, True)
    assert found(orders) == (0, 0)


def test_an_asynchronous_connection_is_refused(conninfo: str) -> None:
    async def try_it() -> None:
        async with await psycopg.AsyncConnection.connect(conninfo) as conn:
            triojobs.enqueue_on(conn, plain, "x")  # type: ignore[arg-type]

    with pytest.raises(
        triojobs.OptionError, match=r"conn is .*AsyncConnection.*synchronous psycopg\.Connection"
    ):
        asyncio.run(try_it())


def test_something_else_is_refused_and_a_password_in_it_is_not_shown() -> None:
    for wrong in ("postgresql://ada:secret@host/db", None, object()):
        with pytest.raises(triojobs.OptionError, match=r"synchronous psycopg\.Connection") as caught:
            triojobs.enqueue_on(wrong, plain, "x")  # type: ignore[arg-type]
        assert caught.value.field == "conn"
        assert "secret" not in str(caught.value)


def fail(conn: Connection) -> None:
    with pytest.raises(psycopg.Error):
        conn.execute("SELECT 1/0")


@pytest.mark.parametrize(
    ("prepare", "sqlstate"),
    [
        (fail, "25P02"),
        (lambda conn: setattr(conn, "read_only", True), "25006"),
    ],
    ids=["failed transaction", "read only"],
)
def test_a_transaction_that_cannot_write_says_so(conninfo: str, prepare: Any, sqlstate: str) -> None:
    with psycopg.connect(conninfo) as conn:
        prepare(conn)
        with pytest.raises(triojobs.DatabaseError, match=r"roll back|primary") as caught:
            triojobs.enqueue_on(conn, plain, "x")
        assert (caught.value.sqlstate, caught.value.committed) == (sqlstate, False)
        conn.rollback()
    assert places(conninfo) == {}


async def test_it_may_be_called_in_a_trio_task(conninfo: str) -> None:
    with psycopg.connect(conninfo) as conn:
        triojobs.enqueue_on(conn, plain, "x")
    assert places(conninfo) == {"jobs": 1, "ready": 1}
