"""The ways in: open a worker group, or a client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, TypedDict

import trio

from ._client import Client, entered_twice
from ._errors import checked_seconds
from ._flusher import Flusher
from ._group import GroupContext, checked_workers, default_name, with_workers
from ._middleware import Middleware, checked_middleware
from ._model import HardStop
from ._options import DEFAULT_SCHEMA, GroupOptions, checked_conninfo, checked_schema
from ._postgres import PostgresStore
from ._queue import Worker
from ._retention import DEFAULT_RETENTION, Retention, checked_retention
from ._store import Store

__all__ = ["GroupKeywords", "open_client", "open_worker_group"]

CLIENT_CLOSE_TIMEOUT: Final = 5.0  # seconds in which a closing client answers everybody


class GroupKeywords(TypedDict, total=False):
    """The keywords of `open_worker_group`; see `GroupOptions` for their meaning."""

    name: str | None
    schema: str
    grace_period: float
    close_timeout: float
    call_timeout: float
    lease_duration: float
    lease_margin: float
    beat_interval: float
    loop_dead_after: float | None
    hard_stop: Callable[[HardStop], object] | None
    hard_stop_after: float | None
    poll_interval: float
    listening_poll_interval: float
    rescan_interval: float
    claim_linger: float
    listen_conninfo: str | None
    notify: bool
    pooled: bool
    job_connections: int | None
    concurrency: int | None
    isolation: Literal["slot", "task"]
    retention: Retention | None
    middleware: Sequence[Middleware]


def open_worker_group(
    conninfo: str,
    workers: Sequence[Worker[Any, Any]],
    *,
    name: str | None = None,
    schema: str = DEFAULT_SCHEMA,
    grace_period: float = 10.0,
    close_timeout: float = 5.0,
    call_timeout: float = 4.0,
    lease_duration: float = 30.0,
    lease_margin: float = 5.0,
    beat_interval: float = 6.0,
    loop_dead_after: float | None = None,
    hard_stop: Callable[[HardStop], object] | None = None,
    hard_stop_after: float | None = None,
    poll_interval: float = 1.0,
    listening_poll_interval: float = 5.0,
    rescan_interval: float = 1.0,
    claim_linger: float = 0.005,
    listen_conninfo: str | None = None,
    notify: bool = True,
    pooled: bool = False,
    job_connections: int | None = None,
    concurrency: int | None = None,
    isolation: Literal["slot", "task"] = "slot",
    retention: Retention | None = DEFAULT_RETENTION,
    middleware: Sequence[Middleware] = (),
) -> GroupContext:
    """Open a worker group as a scope: `async with open_worker_group(conninfo, workers) as group: …`.

    Inside the block jobs run. Leaving it, for whatever reason and at whatever instant, gives every
    job in flight back without charging it an attempt. A normal exit stops gracefully: handlers get
    `grace_period` to end. An exception or a cancel cancels them at once.

    Args:
        conninfo: libpq connection string or URI; its password is never logged.
        workers: at least one, each for another queue. The other arguments: see `GroupOptions`.

    Raises:
        OptionError: an argument is refused; nothing was opened.
        DatabaseError: the server cannot be reached at start. SchemaError: run `triojobs migrate`.
        LeaseLostError: the lease was lost and the group cannot register again.
        The body's own error comes bare when it is alone; several errors come in an exception group.

    Cancellation: leaving takes at most grace_period + close_timeout + call_timeout + 1 seconds (20 by
    default), given handlers that obey cancellation.
    """
    options = GroupOptions(
        name=default_name() if name is None else name,
        schema=schema,
        grace_period=grace_period,
        close_timeout=close_timeout,
        call_timeout=call_timeout,
        lease_duration=lease_duration,
        lease_margin=lease_margin,
        beat_interval=beat_interval,
        loop_dead_after=loop_dead_after,
        hard_stop=hard_stop,
        hard_stop_after=hard_stop_after,
        poll_interval=poll_interval,
        listening_poll_interval=listening_poll_interval,
        rescan_interval=rescan_interval,
        claim_linger=claim_linger,
        listen_conninfo=checked_conninfo("listen_conninfo", listen_conninfo) if listen_conninfo else None,
        notify=notify,
        pooled=pooled,
        job_connections=job_connections,
        concurrency=concurrency,
        isolation=isolation,
        retention=checked_retention(retention),
        middleware=checked_middleware(middleware),
    )
    checked_conninfo("conninfo", conninfo)
    options = with_workers(options, checked_workers(workers))

    def make_store() -> Store:
        return PostgresStore(
            conninfo,
            schema=options.schema,
            call_timeout=options.call_timeout,
            listen_conninfo=options.listen_conninfo,
            pooled=options.pooled,
            notify=options.notify,
            job_connections=options.job_connections or 1,
        )

    return GroupContext(make_store, workers, options)


class ClientContext:
    """The async context manager that `open_client` returns; protected against Ctrl-C like a nursery."""

    def __init__(self, store: Store, close_timeout: float) -> None:
        self._store = store
        self._close_timeout = close_timeout
        self._entered = False
        self._client: Client
        self._flusher: Flusher
        self._nursery_manager: Any

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Client:
        if self._entered:
            raise entered_twice("open_client")
        self._entered = True
        try:
            await self._store.open()
        except BaseException:
            await self._store.aclose()
            raise
        self._flusher = Flusher(self._store)
        self._nursery_manager = trio.open_nursery()
        nursery = await self._nursery_manager.__aenter__()
        nursery.start_soon(self._flusher.run, name="triojobs flusher")
        nursery.start_soon(self._close_when_cancelled, name="triojobs client")
        self._client = Client(self._store, self._flusher)
        return self._client

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self._close()
        try:
            swallowed: bool = await self._nursery_manager.__aexit__(kind, exc, tb)
        except BaseExceptionGroup as errors:
            if exc is not None and errors.exceptions == (exc,):
                return False  # the nursery is ours: the body's own error comes bare
            raise
        finally:
            self._client._closed = True
            await self._store.aclose()
        return swallowed

    def _close(self) -> None:
        deadline = self._store.now() + self._close_timeout
        self._store.hurry(deadline)
        self._flusher.close(deadline=deadline)

    @trio.lowlevel.enable_ki_protection
    async def _close_when_cancelled(self) -> None:
        # Threads may wait in enqueue_from_thread while the block is being cancelled around them.
        try:
            await self._flusher.ended.wait()
        finally:
            self._close()


def open_client(
    conninfo: str, *, schema: str = DEFAULT_SCHEMA, call_timeout: float = 4.0, pooled: bool = False
) -> ClientContext:
    """Open a client as a scope: `async with open_client(conninfo) as client: …`.

    Args:
        conninfo: libpq connection string or URI. schema: where the tables are. call_timeout: seconds
            per call of the database. pooled: conninfo leads to PgBouncer in transaction mode.

    Raises:
        DatabaseError, SchemaError: the database cannot be reached or does not fit.

    Cancellation: leaving answers everybody who waits for an enqueue, within 5 seconds.
    """
    checked_schema(schema)
    checked_seconds("call_timeout", call_timeout, positive=True)
    store = PostgresStore(
        checked_conninfo("conninfo", conninfo), schema=schema, call_timeout=call_timeout, pooled=pooled
    )
    return ClientContext(store, CLIENT_CLOSE_TIMEOUT)
