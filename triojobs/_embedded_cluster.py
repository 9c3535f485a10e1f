"""One embedded PostgreSQL server, from its start to its stop, in steps that never wait.

`Cluster.starting()` and `Cluster.stopping()` are generators that yield wherever they would wait, and
that keep nothing in their frames that a stop needs: the driver sleeps `STEP` at each yield, with
`trio.sleep` (triojobs.embedded) or `time.sleep` (`running_cluster`), may drop `starting()` at any yield,
and then exhausts `stopping()`. That is all of the cancellation logic.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from ._embedded_directory import (
    PORT,
    UNFINISHED,
    account_hint,
    check_major,
    forget_dead_server,
    last_lines,
    locked,
    new_socket_dir,
    postmaster_lives,
    prepared_home,
    read_pid_file,
    remove_socket_dir,
)
from ._embedded_programs import OPERATION, Account, Programs, find_bindir, runnable_programs, server_account
from ._errors import DatabaseError, OptionError
from ._sql.server import data_directory_at

__all__ = ["STEP", "Cluster", "running_cluster"]

STEP: Final = 0.01  # seconds between looks; a start takes 50 ms, a stop 20 ms: two to five looks
START_TIMEOUT: Final = 60.0  # seconds, as pg_ctl; crash recovery after a long write burst takes its time
# What to send, and the seconds to wait for it: a fast shutdown (clients are cut off, a checkpoint is
# written), then an immediate one (recovery at the next start), then the end.
STOP_SIGNALS: Final = ((signal.SIGINT, 5.0), (signal.SIGQUIT, 1.0), (signal.SIGKILL, 1.0))
SUPERUSER: Final = "triojobs"


class Cluster:
    """One server on one directory; used once.

    Args:
        data_dir: the directory to keep, or None for one that is removed at the end.
        bindir: where `initdb` and `postgres` are, or None to look for them.
        settings: server settings beside ours ("fsync": "off").
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        bindir: str | os.PathLike[str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if data_dir is not None and not os.fspath(data_dir):
            raise OptionError("data_dir", data_dir, "a path, or None", operation=OPERATION)
        self.data_dir = data_dir
        self.bindir = bindir
        self.settings: dict[str, str] = dict(settings or {})
        self.home: Path | None = None
        self.socket_dir: Path | None = None
        self.lock: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.adopted: int | None = None
        self.unfinished: Path | None = None
        self.port: str = str(PORT)

    @property
    def conninfo(self) -> str:
        """Where the started server answers."""
        value = str(self.socket_dir).replace("\\", r"\\").replace("'", r"\'")
        return f"host='{value}' port={self.port} user={SUPERUSER} dbname=postgres"

    # ---- start ----

    def starting(self) -> Iterator[None]:
        """Take the directory, then adopt the server on it or start one."""
        bindir = find_bindir(self.bindir)
        home = self.home = prepared_home(self.data_dir)
        self.lock = locked(home)
        pgdata = home / "pgdata"
        account = server_account(pgdata)
        if self.data_dir is None:
            account.take_over(home)
        programs = runnable_programs(bindir, account, home)
        if pgdata.exists():
            check_major(pgdata, programs)
            yield from self.adopting(pgdata)
            if self.adopted is not None:
                return
        else:
            yield from self.initializing(home, programs, account)
        yield from self.launching(home, programs, account)

    def adopting(self, pgdata: Path) -> Iterator[None]:
        """Adopt the server that a killed owner left, or clear away what a dead one left.

        A server that is on its way up or down is waited for: up ends in adoption, down in a start. One
        whose socket is gone (somebody restarted it for an owner that has removed its directory since)
        serves nobody, and is stopped.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while (found := read_pid_file(pgdata)) is not None:
            if not postmaster_lives(found.pid, pgdata):
                forget_dead_server(pgdata, found)
                return
            self.port, socket_dir = found.port, Path(found.socket_dir)
            if found.status == "ready":
                self.socket_dir = socket_dir
                if data_directory_at(self.conninfo) == str(pgdata):
                    self.adopted = found.pid
                    return
                self.socket_dir = None  # not proven ours: the clean-up must not remove it
                if not (socket_dir / f".s.PGSQL.{found.port}").exists():
                    yield from self.stopping_server()
                    continue
            if time.monotonic() > deadline:
                raise DatabaseError(
                    f"the server that runs on {pgdata} (process {found.pid}) does not answer",
                    operation=OPERATION,
                    hint=f"stop it with `kill -QUIT {found.pid}` and try again",
                )
            yield
        self.port = str(PORT)

    def initializing(self, home: Path, programs: Programs, account: Account) -> Iterator[None]:
        """Make the cluster under another name; the rename says that it is whole.

        A new name each time: the initdb of an owner that was killed may still be writing to its own.
        """
        for left in home.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished = self.unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=home))
        account.take_over(unfinished)
        command = [str(programs.bindir / "initdb"), "-D", str(unfinished), "-A", "trust", "-U", SUPERUSER]
        command += ["--no-locale", "-E", "UTF8", *(["--no-sync"] if self.data_dir is None else [])]
        child = self.spawn(command, home, account)
        while child.poll() is None:
            yield
        self.child = None
        if child.returncode != 0:
            raise DatabaseError(
                f"initdb ended with {child.returncode}: {last_lines(home)}",
                operation=OPERATION,
                hint=account_hint(home, account),
            )
        unfinished.rename(home / "pgdata")
        self.unfinished = None
        if self.lock is not None:
            os.fsync(self.lock)  # the rename is as durable as what initdb wrote

    def launching(self, home: Path, programs: Programs, account: Account) -> Iterator[None]:
        """Start the server and wait until it accepts connections.

        Backends of a server that was killed see it a moment later; until the last one is gone they
        hold its shared memory, and a new server refuses to start. That passes, so it is tried again.
        """
        deadline = time.monotonic() + START_TIMEOUT
        pgdata = home / "pgdata"
        self.socket_dir = new_socket_dir(account)
        command = self.server_command(programs, pgdata)
        while True:
            child = self.spawn(command, home, account)
            while child.poll() is None:
                found = read_pid_file(pgdata)
                if found is not None and found.pid == child.pid and found.status == "ready":
                    return
                if time.monotonic() > deadline:
                    raise not_started(f"is not up after {START_TIMEOUT:g} s", home, account)
                yield
            self.child = None
            if "is still in use" not in last_lines(home) or time.monotonic() > deadline:
                raise not_started(f"ended with {child.returncode}", home, account)
            yield

    def server_command(self, programs: Programs, pgdata: Path) -> list[str]:
        """Return the server's command line; ours wins over a postgresql.conf that somebody edited."""
        socket_dir = str(self.socket_dir).replace('"', '""')
        settings = {
            "listen_addresses": "",  # the socket's directory is the only way in: trust needs no more
            "unix_socket_directories": f'"{socket_dir}"',
            "port": str(PORT),
            "logging_collector": "off",  # stderr is server.log, whose end our errors repeat
            "log_destination": "stderr",
            **self.settings,
        }
        command = [str(programs.bindir / "postgres"), "-D", str(pgdata)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def spawn(self, command: list[str], home: Path, account: Account) -> subprocess.Popen[bytes]:
        """Start a program whose output becomes server.log, in a session of its own.

        A Ctrl-C in a terminal goes to the whole foreground process group. The server must not be in
        it: it would stop before the program has closed its worker group.

        Synchronous on purpose: no checkpoint lies between the process and `self.child`.
        """
        log = os.open(home / "server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        try:
            self.child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **account.popen_options(),
            )
        finally:
            os.close(log)
        return self.child

    # ---- stop ----

    def stopping(self) -> Iterator[None]:
        """Stop what runs, within the sum of STOP_SIGNALS, and remove what is not kept."""
        yield from self.stopping_server()
        self.child = self.adopted = None
        if self.socket_dir is not None:
            remove_socket_dir(self.socket_dir)
        if self.unfinished is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        if self.home is not None and self.data_dir is None:
            shutil.rmtree(self.home, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def stopping_server(self) -> Iterator[None]:
        """Stop the process that we own, or the server that runs on our directory."""
        for number, patience in STOP_SIGNALS:
            deadline = time.monotonic() + patience
            if not self.runs():
                break
            self.send(number)
            while self.runs() and time.monotonic() < deadline:
                yield

    def runs(self) -> bool:
        """Tell whether the process that we own is still there, or another server in its place."""
        return (self.child is not None and self.child.poll() is None) or self.server() is not None

    def server(self) -> int | None:
        """Return the process that serves our directory, or None.

        Mostly our child, or the one that we adopted. Another one, when somebody has restarted it with
        `pg_ctl restart`: as long as the lock is ours, it is ours as well.
        """
        if self.home is None or self.lock is None:
            return None
        found = read_pid_file(self.pgdata)
        return found.pid if found is not None and postmaster_lives(found.pid, self.pgdata) else None

    def send(self, number: signal.Signals) -> None:
        """Signal what runs.

        initdb gets the first patience without a signal: it needs half a second in all, and the servers
        that it runs, killed, would leave shared memory (1 MB each, seen) until the machine restarts.
        """
        server = self.server()
        with contextlib.suppress(ProcessLookupError):
            if server is not None:
                os.kill(server, number)
            elif self.child is not None and self.pgdata.exists():
                self.child.send_signal(number)
            elif self.child is not None and number != signal.SIGINT:
                os.killpg(self.child.pid, signal.SIGKILL)

    @property
    def pgdata(self) -> Path:
        """The cluster's own directory; only after `home` is known."""
        assert self.home is not None
        return self.home / "pgdata"


@contextlib.contextmanager
def running_cluster(cluster: Cluster) -> Iterator[str]:
    """Run the server for a `with` block and yield its conninfo, without Trio (for test fixtures).

    Threads: blocks its thread while the server starts and stops.
    """
    try:
        for _ in cluster.starting():
            time.sleep(STEP)
        yield cluster.conninfo
    finally:
        for _ in cluster.stopping():
            time.sleep(STEP)


def not_started(what: str, home: Path, account: Account) -> DatabaseError:
    """Return the error for a server that did not come up, with the end of its log."""
    hint = account_hint(home, account)
    return DatabaseError(f"the server {what}: {last_lines(home)}", operation=OPERATION, hint=hint)
