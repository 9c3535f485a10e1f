"""The hosts of a conninfo: in which order to ask them, and how long to wait for each.

The time of a call is divided among the hosts, but whoever is asked gets at least `LEAST` of it (a far
server with TLS needs several round trips). What is too short for all is enough for the first: a host
that did not answer in time is asked last from then on, so that the next call begins with the others. A
host that answers is asked first. One that refuses costs no time and keeps its place.
"""

from __future__ import annotations

import os
import socket
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

__all__ = ["Hosts", "addresses", "share"]

LEAST: Final = 2.0  # seconds, as libpq has it

Where = dict[str, str]  # host, hostaddr and port, as far as they are given


class Hosts:
    """Whom to connect to. Used by several threads; each assignment is a whole."""

    def __init__(self, conninfo: str) -> None:
        try:
            given = conninfo_to_dict(conninfo)
        except psycopg.Error:
            given = {}  # whoever connects says it better
        self._lists = {
            name: str(given.get(name) or os.environ.get(variable) or "").split(",")
            for name, variable in (("host", "PGHOST"), ("hostaddr", "PGHOSTADDR"), ("port", "PGPORT"))
        }
        self._count = max(len(self._lists["host"]), len(self._lists["hostaddr"]))
        self._first = 0
        self.era = 0  # goes up when the primary is another one

    def __len__(self) -> int:
        return self._count

    def order(self) -> list[tuple[int, Where]]:
        """Return every host, by number, in the order in which to ask them."""
        numbers = [(self._first + n) % self._count for n in range(self._count)]
        return [(n, self._where(n)) for n in numbers]

    def answered(self, host: int) -> None:
        """Ask this one first from now on."""
        self._first = host

    def timed_out(self, host: int) -> None:
        """Ask this one last, if it is still the first."""
        if self._first == host:
            self._first = (host + 1) % self._count

    def demoted(self) -> None:
        """Trust no connection of the past: it may read for ever what is no longer true."""
        self.era += 1

    def _where(self, host: int) -> Where:
        """Return host, hostaddr and port, as far as they are given; one port is everybody's."""
        return {
            name: values[host] if len(values) > 1 else values[0]
            for name, values in self._lists.items()
            if values != [""]
        }


def addresses(where: Where) -> list[Where]:
    """Return the addresses of a host, each as parameters of libpq, which would not bound each by itself.

    The resolver is bounded by its own settings alone (resolv.conf); addresses need none.
    """
    host = where.get("host", "")
    if not host or host.startswith(("/", "@")) or where.get("hostaddr"):
        return [where]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise psycopg.OperationalError(f'could not translate host name "{host}" to address: {exc}') from None
    return [{**where, "hostaddr": str(address)} for address in dict.fromkeys(item[4][0] for item in found)]


def share(left: float, takers: int) -> float:
    """Return the seconds for the next of so many hosts, of those that are left for all."""
    return min(left, max(LEAST, left / takers))
