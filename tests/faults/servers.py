"""Servers of a test's own, which may crash, stop, come back, follow each other and be promoted."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg

from tests.tools.looking import value
from triojobs._embedded_cluster import Cluster, running_cluster
from triojobs._embedded_programs import Account, Programs, find_bindir, runnable_programs, server_account
from triojobs._sql.schema import migrate

from .rig import PATIENCE, wait_for_rows

SETTINGS: Final = {
    # A crash of the server, not of the machine: the kernel keeps what was written.
    "fsync": "off",
    "full_page_writes": "off",
    "max_wal_size": "256MB",
    "log_min_messages": "fatal",
    "listen_addresses": "",
    "shared_buffers": "16MB",
    "unix_socket_permissions": "0777",
}


class Template:
    """A migrated cluster that is not running, to be copied: initdb takes half a second, a copy 50 ms."""

    def __init__(self, home: Path) -> None:
        cluster = Cluster(home, settings={"fsync": "off"})
        with running_cluster(cluster) as conninfo:
            migrate(conninfo)
        self.pgdata = home / "pgdata"
        self.account: Account = server_account(self.pgdata)
        self.programs: Programs = runnable_programs(find_bindir(), self.account, home)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the servers' account."""
        subprocess.run(
            [str(self.programs.bindir / program), *arguments],
            check=True,
            capture_output=True,
            timeout=PATIENCE,
            **self.account.popen_options(),
        )


class Server:
    """One server; its conninfo stays the same whatever becomes of it."""

    def __init__(self, template: Template, home: Path, **settings: str) -> None:
        self.home = home
        self.pgdata = home / "pgdata"
        self.settings = {**SETTINGS, "unix_socket_directories": str(home), **settings}
        self._template = template
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir()
        home.chmod(0o711)
        template.account.take_over(home)

    @property
    def conninfo(self) -> str:
        """Where it answers, or does not."""
        return f"host={self.home} port=5432 user=triojobs dbname=postgres"

    @property
    def pid(self) -> int:
        """The postmaster's."""
        assert self._process is not None
        return self._process.pid

    def copy_template(self) -> None:
        """Begin with a migrated, empty database."""
        subprocess.run(["cp", "-a", str(self._template.pgdata), str(self.pgdata)], check=True)

    def follow(self, primary: Server) -> None:
        """Begin as a streaming standby of another server; `primary_conninfo` may lead there another way."""
        self._template.run(
            "pg_basebackup", "-D", str(self.pgdata), "-d", primary.conninfo, "-R", "-X", "stream",
            "--checkpoint=fast", "--no-sync",
        )  # fmt: skip

    def promote(self) -> None:
        """Make a standby the primary."""
        self._template.run("pg_ctl", "promote", "-D", str(self.pgdata), "-w")

    def start(self) -> float:
        """Start, and return when it accepted a connection (monotonic seconds)."""
        command = [str(self._template.programs.bindir / "postgres"), "-D", str(self.pgdata)]
        for name, setting in self.settings.items():
            command += ["-c", f"{name}={setting}"]
        with open(self.home / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._template.account.popen_options(),
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                psycopg.connect(self.conninfo).close()
                return time.monotonic()
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.home / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "the server does not come up"
                time.sleep(0.01)

    def crash(self) -> None:
        """Stop at once, as `pg_ctl stop -m immediate` does; the next start recovers."""
        self._end(signal.SIGQUIT)

    def stop(self) -> None:
        """Stop as a `pg_ctl stop -m fast` does: every client is told goodbye."""
        self._end(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def caught_up_with(self, primary: Server) -> None:
        """Wait until this standby has everything that its primary has committed."""
        at = value(primary.conninfo, "SELECT pg_current_wal_lsn()::text")
        wait_for_rows(self.conninfo, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", at)

    def backend(self, kind: str) -> int:
        """Return the process id of one of the server's own processes ("walwriter", "walsender")."""
        found = value(self.conninfo, "SELECT pid FROM pg_stat_activity WHERE backend_type = %s", kind)
        assert isinstance(found, int)
        return found

    def set(self, name: str, setting: str) -> None:
        """Change a setting of the running server."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            conn.execute(f"ALTER SYSTEM SET {name} = '{setting}'")  # type: ignore[call-overload]
            conn.execute("SELECT pg_reload_conf()")

    @contextmanager
    def oldest_session(self) -> Iterator[Callable[[LiteralString], str]]:
        """Open a session that sees settings as those that were opened after it do, at the latest.

        The postmaster tells its backends of new settings one by one, the youngest first. Yields a function
        that returns a setting's value there.
        """
        with psycopg.connect(self.conninfo, autocommit=True) as conn:

            def heard(name: LiteralString) -> str:
                row = conn.execute("SELECT current_setting(%s)", [name]).fetchone()
                assert row is not None
                return str(row[0])

            yield heard


@contextmanager
def servers(template: Template, place: Path) -> Iterator[Any]:
    """Yield a function that makes servers; whatever still runs at the end is stopped and removed."""
    made: list[Server] = []

    def make(**settings: str) -> Server:
        made.append(Server(template, place / f"server{len(made)}", **settings))
        return made[-1]

    try:
        yield make
    finally:
        for server in made:
            with suppress(ProcessLookupError):
                server.crash()
            shutil.rmtree(server.home, ignore_errors=True)
