"""Sessions on a migrated database, closed at the end of the test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from tools import Connection, open_session


@pytest.fixture
def connect(database: str) -> Iterator[Callable[[], Connection]]:
    """Opens sessions as the workers have them."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(open_session(database))


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
