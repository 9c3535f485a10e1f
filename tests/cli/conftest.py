"""Servers that restart and crash, as the tests of faults have them, and a place for an embedded one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import make_server as make_server
from tests.faults.conftest import server as server
from tests.faults.conftest import server_template as server_template


@pytest.fixture
def data(memory: Path | None) -> Iterator[Path]:
    """A directory that the embedded server's account can enter (pytest's own are closed to it)."""
    path = Path(tempfile.mkdtemp(prefix="tj-", dir=memory or "/tmp"))
    path.chmod(0o711)
    yield path / "data"
    shutil.rmtree(path)
