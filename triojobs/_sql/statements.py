"""From a template with `{schema}` to the bytes that psycopg sends."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

__all__ = ["numbered", "plain_cursor", "statement"]


@lru_cache(maxsize=1024)
def statement(template: LiteralString, schema: str) -> bytes:
    """Return `template` with `{schema}` as an identifier, `{channel}` and `{job_ids}` as literals.

    The channel of a schema's notifications is named like the schema. The same bytes object comes
    back each time, so psycopg recognises the statement and prepares it.
    """
    composed = sql.SQL(template).format(
        schema=sql.Identifier(schema),
        channel=sql.Literal(schema),
        job_ids=sql.Literal(f"{schema}.job_ids"),
    )
    return composed.as_bytes(None)


def plain_cursor(conn: psycopg.Connection[Any]) -> psycopg.Cursor[tuple[Any, ...]]:
    """Return a cursor of tuples on a connection that may be the caller's, with factories of its own."""
    return psycopg.Cursor(conn, row_factory=tuple_row)


@lru_cache(maxsize=64)
def numbered(template: LiteralString, schema: str) -> tuple[bytes, tuple[str, ...]]:
    """Return `template` with `$1`, `$2`, … for its `%(named)s` parameters, and their names in that order."""
    order: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        return f"${order.setdefault(found[1], len(order) + 1)}"

    text = re.sub(r"%\((\w+)\)[sb]", number, statement(template, schema).decode())
    return text.encode(), tuple(order)
