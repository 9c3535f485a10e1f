"""Drain: how fast waiting jobs with handlers that do nothing are run to their outcomes.

The clock runs from the first handler's start to the moment when the database shows no unfinished job;
what came before (start, connecting, the first poll) is not counted for anybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import psycopg

from .contenders import OURS, SQL, Contender
from .peers import PEERS, installed
from .rounds import Line, compare, interleave
from .server import Database, Server

__all__ = ["Drained", "compare_rates", "drain", "drained", "payload", "snapshot", "who"]

JOBS: Final = 100_000
SNAPSHOT_JOBS: Final = 400_000  # dead rows hurt the more, the more there are
LOOK: Final = 0.002  # seconds between looks for the last unfinished job: 0.2 % of a run of one second
RATE: Final = "jobs/s"
Meanwhile = Callable[[Database], AbstractContextManager[Any]]
Road = Callable[[Database], AbstractContextManager[Database]]


@dataclass(frozen=True)
class Drained:
    """One run: jobs per second, and processor time per job in microseconds.

    The processor's time says the same on a busy machine, where a rate does not.
    """

    rate: float
    client_cpu: float
    server_cpu: float

    def __str__(self) -> str:
        return f"{self.rate:,.0f} jobs/s, {self.client_cpu:.1f} + {self.server_cpu:.1f} us CPU a job"


def drained(
    server: Server,
    contender: Contender,
    config: str,
    *,
    jobs: int,
    size: int = 95,
    meanwhile: Meanwhile = nullcontext,
    road: Road = nullcontext,
) -> Drained:
    """Run `jobs` waiting jobs in a database of their own.

    `meanwhile` makes what surrounds the run, `road` the way on which the worker reaches the database.

    Raises:
        BenchError: the counts are off.
    """
    key = (contender.name, config, jobs, size)
    template = server.template(key, partial(contender.fill, config=config, jobs=jobs, size=size))
    with server.database(template) as database, meanwhile(database):
        with (
            road(database) as far,
            contender.program(far, config, "work", jobs=jobs, size=size) as program,
        ):
            before = program.start().cpu_seconds()
            started = program.hear("started")
            program.hear("handled")
            ended = wait_until_finished(database, contender)
            client, backends = program.cpu_seconds() - before, database.cpu_seconds()
            handled = program.last()["count"]
        contender.check(database, jobs, handled)
    return Drained(jobs / (ended - started), client / jobs * 1e6, backends / jobs * 1e6)


def compare_rates(
    what: str, against: str, ours: Sequence[Drained], peer: Sequence[Drained], *, config: str, **more: Any
) -> Line:
    """Return the line of two drains."""
    line = compare(what, against, [r.rate for r in ours], [r.rate for r in peer], unit=RATE, config=config)
    for side, runs in (("ours", ours), ("peer", peer)):
        line[f"{side}_client_cpu_us"] = round(median(run.client_cpu for run in runs), 2)
        line[f"{side}_server_cpu_us"] = round(median(run.server_cpu for run in runs), 2)
    return line | more


def wait_until_finished(database: Database, contender: Contender) -> float:
    """Return when no job was unfinished any more, by CLOCK_MONOTONIC."""
    with psycopg.connect(database.conninfo, autocommit=True) as conn:
        while True:
            row = conn.execute(contender.unfinished).fetchone()
            assert row is not None
            if not row[0]:
                return time.monotonic()
            time.sleep(LOOK)


def who(names: Sequence[str]) -> list[Contender]:
    """Return the contenders of these names, `sql` or peers."""
    return [SQL if name == "sql" else installed(name) for name in names]


def drain(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """Our best configuration beside each peer's best and default, our default beside each default."""
    jobs = jobs or JOBS
    contenders = who(against)
    sides = [(c, config) for c in contenders for config in ("best", "default") if config in c.configs]
    runs = {"triojobs best": partial(drained, server, OURS, "best", jobs=jobs)}
    if any(config == "default" for _, config in sides):
        runs["triojobs default"] = partial(drained, server, OURS, "default", jobs=jobs)
    for contender, config in sides:
        most = min(jobs, contender.configs[config].most)
        runs[f"{contender.name} {config}"] = partial(drained, server, contender, config, jobs=most)
    found = interleave(runs, rounds)
    for contender, config in sides:
        name = f"{contender.name} {config}"
        told: dict[str, Any] = {
            "config": contender.configs[config].said,
            "jobs": jobs,
            "peer_jobs": min(jobs, contender.configs[config].most),
            "versions": contender.version,
        }
        yield compare_rates("drain", name.removesuffix(" best"), found["triojobs best"], found[name], **told)
        if config == "default":
            yield compare_rates("drain, our default", name, found["triojobs default"], found[name], **told)


def held_snapshot(database: Database) -> AbstractContextManager[Any]:
    """Hold a snapshot that is older than everything that the run does: no dead row can be removed."""
    conn = psycopg.connect(database.conninfo)
    conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    conn.execute("SELECT pg_current_xact_id()")
    return conn


def snapshot(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """A drain while an old snapshot is held: beside the peers, and beside the same without."""
    jobs = jobs or SNAPSHOT_JOBS
    contenders = who(against)
    runs = {"triojobs without": partial(drained, server, OURS, "best", jobs=jobs)}
    for contender in [OURS, *contenders]:
        most = min(jobs, contender.configs["best"].most)
        runs[contender.name] = partial(drained, server, contender, "best", jobs=most, meanwhile=held_snapshot)
    found = interleave(runs, rounds)
    for name in ["triojobs without", *(c.name for c in contenders)]:
        config = OURS if name == "triojobs without" else PEERS.get(name, SQL)
        yield compare_rates(
            "drain, snapshot held",
            name,
            found["triojobs"],
            found[name],
            config=config.configs["best"].said,
            jobs=jobs,
        )


def payload(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """A drain with payloads of 1.5 kB beside the same with 95 bytes, ours and others'."""
    jobs = jobs or JOBS
    sides = [OURS, *who(against)]
    runs = {
        f"{side.name}, {size} B": partial(
            drained, server, side, "best", jobs=min(jobs, side.configs["best"].most), size=size
        )
        for side in sides
        for size in (95, 1500)
    }
    found = interleave(runs, rounds)
    for side in sides:
        large, small = found[f"{side.name}, 1500 B"], found[f"{side.name}, 95 B"]
        yield compare_rates(
            f"drain, 1.5 kB payload ({side.name})",
            "95 B",
            large,
            small,
            config=side.configs["best"].said,
            jobs=jobs,
        )
        if side is not OURS:
            yield compare_rates(
                "drain, 1.5 kB payload",
                side.name,
                found["triojobs, 1500 B"],
                large,
                config=side.configs["best"].said,
                jobs=jobs,
            )
