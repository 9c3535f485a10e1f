"""Which server answers: the probe before an embedded server is adopted, and that of the listener."""

from __future__ import annotations

from typing import Any, Final

import psycopg

__all__ = ["data_directory_at", "is_read_only"]

SHOW_DATA_DIRECTORY: Final = "SHOW data_directory"
READ_ONLY: Final = "SELECT current_setting('transaction_read_only')::boolean"
PROBE_TIMEOUT: Final = 2  # seconds, libpq's least; a local socket answers in 2 ms or refuses at once


def data_directory_at(conninfo: str) -> str | None:
    """Return the data directory of the server that answers, or None when none does.

    Threads: blocks its thread for 2 ms where a server answers, at most 2 s where one accepts the
    connection and stays silent (it is stopped).
    """
    try:
        with psycopg.connect(conninfo, connect_timeout=PROBE_TIMEOUT, autocommit=True) as conn:
            row = conn.execute(SHOW_DATA_DIRECTORY).fetchone()
    except psycopg.Error:
        return None
    return str(row[0]) if row else None


def is_read_only(conn: psycopg.Connection[Any]) -> bool:
    """Return whether this connection may not write: the server is a standby, or was told to refuse."""
    row = conn.execute(READ_ONLY).fetchone()
    return row is not None and bool(row[0])
