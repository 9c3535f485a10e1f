"""Plans of the production statements, as a worker's session has them: generic, with what really ran.

The statements are not repeated here: `recorded` runs a production function on a session whose cursors
note what they execute, and `explain` executes the same statement again under EXPLAIN, prepared with
the same types, in a transaction that is rolled back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.adapt import PyFormat, Transformer
from tools import Connection, rolled_back

PLACEHOLDER = re.compile(rb"%\((\w+)\)[sb]")


@dataclass(frozen=True)
class Plan:
    """A plan that ran, with its actual figures."""

    root: dict[str, Any]

    def nodes(self, node_type: str = "", **properties: str) -> list[dict[str, Any]]:
        """Return the nodes whose type contains `node_type`, with these properties (spaces as `_`)."""
        wanted = {name.replace("_", " "): value for name, value in properties.items()}
        return [
            node
            for node in walk(self.root)
            if node_type in node["Node Type"] and all(node.get(n) == v for n, v in wanted.items())
        ]

    @property
    def walked(self) -> set[str]:
        """The relations that are read from end to end, by heap or by index, where they are read at all."""
        return {node["Relation Name"] for node in walk(self.root) if reads_all(node) and node["Actual Loops"]}

    @property
    def would_walk(self) -> set[str]:
        """`walked`, and what this execution pruned or never came to."""
        return {node["Relation Name"] for node in walk(self.root) if reads_all(node)}

    @property
    def pages(self) -> int:
        """How many pages were touched, in the cache or not."""
        return self.root["Shared Hit Blocks"] + self.root["Shared Read Blocks"]


def reads_all(node: dict[str, Any]) -> bool:
    """Tell whether a node reads a relation from end to end."""
    by_index = node["Node Type"] in ("Index Scan", "Index Only Scan") and "Index Cond" not in node
    return node["Node Type"] == "Seq Scan" or by_index


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a node and all below it."""
    yield node
    for child in node.get("Plans", ()):
        yield from walk(child)


def recorded(conn: Connection, fn: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[bytes, Any]]:
    """Run `fn(conn, …)`, roll it back, and return the statements that it executed."""
    statements: list[tuple[bytes, Any]] = []
    plain = psycopg.Cursor.execute

    def recording(self: psycopg.Cursor[Any], query: Any, params: Any = None, **kwargs: Any) -> Any:
        statements.append((query if isinstance(query, bytes) else query.encode(), params))
        return plain(self, query, params, **kwargs)

    # Of the class, because some functions make their cursors themselves.
    with pytest.MonkeyPatch.context() as patch, rolled_back(conn):
        patch.setattr(psycopg.Cursor, "execute", recording)
        fn(conn, *args, **options)
    return [s for s in statements if not s[0].startswith(b"SET")]


def explain(conn: Connection, statement: tuple[bytes, Any]) -> Plan:
    """Return the generic plan of a recorded statement."""
    query, params = statement
    names = list(dict.fromkeys(name.decode() for name in PLACEHOLDER.findall(query)))
    values = [params[name] for name in names]
    transformer = Transformer(conn)
    transformer.dump_sequence(values, [PyFormat.AUTO] * len(values))
    types = [type_name(conn, oid) for oid in transformer.types or ()]
    numbered = PLACEHOLDER.sub(lambda m: b"$%d" % (names.index(m[1].decode()) + 1), query)
    declared = f"({', '.join(types)})" if types else ""
    with rolled_back(conn):
        conn.execute(f"PREPARE looked_at {declared} AS ".encode() + numbered)
        try:
            given = (
                sql.SQL("({})").format(sql.SQL(", ").join(literal(conn, value) for value in values))
                if values
                else sql.SQL("")
            )
            row = conn.execute(
                sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE looked_at {}").format(given)
            ).fetchone()
        finally:
            conn.execute("DEALLOCATE looked_at")
    assert row is not None
    return Plan(row[0][0]["Plan"])


def literal(conn: Connection, value: Any) -> sql.Composable:
    """Return a value as a literal; the server reads what was packed in its binary form."""
    if isinstance(value, bytes) and type(value) is not bytes:
        (value,) = conn.execute("SELECT %s", [value], binary=True).fetchone() or (None,)
    return sql.Literal(value)


def type_name(conn: Connection, oid: int) -> str:
    """Return the name of a type; psycopg leaves some to the server (0)."""
    if oid == 0:
        return "unknown"
    row = conn.execute("SELECT format_type(%s, NULL)", [oid]).fetchone()
    assert row is not None
    return row[0]
