"""Connecting by a deadline of our own.

psycopg and libpq wait at least two seconds for every host, which is longer than a short `call_timeout`,
and nothing can hurry them while they do. So the steps are made here (libpq's manual, "Database
Connection Control Functions": PQconnectStart, PQconnectPoll), between waits that look at the deadline.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import ConnStatus, PGconn, PollingStatus, abc

from .failures import cannot_connect, checked_options, one_line
from .hosts import Hosts, Where, addresses, share

__all__ = ["connect_in_time"]

LOOK: Final = 0.05  # seconds between looks whether the deadline was brought nearer
WHERE: Final = ("host", "hostaddr", "port")
Timeout = psycopg.errors.ConnectionTimeout


def connect_in_time(
    conninfo: str,
    hosts: Hosts,
    left: Callable[[], float],
    *,
    operation: str,
    defaults: Mapping[str, Any],
) -> psycopg.Connection[Any]:
    """Open an autocommit connection to the first host that answers, while there are seconds `left()`.

    Args:
        left: may begin to return less while we wait.
        defaults: libpq parameters that the conninfo may override.

    Raises:
        DatabaseError: says what each host answered, and what to check in the conninfo.
    """
    given = checked_options(conninfo, operation=operation)
    options = {**defaults, **given, "client_encoding": "utf8"}  # SQL_ASCII would make bytes of texts
    if len(hosts) > 1 and "PGTARGETSESSIONATTRS" not in os.environ:
        # A standby would accept us and refuse every write.
        options.setdefault("target_session_attrs", "read-write")
    failures: list[psycopg.Error] = []
    order = hosts.order()
    for position, (host, where) in enumerate(order):
        ends = time.monotonic() + share(left(), len(order) - position)
        conn = _ask(options, where, ends, left, failures)
        if conn is not None:
            hosts.answered(host)
            return conn
        if isinstance(failures[-1], Timeout):
            hosts.timed_out(host)
        if left() <= 0:
            break
    texts = dict.fromkeys(one_line(exc) for exc in failures)
    raise cannot_connect("; ".join(texts), given, operation=operation) from failures[-1]


def _ask(
    options: Mapping[str, Any],
    where: Where,
    ends: float,
    left: Callable[[], float],
    failures: list[psycopg.Error],
) -> psycopg.Connection[Any] | None:
    """Ask one host, at each of its addresses, until `ends`; on None there are new failures."""
    options = {name: value for name, value in options.items() if name not in WHERE}
    try:
        most = _connect_timeout(options)
        found = addresses(where)
    except psycopg.Error as exc:
        failures.append(exc)
        return None
    for n, address in enumerate(found):
        now = time.monotonic()
        until = now + min((ends - now) / (len(found) - n), most)
        try:
            conn = psycopg.Connection(_connect({**options, **address}, until, left))
        except psycopg.Error as exc:
            failures.append(exc)
        else:
            conn.autocommit = True
            return conn
    return None


def _connect(parameters: Mapping[str, Any], until: float, left: Callable[[], float]) -> abc.PGconn:
    """Connect to one address until a time of the monotonic clock, and while something is `left`."""
    pgconn = PGconn.connect_start(make_conninfo("", **parameters).encode())
    try:
        status = PollingStatus.WRITING  # as the manual wants it: first of all wait until writable
        while pgconn.status != ConnStatus.BAD and status != PollingStatus.FAILED:
            if status == PollingStatus.OK:
                pgconn.nonblocking = 1  # psycopg's way to use it
                return pgconn
            if min(until - time.monotonic(), left()) <= 0:
                raise Timeout(f"{_told(parameters)} failed: timeout expired")
            if _ready(pgconn.socket, status, min(until - time.monotonic(), left(), LOOK)):
                status = PollingStatus(pgconn.connect_poll())
        raise psycopg.OperationalError(pgconn.get_error_message())
    except BaseException:
        pgconn.finish()
        raise


def _ready(descriptor: int, status: PollingStatus, seconds: float) -> bool:
    poll = select.poll()  # select() refuses descriptors from 1,024 on
    poll.register(descriptor, select.POLLIN if status == PollingStatus.READING else select.POLLOUT)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _connect_timeout(options: Mapping[str, Any]) -> float:
    """Return the seconds for an address that the user wants at most."""
    given = options.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT") or 0
    try:
        return float(given) if float(given) > 0 else math.inf
    except ValueError:
        raise psycopg.ProgrammingError(f"bad value for connect_timeout: {given!r}") from None


def _told(parameters: Mapping[str, Any]) -> str:
    """Name a connection as libpq does."""
    host, address = parameters.get("host") or "", parameters.get("hostaddr") or ""
    port = parameters.get("port") or "5432"
    if not (host or address) or host.startswith(("/", "@")):
        return f'connection to server on socket in "{host}", port {port}'
    named = f'"{host}" ({address})' if host and address and host != address else f'"{host or address}"'
    return f"connection to server at {named}, port {port}"
