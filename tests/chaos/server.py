"""The private PostgreSQL: default durability, and it can crash and come back under the same conninfo."""

from __future__ import annotations

import shutil
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from triojobs._embedded_cluster import STEP, Cluster
from triojobs._embedded_directory import read_pid_file
from triojobs._embedded_programs import find_bindir, runnable_programs, server_account

SETTINGS = {
    "max_connections": "200",
    "log_min_messages": "fatal",  # thousands of terminated backends would be told otherwise
    "log_min_error_statement": "panic",
}
# Syncs cost nothing in memory, where recovery takes 0.3 s; on a busy disk it took up to 6 s.
MEMORY = Path("/dev/shm")
MEMORY_NEEDED = 2 * 1024**3  # bytes free; containers often have 64 MB there: then it is the disk
UP_AGAIN = 60.0  # seconds that recovery may take


class Server:
    """A running server of our own."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.conninfo = cluster.conninfo

    async def crash(self) -> None:
        """Shut down immediately: no checkpoint, clients are cut off; recovery comes at the next start."""
        child = self._cluster.child
        assert child is not None
        child.send_signal(signal.SIGQUIT)
        while child.poll() is None:
            await trio.sleep(STEP)

    async def start_again(self) -> None:
        """Start on the same directory and socket; return when connections are accepted."""
        cluster = self._cluster
        assert cluster.home is not None
        account = server_account(cluster.pgdata)
        command = cluster.server_command(
            runnable_programs(find_bindir(), account, cluster.home), cluster.pgdata
        )
        with trio.fail_after(UP_AGAIN):
            while True:
                child = cluster.spawn(command, cluster.home, account)
                while child.poll() is None:
                    found = read_pid_file(cluster.pgdata)
                    if found is not None and found.pid == child.pid and found.status == "ready":
                        return
                    await trio.sleep(STEP)


def directory_in_memory() -> Path | None:
    """Return a name for a new directory in memory, or None where there is no room for it."""
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED
    return MEMORY / f"triojobs-chaos-{uuid.uuid4().hex[:12]}" if room else None


@asynccontextmanager
async def private_server() -> AsyncIterator[Server]:
    """Run a server in a directory of its own; both are gone at the end, whatever happens."""
    data_dir = directory_in_memory()
    cluster = Cluster(data_dir, settings=SETTINGS)
    try:
        for _ in cluster.starting():
            await trio.sleep(STEP)
        yield Server(cluster)
    finally:
        with trio.CancelScope(shield=True):  # bounded: `stopping` kills in the end
            for _ in cluster.stopping():
                await trio.sleep(STEP)
        if data_dir is not None:
            shutil.rmtree(data_dir, ignore_errors=True)
