"""The hosts of a conninfo, in the order in which to try them, and how long each may take.

libpq gives every host the whole connect_timeout, so a conninfo with several hosts multiplies it. Here the
time of a call is divided among them, and when it is too short for all (libpq's least is two seconds for
each) only as many are tried as fit; the next try begins with the others. So a call is bounded, no host
is left out for ever, and a host that answered is asked first.

A name that resolves to several addresses counts as one host, although each address gets that time. The
resolver itself is bounded by its own settings alone (resolv.conf); addresses need none.
"""

from __future__ import annotations

import os
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

__all__ = ["Hosts"]

LEAST: Final = 2  # seconds that libpq waits for a host at least
PORT: Final = "5432"  # where none is given


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

    def choose(self, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Choose for one try of about `seconds` at most (and 2 at least).

        Returns libpq parameters: those that replace the conninfo's own (whom to ask), and those that
        the conninfo may override.
        """
        tried = max(1, min(self._count, int(seconds / LEAST)))
        defaults: dict[str, Any] = {"connect_timeout": max(LEAST, int(seconds / tried))}
        if self._count == 1:
            return {}, defaults
        if "PGTARGETSESSIONATTRS" not in os.environ:
            defaults["target_session_attrs"] = (
                "read-write"  # a standby would accept us and refuse every write
            )
        chosen = [(self._first + n) % self._count for n in range(tried)]
        self._first = (self._first + tried) % self._count  # unless one of them answers
        return self._only(chosen), defaults

    def answered(self, conn: psycopg.Connection[Any]) -> None:
        """Note who answered: it is asked first from now on."""
        for n in range(self._count if self._count > 1 else 0):
            only = self._only([n])
            names = {only.get("host"), only.get("hostaddr")} - {None, ""}
            if names & {conn.info.host, conn.info.hostaddr} and (only.get("port") or PORT) == str(
                conn.info.port
            ):
                self._first = n

    def _only(self, chosen: list[int]) -> dict[str, str]:
        """Return host, hostaddr and port of these hosts, as far as they are given; one port is everybody's."""
        return {
            name: ",".join(values[n] if len(values) > 1 else values[0] for n in chosen)
            for name, values in self._lists.items()
            if values != [""]
        }
