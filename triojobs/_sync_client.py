"""SyncClient: the client for programs and threads without Trio."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

import trio

from ._bridge import on_loop
from ._client import (
    FIRST_LOOK,
    LAST_LOOK,
    REASON_LIMIT,
    checked_job_id,
    completed,
    info_of,
    naming_items,
    result_of,
    rows_of,
    wrong_side,
)
from ._errors import DatabaseError, checked_seconds
from ._instruments import sending
from ._logs import Log
from ._model import Enqueued, JobInfo, NewRow
from ._options import DEFAULT_SCHEMA, checked_conninfo, checked_schema, checked_text
from ._queue import JobOptions, NewJob, Payloads, Queue, new_row
from ._sync_store import SyncStore

__all__ = ["SyncClient"]

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")
log = Log("triojobs.client")


class SyncClient:
    """Enqueue and look after jobs without an event loop: `with SyncClient(conninfo) as client: …`.

    Args:
        conninfo: libpq connection string or URI. schema: where the tables are.
        call_timeout: seconds per call of the database. pooled: conninfo leads to PgBouncer in
            transaction mode.

    Raises:
        DatabaseError, SchemaError: on entry, when the database cannot be reached or does not fit.

    Threads: any; calls of several threads take turns on one connection. Inside a Trio task every
    method raises at once: it would block the loop.
    """

    def __init__(
        self,
        conninfo: str,
        *,
        schema: str = DEFAULT_SCHEMA,
        call_timeout: float = 4.0,
        pooled: bool = False,
    ) -> None:
        self._schema = checked_schema(schema)
        checked_seconds("call_timeout", call_timeout, positive=True)
        checked_conninfo("conninfo", conninfo)
        self._store = SyncStore(conninfo, schema=schema, call_timeout=call_timeout, pooled=pooled)
        self._closed = False

    def __enter__(self) -> SyncClient:
        self._check("SyncClient", "async with open_client(…)")
        try:
            self._store.check()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if not self._closed:
            self._closed = True
            self._store.close()

    def _check(self, method: str, instead: str) -> None:
        if on_loop():
            raise wrong_side(method, f"in a Trio task use `{instead}`, with a client from open_client")
        if self._closed:
            raise trio.ClosedResourceError("this triojobs client is closed")

    def enqueue(
        self,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        **options: Unpack[JobOptions],
    ) -> int:
        """Enqueue one job and return its id, once it is committed. See `Client.enqueue`."""
        self._check("SyncClient.enqueue", "await client.enqueue(…)")
        return self._send([new_row(queue, NewJob(payload, **options))])[0].id

    def try_enqueue(
        self,
        queue: Queue[PayloadT, Any],
        payload: PayloadT,
        **options: Unpack[JobOptions],
    ) -> Enqueued:
        """Like `enqueue`, but tell whether this call created the job or replaced another's body."""
        self._check("SyncClient.try_enqueue", "await client.try_enqueue(…)")
        options.setdefault("on_conflict", "return")
        return self._send([new_row(queue, NewJob(payload, **options))])[0]

    def enqueue_many(self, queue: Queue[PayloadT, Any], payloads: Payloads[PayloadT]) -> list[int]:
        """Enqueue jobs in one transaction; ids in the order given. See `Client.enqueue_many`."""
        self._check("SyncClient.enqueue_many", "await client.enqueue_many(…)")
        return [entry.id for entry in self._enqueue_rows(queue, payloads)]

    def try_enqueue_many(self, queue: Queue[PayloadT, Any], payloads: Payloads[PayloadT]) -> list[Enqueued]:
        """Like `enqueue_many`, but tell for each item whether it was created or replaced."""
        self._check("SyncClient.try_enqueue_many", "await client.try_enqueue_many(…)")
        return self._enqueue_rows(queue, payloads)

    def _enqueue_rows(self, queue: Queue[Any, Any], payloads: Payloads[Any]) -> list[Enqueued]:
        with naming_items():
            return self._send(rows_of(queue, payloads))

    def _send(self, rows: list[NewRow]) -> list[Enqueued]:
        with sending(rows) as sent:
            sent.entries = entries = self._store.enqueue(sent.rows) if rows else []
        return entries

    def new_job_id(self) -> int:
        """Reserve an id for `enqueue(…, job_id=…)`."""
        self._check("SyncClient.new_job_id", "await client.new_job_id()")
        return self._store.new_job_ids(1)[0]

    @overload
    def get(self, job_id: int) -> JobInfo[Any] | None: ...
    @overload
    def get(self, job_id: int, queue: Queue[PayloadT, Any]) -> JobInfo[PayloadT] | None: ...
    def get(self, job_id: int, queue: Queue[Any, Any] | None = None) -> JobInfo[Any] | None:
        """Return the job as it stands, or None. See `Client.get`."""
        self._check("SyncClient.get", "await client.get(…)")
        found = self._store.read_jobs([checked_job_id(job_id)])
        return info_of(found[0], queue) if found else None

    @overload
    def result(self, job_id: int, *, timeout: float | None = None) -> Any: ...
    @overload
    def result(self, job_id: int, queue: Queue[Any, ResultT], *, timeout: float | None = None) -> ResultT: ...
    def result(
        self, job_id: int, queue: Queue[Any, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Block until the job has ended and return its result. See `Client.result`.

        Raises:
            TimeoutError: it had not ended after `timeout` seconds.
        """
        self._check("SyncClient.result", "await client.result(…)")
        checked_job_id(job_id)
        limit = float("inf") if timeout is None else checked_seconds("timeout", timeout)
        give_up_at = time.monotonic() + limit
        look = FIRST_LOOK
        while True:
            try:
                ended = self._store.ended([job_id])
                for raw in completed(ended, self._store.read_jobs(ended) if ended else []):
                    return result_of(raw, queue)
            except DatabaseError as exc:
                if not exc.transient:
                    raise
                log.warning("%s", exc, extra={"event": "wait_failed"})
            remaining = give_up_at - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"job {job_id} had not ended after {limit:g} s")
            time.sleep(min(look, remaining))
            look = min(LAST_LOOK, look * 1.5)

    def cancel(self, job_id: int, *, reason: str = "cancelled") -> bool:
        """Cancel a job. See `Client.cancel`."""
        self._check("SyncClient.cancel", "await client.cancel(…)")
        checked_text("reason", reason, least=0, most=REASON_LIMIT)
        return self._store.cancel_job(checked_job_id(job_id), reason)
