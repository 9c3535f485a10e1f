"""Sessions and databases as the tests of the SQL have them; their tools serve here too."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "postgres"))

from faces import FACES, Face, open_face
from tools import Connection, Group

import triojobs
from tests.postgres.conftest import connect, db, shared_database  # after the path that it needs

__all__ = ["connect", "db", "shared_database"]


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
    with triojobs.SyncAdmin(database) as opened:
        yield opened
