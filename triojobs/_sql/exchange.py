"""Statements without a thread: one round trip each, in libpq's pipeline mode, driven from outside.

`ask` sends one statement, which commits by itself. `enqueue_now` makes one round trip of what is two: the jobs
and their commit, then the look for who waits. Both statements are sent at once, each with a synchronization
point of its own behind it. The first point commits, and only then does the server begin the second statement,
with a new snapshot: the order that notify.py asks for, without the wait in between. Each has its own answer, so
that an error of the second says nothing about the first.

Nothing here waits: a generator yields where the socket must become readable or writable, and whoever
drives it knows how to wait.
"""

from __future__ import annotations

import datetime as dt
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, LiteralString

import psycopg
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult

from .._model import NewRow
from .enqueue import ENQUEUE_NOW, OPTION_NAMES, OPTIONS, Packed, due_alike
from .notify import NOTIFY_WAITING
from .statements import numbered

__all__ = ["Ready", "ask", "enqueue_now", "fits", "rows_of"]

ROWS: Final = 10  # more are worth a thread, which leaves the loop to others meanwhile
BYTES: Final = 64 * 1024  # of payload: what a socket takes at once
TEXT, BINARY = Format.TEXT, Format.BINARY

# The names under which a session keeps a statement's plan, as far as this process has given them.
PREPARED: Final[weakref.WeakKeyDictionary[psycopg.Connection[Any], set[bytes]]] = weakref.WeakKeyDictionary()


class Ready(Enum):
    """What the socket must be before the generator goes on."""

    READABLE = 1
    WRITABLE = 2


def fits(conn: psycopg.Connection[Any], rows: Sequence[NewRow]) -> bool:
    """Tell whether these rows can go this way on this connection."""
    return (
        len(rows) <= ROWS
        and all(row.is_plain for row in rows)
        and sum(len(row.payload) for row in rows) <= BYTES
        and due_alike(rows)
        and conn.info.encoding == "utf-8"
    )


def enqueue_now(
    conn: psycopg.Connection[Any], schema: str, rows: Sequence[NewRow]
) -> Generator[Ready, None, tuple[list[int], psycopg.Error | None]]:
    """Insert rows that fit, then notify who waits. Return their ids, and the error of the notification.

    The connection is in autocommit mode, outside of a transaction, and nobody else uses it meanwhile.
    """
    pgconn = conn.pgconn
    pgconn.enter_pipeline_mode()
    jobs = Statement(conn, b"triojobs_enqueue_now", ENQUEUE_NOW, schema)
    look = Statement(conn, b"triojobs_notify_waiting", NOTIFY_WAITING, schema)
    options = dict(zip(OPTION_NAMES, OPTIONS(rows[0]), strict=True))
    jobs.send(options | {"payloads": Packed.of([row.payload for row in rows])})
    pgconn.pipeline_sync()
    look.send({"queues": text_array({row.queue for row in rows})})
    pgconn.pipeline_sync()
    while pgconn.flush():
        yield Ready.WRITABLE
    found = yield from jobs.answer()
    try:
        yield from _synchronized(conn)  # what was inserted is committed
    except psycopg.Error:
        jobs.check(found)  # the server's farewell says more than the silence after it
        raise
    error = None
    try:
        told = yield from look.answer()
        yield from _synchronized(conn)
        pgconn.exit_pipeline_mode()
        jobs.check(found)
        look.check(told)
    except psycopg.Error as exc:
        jobs.check(found)
        error = exc
    rows_found = found[-1]
    return sorted(int(rows_found.get_value(i, 0) or b"") for i in range(rows_found.ntuples)), error


def ask(
    conn: psycopg.Connection[Any],
    name: bytes,
    template: LiteralString,
    schema: str,
    values: Mapping[str, Any],
    *,
    sent: Callable[[], None] = lambda: None,
) -> Generator[Ready, None, PGresult]:
    """Run one statement, which commits by itself; return its result, rows in binary.

    The connection is in autocommit mode, outside of a transaction, and nobody else uses it meanwhile.
    `sent` is called when the server has it.
    """
    pgconn = conn.pgconn
    pgconn.enter_pipeline_mode()
    one = Statement(conn, name, template, schema)
    one.send(values, rows=BINARY)
    pgconn.pipeline_sync()
    while pgconn.flush():
        yield Ready.WRITABLE
    sent()
    found = yield from one.answer()
    try:
        yield from _synchronized(conn)
    except psycopg.Error:
        one.check(found)  # the server's farewell says more than the silence after it
        raise
    pgconn.exit_pipeline_mode()
    one.check(found)
    return found[-1]


def rows_of(conn: psycopg.Connection[Any], result: PGresult) -> list[tuple[Any, ...]]:
    """Return the rows of a result in binary."""
    loading = Transformer(conn)
    loading.set_pgresult(result)
    return loading.load_rows(0, result.ntuples, tuple)


class Statement:
    """A statement that the session prepares at its first use."""

    def __init__(
        self, conn: psycopg.Connection[Any], name: bytes, template: LiteralString, schema: str
    ) -> None:
        self._conn = conn
        self._name = name
        self._text, self._order = numbered(template, schema)
        self._known = PREPARED.setdefault(conn, set())
        self._prepares = name not in self._known

    def send(self, values: Mapping[str, Any], *, rows: Format = TEXT) -> None:
        """Put it into libpq's buffer; `rows` is the form of what comes back."""
        pgconn = self._conn.pgconn
        if self._prepares:
            pgconn.send_prepare(self._name, self._text)
        given = [values[name] for name in self._order]
        pgconn.send_query_prepared(
            self._name,
            [as_sent(value) for value in given],
            [BINARY if isinstance(value, bytes) else TEXT for value in given],
            rows,
        )

    def answer(self) -> Generator[Ready, None, list[PGresult]]:
        """Return its results as they come, good or bad."""
        results = []
        for _ in range(2 if self._prepares else 1):
            result = yield from _result(self._conn)
            if result is None or (yield from _result(self._conn)) is not None:
                raise psycopg.OperationalError("the connection was lost")
            results.append(result)
            if result.status == ExecStatus.COMMAND_OK:  # prepared, also when the execution is refused
                self._known.add(self._name)
        return results

    def check(self, results: Sequence[PGresult]) -> None:
        """Raise what the server says against it."""
        for result in results:
            if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
                raise error_from_result(result, encoding="utf-8")


def _synchronized(conn: psycopg.Connection[Any]) -> Generator[Ready, None, None]:
    result = yield from _result(conn)
    if result is None or result.status != ExecStatus.PIPELINE_SYNC:
        raise psycopg.OperationalError("the connection was lost")


def _result(conn: psycopg.Connection[Any]) -> Generator[Ready, None, PGresult | None]:
    pgconn = conn.pgconn
    while pgconn.is_busy():
        yield Ready.READABLE
        pgconn.consume_input()
    return pgconn.get_result()


def as_sent(value: Any) -> bytes | None:
    """Return a parameter in PostgreSQL's text form, or packed bytes as they are."""
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, list):
        return ("{" + ",".join(map(item_as_sent, value)) + "}").encode()
    return (value.isoformat() if isinstance(value, dt.datetime) else str(value)).encode()


def item_as_sent(value: str | float | None) -> str:
    """Return an item of an array in its text form."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def text_array(values: Collection[str]) -> str:
    """Return texts as the text form of their array."""
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in sorted(values))
    return "{" + ",".join(f'"{value}"' for value in quoted) + "}"
