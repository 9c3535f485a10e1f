"""Fixtures that every test may use: one PostgreSQL server per session, one database per test.

TRIOJOBS_TEST_DSN names a server to use instead (its user must be allowed to create databases); so the
same tests run against each supported version.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo as conninfos
from psycopg import sql

from tests.tools.shots import hear_ctrl_c
from triojobs._embedded_cluster import Cluster, running_cluster
from triojobs._sql.schema import migrate

SETTINGS = {
    # Only the tests' server, whose rows nobody wants back; tests of crashes start servers of their own.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "on",
    "max_connections": "300",
    "deadlock_timeout": "200ms",  # a deadlock is a failure to see soon, not after the default second
    "log_min_messages": "fatal",  # tests provoke errors by the thousand
    "log_min_error_statement": "panic",
    "max_wal_size": "256MB",  # it may lie in memory
}
# A database is 300 small files. In memory a copy takes 15 ms each time; on ext4 it took 20 to 250 ms.
MEMORY = Path("/dev/shm")
PATIENCE = 10.0  # seconds
MEMORY_NEEDED = 2 * 1024**3  # bytes free; a container often has 64 MB there: then the disk it is


def pytest_configure() -> None:
    hear_ctrl_c()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail the test after which a thread of ours still runs; the threads of calls that were broken off may end late."""
    before = set(threading.enumerate())
    yield
    give_up_at = time.monotonic() + PATIENCE
    while left := [t for t in set(threading.enumerate()) - before if t.name.startswith("triojobs")]:
        left[0].join(max(0.0, give_up_at - time.monotonic()))
        assert time.monotonic() < give_up_at, f"threads {left} still run"


@pytest.fixture(scope="session")
def memory() -> Path | None:
    """A directory in memory with room for clusters, or None."""
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED
    return MEMORY if room else None


@pytest.fixture(scope="session")
def cluster(memory: Path | None) -> Iterator[str]:
    """The conninfo of a server with nothing in it, for the whole session."""
    if given := os.environ.get("TRIOJOBS_TEST_DSN"):
        yield given
        return
    data_dir = None if memory is None else memory / f"triojobs-test-{uuid.uuid4().hex[:12]}"
    try:
        with running_cluster(Cluster(data_dir, settings=SETTINGS)) as conninfo:
            yield conninfo
    finally:
        if data_dir is not None:
            shutil.rmtree(data_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated_template(cluster: str) -> Iterator[str]:
    """The name of a database that was migrated once; `CREATE DATABASE … TEMPLATE` copies it."""
    name = create_database(cluster)
    migrate(conninfos.make_conninfo(cluster, dbname=name))
    yield name
    drop_database(cluster, name)


@pytest.fixture
def empty_database(cluster: str) -> Iterator[str]:
    """The conninfo of a new, empty database."""
    name = create_database(cluster)
    yield conninfos.make_conninfo(cluster, dbname=name)
    drop_database(cluster, name)


@pytest.fixture
def database(cluster: str, migrated_template: str) -> Iterator[str]:
    """The conninfo of a new, migrated database."""
    name = create_database(cluster, template=migrated_template)
    yield conninfos.make_conninfo(cluster, dbname=name)
    drop_database(cluster, name)


@pytest.fixture
def conninfo(database: str) -> str:
    """`database` by its other name."""
    return database


def create_database(cluster: str, *, template: str = "template0") -> str:
    """Create a database with a name of its own and return the name."""
    name = f"triojobs_test_{uuid.uuid4().hex[:12]}"
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
    with psycopg.connect(cluster, autocommit=True) as conn:
        conn.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
    return name


def drop_database(cluster: str, name: str) -> None:
    """Drop a database with all connections to it: a failed test may have left some."""
    with psycopg.connect(cluster, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
