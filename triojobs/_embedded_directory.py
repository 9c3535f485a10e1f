"""What an embedded server has on disk: its directory, its socket's directory, its pid file, its log.

A directory that we keep looks like this; everything in it is ours:

    pgdata/              the cluster; its presence means that initdb had finished
    pgdata.unfinished-*/ initdb at work, or what a killed one left
    server.log           of the newest start
    postgres-18.4/       the programs, only where their account could not read the originals

An exclusive `flock` on the directory is held by its owner; the kernel frees it however the owner ends.
What a killed owner left running is found by `pgdata/postmaster.pid`, which also says where its socket is.

Standard library only: no trio, no psycopg.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ._embedded_programs import OPERATION, Account, Programs
from ._errors import DatabaseError, OptionError, TriojobsError

__all__ = [
    "PORT",
    "UNFINISHED",
    "PidFile",
    "account_hint",
    "check_major",
    "forget_dead_server",
    "last_lines",
    "locked",
    "new_socket_dir",
    "postmaster_lives",
    "prepared_home",
    "read_pid_file",
    "remove_socket_dir",
]

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
        whole = (home / "pgdata" / "PG_VERSION").exists()
    except OSError as exc:
        limit = f"a directory that can be made and written ({exc.strerror})"
        raise OptionError("data_dir", str(home), limit, operation=OPERATION) from exc
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
            limit = f"on a filesystem that has locks ({exc.strerror})"
            raise OptionError("data_dir", str(home), limit, operation=OPERATION) from exc
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


def last_lines(home: Path) -> str:
    """Return the last lines of the log as one line."""
    lines = (home / "server.log").read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-LOG_LINES:]) or "its log is empty"


def account_hint(home: Path, account: Account) -> str:
    """Return what to look at: the log, and for root the account that must reach the directory."""
    if account.switched:
        return f"as root the server runs as user {account.name}, who must be able to enter {home.parent}"
    return f"see {home / 'server.log'}"
