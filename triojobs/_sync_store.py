"""What programs and threads without Trio need of PostgreSQL: the caller's connection, or one of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg

from ._bridge import IDLE, Breaker, Call, Line
from ._model import Enqueued, NewRow, RawJob
from ._postgres import cancel_job
from ._sql import enqueue as enqueue_sql
from ._sql import inspect, notify
from ._sql.failures import translate
from ._sql.schema import check_schema
from ._sql.session import prepare_session, refuse_undeclared_pooler

__all__ = ["SyncStore", "enqueue_on_connection", "is_connection"]

T = TypeVar("T")


def enqueue_on_connection(
    conn: psycopg.Connection[Any], schema: str, rows: Sequence[NewRow]
) -> list[Enqueued]:
    """Enqueue in the caller's transaction. What fails undoes this call alone.

    A connection without autocommit that is idle begins its transaction here, as its first statement
    would; with autocommit the call is a transaction of its own.
    """
    if conn.pgconn.pipeline_status and not conn.closed:
        with conn.pipeline():
            pass  # a synchronization point, so that the status below is the present one
    begun = not conn.autocommit or conn.pgconn.transaction_status != IDLE
    sent = not conn.closed
    try:
        if not conn.autocommit and conn.pgconn.transaction_status == IDLE:
            conn.execute("SELECT")
        with conn.transaction():  # a savepoint inside the caller's transaction
            answers = enqueue_sql.enqueue(conn, schema, rows, notify_inside=True)
    except psycopg.Error as exc:
        error = translate(exc, operation=f"enqueueing {len(rows)} job(s)")
        if begun or not sent:
            error.committed = False  # the COMMIT is the caller's
        raise error from exc
    return [a for a in answers if isinstance(a, Enqueued)]


def is_connection(value: object) -> bool:
    """Return whether `value` is a synchronous psycopg connection."""
    return isinstance(value, psycopg.Connection)


class SyncStore:
    """What a program without Trio needs: one connection, opened on demand, used by one thread at a time."""

    def __init__(self, conninfo: str, *, schema: str, call_timeout: float, pooled: bool) -> None:
        self._schema = schema
        self._breaker = Breaker()
        self._lock = threading.Lock()

        def prepare(conn: psycopg.Connection[Any]) -> None:
            refuse_undeclared_pooler(conn, declared=pooled)
            if not pooled:
                prepare_session(conn, call_timeout=call_timeout)

        self._line = Line(
            "sync client", conninfo, self._breaker, call_timeout=call_timeout, prepare=prepare, pooled=pooled
        )

    def run(self, operation: str, fn: Callable[[Call], T]) -> T:
        """Run `fn` on the connection, bounded like every call."""
        with self._lock:
            return self._line.call(operation, fn)

    def check(self) -> None:
        """Connect and verify the schema."""
        self.run("connecting", lambda call: check_schema(call.conn, self._schema))

    def enqueue(self, rows: Sequence[NewRow]) -> list[Enqueued]:
        """Insert jobs in one transaction, then notify who waits."""

        def work(call: Call) -> list[Enqueued]:
            with call.conn.transaction():
                answers = enqueue_sql.enqueue(
                    call.conn, self._schema, rows, notify_inside=False, between_chunks=call.extend
                )
            queues = {row.queue for row in rows}
            call.afterwards(lambda conn: notify.notify_waiting(conn, self._schema, queues))
            return [a for a in answers if isinstance(a, Enqueued)]

        return self.run(f"enqueueing {len(rows)} job(s)", work)

    def new_job_ids(self, count: int) -> list[int]:
        """Reserve ids."""
        return self.run(
            "reserving job ids", lambda call: enqueue_sql.new_job_ids(call.conn, self._schema, count)
        )

    def read_jobs(self, ids: Sequence[int]) -> list[RawJob]:
        """Return the jobs that exist."""
        return self.run("reading jobs", lambda call: inspect.read_jobs(call.conn, self._schema, ids))

    def ended(self, ids: Sequence[int]) -> list[int]:
        """Return those ids whose job has ended or does not exist."""
        return self.run("waiting for jobs", lambda call: inspect.ended(call.conn, self._schema, ids))

    def cancel_job(self, job_id: int, reason: str) -> bool:
        """Cancel a waiting job, or ask for the cancellation of a running one."""
        return self.run(
            f"cancelling job {job_id}", lambda call: cancel_job(call, self._schema, job_id, reason)
        )

    def close(self) -> None:
        """Close the connection and end the breaker's thread."""
        with self._lock:
            self._line.close()
            self._breaker.close()
