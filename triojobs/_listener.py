"""LISTEN without a thread: the connection's file descriptor wakes a task.

Rules, each measured: drain before the first wait (a notification that another query consumed does
not make the descriptor readable again); nothing else on this connection but the probe;
`notify_closing` before close; after a reconnect LISTEN again, then claim once. Half-open
connections are silent, so a probe goes through the server now and then, and polling never stops.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

import psycopg
import trio
from psycopg import sql

from ._backoff import reconnect_delay
from ._errors import DatabaseError
from ._logs import Log
from ._sql.notify import group_channel
from ._store import ListenEvents

__all__ = ["PROBE_INTERVAL", "listen"]

log = Log("triojobs.listener")

PROBE_INTERVAL: Final = 15.0  # seconds: how long a dead link may go unnoticed
Connection = psycopg.Connection[Any]


async def listen(
    *,
    schema: str,
    group_id: uuid.UUID,
    queues: Collection[str],
    events: ListenEvents,
    connect: Callable[[Callable[[Connection], None]], Awaitable[Connection]],
    probe: Callable[[Connection], Awaitable[None]],
) -> None:
    """Report wake-ups until cancelled; reconnect with backoff by itself.

    `connect` and `probe` cross to a thread, bounded in time, and raise DatabaseError. `connect` calls
    the function that it gets there, with the connection that it then returns.
    """

    def begin(conn: Connection) -> None:
        for channel in (schema, mine):
            conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    failures = 0
    wanted = frozenset(queues)
    mine = group_channel(group_id)
    while True:
        try:
            conn = await connect(begin)
        except DatabaseError as exc:
            failures += 1
            log.warning("cannot listen: %s", exc, extra={"event": "listen_failed"})
        else:
            try:
                failures = 0
                events.listening(True)
                await _receive(conn, schema, mine, wanted, events, probe)
            except (DatabaseError, psycopg.Error, OSError) as exc:
                failures += 1
                log.warning("stopped listening: %s", exc, extra={"event": "listen_lost"})
            finally:
                _close(conn)
                events.listening(False)
        await trio.sleep(reconnect_delay(failures, random.random))


async def _receive(
    conn: Connection,
    schema: str,
    mine: str,
    wanted: frozenset[str],
    events: ListenEvents,
    probe: Callable[[Connection], Awaitable[None]],
) -> None:
    while True:
        for notification in list(conn.notifies(timeout=0)):
            if notification.channel == mine:
                events.group_woken()
            elif notification.payload in wanted:
                events.queue_woken(notification.payload)
        with trio.move_on_after(PROBE_INTERVAL) as quiet:
            await trio.lowlevel.wait_readable(conn.fileno())
        if quiet.cancelled_caught:
            await probe(conn)


def _close(conn: Connection) -> None:
    if not conn.closed:
        trio.lowlevel.notify_closing(conn.fileno())
        conn.close()
