"""Telemetry is the process's: each test takes out what it has put in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triojobs._instruments import is_watched


@pytest.fixture(autouse=True)
def nothing_stays_installed() -> Iterator[None]:
    yield
    assert not is_watched()
