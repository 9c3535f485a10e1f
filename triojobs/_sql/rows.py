"""Rows as records have them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

__all__ = ["in_utc"]


def in_utc(row: Iterable[Any]) -> tuple[Any, ...]:
    """Return the row with its times in UTC, whatever time zone the session shows them in."""
    return tuple(each.astimezone(dt.UTC) if isinstance(each, dt.datetime) else each for each in row)
