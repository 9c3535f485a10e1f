"""A private PostgreSQL server for development, demonstrations and tests (extra `embedded`).

    async with triojobs.open_embedded_postgres() as conninfo:
        triojobs.migrate(conninfo)
        ...

Not for production data: one process owns the server, backups and upgrades are nobody's task, and the
programs in the wheel lag months behind PostgreSQL's minor releases.
"""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import final

import trio

from ._embedded_cluster import STEP, Cluster

__all__ = ["open_embedded_postgres"]


def open_embedded_postgres(
    data_dir: str | os.PathLike[str] | None = None, *, bindir: str | os.PathLike[str] | None = None
) -> AbstractAsyncContextManager[str]:
    """Run a PostgreSQL server for an `async with` block and give its conninfo.

    The server listens on a Unix socket in a private directory and nowhere else; the conninfo names
    a superuser and the empty database `postgres`. fsync is on: rows in a kept directory survive
    a crash of the server or the machine.

    One owner at a time: a second one on the same `data_dir`, in any process, is refused. An owner
    that was killed leaves its server running; the next one on the same `data_dir` adopts it, with its
    clients, and stops it at its own end. (Without `data_dir` nobody can: stop what a killed owner left
    by removing its directory, `$TMPDIR/triojobs-…`; the server ends itself within a minute.)

    The server is in a session of its own, so a Ctrl-C in the terminal does not reach it. If it
    dies while the block runs, its clients see that; the block itself is not disturbed.

    As root the server runs as user `postgres`, or else `nobody`, who must be able to enter
    `data_dir`: root's home will not do.

    Args:
        data_dir: a directory to make and keep. None: a temporary one, removed at the end.
        bindir: the directory that holds `initdb` and `postgres`. None: TRIOJOBS_PG_BINDIR, then the
            wheel of the extra, PATH, `pg_config --bindir`, Debian's newest.

    Raises:
        OptionError: `data_dir` cannot be made or written, or holds something else; `bindir` lacks the
            programs.
        DatabaseError: `data_dir` is in use, was made by another major version, or the server does not
            start; with the last lines of its log, which is `server.log` in `data_dir`.
        TriojobsError: no programs were found, or this user cannot run them.

    Cancellation: at any moment; what has been started is stopped, shielded, for at most 7 s (a fast
    shutdown takes 0.02 s; initdb, 0.5 s, is let finish). A second Ctrl-C while the server stops is
    raised once it has stopped.

    Threads: none. The loop is blocked for some milliseconds at a time; once for about 0.1 s where the
    programs must be copied, and up to 2 s where an adopted server accepts connections but is stuck.
    """
    return EmbeddedPostgres(Cluster(data_dir, bindir=bindir))


@final
class EmbeddedPostgres(AbstractAsyncContextManager[str]):
    """Drives a Cluster on the Trio loop.

    A class instead of a generator: its methods are protected from Ctrl-C, which therefore arrives at
    the sleeps alone and never between a process and the note that we own it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> str:
        await trio.lowlevel.checkpoint()
        try:
            for _ in self._cluster.starting():
                await trio.sleep(STEP)
        except BaseException:  # Cancelled and KeyboardInterrupt too: all are raised again
            await self._stop()
            raise
        return self._cluster.conninfo

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    @trio.lowlevel.enable_ki_protection
    async def _stop(self) -> None:
        interrupt: KeyboardInterrupt | None = None
        for _ in self._cluster.stopping():  # bounded by its own deadlines
            try:
                with trio.CancelScope(shield=True):
                    await trio.sleep(STEP)
            except KeyboardInterrupt as exc:  # goes through shields, to the main task
                interrupt = exc
        if interrupt is not None:
            raise interrupt
