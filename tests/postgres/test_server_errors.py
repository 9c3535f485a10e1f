"""A group under what a server may answer: each error leads to a repetition, a pause or another connection."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import trio
from psycopg import conninfo as conninfos
from psycopg import sql

import triojobs
from tests.tools.looking import blocked, locked, rows, until, value
from triojobs._embedded_cluster import Cluster, running_cluster
from triojobs._sql.schema import migrate

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
PATIENCE = 30.0


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[Any]:
    return [record for record in caplog.records if getattr(record, "event", "") == event]


async def answer(job: triojobs.Job[Any]) -> int:
    return job.attempt


# Raises an error of the server's at each write into a table; counts, whatever is rolled back.
RAISE = """
CREATE SEQUENCE public.raised;
CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('public.raised') <= {times} THEN
        RAISE EXCEPTION 'refused by a test' USING ERRCODE = {sqlstate};
    END IF;
    RETURN new;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON triojobs.{table} FOR EACH ROW EXECUTE FUNCTION public.refuse();
"""


def refuse(conninfo: str, table: str, sqlstate: str, *, times: int) -> None:
    """Have the first `times` writes into a table refused."""
    statement = sql.SQL(RAISE).format(
        times=sql.Literal(times), sqlstate=sql.Literal(sqlstate), table=sql.Identifier(table)
    )
    with psycopg.connect(conninfo) as conn:
        conn.execute(statement)


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03"])
@pytest.mark.parametrize(("table", "event"), [("leases", "claim_failed"), ("outcomes", "settle_failed")])
async def test_a_lost_race_is_repeated_within_the_call(
    conninfo: str, caplog: pytest.LogCaptureFixture, table: str, event: str, sqlstate: str
) -> None:
    refuse(conninfo, table, sqlstate, times=3)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, answer)]) as group:
        with trio.fail_after(PATIENCE):
            assert await group.client.result(await group.client.enqueue(plain, None)) == 1
    assert value(conninfo, "SELECT last_value FROM public.raised") == 4
    assert told(caplog, event) == []


@pytest.mark.parametrize("sqlstate", ["53100", "53200", "57014", "58030"])
@pytest.mark.parametrize(("table", "event"), [("leases", "claim_failed"), ("outcomes", "settle_failed")])
async def test_a_server_that_refuses_is_asked_again_later(
    conninfo: str, caplog: pytest.LogCaptureFixture, table: str, event: str, sqlstate: str
) -> None:
    refuse(conninfo, table, sqlstate, times=3)
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, answer)]) as group:
        began = trio.current_time()
        with trio.fail_after(PATIENCE):
            assert await group.client.result(await group.client.enqueue(plain, None)) == 1
        assert trio.current_time() - began >= 0.1 + 0.2 + 0.4  # the least pauses
    assert [record.sqlstate for record in told(caplog, event)] == [sqlstate] * 3
    assert told(caplog, "compared") == []  # a refusal is no claim of unknown fate
    assert value(conninfo, "SELECT epoch FROM triojobs.worker_groups") == 1


async def test_a_cancelled_claim_is_clean_and_repeated(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(plain, answer)], poll_interval=0.1, notify=False
    ) as group:
        with locked(conninfo, "SELECT FROM triojobs.worker_groups FOR UPDATE"):
            job_id = await group.client.enqueue(plain, None)
            rows(conninfo, "SELECT pg_cancel_backend(%s)", await blocked(conninfo, "claim"))
            with trio.fail_after(PATIENCE):
                while not told(caplog, "claim_failed"):
                    await trio.sleep(0.01)
        with trio.fail_after(PATIENCE):
            assert await group.client.result(job_id) == 1
    assert told(caplog, "claim_failed")[0].sqlstate == "57014"
    assert value(conninfo, "SELECT epoch FROM triojobs.worker_groups") == 1


# Servers of the test's own: these change settings of the whole server, or need a second one.


@pytest.fixture(scope="module")
def small_server() -> Iterator[str]:
    """The conninfo of a server with room for twelve connections and none for superusers."""
    settings = {
        "fsync": "off",
        "max_connections": "12",
        "superuser_reserved_connections": "0",
        "log_min_messages": "fatal",
        "max_wal_senders": "0",
    }
    with running_cluster(Cluster(settings=settings)) as conninfo:
        migrate(conninfo)
        yield conninfo


async def test_without_room_for_connections_a_group_waits_and_keeps_its_lease(
    small_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[psycopg.Connection[Any]] = []
    async with triojobs.open_worker_group(
        small_server, [triojobs.Worker(plain, answer)], beat_interval=0.1, poll_interval=0.1, notify=False
    ) as group:
        await until(small_server, "SELECT count(*) = 1 FROM triojobs.worker_groups WHERE epoch = 1")
        looking = psycopg.connect(small_server, autocommit=True)
        try:
            job_id = await group.client.enqueue(plain, None)
            assert await group.client.result(job_id) == 1
            with pytest.raises(psycopg.OperationalError, match="too many clients"):
                while True:
                    taken.append(psycopg.connect(small_server))
            full = len(taken)
            while len(taken) == full:  # the group may be faster in taking the place that becomes free
                looking.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'triojobs claim'"
                )
                with pytest.raises(psycopg.OperationalError, match="too many clients"):
                    while True:
                        taken.append(psycopg.connect(small_server))
            before = group.statistics().lease_until
            job_id = await group.client.enqueue(plain, None)
            with trio.fail_after(PATIENCE):
                while len(told(caplog, "claim_failed")) < 3 or group.statistics().lease_until <= before:
                    await trio.sleep(0.02)
            assert not looking.execute("SELECT 1 FROM triojobs.leases").fetchall()
            for conn in taken:
                conn.close()
            with trio.fail_after(PATIENCE):
                assert await group.client.result(job_id) == 1
            assert group.statistics().registrations == 1
        finally:
            looking.close()
            for conn in taken:
                conn.close()


@pytest.fixture
def second_database(conninfo: str, small_server: str) -> Iterator[str]:
    """A database on the other server, of the same name: a conninfo with two hosts has but one name."""
    name = str(conninfos.conninfo_to_dict(conninfo)["dbname"])
    with psycopg.connect(small_server, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        second = conninfos.make_conninfo(small_server, dbname=name)
        migrate(second)
        yield second
        conn.execute("SET default_transaction_read_only = off")
        conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
        conn.execute("SELECT pg_reload_conf()")
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


async def test_a_group_whose_server_becomes_read_only_goes_to_the_next_host(
    conninfo: str, second_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The two servers share no rows, so the group finds no registration on the second one and makes one."""
    first, second = (conninfos.conninfo_to_dict(each) for each in (second_database, conninfo))
    both = conninfos.make_conninfo(
        conninfo,
        host=f"{first['host']},{second['host']}",
        port=f"{first.get('port', 5432)},{second.get('port', 5432)}",
        user=f"{second['user']}",
    )
    async with triojobs.open_worker_group(
        both, [triojobs.Worker(plain, answer)], beat_interval=0.2, poll_interval=0.2
    ) as group:
        assert value(second_database, "SELECT count(*) FROM triojobs.worker_groups") == 1
        assert value(conninfo, "SELECT count(*) FROM triojobs.worker_groups") == 0
        with psycopg.connect(second_database, autocommit=True) as conn:
            conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            conn.execute("SELECT pg_reload_conf()")
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.worker_groups", seconds=PATIENCE)
        async with triojobs.open_client(conninfo) as client:
            with trio.fail_after(PATIENCE):
                assert await client.result(await client.enqueue(plain, None)) == 1
        assert group.statistics().registrations == 2
    assert "25006" in {getattr(record, "sqlstate", None) for record in caplog.records}


async def test_with_one_host_a_read_only_server_is_waited_for(
    small_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with triojobs.open_worker_group(
        small_server, [triojobs.Worker(plain, answer)], poll_interval=0.1, notify=False
    ) as group:
        job_id = await group.client.enqueue(plain, None)
        assert await group.client.result(job_id) == 1
        with psycopg.connect(small_server, autocommit=True) as conn:
            conn.execute("SET default_transaction_read_only = off")
            conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            conn.execute("SELECT pg_reload_conf()")
            try:
                with trio.fail_after(PATIENCE):
                    while not told(caplog, "claim_failed"):
                        await trio.sleep(0.02)
                with pytest.raises(triojobs.DatabaseError, match="read-only") as caught:
                    await group.client.enqueue(plain, None)
            finally:
                conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
                conn.execute("SELECT pg_reload_conf()")
        error = caught.value  # the client meets the same server
        assert (error.sqlstate, error.transient, error.committed) == ("25006", True, False)
        assert "connect to the primary server" in error.hint
        await until(small_server, "SELECT current_setting('transaction_read_only') = 'off'")
        with trio.fail_after(PATIENCE):
            assert await group.client.result(await group.client.enqueue(plain, None)) == 1
        assert group.statistics().registrations == 1


async def test_a_listener_leaves_a_server_that_became_read_only(
    small_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can notify there, and the connection itself tells nothing: the probe does."""
    monkeypatch.setattr("triojobs._listener.PROBE_INTERVAL", 0.1)
    async with triojobs.open_worker_group(small_server, [triojobs.Worker(plain, answer)]):
        with psycopg.connect(small_server, autocommit=True) as conn:
            try:
                conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
                conn.execute("SELECT pg_reload_conf()")
                with trio.fail_after(PATIENCE):
                    while not told(caplog, "listen_lost"):
                        await trio.sleep(0.02)
            finally:
                conn.execute("SET default_transaction_read_only = off")
                conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
                conn.execute("SELECT pg_reload_conf()")
    assert "read-only" in told(caplog, "listen_lost")[0].getMessage()
