"""Sessions on a migrated database, closed at the end of the test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from tools import Connection, end_all_calls, open_session

from tests.tools.commit_proxy import CommitProxy, commit_proxy


@pytest.fixture
def connect(database: str) -> Iterator[Callable[[], Connection]]:
    """Opens sessions as the workers have them. A failed test's sessions may still wait for each other."""
    opened: list[Connection] = []

    def open_one() -> Connection:
        opened.append(open_session(database))
        return opened[-1]

    yield open_one
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY (%s)",
            [[each.info.backend_pid for each in opened]],
        )
    end_all_calls()
    for each in opened:
        each.close()


@pytest.fixture
def db(connect: Callable[[], Connection]) -> Connection:
    """The first session; in tests of two actors the one that looks on."""
    return connect()


@pytest.fixture(scope="module")
def shared_database(cluster: str, migrated_template: str) -> Iterator[str]:
    """The conninfo of a migrated database for a whole module, whose tests leave it as they found it."""
    name = f"triojobs_test_{uuid.uuid4().hex[:12]}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
    with psycopg.connect(cluster, autocommit=True) as conn:
        conn.execute(create.format(sql.Identifier(name), sql.Identifier(migrated_template)))
        yield make_conninfo(cluster, dbname=name)
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def proxied(conninfo: str) -> Iterator[tuple[CommitProxy, str]]:
    """A proxy that can stop a COMMIT, and the conninfo that leads through it."""
    with commit_proxy(conninfo) as found:
        yield found
