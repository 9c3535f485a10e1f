"""A server of a test's own that loses its last asynchronous commits, in both ways in which servers crash."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import psycopg
import trio

from tests.tools.looking import value
from triojobs._embedded_cluster import STEP, Cluster
from triojobs._embedded_directory import read_pid_file
from triojobs._embedded_programs import find_bindir, runnable_programs, server_account

PATIENCE = 30.0
SETTINGS = {
    "synchronous_commit": "off",
    "fsync": "off",  # the server crashes, not the machine
    "log_min_messages": "fatal",
}


class CrashingServer:
    """A running server; its conninfo stays the same."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.conninfo = cluster.conninfo

    def hold_back_wal(self) -> int:
        """From now on only a synchronous commit makes those before it durable. Returns the process that sleeps."""
        pid: int = value(self.conninfo, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
        os.kill(pid, signal.SIGSTOP)
        return pid

    async def stop_at_once_and_start(self, walwriter: int) -> None:
        """Do what `pg_ctl restart -m immediate` does."""
        child = self._cluster.child
        assert child is not None
        child.send_signal(signal.SIGQUIT)
        os.kill(walwriter, signal.SIGKILL)  # a sleeper cannot obey
        await self._start_again()

    async def restart(self) -> None:
        """Do what `pg_ctl restart -m fast` does: nothing is lost."""
        assert self._cluster.child is not None
        self._cluster.child.send_signal(signal.SIGINT)
        await self._start_again()

    async def _start_again(self) -> None:
        cluster = self._cluster
        while cluster.child is not None and cluster.child.poll() is None:
            await trio.sleep(STEP)
        assert cluster.home is not None
        programs = runnable_programs(find_bindir(), server_account(cluster.pgdata), cluster.home)
        command = cluster.server_command(programs, cluster.pgdata)
        child = cluster.spawn(command, cluster.home, server_account(cluster.pgdata))
        with trio.fail_after(PATIENCE):
            while (found := read_pid_file(cluster.pgdata)) is None or (found.pid, found.status) != (
                child.pid,
                "ready",
            ):
                await trio.sleep(STEP)

    async def crash_one_process(self, walwriter: int) -> None:
        """Kill one process: the postmaster ends the others and recovers, and has the same start time as before."""
        started = value(self.conninfo, "SELECT pg_postmaster_start_time()")
        with psycopg.connect(self.conninfo) as conn:
            os.kill(walwriter, signal.SIGKILL)
            with trio.fail_after(PATIENCE):
                while not conn.closed:  # until every connection has been ended
                    try:
                        conn.execute("SELECT")
                    except psycopg.Error:
                        conn.close()
                    await trio.sleep(STEP)
                while True:
                    try:
                        assert value(self.conninfo, "SELECT pg_postmaster_start_time()") == started
                        return
                    except psycopg.OperationalError:
                        await trio.sleep(STEP)


@asynccontextmanager
async def crashing_server(settings: Mapping[str, str] = SETTINGS) -> AsyncIterator[CrashingServer]:
    """Run a server in a directory of its own; both are gone at the end."""
    cluster = Cluster(settings=settings)
    try:
        for _ in cluster.starting():
            await trio.sleep(STEP)
        yield CrashingServer(cluster)
    finally:
        with trio.CancelScope(shield=True):  # bounded: it kills in the end
            for _ in cluster.stopping():
                await trio.sleep(STEP)
