"""Sessions and databases as the tests of the SQL have them; their tools serve here too."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

sys.path.insert(0, str(Path(__file__).parents[1] / "postgres"))

from faces import FACES, Face, open_face
from tools import PATIENCE, Connection, Group, clean

import triojobs
from tests.conftest import create_database, drop_database
from tests.postgres.conftest import connect, db, shared_database  # after the path that it needs

__all__ = ["connect", "db", "shared_database"]


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    """One database for all tests of a file, emptied after each."""
    yield shared_database
    clean(shared_database)


@pytest.fixture
def fresh_database(cluster: str, migrated_template: str) -> Iterator[str]:
    """A database of its own for one test."""
    name = create_database(cluster, template=migrated_template)
    yield make_conninfo(cluster, dbname=name)
    drop_database(cluster, name)


@pytest.fixture
def group(db: Connection) -> Group:
    """A registered group."""
    return Group(db)


@pytest.fixture(params=FACES)
async def face(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Face]:
    """Each of the three admins in turn."""
    async with open_face(request.param, database) as opened:
        yield opened


@pytest.fixture
def admin(database: str) -> Iterator[triojobs.SyncAdmin]:
    """The synchronous one, for what does not depend on the face."""
    with triojobs.SyncAdmin(database, call_timeout=PATIENCE) as opened:
        yield opened
