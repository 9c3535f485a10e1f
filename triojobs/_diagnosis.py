"""From what a server says about itself and our tables to findings, each with its remedy. Pure.

A finding is broken when something does not work now, a warning when it will not for long or costs more
than it should, a note when somebody may want to know.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "ClockFacts",
    "Finding",
    "GroupFacts",
    "Holder",
    "Level",
    "QueueFacts",
    "RoleFacts",
    "ServerFacts",
    "TableFacts",
    "clock",
    "groups",
    "holders",
    "queues",
    "role",
    "server",
    "tables",
]

OLDEST_SERVER: Final = 140000  # server_version_num
SKEW: Final = 1.0  # seconds; less is no trouble for anybody, and common
# Each job leaves three dead rows behind, so a minute between two rounds of autovacuum is worth many.
DEAD: Final = 100_000  # rows
VACUUM_AGE: Final = 300.0  # seconds: a round that is so late is not coming by itself
MANY_XIDS: Final = 1_000_000  # transactions since: a slot that lags so far is not in use


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis. `text` and `remedy` are sentences without their full stops."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Who answered. `pooled`: the process that answers is not the one that was connected to."""

    version: int
    version_text: str
    pooled: bool
    is_standby: bool
    autovacuum: bool
    track_counts: bool


@dataclass(frozen=True, slots=True)
class ClockFacts:
    """The server's clock when this machine's showed `here`; the answer took `round_trip` seconds."""

    server: dt.datetime
    here: dt.datetime
    round_trip: float


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """What the role may do. `lacks`: "INSERT on leases", …; `owns`: the tables are its own."""

    name: str
    read_only: bool
    isolation: str
    sees_sessions: bool
    lacks: Sequence[str]
    owns: bool


@dataclass(frozen=True, slots=True)
class Holder:
    """What keeps VACUUM from removing dead rows: since `seconds` (None: unknown), `xids` transactions ago.

    `kind`: "session", "prepared transaction" or "replication slot"; `active`: somebody uses the slot.
    """

    kind: str
    name: str
    detail: str
    seconds: float | None
    xids: int | None
    active: bool = True


@dataclass(frozen=True, slots=True)
class TableFacts:
    """One of our tables, by the server's statistics. `vacuumed`: seconds since; None: never."""

    name: str
    live: int
    dead: int
    vacuumed: float | None
    autovacuum: bool


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """Worker groups. `lapsed`: names of those that died and were not closed; `stranded`: jobs under them."""

    living: Sequence[str]
    listeners: int
    lapsed: Sequence[str]
    stranded: int


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """Queues: due jobs of those that nobody serves, and since when others are paused."""

    unserved: Sequence[tuple[str, int]]
    paused: Sequence[tuple[str, int, str]]


def server(facts: ServerFacts, *, declared_pooled: bool) -> Iterator[Finding]:
    """Judge the server and the way to it."""
    if facts.version < OLDEST_SERVER:
        yield Finding(
            Level.BROKEN,
            "server",
            f"PostgreSQL {facts.version_text} is older than 14",
            "upgrade the server",
        )
    else:
        yield Finding(Level.OK, "server", f"PostgreSQL {facts.version_text}")
    if facts.is_standby:
        yield Finding(
            Level.BROKEN,
            "server",
            "it is a standby, which refuses every write",
            "connect to the primary server",
        )
    if facts.pooled and not declared_pooled:
        yield Finding(
            Level.WARNING,
            "pooler",
            "the connection leads through PgBouncer, or another pooler",
            "pass pooled=True and a direct listen_conninfo to worker groups, --pooled to these commands, and "
            "migrate over a direct connection",
        )
    elif facts.pooled:
        yield Finding(Level.OK, "pooler", "the connection leads through one, as --pooled says")
    elif declared_pooled:
        yield Finding(
            Level.NOTE, "pooler", "there is none on this connection", "leave --pooled out: calls are faster"
        )
    yield from _autovacuum(facts)


def _autovacuum(facts: ServerFacts) -> Iterator[Finding]:
    off = [name for name in ("autovacuum", "track_counts") if not getattr(facts, name)]
    if off:
        yield Finding(
            Level.BROKEN,
            "autovacuum",
            f"it does not run, as {' and '.join(off)} {'is' if len(off) == 1 else 'are'} off: "
            "dead rows slow down each claim",
            f"ALTER SYSTEM SET {off[0]} = on, then SELECT pg_reload_conf()",
        )


def clock(facts: ClockFacts) -> Iterator[Finding]:
    """Compare the server's clock with this machine's."""
    skew = (facts.here - facts.server).total_seconds()
    words = f"this machine's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    if abs(skew) - facts.round_trip / 2 > SKEW:
        yield Finding(
            Level.WARNING,
            "clock",
            f"{words}: a run_at or deadline that is computed here is wrong by that",
            "run NTP on both machines, or pass delay=, which counts on the server's clock",
        )
    else:
        yield Finding(Level.OK, "clock", f"this machine's and the server's differ by less than {SKEW:g} s")


def role(facts: RoleFacts) -> Iterator[Finding]:
    """Judge what the role is set to and may do."""
    before_all = f"ALTER ROLE {facts.name}"
    if facts.read_only:
        yield Finding(
            Level.BROKEN,
            "role",
            "its transactions are read-only by default (default_transaction_read_only)",
            f"{before_all} SET default_transaction_read_only = off, or look whether the database or the "
            "conninfo sets it",
        )
    if facts.isolation != "read committed":
        yield Finding(
            Level.WARNING,
            "role",
            f"its transactions are {facts.isolation.upper()} by default: ours are pinned, but admin_on refuses "
            "yours, and key conflicts of enqueue_on end them",
            f"{before_all} SET default_transaction_isolation = 'read committed', or begin those "
            "transactions so",
        )
    if facts.lacks:
        shown = ", ".join(facts.lacks[:4]) + (
            f" and {len(facts.lacks) - 4} more" if len(facts.lacks) > 4 else ""
        )
        yield Finding(
            Level.BROKEN,
            "rights",
            f"role {facts.name} lacks {shown}",
            "as the owner: GRANT USAGE ON SCHEMA, GRANT ALL ON ALL TABLES and ON ALL SEQUENCES IN SCHEMA to it",
        )
    else:
        yield Finding(Level.OK, "rights", f"role {facts.name} may read and write all tables")
    if not facts.lacks and not facts.owns:
        yield Finding(
            Level.NOTE,
            "rights",
            f"role {facts.name} does not own the tables: its groups prune job by job and make no partitions",
            "run one group, or `triojobs prune` now and then, as the owner",
        )
    if not facts.sees_sessions:
        yield Finding(
            Level.NOTE,
            "rights",
            f"role {facts.name} does not see the sessions of others: what holds back VACUUM may be hidden",
            f"GRANT pg_read_all_stats TO {facts.name}",
        )


def holders(found: Sequence[Holder], *, patience: float) -> Iterator[Finding]:
    """Judge what keeps dead rows from being removed: what is older than `patience` seconds."""
    judged = [finding for holder in found if (finding := _held(holder, patience)) is not None]
    yield from judged
    if not judged:
        yield Finding(Level.OK, "vacuum", f"nothing holds it back for more than {patience:g} s")


def _held(holder: Holder, patience: float) -> Finding | None:
    since = "" if holder.seconds is None else f" since {_seconds(holder.seconds)}"
    if holder.kind == "replication slot":
        if holder.active and (holder.xids or 0) < MANY_XIDS:
            return None
        state = "in use, and lags" if holder.active else "not in use, and keeps"
        return Finding(
            Level.WARNING,
            "vacuum",
            f"replication slot {holder.name} is {state} old rows or WAL on the server ({holder.detail})",
            f"bring its reader back, or SELECT pg_drop_replication_slot('{holder.name}')",
        )
    if holder.seconds is not None and holder.seconds <= patience:
        return None
    text = f"{holder.kind} {holder.name} ({holder.detail}) holds it back{since}"
    if holder.kind == "prepared transaction":
        return Finding(
            Level.WARNING,
            "vacuum",
            text,
            f"COMMIT PREPARED '{holder.name}' or ROLLBACK PREPARED '{holder.name}'",
        )
    return Finding(
        Level.WARNING,
        "vacuum",
        text,
        f"let it end, or SELECT pg_terminate_backend({holder.name}); idle_in_transaction_session_timeout "
        "keeps it from coming back",
    )


def tables(found: Sequence[TableFacts]) -> Iterator[Finding]:
    """Judge the dead rows in our tables."""
    worst = False
    for table in found:
        if not table.autovacuum:
            worst = True
            yield Finding(
                Level.WARNING,
                "tables",
                f"autovacuum is switched off for {table.name}",
                f"ALTER TABLE {table.name} RESET (autovacuum_enabled)",
            )
        late = table.vacuumed is None or table.vacuumed > VACUUM_AGE
        if table.dead > DEAD and table.dead > 2 * table.live and late:
            worst = True
            last = "never" if table.vacuumed is None else f"{_seconds(table.vacuumed)} ago"
            yield Finding(
                Level.WARNING,
                "tables",
                f"{table.name} has {table.dead} dead rows beside {table.live} live ones; last vacuumed: {last}",
                f"remove what holds it back, then VACUUM {table.name}",
            )
    if not worst:
        yield Finding(Level.OK, "tables", f"{sum(t.dead for t in found)} dead rows, which is no concern")


def groups(facts: GroupFacts) -> Iterator[Finding]:
    """Judge the worker groups."""
    count = len(facts.living)
    if count == 0:
        yield Finding(
            Level.NOTE, "groups", "no worker group lives: no job runs", "start one: `triojobs worker`"
        )
    elif facts.listeners < count:
        names = ", ".join(facts.living[:4]) + (", …" if count > 4 else "")
        which = "it polls" if count == 1 else "those without one poll"
        yield Finding(
            Level.WARNING,
            "listen",
            f"{count} living worker group(s) ({names}), but {facts.listeners} connection(s) that LISTEN: {which} "
            "instead, and notice jobs up to a second late",
            "look for 'cannot listen' in their logs; behind a pooler give listen_conninfo, a direct one",
        )
    else:
        yield Finding(Level.OK, "groups", f"{count} living, each with its connection that LISTENs")
    if facts.lapsed and count == 0:
        names = ", ".join(facts.lapsed[:4]) + (", …" if len(facts.lapsed) > 4 else "")
        yield Finding(
            Level.WARNING if facts.stranded else Level.NOTE,
            "groups",
            f"{len(facts.lapsed)} group(s) died ({names}); {facts.stranded} job(s) wait to be taken from them",
            "start any worker group: it takes them within seconds",
        )


def queues(facts: QueueFacts) -> Iterator[Finding]:
    """Judge the queues that do not go on."""
    for name, ready in facts.unserved:
        yield Finding(
            Level.WARNING,
            "queues",
            f"{ready} due job(s) in queue {name!r}, which no living worker group serves",
            "start a group with a worker for it",
        )
    for name, ready, reason in facts.paused:
        yield Finding(
            Level.NOTE,
            "queues",
            f"queue {name!r} is paused ({reason}), with {ready} due job(s)",
            f"`triojobs queues resume {name}`",
        )


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
