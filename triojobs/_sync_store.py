"""What programs and threads without Trio need of PostgreSQL: the caller's connection, or one of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
import trio

from ._bridge import IDLE, Breaker, Call, Line, drive_here
from ._errors import DatabaseError
from ._logs import Log
from ._model import Enqueued, NewRow, RawJob
from ._postgres import cancel_job, enqueue_in_transaction
from ._sql import enqueue as enqueue_sql
from ._sql import exchange, inspect, notify
from ._sql.failures import translate
from ._sql.schema import check_schema
from ._sql.session import begin_transaction, prepare_session, refuse_undeclared_pooler

__all__ = ["SyncStore", "enqueue_on_connection", "is_connection"]

T = TypeVar("T")
INERROR: Final = psycopg.pq.TransactionStatus.INERROR
log = Log("triojobs.client")


def enqueue_on_connection(
    conn: psycopg.Connection[Any], schema: str, rows: Sequence[NewRow]
) -> list[Enqueued]:
    """Enqueue in the caller's transaction. What fails undoes this call alone.

    A connection without autocommit that is idle begins its transaction here, as its first statement
    would; with autocommit the call is a transaction of its own.
    """
    operation = f"enqueueing {len(rows)} job(s)"
    if conn.closed:
        raise DatabaseError(
            "the connection is closed",
            operation=operation,
            hint="nothing was enqueued; repeat the transaction on a new connection",
            transient=True,
        )
    if conn.pgconn.transaction_status == INERROR:
        raise DatabaseError(
            "an earlier statement of this transaction has failed",
            operation=operation,
            hint="nothing was enqueued; roll back, and put what may fail into a savepoint: "
            "`with conn.transaction(): …`",
            sqlstate="25P02",  # what the server would say
        )
    doubtful = False
    try:
        if conn.pgconn.pipeline_status:
            with conn.pipeline():
                pass  # a synchronization point, so that the status below is the present one
        theirs = not conn.autocommit or conn.pgconn.transaction_status != IDLE
        if theirs and conn.pgconn.transaction_status == IDLE:
            enqueue_sql.Cursor(conn).execute("SELECT")
        with conn.transaction():  # a savepoint inside the caller's transaction
            answers = enqueue_sql.enqueue(conn, schema, rows, notify_inside=True)
            doubtful = not theirs  # our own COMMIT is next
    except UnicodeEncodeError as exc:
        raise DatabaseError(
            f"the connection's client_encoding is {exc.encoding} and cannot express this call: {exc.reason}",
            operation=operation,
            hint="nothing was enqueued; connect with client_encoding=utf8",
        ) from exc
    except psycopg.Error as exc:
        error = translate(exc, operation=operation)
        if not doubtful:
            error.committed = False
        raise error from exc
    return answers


def is_connection(value: object) -> bool:
    """Return whether `value` is a synchronous psycopg connection."""
    return isinstance(value, psycopg.Connection)


class SyncStore:
    """What a program without Trio needs: one connection, opened on demand, used by one thread at a time."""

    def __init__(self, conninfo: str, *, schema: str, call_timeout: float, pooled: bool) -> None:
        self._schema = schema
        self._breaker = Breaker()
        self._lock = threading.Lock()
        self._closed = False

        def prepare(conn: psycopg.Connection[Any]) -> None:
            if not pooled:
                refuse_undeclared_pooler(conn)
                prepare_session(conn, call_timeout=call_timeout)

        self._line = Line(
            "sync client",
            conninfo,
            self._breaker,
            call_timeout=call_timeout,
            prepare=prepare,
            pooled=pooled,
            begin=partial(begin_transaction, call_timeout=call_timeout),
        )

    def run(self, operation: str, fn: Callable[[Call], T]) -> T:
        """Run `fn` on the connection, bounded like every call."""
        # Before the lock: in a forked child nobody may be left to release it.
        self._line.check_owner(operation)
        with self._lock:
            if self._closed:  # while this thread waited for its turn
                raise trio.ClosedResourceError("this triojobs client is closed")
            return self._line.call(operation, fn)

    def check(self) -> None:
        """Connect and verify the schema."""
        self.run("connecting", lambda call: check_schema(call.conn, self._schema))

    def enqueue(self, rows: Sequence[NewRow]) -> list[Enqueued]:
        """Insert jobs in one transaction, then notify who waits."""

        def work(call: Call) -> list[Enqueued]:
            if call.conn.pgconn.transaction_status == IDLE and exchange.fits(call.conn, rows):
                ids, error = drive_here(
                    exchange.enqueue_now(call.conn, self._schema, rows), call.conn.fileno()
                )
                if error is not None:
                    log.warning("a notification was not sent: %s", error, extra={"event": "notify_failed"})
                return [Enqueued(job_id, created=True) for job_id in ids]
            answers = enqueue_in_transaction(call, self._schema, rows)
            queues = {row.queue for row in rows}
            call.afterwards(lambda conn: notify.notify_waiting(conn, self._schema, queues))
            return answers

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
        """Close the connection and end the breaker's thread. In a forked child: nothing, they are not its own."""
        if not self._line.is_owned:
            return
        with self._lock:
            self._closed = True
            self._line.close()
            self._breaker.close()
