"""The embedded server's life: start, stop, crash, adoption, cancellation; real servers throughout."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import trio

from tests.tools.administrator import restart
from triojobs._embedded_cluster import Cluster
from triojobs._embedded_directory import read_pid_file, remove_socket_dir
from triojobs._embedded_programs import server_account
from triojobs._errors import DatabaseError
from triojobs.embedded import EmbeddedPostgres, open_embedded_postgres

from .conftest import names_in, processes_below, run_as, value

STARTED = "SELECT pg_postmaster_start_time()"
KEEPER = """
import sys, psycopg, trio
from triojobs.embedded import open_embedded_postgres

async def main():
    async with open_embedded_postgres(sys.argv[1]) as conninfo:
        try:
            print(conninfo, flush=True)  # in here: the signal may come at once
            await trio.sleep_forever()
        finally:
            with psycopg.connect(conninfo) as conn:
                print("still up", conn.execute("SELECT 1").fetchone(), flush=True)

trio.run(main)
"""


BUSY = b"""
DO $$
DECLARE last timestamptz := clock_timestamp() + interval '700 ms';
BEGIN
    RAISE NOTICE 'begun';
    WHILE clock_timestamp() < last LOOP END LOOP;
END $$
"""


def postmaster(data_dir: Path) -> int:
    found = read_pid_file(data_dir / "pgdata")
    assert found is not None
    return found.pid


def fill(conninfo: str) -> None:
    with psycopg.connect(conninfo) as conn:
        conn.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")


async def test_a_temporary_server_leaves_nothing(place: Path) -> None:
    async with open_embedded_postgres() as conninfo:
        assert value(conninfo, "SHOW fsync") == "on"
        assert value(conninfo, "SHOW listen_addresses") == ""
        assert processes_below(place)

    assert names_in(place) == []
    assert processes_below(place) == []


async def test_rows_in_a_kept_directory_survive_a_restart(place: Path) -> None:
    async with open_embedded_postgres(place / "data") as conninfo:
        fill(conninfo)

    async with open_embedded_postgres(place / "data") as conninfo:
        assert value(conninfo, "SELECT count(*) FROM kept") == 1000

    assert names_in(place) == ["data"]


async def test_rows_survive_a_killed_server(place: Path) -> None:
    async with open_embedded_postgres(place / "data") as conninfo:
        fill(conninfo)
        os.kill(postmaster(place / "data"), signal.SIGKILL)

    async with open_embedded_postgres(place / "data") as conninfo:
        assert value(conninfo, "SELECT count(*) FROM kept") == 1000

    assert processes_below(place) == []


async def test_a_busy_backend_of_a_killed_server_is_waited_for(place: Path) -> None:
    async with open_embedded_postgres(place / "data") as conninfo:
        busy = psycopg.connect(conninfo)
        busy.pgconn.send_query(BUSY)
        await trio.lowlevel.wait_readable(busy.fileno())  # its notice: the loop runs
        os.kill(postmaster(place / "data"), signal.SIGKILL)

    async with open_embedded_postgres(place / "data") as conninfo:
        await trio.lowlevel.wait_readable(busy.fileno())  # it saw the end of its server
        assert value(conninfo, "SELECT 1") == 1
    busy.close()


async def test_the_server_of_a_killed_owner_is_adopted_and_stopped(
    place: Path, owner: Callable[..., tuple[subprocess.Popen[str], str]]
) -> None:
    process, left = owner(place / "data")
    started = value(left, STARTED)
    process.kill()
    process.wait()

    async with open_embedded_postgres(place / "data") as conninfo:
        assert value(conninfo, STARTED) == started

    assert processes_below(place) == []
    assert names_in(place) == ["data"]


async def test_a_server_that_somebody_restarted_serves_on_and_is_stopped_at_the_end(place: Path) -> None:
    async with open_embedded_postgres(place / "data") as conninfo:
        fill(conninfo)
        before = postmaster(place / "data")
        await trio.to_thread.run_sync(restart, place / "data")
        assert postmaster(place / "data") != before
        assert value(conninfo, "SELECT count(*) FROM kept") == 1000

    assert processes_below(place) == []
    assert names_in(place) == ["data"]


@pytest.mark.parametrize("socket_is_there", [True, False])
async def test_a_server_that_was_restarted_after_its_owner_was_killed_is_adopted_or_replaced(
    place: Path, owner: Callable[..., tuple[subprocess.Popen[str], str]], socket_is_there: bool
) -> None:
    process, left = owner(place / "data")
    fill(left)
    process.kill()
    process.wait()
    await trio.to_thread.run_sync(restart, place / "data")
    restarted = postmaster(place / "data")
    if not socket_is_there:  # an owner of an older version has removed it
        found = read_pid_file(place / "data" / "pgdata")
        assert found is not None
        remove_socket_dir(Path(found.socket_dir))

    async with open_embedded_postgres(place / "data") as conninfo:
        assert value(conninfo, "SELECT count(*) FROM kept") == 1000
        assert (postmaster(place / "data") == restarted) == socket_is_there

    assert processes_below(place) == []
    assert names_in(place) == ["data"]


async def test_rows_survive_the_death_of_owner_and_server(
    place: Path, owner: Callable[..., tuple[subprocess.Popen[str], str]]
) -> None:
    process, left = owner(place / "data")
    fill(left)
    os.kill(postmaster(place / "data"), signal.SIGKILL)
    process.kill()
    process.wait()

    async with open_embedded_postgres(place / "data") as conninfo:
        assert value(conninfo, "SELECT count(*) FROM kept") == 1000

    assert names_in(place) == ["data"]  # the dead server's socket is gone too


@pytest.mark.parametrize("command", [["true"], ["sleep", "100"]], ids=["zombie", "stranger"])
async def test_a_pid_file_that_names_another_process_is_no_server(place: Path, command: list[str]) -> None:
    async with open_embedded_postgres(place / "data"):
        pid_file = place / "data" / "pgdata" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
    account = server_account(place / "data" / "pgdata")
    with run_as(command, account) as other:
        pid_file.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
        account.take_over(pid_file)

        async with open_embedded_postgres(place / "data") as conninfo:
            assert value(conninfo, "SELECT 1") == 1

        other.kill()


async def test_a_second_owner_is_refused_and_the_first_undisturbed(place: Path) -> None:
    async with open_embedded_postgres(place / "data") as conninfo:
        with pytest.raises(DatabaseError, match=r"data is in use by another owner.*; give each its own"):
            async with open_embedded_postgres(place / "data"):
                pass
        assert value(conninfo, "SELECT 1") == 1


async def test_the_body_raises_as_it_is(place: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_embedded_postgres():
            raise ZeroDivisionError

    assert names_in(place) == []


async def test_cancel_during_use_stops_the_server(place: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_embedded_postgres():
            scope.cancel()
            await trio.sleep_forever()

    assert names_in(place) == []
    assert processes_below(place) == []


class Stopper(Cluster):
    """Calls `at_start` at the first yield of `starting` where `when` is true."""

    when: Callable[[Cluster], bool]
    at_start: Callable[[], object]

    def starting(self) -> Iterator[None]:
        for _ in super().starting():
            if self.when(self):
                self.at_start()
            yield


def initdb_runs(cluster: Cluster) -> bool:
    return cluster.child is not None and not cluster.pgdata.exists()


def server_starts(cluster: Cluster) -> bool:
    return cluster.child is not None and cluster.pgdata.exists()


@pytest.mark.parametrize("when", [initdb_runs, server_starts])
@pytest.mark.parametrize("kept", [False, True])
async def test_cancel_during_start_leaves_nothing_running(
    place: Path, when: Callable[[Cluster], bool], kept: bool
) -> None:
    cluster = Stopper(place / "data" if kept else None)
    with trio.CancelScope() as scope:
        cluster.when, cluster.at_start = when, scope.cancel
        async with EmbeddedPostgres(cluster):
            pytest.fail("it started in spite of the cancel")

    assert scope.cancelled_caught
    assert processes_below(place) == []
    assert names_in(place) == (["data"] if kept else [])
    if kept:
        assert not list((place / "data").glob("pgdata.unfinished-*"))
        async with open_embedded_postgres(place / "data") as conninfo:
            assert value(conninfo, "SELECT 1") == 1


async def test_a_cancel_lets_initdb_finish_because_its_servers_would_leave_shared_memory(place: Path) -> None:
    children = []
    cluster = Stopper()
    with trio.CancelScope() as scope:

        def cancel() -> None:
            children.append(cluster.child)
            scope.cancel()

        cluster.when, cluster.at_start = initdb_runs, cancel
        async with EmbeddedPostgres(cluster):
            pytest.fail("it started in spite of the cancel")

    assert [child.returncode for child in children if child is not None] == [0]


def test_ctrl_c_during_start_leaves_nothing(place: Path) -> None:
    cluster = Stopper()
    cluster.when, cluster.at_start = server_starts, lambda: signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        async with EmbeddedPostgres(cluster):
            pytest.fail("it started in spite of Ctrl-C")

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)

    assert names_in(place) == []
    assert processes_below(place) == []


class InterruptedStop(Cluster):
    """Ctrl-C comes while the server stops."""

    def stopping(self) -> Iterator[None]:
        for _ in super().stopping():
            signal.raise_signal(signal.SIGINT)
            yield


def test_ctrl_c_during_the_stop_is_raised_after_it(place: Path) -> None:
    async def main() -> None:
        async with EmbeddedPostgres(InterruptedStop()):
            pass

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)

    assert names_in(place) == []
    assert processes_below(place) == []


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server_first(
    place: Path, owner: Callable[..., tuple[subprocess.Popen[str], str]]
) -> None:
    process, _ = owner(place / "data", KEEPER)

    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole foreground group

    assert process.stdout is not None
    assert process.stdout.read() == "still up (1,)\n"
    process.wait()
    assert processes_below(place) == []
