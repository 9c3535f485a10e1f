"""Where an admin's work runs: on a connection of its own, from a task or a thread, or on the caller's.

A `Step` is one short statement or transaction. Where the commit is ours, whoever waits is told after
it; in the caller's transaction the notification goes inside.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar

import psycopg
import trio

from ._bridge import IDLE, Breaker, Call, Line
from ._errors import DatabaseError, TriojobsError
from ._sql import notify
from ._sql.effects import Effect
from ._sql.enqueue import NOTIFY_INSIDE
from ._sql.failures import translate
from ._sql.schema import check_schema
from ._sql.session import begin_transaction, prepare_session, refuse_undeclared_pooler
from ._sql.statements import plain_cursor, statement

__all__ = [
    "AdminStore",
    "CallersConnection",
    "Step",
    "Steps",
    "SyncAdminStore",
    "drive",
    "drive_sync",
    "perform",
    "prepare_admin_session",
]

T = TypeVar("T")

CONNECTIONS: Final = 2  # a long bulk operation does not hold up a look


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """One short call.

    Attributes:
        operation: what it does, as a present participle. work: does it.
        looks_again: it reads in a second statement what others did since the first, so it needs a
            transaction that is READ COMMITTED.
        after_commit: it waits for what follows from the commit of the step before; left out in the
            caller's transaction, whose commit is yet to come.
    """

    operation: str
    work: Callable[[psycopg.Connection[Any], str], Effect[T]]
    looks_again: bool = False
    after_commit: bool = False


Steps: TypeAlias = Generator[Step[Any], Any, T]
"""A method of several steps: it gets the answer of each step, or the error that it raised."""


async def drive(given: Steps[T], run: Callable[[Step[Any]], Awaitable[Any]]) -> T:
    """Do the steps one after another."""
    try:
        step = next(given)
        while True:
            try:
                answer = await run(step)
            except Exception as exc:
                step = given.throw(exc)
            else:
                step = given.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        given.close()


def drive_sync(given: Steps[T], run: Callable[[Step[Any]], Any]) -> T:
    """Do the steps one after another, in this thread."""
    try:
        step = next(given)
        while True:
            try:
                answer = run(step)
            except Exception as exc:
                step = given.throw(exc)
            else:
                step = given.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        given.close()


def perform(call: Call, schema: str, step: Step[T]) -> T:
    """Do a step on a connection of ours."""
    effect = step.work(call.conn, schema)
    if effect.queues:
        call.afterwards(lambda conn: notify.notify_waiting(conn, schema, effect.queues))
    if effect.groups:
        call.afterwards(lambda conn: _notify_groups(conn, effect.groups))
    return effect.value


def _notify_groups(conn: psycopg.Connection[Any], groups: frozenset[uuid.UUID]) -> None:
    for group_id in groups:
        notify.notify_group(conn, group_id)


def prepare_admin_session(conn: psycopg.Connection[Any], *, call_timeout: float) -> None:
    """Settings for connections that carry an admin's statements only."""
    prepare_session(conn, call_timeout=call_timeout)
    # A parallel plan reads and sorts every candidate of a page before it hands over the first one.
    conn.execute("SET max_parallel_workers_per_gather = 0")


def open_line(breaker: Breaker, conninfo: str, *, call_timeout: float, pooled: bool, size: int) -> Line:
    """Return the line of an admin's connections; they are opened on demand."""

    def prepare(conn: psycopg.Connection[Any]) -> None:
        if not pooled:
            refuse_undeclared_pooler(conn)
            prepare_admin_session(conn, call_timeout=call_timeout)

    def begin(conn: psycopg.Connection[Any]) -> None:
        begin_transaction(conn, call_timeout=call_timeout)
        conn.execute("SET LOCAL max_parallel_workers_per_gather = 0")

    return Line(
        "admin",
        conninfo,
        breaker,
        call_timeout=call_timeout,
        prepare=prepare,
        size=size,
        pooled=pooled,
        begin=begin,
    )


class AdminStore:
    """Connections for Trio tasks."""

    def __init__(self, conninfo: str, *, schema: str, call_timeout: float, pooled: bool) -> None:
        self._schema = schema
        self._breaker = Breaker()
        self._line = open_line(
            self._breaker, conninfo, call_timeout=call_timeout, pooled=pooled, size=CONNECTIONS
        )

    async def open(self) -> None:
        """Connect and verify the schema."""
        await self._line.run("connecting", lambda call: check_schema(call.conn, self._schema))

    async def run(self, step: Step[T]) -> T:
        """Do a step in a thread. Cancellation: cancelled before it starts, or done."""
        return await self._line.run(step.operation, lambda call: perform(call, self._schema, step))

    def close(self) -> None:
        """Close the connections and end the breaker's thread. No call may be in flight."""
        self._line.close()
        self._breaker.close()


class SyncAdminStore:
    """One connection, for one thread at a time."""

    def __init__(self, conninfo: str, *, schema: str, call_timeout: float, pooled: bool) -> None:
        self._schema = schema
        self._breaker = Breaker()
        self._lock = threading.Lock()
        self._closed = False
        self._line = open_line(self._breaker, conninfo, call_timeout=call_timeout, pooled=pooled, size=1)

    def open(self) -> None:
        """Connect and verify the schema."""
        self._call("connecting", lambda call: check_schema(call.conn, self._schema))

    def run(self, step: Step[T]) -> T:
        """Do a step in this thread."""
        return self._call(step.operation, lambda call: perform(call, self._schema, step))

    def _call(self, operation: str, fn: Callable[[Call], T]) -> T:
        # Before the lock: in a forked child nobody may be left to release it.
        self._line.check_owner(operation)
        with self._lock:
            if self._closed:  # while this thread waited for its turn
                raise trio.ClosedResourceError("this triojobs admin is closed")
            return self._line.call(operation, fn)

    def close(self) -> None:
        """Close the connection and end the breaker's thread. In a forked child: nothing, they are not its own."""
        if not self._line.is_owned:
            return
        with self._lock:
            self._closed = True
            self._line.close()
            self._breaker.close()


class CallersConnection:
    """The caller's connection and transaction."""

    def __init__(self, conn: psycopg.Connection[Any], schema: str) -> None:
        self._conn = conn
        self._schema = schema

    def run(self, step: Step[T]) -> T:
        """Do a step in the caller's transaction; what fails undoes this step alone."""
        if step.after_commit and _is_in_transaction(self._conn):
            return None  # type: ignore[return-value]  # such steps have no value
        with callers_transaction(self._conn, step.operation):
            if step.looks_again:
                self._check_isolation(step.operation)
            effect = step.work(self._conn, self._schema)
            cursor = plain_cursor(self._conn)
            if effect.queues:
                cursor.execute(statement(NOTIFY_INSIDE, self._schema), {"queues": sorted(effect.queues)})
            for group_id in effect.groups:
                cursor.execute("SELECT pg_notify(%s, '')", [notify.group_channel(group_id)])
        return effect.value

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Have all steps in the block undone if one fails, in the caller's transaction."""
        if not _is_in_transaction(self._conn):
            yield
            return
        with callers_transaction(self._conn, "steering"):
            yield

    def check_own_transactions(self, operation: str) -> None:
        """Raise TriojobsError where what we do would wait for the caller's COMMIT."""
        if _is_in_transaction(self._conn):
            raise TriojobsError(
                "it takes locks that must not be kept until the caller's COMMIT",
                operation=operation,
                hint="use a connection in autocommit mode, outside of a transaction",
            )

    def _check_isolation(self, operation: str) -> None:
        row = plain_cursor(self._conn).execute("SHOW transaction_isolation").fetchone()
        if row != ("read committed",):
            raise TriojobsError(
                f"the transaction is {str(row and row[0]).upper()}",
                operation=operation,
                hint="use a READ COMMITTED one: it must see what others have committed meanwhile",
            )


def _is_in_transaction(conn: psycopg.Connection[Any]) -> bool:
    return not conn.autocommit or conn.pgconn.transaction_status != IDLE


@contextmanager
def callers_transaction(conn: psycopg.Connection[Any], operation: str) -> Iterator[None]:
    """Run the block in a savepoint of the caller's transaction; translate what goes wrong.

    A connection without autocommit that is idle begins its transaction here, as its first statement
    would; with autocommit the block is a transaction of its own.
    """
    if conn.pgconn.pipeline_status and not conn.closed:
        with conn.pipeline():
            pass  # a synchronization point, so that the status below is the present one
    theirs = _is_in_transaction(conn)
    ours_is_next = False
    try:
        if theirs and conn.pgconn.transaction_status == IDLE:
            plain_cursor(conn).execute("SELECT")
        with conn.transaction():
            yield
            ours_is_next = not theirs  # the COMMIT that comes now
    except psycopg.Error as exc:
        error: DatabaseError = translate(exc, operation=operation)
        if not ours_is_next:
            error.committed = False  # the COMMIT is the caller's
        raise error from exc
