"""Arrays in PostgreSQL's binary form, made at once.

psycopg looks at a list item by item, 0.3 to 0.8 µs each; a settlement has seven. The form: dimensions,
whether there are NULLs, the elements' type, then for each dimension its length and lower bound, then each
element's length (-1: NULL) and bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

__all__ = ["bytea_array", "float8_array", "int8_array", "text_array"]

HEAD: Final = struct.Struct("!iiIii")
LENGTH: Final = struct.Struct("!i").pack
NULL: Final = LENGTH(-1)


class Int8Array(bytes):
    """bigint[]"""


class Float8Array(bytes):
    """float8[]"""


class ByteaArray(bytes):
    """bytea[]"""


class TextArray(bytes):
    """text[]"""


ELEMENTS: Final = {Int8Array: "int8", Float8Array: "float8", ByteaArray: "bytea", TextArray: "text"}
TYPES: Final = {array: psycopg.adapters.types[name] for array, name in ELEMENTS.items()}


def int8_array(values: Sequence[int]) -> Int8Array:
    """Return values as bigint[]."""
    return Int8Array(_head(Int8Array, len(values)) + _numbers("q", values))


def float8_array(values: Sequence[float]) -> Float8Array:
    """Return values as float8[]."""
    return Float8Array(_head(Float8Array, len(values)) + _numbers("d", values))


def bytea_array(values: Sequence[bytes | None]) -> ByteaArray:
    """Return values as bytea[]."""
    return ByteaArray(_head(ByteaArray, len(values), nulls=None in values) + _items(values))


def text_array(values: Sequence[str | None]) -> TextArray:
    """Return values as text[]."""
    encoded = {value: None if value is None else value.encode() for value in set(values)}
    items = _items([encoded[value] for value in values])
    return TextArray(_head(TextArray, len(values), nulls=None in encoded) + items)


def _head(array: type[bytes], length: int, *, nulls: bool = False) -> bytes:
    return HEAD.pack(1, nulls, TYPES[array].oid, length, 1)  # a length of 0 is an empty array, too


def _numbers(code: str, values: Sequence[float]) -> bytes:
    flat: list[float] = [8] * (2 * len(values))  # each value after its length
    flat[1::2] = values
    return struct.pack("!" + f"i{code}" * len(values), *flat)


def _items(values: Iterable[bytes | None]) -> bytes:
    parts: list[bytes] = []
    for value in values:
        if value is None:
            parts.append(NULL)
        else:
            parts += (LENGTH(len(value)), value)
    return b"".join(parts)


class ArrayDumper(Dumper):
    """Sends an array as it is."""

    format = Format.BINARY

    def dump(self, obj: bytes) -> bytes:
        return obj


# For every connection: these classes are ours, so nobody else's values are touched.
for _array, _info in TYPES.items():
    _dumper = type(f"{_array.__name__}Dumper", (ArrayDumper,), {"oid": _info.array_oid})
    psycopg.adapters.register_dumper(_array, _dumper)
