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

import psycopg
from psycopg import conninfo as conninfos

from .rig import PATIENCE

CONFIGURATION = """
[databases]
{dbname} = host={host} port={port} dbname={dbname} user={user}
[pgbouncer]
listen_addr =
unix_socket_dir = {directory}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
logfile =
pidfile =
ignore_startup_parameters = extra_float_digits
"""


@dataclass(frozen=True)
class PgBouncer:
    """`conninfo` leads through it, `direct` past it."""

    conninfo: str
    direct: str
    pool_size: int


@contextmanager
def pgbouncer(conninfo: str, *, pool_size: int = 3) -> Iterator[PgBouncer]:
    """Run a PgBouncer with so few server connections that sessions are shared all the time."""
    given = conninfos.conninfo_to_dict(conninfo)
    directory = Path(tempfile.mkdtemp(prefix="tjf-", dir="/tmp"))
    directory.chmod(0o777)
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        CONFIGURATION.format(
            dbname=given["dbname"], host=given["host"], port=given.get("port", 5432), user=given["user"],
            directory=directory, pool_size=pool_size,
        )
    )  # fmt: skip
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    options = {}
    if os.geteuid() == 0:  # it refuses root
        account = pwd.getpwnam("nobody")
        options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [program, str(configuration)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **options
        )  # type: ignore[call-overload]
    try:
        through = conninfos.make_conninfo(conninfo, host=str(directory), port=6432)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                psycopg.connect(through, prepare_threshold=None).close()
                break
            except psycopg.OperationalError:
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.01)
        yield PgBouncer(through, conninfo, pool_size)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)
