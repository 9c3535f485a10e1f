"""A migrated database for the commands, and sessions that see what they have done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "postgres"))

from command import Command
from tools import Connection, Group, clean, open_session

from tests.postgres.conftest import shared_database  # after the path that it needs

__all__ = ["shared_database"]


@pytest.fixture
def dsn(shared_database: str) -> Iterator[str]:
    """One database for all tests of a file, emptied after each."""
    yield shared_database
    clean(shared_database)


@pytest.fixture
def triojobs_(dsn: str) -> Command:
    """The command line, with that database in TRIOJOBS_DSN."""
    return Command(dsn)


@pytest.fixture
def db(dsn: str) -> Iterator[Connection]:
    """A session as workers have them."""
    conn = open_session(dsn)
    yield conn
    conn.close()


@pytest.fixture
def group(db: Connection) -> Group:
    """A registered group, whose process is the test."""
    return Group(db)
