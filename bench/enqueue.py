"""Enqueue: one job after another, many callers of one process, eight processes, in bulk."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import psycopg

from triojobs._model import Registration
from triojobs._sql import groups, notify

from .contenders import OURS, SQL, Contender
from .drain import who
from .rounds import Line, compare, interleave
from .running import BenchError
from .server import Database, Server

__all__ = ["enqueue"]

JOBS: Final = 5000  # one after another, each with a commit of its own
CALLERS: Final = 100
CONNECTIONS: Final = 8
CHUNKS: Final = (1000, 10_000)
RATE: Final = "jobs/s"


def sent(
    server: Server,
    contender: Contender,
    do: str,
    *,
    jobs: int,
    processes: int = 1,
    before: Callable[[Database], None] = lambda database: None,
    **order: Any,
) -> float:
    """Send jobs into an empty database from some processes at once; return jobs per second of all.

    Raises:
        BenchError: the jobs that wait afterwards are not those that were sent.
    """
    config = "quick" if "quick" in contender.configs else "best"
    key = ("enqueue", contender.name, config)
    template = server.template(key, partial(contender.prepare, config=config))
    each = jobs // processes
    with server.database(template) as database, contextlib.ExitStack() as stack:
        before(database)
        programs = [
            stack.enter_context(contender.program(database, config, do, jobs=each, **order))
            for _ in range(processes)
        ]
        for program in programs:
            program.hear("ready")
        for program in programs:
            program.go()
        seconds: float = max(program.hear("seconds") for program in programs)
        waiting = database.row(contender.waiting)[0]
        if waiting != each * processes:
            raise BenchError(f"{contender.name} was given {each * processes} jobs, but {waiting} wait")
    return each * processes / seconds


def somebody_waits(database: Database) -> None:
    """Leave the mark of a living group that sleeps: each enqueue has to notify."""
    group_id = uuid.uuid4()
    with psycopg.connect(database.conninfo, autocommit=True) as conn:
        groups.register(conn, "triojobs", Registration(group_id, "asleep", "here", 0, "", 3600.0))
        notify.mark_waiting(conn, "triojobs", group_id, ["bench"])


def enqueue(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """All ways in, beside each peer and beside bare INSERTs (`sql`: the same statement, nobody notified)."""
    jobs = jobs or JOBS
    contenders = who(against)
    peers = [c for c in contenders if c is not SQL]
    yield from one_at_a_time(server, contenders, jobs, rounds)
    if SQL in contenders:
        yield from eight_connections(server, jobs, rounds)
    if peers:
        yield from in_bulk(server, peers, jobs * 20, rounds)


def one_at_a_time(server: Server, contenders: Sequence[Contender], jobs: int, rounds: int) -> Iterator[Line]:
    """One caller, and many callers of one process, beside one caller of each other."""
    ways = {
        "enqueue, one at a time": partial(sent, server, OURS, "single", jobs=jobs),
        "enqueue, one at a time, SyncClient": partial(sent, server, OURS, "sync", jobs=jobs),
        f"enqueue, {CALLERS} tasks": partial(sent, server, OURS, "tasks", jobs=jobs * 4, callers=CALLERS),
        f"enqueue, {CALLERS} threads": partial(sent, server, OURS, "threads", jobs=jobs * 4, callers=CALLERS),
    }
    runs = dict(ways) | {c.name: partial(sent, server, c, "single", jobs=jobs) for c in contenders}
    found = interleave(runs, rounds)
    for way in ways:
        for contender in contenders:
            told = {"unit": RATE, "config": "one caller, one job a commit", "versions": contender.version}
            yield compare(way, contender.name, found[way], found[contender.name], jobs=jobs, **told)


def eight_connections(server: Server, jobs: int, rounds: int) -> Iterator[Line]:
    """Eight processes with a connection each, with notification on, beside the bare statement."""
    eight = partial(sent, server, jobs=jobs * 4, processes=CONNECTIONS)
    ways = {
        "nobody waits": partial(eight, OURS, "sync"),
        "a group waits": partial(eight, OURS, "sync", before=somebody_waits),
        "notified inside the caller's transaction": partial(eight, OURS, "inside"),
    }
    found = interleave(ways | {"sql": partial(eight, SQL, "single")}, rounds)
    for way in ways:
        yield compare(
            f"enqueue, {CONNECTIONS} connections, {way}",
            "sql",
            found[way],
            found["sql"],
            unit=RATE,
            config="SyncClient" if "inside" not in way else "enqueue_on",
            jobs=jobs * 4,
        )


def in_bulk(server: Server, peers: Sequence[Contender], jobs: int, rounds: int) -> Iterator[Line]:
    """Whole lists in one call, of each size that the peers are asked for."""
    runs = {
        (c.name, chunk): partial(sent, server, c, "bulk", jobs=jobs, chunk=chunk)
        for c in [OURS, *peers]
        for chunk in CHUNKS
    }
    found = interleave(runs, rounds)
    for chunk in CHUNKS:
        for peer in peers:
            yield compare(
                f"enqueue, {chunk:,} in a call",
                peer.name,
                found[OURS.name, chunk],
                found[peer.name, chunk],
                unit=RATE,
                config="its call for many",
                jobs=jobs,
                versions=peer.version,
            )
