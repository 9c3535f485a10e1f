"""The outbox: enqueue inside the caller's own psycopg transaction.

The job exists if and only if the caller's transaction commits. Synchronous, from any thread, no
event loop needed. The caller's connection may have any settings; it is left as it was found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack

from ._client import naming_items, rows_of
from ._errors import OptionError
from ._instruments import sending
from ._model import Enqueued, NewRow
from ._options import DEFAULT_SCHEMA, checked_schema
from ._queue import JobOptions, NewJob, Payloads, Queue, new_row
from ._sync_store import enqueue_on_connection, is_connection

if TYPE_CHECKING:
    import psycopg

__all__ = ["enqueue_many_on", "enqueue_on", "try_enqueue_many_on", "try_enqueue_on"]

PayloadT = TypeVar("PayloadT")


class Transaction(Protocol):
    """A transaction of another store (the one in memory lends such an object to `Job.commit`)."""

    def enqueue_rows(self, rows: list[NewRow]) -> list[Enqueued]: ...


def enqueue_on(
    conn: psycopg.Connection[Any],
    queue: Queue[PayloadT, Any],
    payload: PayloadT,
    *,
    schema: str = DEFAULT_SCHEMA,
    **options: Unpack[JobOptions],
) -> int:
    """Enqueue one job in the caller's transaction; return its id.

    Args:
        conn: a synchronous psycopg connection. In autocommit mode, outside of a transaction, the
            call is a transaction of its own. schema: where the tables are. options: see `JobOptions`.

    Raises:
        OptionError, DuplicateJobError, DatabaseError: this call alone is undone (savepoint); the
            caller's transaction stays usable.

    Threads: any; blocks its thread.
    """
    return _enqueue(conn, [new_row(queue, NewJob(payload, **options))], schema)[0].id


def try_enqueue_on(
    conn: psycopg.Connection[Any],
    queue: Queue[PayloadT, Any],
    payload: PayloadT,
    *,
    schema: str = DEFAULT_SCHEMA,
    **options: Unpack[JobOptions],
) -> Enqueued:
    """Like `enqueue_on`, but tell whether this call created the job or replaced another's body."""
    options.setdefault("on_conflict", "return")
    return _enqueue(conn, [new_row(queue, NewJob(payload, **options))], schema)[0]


def enqueue_many_on(
    conn: psycopg.Connection[Any],
    queue: Queue[PayloadT, Any],
    payloads: Payloads[PayloadT],
    *,
    schema: str = DEFAULT_SCHEMA,
) -> list[int]:
    """Enqueue jobs in the caller's transaction; ids in the order given. See `enqueue_on`."""
    with naming_items():
        return [entry.id for entry in _enqueue(conn, rows_of(queue, payloads), schema)]


def try_enqueue_many_on(
    conn: psycopg.Connection[Any],
    queue: Queue[PayloadT, Any],
    payloads: Payloads[PayloadT],
    *,
    schema: str = DEFAULT_SCHEMA,
) -> list[Enqueued]:
    """Like `enqueue_many_on`, but tell for each item whether it was created or replaced."""
    with naming_items():
        return _enqueue(conn, rows_of(queue, payloads), schema)


def _enqueue(conn: psycopg.Connection[Any] | Transaction, rows: list[NewRow], schema: str) -> list[Enqueued]:
    checked_schema(schema)
    with sending(rows) as sent:
        sent.entries = entries = _write(conn, sent.rows, schema)
    return entries


def _write(conn: psycopg.Connection[Any] | Transaction, rows: list[NewRow], schema: str) -> list[Enqueued]:
    if is_connection(conn):
        return enqueue_on_connection(conn, schema, rows) if rows else []  # type: ignore[arg-type]
    if hasattr(conn, "enqueue_rows"):
        return conn.enqueue_rows(rows)
    # Its type and not its value: it may be a conninfo with a password in it.
    raise OptionError("conn", type(conn), "a synchronous psycopg.Connection")
