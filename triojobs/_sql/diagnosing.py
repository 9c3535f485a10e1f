"""What a server says about itself, our role, our tables and groups: the facts of a diagnosis.

Reads only, and only what the server keeps ready: catalogues, settings, statistics, and the narrow tables.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg

from .._diagnosis import (
    ClockFacts,
    GroupFacts,
    Holder,
    QueueFacts,
    RoleFacts,
    ServerFacts,
    TableFacts,
)
from . import counting
from .connecting import connect_in_time
from .failures import translated
from .hosts import Hosts
from .server import READ_ONLY
from .statements import plain_cursor, statement

__all__ = [
    "clock",
    "groups",
    "holders",
    "open_session",
    "queues",
    "role",
    "schema_exists",
    "server",
    "tables",
]

CONNECT: Final = 10.0  # seconds until a host that does not answer is given up
QUEUES: Final = 1000  # that are looked at
LOOKS: Final = 3  # at the clock; the quickest counts
LISTEN_ROLE: Final = "triojobs listen"  # what the connections of worker groups that LISTEN are called


SERVER: Final = """
SELECT current_setting('server_version_num')::int, current_setting('server_version'), pg_backend_pid(),
       pg_is_in_recovery(), current_setting('autovacuum')::boolean, current_setting('track_counts')::boolean
"""

# The session's own values: what the role, the database and the conninfo make of it.
ROLE: Final = """
SELECT current_user::text, current_setting('default_transaction_read_only')::boolean,
       current_setting('default_transaction_isolation'), pg_has_role('pg_read_all_stats', 'USAGE')
"""

SCHEMA_EXISTS: Final = "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = {channel})"

# What workers, producers and operators need together. A partition is reached through its parent.
LACKS: Final = """
WITH space AS (
    SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = {channel}
), needed(name, rights) AS (VALUES
    ('migrations', '{{SELECT}}'::text[]),
    ('jobs', '{{SELECT,INSERT,UPDATE,DELETE}}'), ('scheduled', '{{SELECT,INSERT,UPDATE,DELETE}}'),
    ('ready', '{{SELECT,INSERT,UPDATE,DELETE}}'), ('leases', '{{SELECT,INSERT,UPDATE,DELETE}}'),
    ('outcomes', '{{SELECT,INSERT,DELETE}}'), ('keys', '{{SELECT,INSERT,UPDATE,DELETE}}'),
    ('worker_groups', '{{SELECT,INSERT,UPDATE,DELETE}}'), ('waiting', '{{SELECT,INSERT,DELETE}}'),
    ('witnesses', '{{SELECT,INSERT,DELETE}}'), ('paused_queues', '{{SELECT,INSERT,DELETE}}'),
    ('drains', '{{SELECT,INSERT,DELETE}}'), ('chores', '{{SELECT,INSERT,UPDATE}}'),
    ('job_status', '{{SELECT}}')
)
SELECT 'USAGE on schema ' || {channel} FROM space s WHERE NOT has_schema_privilege(s.oid, 'USAGE')
UNION ALL
SELECT r.wanted || ' on ' || c.relname
FROM needed n
JOIN space s ON true
JOIN pg_catalog.pg_class c ON c.relnamespace = s.oid AND c.relname = n.name
CROSS JOIN LATERAL unnest(n.rights) r(wanted)
WHERE NOT has_table_privilege(c.oid, r.wanted)
UNION ALL
SELECT 'USAGE on ' || c.relname FROM pg_catalog.pg_class c JOIN space s ON c.relnamespace = s.oid
WHERE c.relkind = 'S' AND c.relname IN ('job_ids', 'outcome_nos') AND NOT has_sequence_privilege(c.oid, 'USAGE')
"""

OWNS: Final = """
SELECT coalesce(bool_and(pg_has_role(c.relowner, 'USAGE')), false) FROM pg_catalog.pg_class c
WHERE c.relname IN ('jobs', 'outcomes')
  AND c.relnamespace = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = {channel})
"""

# A session of another database holds back nothing here; what sends WAL on belongs to all. Autovacuum's own
# snapshots do not count. Catalogue xmins hold back the catalogues alone, but a slot that nobody reads
# keeps WAL as well, until the disk is full.
HOLDERS: Final = """
SELECT * FROM (
    SELECT 'session', a.pid::text,
           coalesce(nullif(a.application_name, ''), a.backend_type) || ', ' || coalesce(a.state, 'streaming'),
           extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.backend_start))::float8,
           greatest(age(a.backend_xmin), age(a.backend_xid)), true
    FROM pg_catalog.pg_stat_activity a
    WHERE a.pid <> pg_backend_pid() AND (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL)
      AND (a.datname = current_database() OR a.datname IS NULL) AND a.backend_type <> 'autovacuum worker'
    UNION ALL
    SELECT 'prepared transaction', p.gid, 'of ' || p.owner,
           extract(epoch FROM clock_timestamp() - p.prepared)::float8, age(p.transaction), true
    FROM pg_catalog.pg_prepared_xacts p WHERE p.database = current_database()
    UNION ALL
    SELECT 'replication slot', s.slot_name, s.slot_type, NULL, greatest(age(s.xmin), age(s.catalog_xmin)), s.active
    FROM pg_catalog.pg_replication_slots s
) h(kind, name, detail, seconds, xids, active)
ORDER BY h.xids DESC NULLS LAST, h.seconds DESC NULLS LAST LIMIT 20
"""

TABLES: Final = """
SELECT t.schemaname || '.' || t.relname, t.n_live_tup, t.n_dead_tup,
       extract(epoch FROM clock_timestamp() - greatest(t.last_vacuum, t.last_autovacuum))::float8,
       NOT coalesce('autovacuum_enabled=false' = ANY (c.reloptions), false)
FROM pg_catalog.pg_stat_user_tables t JOIN pg_catalog.pg_class c ON c.oid = t.relid
WHERE t.schemaname = {channel} ORDER BY t.n_dead_tup DESC
"""

# A session that LISTENs has said it last, or has asked since whether the server takes writes.
GROUPS: Final = """
SELECT coalesce(array_agg(g.name ORDER BY g.name) FILTER (WHERE g.lease_until > clock_timestamp()), '{{}}'),
       (SELECT count(*) FROM pg_catalog.pg_stat_activity a
        WHERE a.datname = current_database()
          AND (a.application_name = %(role)s OR a.query LIKE 'LISTEN %%' OR a.query = %(probe)s)),
       coalesce(array_agg(g.name ORDER BY g.name) FILTER (WHERE g.lease_until <= clock_timestamp()), '{{}}'),
       (SELECT count(*) FROM {schema}.leases l
        JOIN {schema}.worker_groups w ON w.id = l.group_id AND w.lease_until <= clock_timestamp())
FROM {schema}.worker_groups g WHERE g.closed_at IS NULL
"""

Connection = psycopg.Connection[Any]


def open_session(conninfo: str) -> Connection:
    """Connect for a look; DatabaseError says what to check when that fails."""
    give_up_at = time.monotonic() + CONNECT
    conn = connect_in_time(
        conninfo,
        Hosts(conninfo),
        lambda: give_up_at - time.monotonic(),
        operation="connecting",
        defaults={"application_name": "triojobs doctor"},
    )
    conn.prepare_threshold = None  # there may be a pooler
    with translated("connecting"):
        if not server(conn).pooled:  # where the session is our own
            # A look at a troubled server must not become one more trouble.
            conn.execute("SET statement_timeout = '10s'; SET lock_timeout = '1s'")
    return conn


def server(conn: Connection) -> ServerFacts:
    """Ask who answers."""
    version, text, pid, standby, autovacuum, counts = _one(conn, SERVER)
    return ServerFacts(version, text, conn.info.backend_pid != pid, standby, autovacuum, counts)


def clock(conn: Connection, here: Callable[[], float]) -> ClockFacts:
    """Compare clocks, as far as a round trip allows."""
    looks: list[ClockFacts] = []
    for _ in range(LOOKS):
        before = here()
        began = time.monotonic()
        at: dt.datetime = _one(conn, "SELECT clock_timestamp()")[0]
        took = time.monotonic() - began
        looks.append(ClockFacts(at, dt.datetime.fromtimestamp(before + took / 2, dt.UTC), took))
    return min(looks, key=lambda look: look.round_trip)


def role(conn: Connection, schema: str) -> RoleFacts:
    """Ask what our role is set to, and may do in the schema, as far as that is there."""
    name, read_only, isolation, sees = _one(conn, ROLE)
    lacks = [row[0] for row in plain_cursor(conn).execute(statement(LACKS, schema)).fetchall()]
    owns = _one(conn, statement(OWNS, schema))[0]
    return RoleFacts(name, read_only, isolation, sees, lacks, owns)


def schema_exists(conn: Connection, schema: str) -> bool:
    """Return whether there is such a schema at all."""
    return bool(_one(conn, statement(SCHEMA_EXISTS, schema))[0])


def holders(conn: Connection) -> list[Holder]:
    """Return what holds back VACUUM in this database, the oldest first."""
    return [Holder(*row) for row in plain_cursor(conn).execute(HOLDERS).fetchall()]


def tables(conn: Connection, schema: str) -> list[TableFacts]:
    """Return our tables, those with the most dead rows first."""
    return [TableFacts(*row) for row in plain_cursor(conn).execute(statement(TABLES, schema)).fetchall()]


def groups(conn: Connection, schema: str) -> GroupFacts:
    """Return who lives, who listens, and who died."""
    parameters = {"role": LISTEN_ROLE, "probe": READ_ONLY}
    row = plain_cursor(conn).execute(statement(GROUPS, schema), parameters).fetchone()
    assert row is not None
    return GroupFacts(*row)


def queues(conn: Connection, schema: str) -> QueueFacts:
    """Return queues with due jobs that nobody serves, and those that are paused."""
    found = counting.counts(conn, schema, counting.names(conn, schema, after="", limit=QUEUES))
    return QueueFacts(
        [(each.name, each.ready) for each in found if each.ready and not each.groups],
        [(each.name, each.ready, each.pause_reason or "") for each in found if each.paused_at is not None],
    )


def _one(conn: Connection, query: Any) -> tuple[Any, ...]:
    row = plain_cursor(conn).execute(query).fetchone()
    assert row is not None
    return row
