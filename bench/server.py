"""One private PostgreSQL for a whole call, with stock settings and default durability.

Each run gets a database of its own, copied from a template that was filled once, so that all rounds
of all contenders start from the same bytes. TRIOJOBS_PG_BINDIR chooses the server's programs (default:
those of the wheel in the extra `embedded`), TRIOJOBS_BENCH_DSN a running server to use instead.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import conninfo as conninfos
from psycopg import sql
from psycopg.rows import dict_row

from triojobs._embedded_cluster import Cluster, running_cluster

__all__ = ["Database", "Server", "cpu_seconds", "private_server"]


def cpu_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process; 0 where it cannot be read."""
    total = 0
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(schedstat.read_text().split()[0])
    return total / 1e9


class Database:
    """A database of one run."""

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo

    @property
    def environment(self) -> dict[str, str]:
        """What makes libpq, asyncpg and node-postgres connect here."""
        names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
        values = conninfos.conninfo_to_dict(self.conninfo)
        return {names[name]: str(values[name]) for name in names if name in values}

    def row(self, query: LiteralString) -> tuple[Any, ...]:
        """Return the first row of a query."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            row = conn.execute(query).fetchone()
        assert row is not None
        return row

    def counts(self, query: LiteralString) -> dict[str, Any]:
        """Return the first row of a query as a dict."""
        with psycopg.connect(self.conninfo, autocommit=True, row_factory=dict_row) as conn:
            row = conn.execute(query).fetchone()
        assert row is not None
        return row

    def cpu_seconds(self) -> float:
        """Return the processor time of the sessions that are connected here, where we can see them."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            pids = conn.execute(
                "SELECT pid FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        return sum(cpu_seconds(pid) for (pid,) in pids)

    def execute(self, *statements: LiteralString) -> None:
        """Run statements, each in a transaction of its own."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            for statement in statements:
                conn.execute(statement)


class Server:
    """A running server, and the databases that we made on it."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._templates: dict[object, str] = {}
        with psycopg.connect(conninfo) as conn:
            self.version = conn.info.parameter_status("server_version") or ""
            self._copy = "STRATEGY file_copy" if conn.info.server_version >= 150_000 else ""
            shown = [
                f"{name} {conn.execute(f'SHOW {name}').fetchone()[0]}"  # type: ignore[index]
                for name in ("fsync", "synchronous_commit", "shared_buffers")
            ]
        self.description = f"PostgreSQL {self.version}, {', '.join(shown)}"

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[Database]:
        """Lend a new database, a copy of `template`, and drop it."""
        name = self._create(template)
        try:
            yield self._named(name)
        finally:
            self._drop(name)

    def template(self, key: object, fill: Callable[[Database], None]) -> str:
        """Return the name of the database that `fill` filled for this key, at the first call."""
        if key not in self._templates:
            name = self._create("template0")
            self._templates[key] = name
            fill(self._named(name))
            # What autovacuum would have done, had the jobs been waiting for a minute.
            self._named(name).execute("VACUUM (ANALYZE)")
        return self._templates[key]

    def forget_templates(self) -> None:
        """Drop what `template` made."""
        while self._templates:
            self._drop(self._templates.popitem()[1])

    def _named(self, name: str) -> Database:
        return Database(conninfos.make_conninfo(self._conninfo, dbname=name))

    def _create(self, template: str) -> str:
        name = f"bench_{uuid.uuid4().hex[:12]}"
        statement = sql.SQL(f"CREATE DATABASE {{}} TEMPLATE {{}} {self._copy}")
        with psycopg.connect(self._conninfo, autocommit=True) as conn:
            conn.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
            conn.execute("CHECKPOINT")
        return name

    def _drop(self, name: str) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def private_server() -> Iterator[Server]:
    """Start a server and stop it at the end, or use the one that TRIOJOBS_BENCH_DSN names."""
    if given := os.environ.get("TRIOJOBS_BENCH_DSN"):
        server = Server(given)
        try:
            yield server
        finally:
            server.forget_templates()
    else:
        with running_cluster(Cluster()) as conninfo:
            yield Server(conninfo)
