"""How our connections are opened: parameters against black holes, several hosts, and what a conninfo overrides."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from psycopg import conninfo as conninfos

import triojobs
from tests.tools.looking import until
from triojobs._bridge import Breaker, Line, clock

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
ROLES = {"claim", "settle", "client", "heartbeat", "listen", "job"}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """The libpq parameters that each of our connections was opened with, by its role."""
    found: dict[str, dict[str, str]] = {}
    connect = psycopg.connect

    def connect_and_tell(*args: Any, **options: Any) -> psycopg.Connection[Any]:
        conn = connect(*args, **options)
        parameters = conn.info.get_parameters()
        name = parameters.get("application_name", "")
        if name.startswith("triojobs "):
            found[name.removeprefix("triojobs ")] = parameters
        return conn

    monkeypatch.setattr("triojobs._sql.failures.psycopg.connect", connect_and_tell)
    return found


async def run_a_group(conninfo: str) -> None:
    """Open a group that uses every kind of connection."""

    async def handler(job: triojobs.Job[Any]) -> None:
        await job.commit(lambda conn: None)

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        await group.client.result(await group.client.enqueue(plain, None))
        await until(
            conninfo, "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'triojobs listen'"
        )


async def test_every_connection_notices_a_peer_that_is_gone(
    conninfo: str, opened: dict[str, dict[str, str]]
) -> None:
    """Keepalives alone or tcp_user_timeout alone each leave one hole."""
    await run_a_group(conninfo)
    assert opened.keys() >= ROLES
    for role in ROLES:
        wanted = {
            "keepalives": "1",
            "keepalives_idle": "5",
            "keepalives_interval": "2",
            "keepalives_count": "3",
            "tcp_user_timeout": "10000",
        }
        assert wanted.items() <= opened[role].items(), role
        assert 2 <= int(opened[role]["connect_timeout"]) <= 4, role  # within call_timeout
        assert "target_session_attrs" not in opened[role]  # one host: there is no choice


async def test_what_the_conninfo_says_wins(conninfo: str, opened: dict[str, dict[str, str]]) -> None:
    own = {"keepalives_idle": "77", "tcp_user_timeout": "5000", "connect_timeout": "9"}
    await run_a_group(conninfos.make_conninfo(conninfo, **own))
    for role in ROLES:
        assert own.items() <= opened[role].items(), role
        assert opened[role]["keepalives_count"] == "3", role


@pytest.fixture
def silent() -> Iterator[list[str]]:
    """Directories whose servers accept connections and never say a word: black holes, as far as libpq sees."""
    with tempfile.TemporaryDirectory(prefix="tj") as home:
        sockets = []
        for n in range(4):
            (Path(home) / str(n)).mkdir()
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(f"{home}/{n}/.s.PGSQL.5432")
            sockets[-1].listen(64)
        yield [f"{home}/{n}" for n in range(4)]
        for each in sockets:
            each.close()


def line_to(conninfo: str, *, call_timeout: float) -> Line:
    return Line("test", conninfo, Breaker(), call_timeout=call_timeout, prepare=lambda conn: None)


def among(hosts: list[str], conninfo: str) -> str:
    """Return the conninfo with other hosts before its own."""
    given = conninfos.conninfo_to_dict(conninfo)
    ports = ["5432"] * len(hosts) + [str(given.get("port", 5432))]
    return conninfos.make_conninfo(
        conninfo, host=",".join([*hosts, str(given["host"])]), port=",".join(ports)
    )


def test_behind_black_holes_a_host_that_answers_is_found_and_remembered(
    conninfo: str, silent: list[str]
) -> None:
    """The time of one call is enough for one host, so each call asks the next one."""
    line = line_to(among(silent[:2], conninfo), call_timeout=2.0)
    try:
        for _ in range(2):
            with pytest.raises(triojobs.DatabaseError) as caught:
                line.call("testing", lambda call: None)
            assert (caught.value.transient, caught.value.committed) == (True, False)
        pids = []
        for _ in range(2):  # were the first host asked again, it would be silence
            line.call("testing", lambda call: (pids.append(call.conn.info.backend_pid), call.conn.close()))
        assert len(set(pids)) == 2
    finally:
        line.close()


@pytest.mark.parametrize("seconds", [1.5, 4.0])
def test_a_call_with_a_deadline_is_bounded_however_many_hosts_are_black_holes(
    silent: list[str], seconds: float
) -> None:
    """libpq would give each of the four its least of two seconds."""
    conninfo = f"host={','.join(silent)} user=nobody dbname=none"
    line = line_to(conninfo, call_timeout=60.0)
    began = time.monotonic()
    with pytest.raises(triojobs.DatabaseError):
        line.call("testing", lambda call: None, clock() + seconds)
    # Two seconds for one host, or what the deadline leaves; generous, but less than four hosts take.
    assert time.monotonic() - began < max(seconds, 2.0) + 3.5


async def test_a_group_opens_through_a_host_that_answers(conninfo: str, silent: list[str]) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        return "done"

    through = among(silent[:1], conninfo)
    async with triojobs.open_worker_group(
        through, [triojobs.Worker(plain, handler)], call_timeout=8.0
    ) as group:
        with trio.fail_after(60):
            assert await group.client.result(await group.client.enqueue(plain, None)) == "done"


def test_without_time_for_it_no_connection_is_opened_and_an_idle_one_is_used(conninfo: str) -> None:
    line = line_to(conninfo, call_timeout=20.0)
    try:
        for late in (-1.0, 0.5):
            with pytest.raises(triojobs.DatabaseError, match="no time left") as caught:
                line.call("testing", lambda call: None, clock() + late)
            assert (caught.value.transient, caught.value.committed) == (True, False)
        first = line.call("testing", lambda call: call.conn.info.backend_pid)
        assert line.call("testing", lambda call: call.conn.info.backend_pid, clock() + 0.9) == first
        with pytest.raises(triojobs.DatabaseError, match="no time left"):
            line.call("testing", lambda call: None, clock())
        assert line.call("testing", lambda call: call.conn.info.backend_pid) == first
    finally:
        line.close()


async def test_no_statement_is_sent_from_the_event_loop(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would block the loop for as long as the server is silent."""
    sent: list[tuple[bool, str]] = []
    execute = psycopg.Cursor.execute

    def execute_and_tell(cursor: Any, query: Any, *args: Any, **options: Any) -> Any:
        name = cursor.connection.info.get_parameters().get("application_name", "")
        if name.startswith("triojobs "):
            sent.append((trio.lowlevel.in_trio_task(), str(query)))
        return execute(cursor, query, *args, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", execute_and_tell)
    await run_a_group(conninfo)
    assert [query for _, query in sent if "LISTEN" in query]
    assert [query for on_loop, query in sent if on_loop] == []
