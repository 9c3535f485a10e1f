"""One embedded PostgreSQL server, from its start to its stop, in steps that never wait.

`Cluster.starting()` and `Cluster.stopping()` are generators that yield wherever they would wait, and
that keep nothing in their frames that a stop needs: the driver sleeps `STEP` at each yield, with
`trio.sleep` (triojobs.embedded) or `time.sleep` (`running_cluster`), may drop `starting()` at any yield,
and then exhausts `stopping()`. That is all of the cancellation logic.

A directory that we keep looks like this; everything in it is ours:

    pgdata/              the cluster; its presence means that initdb had finished
    pgdata.unfinished-*/ initdb at work, or what a killed one left
    server.log           of the newest start
    postgres-18.4/       the programs, only where their account could not read the originals

An exclusive `flock` on the directory is held by its owner; the kernel frees it however the owner ends.
What a killed owner left running is found by `pgdata/postmaster.pid`, which also says where its socket is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ._embedded_programs import (
    OPERATION,
    Account,
    Programs,
    find_bindir,
    runnable_programs,
    server_account,
)
from ._errors import DatabaseError, OptionError, TriojobsError
from ._sql.server import data_directory_at

__all__ = ["STEP", "Cluster", "running_cluster"]

STEP: Final = 0.01  # seconds between looks; a start takes 50 ms, a stop 20 ms: two to five looks
START_TIMEOUT: Final = 60.0  # seconds, as pg_ctl; crash recovery after a long write burst takes its time
# What to send, and the seconds to wait for it: a fast shutdown (clients are cut off, a checkpoint is
# written), then an immediate one (recovery at the next start), then the end.
STOP_SIGNALS: Final = ((signal.SIGINT, 5.0), (signal.SIGQUIT, 1.0), (signal.SIGKILL, 1.0))
SUPERUSER: Final = "triojobs"
PORT: Final = 5432  # only names the socket file; each server has a socket directory of its own
UNFINISHED: Final = "pgdata.unfinished-"
SOCKET_PREFIX: Final = "triojobs-socket-"
SOCKET_PATH_LIMIT: Final = 107  # bytes, Linux' sun_path without its NUL
LOG_LINES: Final = 5  # of the server's log, repeated in an error


@dataclass(frozen=True)
class PidFile:
    """What `postmaster.pid` says."""

    pid: int
    port: str
    socket_dir: str
    status: str


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
        self.settings = dict(settings or {})
        self.home: Path | None = None
        self.socket_dir: Path | None = None
        self.lock: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.adopted: int | None = None
        self.port = str(PORT)

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

        A server that is on its way up or down is waited for: up ends in adoption, down in a start.
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
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=home))
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
        for number, patience in STOP_SIGNALS:
            deadline = time.monotonic() + patience
            if not self.runs():
                break
            self.send(number)
            while self.runs() and time.monotonic() < deadline:
                yield
        self.child = self.adopted = None
        if self.socket_dir is not None:
            remove_socket_dir(self.socket_dir)
        if self.home is not None and self.data_dir is None:
            shutil.rmtree(self.home, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def runs(self) -> bool:
        """Tell whether the process that we own is still there."""
        if self.child is not None:
            return self.child.poll() is None
        return self.adopted is not None and postmaster_lives(self.adopted, self.pgdata)

    def send(self, number: signal.Signals) -> None:
        """Signal the process that we own; initdb has nothing to save, so it and its children just end."""
        with contextlib.suppress(ProcessLookupError):
            if self.adopted is not None:
                os.kill(self.adopted, number)
            elif self.child is not None and self.pgdata.exists():
                self.child.send_signal(number)
            elif self.child is not None:
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


# ---- the directory ----


def prepared_home(data_dir: str | os.PathLike[str] | None) -> Path:
    """Return the directory to work in, made if need be; refuse one that holds anything but ours."""
    if data_dir is None:
        return Path(tempfile.mkdtemp(prefix="triojobs-")).resolve()
    home = Path(data_dir).resolve()
    try:
        if not home.exists():
            home.mkdir(parents=True)
            home.chmod(0o711 if os.geteuid() == 0 else 0o700)  # as root, the server's account passes
        names = {entry.name for entry in home.iterdir()}
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as exc:
        limit = f"a directory that can be made and written ({exc.strerror})"
        raise OptionError("data_dir", str(home), limit, operation=OPERATION) from exc
    whole = (home / "pgdata" / "PG_VERSION").exists()
    foreign = [name for name in names if not name.startswith(("server.log", UNFINISHED, "postgres-"))]
    if not whole and foreign:
        limit = "new, empty, or a directory that open_embedded_postgres made"
        hint = f"name a directory inside it, such as {home / 'postgres'}"
        raise OptionError("data_dir", str(home), limit, operation=OPERATION, hint=hint)
    return home


def locked(home: Path) -> int:
    """Take the directory for this process and return the descriptor that holds it."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(descriptor)
        if not isinstance(exc, BlockingIOError):
            raise
        raise DatabaseError(
            f"{home} is in use by another owner, in this process or another",
            operation=OPERATION,
            hint="give each its own data_dir, or pass the conninfo of the first one on",
            transient=True,
        ) from exc
    return descriptor


def check_major(pgdata: Path, programs: Programs) -> None:
    """Refuse a cluster that another major version made: the server could not read it."""
    made_by = (pgdata / "PG_VERSION").read_text().strip()
    if made_by != programs.major:
        raise DatabaseError(
            f"{pgdata} was made by PostgreSQL {made_by}, but {programs.bindir} holds {programs.version}",
            operation=OPERATION,
            hint=f"set TRIOJOBS_PG_BINDIR to the programs of PostgreSQL {made_by}, or use another data_dir",
        )


# ---- the socket's directory ----


def new_socket_dir(account: Account) -> Path:
    """Make the directory of the socket, where its path is short and the account can reach it."""
    refusals = []
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        size = len(os.fsencode(base)) + len(f"/{SOCKET_PREFIX}12345678/.s.PGSQL.{PORT}")
        if size > SOCKET_PATH_LIMIT:
            refusals.append(f"{base} makes {size} bytes of at most {SOCKET_PATH_LIMIT}")
        elif account.switched and not open_to_all(Path(base)):
            refusals.append(f"user {account.name} cannot enter {base}")
        else:
            path = Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir=base)).resolve()
            account.take_over(path)
            return path
    raise TriojobsError(
        f"there is no place for the server's socket: {', '.join(refusals)}",
        operation=OPERATION,
        hint="set TMPDIR to a directory with a short path that everybody can enter",
    )


def open_to_all(path: Path) -> bool:
    """Tell whether any account can enter the directory."""
    return all(step.stat().st_mode & 0o001 for step in [path, *path.parents])


def remove_socket_dir(path: Path) -> None:
    """Remove a socket directory that we made: by its name, and only what a server puts there.

    The path may come from a dead server's pid file, so nothing is removed on its word alone.
    """
    if path.name.startswith(SOCKET_PREFIX) and not path.is_symlink():
        for socket in path.glob(".s.PGSQL.*"):
            socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.rmdir()


# ---- processes ----


def read_pid_file(pgdata: Path) -> PidFile | None:
    """Read `postmaster.pid`; None when there is none, or when the server has only begun to write it."""
    try:
        lines = (pgdata / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    if len(lines) < 5 or not lines[0].isdecimal():
        return None
    status = lines[7].strip() if len(lines) > 7 else "starting"
    return PidFile(pid=int(lines[0]), port=lines[3], socket_dir=lines[4], status=status)


def postmaster_lives(pid: int, pgdata: Path) -> bool:
    """Tell whether this process is the server of this directory.

    Not every process with this number is: it may be the dead server, not yet reaped (seen for 1.8 s
    where process 1 is slow), or after a reboot anything else. A server works in its data directory.
    """
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" and os.readlink(f"/proc/{pid}/cwd") == str(pgdata)
    except PermissionError:
        return False  # another account's process: the directory is ours, so its server would be too
    except (ProcessLookupError, FileNotFoundError):
        return False


def forget_dead_server(pgdata: Path, found: PidFile) -> None:
    """Clear away what a killed server left.

    PostgreSQL replaces a stale pid file by itself unless a process has that number, which it takes for
    the server. The caller has looked closer (`postmaster_lives`), so the file goes. The check for living
    backends does not depend on it: the new server finds their shared memory by the directory.
    """
    remove_socket_dir(Path(found.socket_dir))
    (pgdata / "postmaster.pid").unlink(missing_ok=True)


def not_started(what: str, home: Path, account: Account) -> DatabaseError:
    """Return the error for a server that did not come up, with the end of its log."""
    hint = account_hint(home, account)
    return DatabaseError(f"the server {what}: {last_lines(home)}", operation=OPERATION, hint=hint)


def last_lines(home: Path) -> str:
    """Return the last lines of the log as one line."""
    lines = (home / "server.log").read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-LOG_LINES:]) or "its log is empty"


def account_hint(home: Path, account: Account) -> str:
    """Return what to look at: the log, and for root the account that must reach the directory."""
    if account.switched:
        return f"as root the server runs as user {account.name}, who must be able to enter {home.parent}"
    return f"see {home / 'server.log'}"
