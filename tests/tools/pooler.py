"""PgBouncer in transaction mode, as a process of the test's own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo as conninfos

PATIENCE = 30.0  # seconds for a start that takes a tenth; only a hang needs them
PORT = 6432
SETTINGS = """
[databases]
{dbname} = host={host} port={port} user={user} dbname={dbname}
[pgbouncer]
listen_addr =
unix_socket_dir = {directory}
listen_port = {own_port}
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
server_login_retry = 1
server_idle_timeout = 600
"""


@dataclass(frozen=True)
class Pooler:
    """`conninfo` leads through it, `direct` past it."""

    conninfo: str
    direct: str


def program() -> str | None:
    """Return where PgBouncer is, or None."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def pgbouncer(conninfo: str, *, pool_size: int = 3) -> Iterator[Pooler]:
    """Run a PgBouncer in front of a database, with so few connections that sessions change hands all the time."""
    found = program()
    assert found is not None
    given = conninfos.conninfo_to_dict(conninfo)
    directory = Path(tempfile.mkdtemp(prefix="tjp-", dir="/tmp"))
    directory.chmod(0o777)  # its socket is made by another account
    settings = directory / "pgbouncer.ini"
    settings.write_text(
        SETTINGS.format(
            dbname=given["dbname"],
            host=given["host"],
            port=given.get("port", 5432),
            user=given["user"],
            directory=directory,
            own_port=PORT,
            pool_size=pool_size,
        )
    )
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [found, str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            **account(str(given["host"])),
        )
    try:
        through = conninfos.make_conninfo(conninfo, host=str(directory), port=PORT)
        wait_until_it_answers(process, through, directory / "log")
        yield Pooler(through, conninfo)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def account(host: str) -> dict[str, Any]:
    """Return as whom to run: it refuses to be root, and must be able to enter the server's socket directory."""
    if os.geteuid() != 0:
        return {}
    owner = os.stat(host).st_uid if host.startswith("/") else 0
    chosen = pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
    return {"user": chosen.pw_uid, "group": chosen.pw_gid, "extra_groups": []}


def wait_until_it_answers(process: subprocess.Popen[bytes], conninfo: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            psycopg.connect(conninfo, prepare_threshold=None).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
