"""Sessions on a migrated database, closed at the end of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
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
