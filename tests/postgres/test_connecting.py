"""How our connections are opened: parameters against black holes, several hosts, and what a conninfo overrides."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from psycopg import conninfo as conninfos

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import until
from triojobs._bridge import Breaker, Line, clock
from triojobs._sql.connecting import connect_in_time

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
LineTo = Callable[..., Line]
ROLES = {"claim", "settle", "client", "heartbeat", "listen", "job"}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """The libpq parameters that each of our connections was opened with, by its role."""
    found: dict[str, dict[str, str]] = {}

    def connect_and_tell(*args: Any, **options: Any) -> psycopg.Connection[Any]:
        conn = connect_in_time(*args, **options)
        parameters = conn.info.get_parameters()
        name = parameters.get("application_name", "")
        if name.startswith("triojobs "):
            found[name.removeprefix("triojobs ")] = parameters
        return conn

    monkeypatch.setattr("triojobs._bridge.connect_in_time", connect_and_tell)
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


@pytest.fixture
def breaker() -> Iterator[Breaker]:
    """Breaks off the calls of `line_to`."""
    breaker = Breaker()
    yield breaker
    breaker.close()


@pytest.fixture
def line_to(breaker: Breaker) -> Iterator[LineTo]:
    """Makes lines: `line_to(conninfo, call_timeout=1.0)`."""
    lines: list[Line] = []

    def make(conninfo: str, *, call_timeout: float) -> Line:
        lines.append(Line("test", conninfo, breaker, call_timeout=call_timeout, prepare=lambda conn: None))
        return lines[-1]

    yield make
    for line in lines:
        line.close()


def among(hosts: list[str], conninfo: str) -> str:
    """Return the conninfo with other hosts before its own."""
    given = conninfos.conninfo_to_dict(conninfo)
    ports = ["5432"] * len(hosts) + [str(given.get("port", 5432))]
    return conninfos.make_conninfo(
        conninfo, host=",".join([*hosts, str(given["host"])]), port=",".join(ports)
    )


def test_behind_black_holes_a_host_that_answers_is_found_and_remembered(
    line_to: LineTo, conninfo: str, silent: list[str]
) -> None:
    """The time of one call is enough for one host, so each call begins with another."""
    line = line_to(among(silent[:2], conninfo), call_timeout=0.5)
    for _ in range(2):
        with pytest.raises(triojobs.DatabaseError, match="timeout expired") as caught:
            line.call("testing", lambda call: None)
        assert (caught.value.transient, caught.value.committed) == (True, False)
    pids = []
    for _ in range(2):  # were the first host asked again, it would be silence
        line.call("testing", lambda call: (pids.append(call.conn.info.backend_pid), call.conn.close()))
    assert len(set(pids)) == 2


def test_hosts_that_refuse_cost_a_short_call_no_time(line_to: LineTo, conninfo: str, tmp_path: Path) -> None:
    line = line_to(among([f"{tmp_path}/none", f"{tmp_path}/neither"], conninfo), call_timeout=1.0)
    assert line.call("testing", lambda call: call.conn.execute("SELECT 1").fetchone()) == (1,)


def test_an_error_says_what_each_host_answered(line_to: LineTo, silent: list[str], tmp_path: Path) -> None:
    hosts = [f"{tmp_path}/none", silent[0], f"{tmp_path}/neither"]
    line = line_to(f"host={','.join(hosts)} user=nobody password=secret", call_timeout=2.5)
    with pytest.raises(triojobs.DatabaseError) as caught:
        line.call("testing", lambda call: None)
    for host in hosts:
        assert host in str(caught.value)
    assert str(caught.value).count("timeout expired") == 1
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("seconds", [0.5, 3.0])
@pytest.mark.parametrize("bound", ["call_timeout", "deadline"])
def test_connecting_is_bounded_however_many_hosts_are_black_holes(
    line_to: LineTo, silent: list[str], seconds: float, bound: str
) -> None:
    """libpq would give each of the four its least of two seconds."""
    conninfo = f"host={','.join(silent)} user=nobody dbname=none"
    line = line_to(conninfo, call_timeout=seconds if bound == "call_timeout" else 60.0)
    began = time.monotonic()
    with pytest.raises(triojobs.DatabaseError):
        line.call("testing", lambda call: None, clock() + seconds if bound == "deadline" else None)
    assert time.monotonic() - began < seconds + 1.0


def test_the_users_connect_timeout_ends_a_connect_earlier(line_to: LineTo, silent: list[str]) -> None:
    line = line_to(f"host={silent[0]} user=nobody connect_timeout=1", call_timeout=60.0)
    began = time.monotonic()
    with pytest.raises(triojobs.DatabaseError, match="timeout expired"):
        line.call("testing", lambda call: None)
    assert 1.0 <= time.monotonic() - began < 30.0


async def test_a_connect_in_flight_can_be_hurried(breaker: Breaker, line_to: LineTo) -> None:
    with trio.fail_after(30), socket.create_server(("127.0.0.1", 0)) as silent:
        conninfo = f"host=127.0.0.1 port={silent.getsockname()[1]} user=nobody"
        line = line_to(conninfo, call_timeout=60.0)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def connect() -> None:
                with pytest.raises(triojobs.DatabaseError, match="timeout expired"):
                    await line.run("testing", lambda call: None)

            peer, _ = await trio.to_thread.run_sync(silent.accept)
            breaker.hurry(clock())
        peer.close()
    with pytest.raises(triojobs.DatabaseError, match="no time left"):
        await line.run("testing", lambda call: None)


def test_a_name_is_reached_at_the_address_that_answers(
    line_to: LineTo, conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first address is a black hole, and the call is too short for twice libpq's least."""
    with fault_proxy(conninfo, tcp=True) as (_, through):
        port = conninfos.conninfo_to_dict(through)["port"]
        with socket.create_server(("127.0.0.2", int(str(port)))):
            found = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
                for address in ("127.0.0.2", "127.0.0.1")
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
            line = line_to(conninfos.make_conninfo(through, host="db.example"), call_timeout=3.0)
            assert line.call("testing", lambda call: call.conn.info.hostaddr) == "127.0.0.1"


async def test_a_group_opens_through_a_host_that_answers(conninfo: str, silent: list[str]) -> None:
    async def handler(job: triojobs.Job[Any]) -> str:
        return "done"

    through = among(silent[:1], conninfo)
    async with triojobs.open_worker_group(
        through, [triojobs.Worker(plain, handler)], call_timeout=8.0
    ) as group:
        with trio.fail_after(60):
            assert await group.client.result(await group.client.enqueue(plain, None)) == "done"


def test_without_time_for_it_nothing_is_begun_and_an_idle_connection_is_kept(
    line_to: LineTo, conninfo: str
) -> None:
    line = line_to(conninfo, call_timeout=20.0)
    with pytest.raises(triojobs.DatabaseError, match="no time left") as caught:
        line.call("testing", lambda call: None, clock())
    assert (caught.value.transient, caught.value.committed) == (True, False)
    first = line.call("testing", lambda call: call.conn.info.backend_pid)
    with pytest.raises(triojobs.DatabaseError, match="no time left"):
        line.call("testing", lambda call: None, clock())
    assert line.call("testing", lambda call: call.conn.info.backend_pid) == first


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
