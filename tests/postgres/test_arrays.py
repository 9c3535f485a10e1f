"""Arrays that we pack ourselves arrive as what they were."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest

from triojobs._sql.arrays import bytea_array, float8_array, int8_array, text_array

Connection = psycopg.Connection[Any]


@pytest.mark.parametrize(
    ("pack", "type", "values"),
    [
        (int8_array, "bigint[]", [1, -1, 0, 2**63 - 1, -(2**63)]),
        (int8_array, "bigint[]", []),
        (float8_array, "double precision[]", [0.0, 1.5, -1e300, 3, math.inf]),
        (bytea_array, "bytea[]", [b"", b"\x00\xff\\x", None, b"x" * 100_000]),
        (bytea_array, "bytea[]", [None]),
        (text_array, "text[]", ["", "a", None, "a", "grün ☃", "{NULL}", '"']),
        (text_array, "text[]", [None, None]),
        (text_array, "text[]", []),
    ],
)
def test_an_array_arrives_as_it_was(
    db: Connection, pack: Callable[[Sequence[Any]], Any], type: str, values: list[Any]
) -> None:
    row = db.execute("SELECT %(a)s, pg_typeof(%(a)s)::text", {"a": pack(values)}, binary=True).fetchone()
    assert row == (values, type)


@pytest.mark.parametrize(
    ("pack", "values"),
    [(int8_array, [2**63]), (int8_array, [None]), (float8_array, [None]), (text_array, ["\ud800"])],
)
def test_what_does_not_fit_is_not_packed(pack: Callable[[Sequence[Any]], Any], values: list[Any]) -> None:
    with pytest.raises((struct.error, OverflowError, UnicodeEncodeError)):
        pack(values)
