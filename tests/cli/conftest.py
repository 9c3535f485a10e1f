"""A migrated database for the commands, sessions that see what they have done; servers that restart and crash."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "postgres"))

from command import Command
from tools import Connection, Group, clean, open_session

from tests.faults.conftest import make_server as make_server
from tests.faults.conftest import server as server
from tests.faults.conftest import server_template as server_template
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


@pytest.fixture
def data(memory: Path | None) -> Iterator[Path]:
    """A directory that the embedded server's account can enter (pytest's own are closed to it)."""
    path = Path(tempfile.mkdtemp(prefix="tj-", dir=memory or "/tmp"))
    path.chmod(0o711)
    yield path / "data"
    shutil.rmtree(path)
