"""Scale: several worker processes on one database, and a worker that is far from its database."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import psycopg
from psycopg import conninfo as conninfos

from . import drain
from .contenders import OURS, PROGRAMS
from .drain import LOOK, RATE, compare_rates, drained, wait_until_finished, who
from .rounds import Line, compare, interleave
from .running import BenchError, Program
from .server import Database, Server

__all__ = ["distance", "processes"]

JOBS: Final = 200_000
PROCESSES: Final = (1, 2, 4, 8)
DELAY: Final = 0.0005  # seconds each way: a round trip of 1 ms, as between two buildings


def together(server: Server, count: int, *, jobs: int) -> float:
    """Return the rate at which `count` workers drain a queue together."""
    template = server.template(("triojobs", "best", jobs, 95), partial(OURS.fill, config="best", jobs=jobs))
    with server.database(template) as database:
        with contextlib.ExitStack() as stack:
            programs = [
                stack.enter_context(OURS.program(database, "best", "work", jobs=jobs)) for _ in range(count)
            ]
            for program in programs:
                program.hear("ready")
            for program in programs:
                program.go()
            wait_for_outcomes(database, jobs)
            ended = wait_until_finished(database, OURS)
            lasts = [program.last() for program in programs]
        OURS.check(database, jobs, sum(last["count"] for last in lasts))
    # One that came last may have found nothing.
    started: float = min(last["first"] for last in lasts if last["count"])
    return jobs / (ended - started)


def wait_for_outcomes(database: Database, jobs: int) -> None:
    """Wait until so many outcomes have been numbered: a look that costs the same at any size."""
    limit = time.monotonic() + 600
    with psycopg.connect(database.conninfo, autocommit=True) as conn:
        while time.monotonic() < limit:
            row = conn.execute("SELECT last_value FROM triojobs.outcome_nos").fetchone()
            assert row is not None
            if row[0] >= jobs:
                return
            time.sleep(LOOK)
    raise BenchError(f"{jobs} jobs were not done in ten minutes")


def processes(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """Two, four and eight worker processes beside one."""
    jobs = jobs or JOBS
    runs = {count: partial(together, server, count, jobs=jobs) for count in PROCESSES}
    found = interleave(runs, rounds)
    for count in PROCESSES[1:]:
        yield compare(
            f"drain, {count} processes",
            "one process",
            found[count],
            found[1],
            unit=RATE,
            config=OURS.configs["best"].said,
            jobs=jobs,
        )


@contextlib.contextmanager
def long_wire(database: Database) -> Iterator[Database]:
    """Lend the database as it is seen over a wire that takes DELAY each way."""
    given = conninfos.conninfo_to_dict(database.conninfo)
    target = f"{given['host']}/.s.PGSQL.{given.get('port', 5432)}"
    with tempfile.TemporaryDirectory(prefix="bench") as directory:
        order = {"do": "delay", "target": target, "directory": directory, "delay": DELAY}
        with Program([sys.executable, str(PROGRAMS / "run_delay.py")], order, database) as wire:
            wire.hear("open")
            yield Database(conninfos.make_conninfo(database.conninfo, host=directory, port="5432"))


def distance(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """A drain over a wire with a round trip of 1 ms, beside others' and beside the same without."""
    jobs = jobs or drain.JOBS
    contenders = who(against)
    runs = {"triojobs near": partial(drained, server, OURS, "best", jobs=jobs)}
    for contender in [OURS, *contenders]:
        most = min(jobs, contender.configs["best"].most)
        runs[contender.name] = partial(drained, server, contender, "best", jobs=most, road=long_wire)
    found = interleave(runs, rounds)
    for name in runs:
        if name != OURS.name:
            config = next((c for c in contenders if c.name == name), OURS).configs["best"].said
            yield compare_rates(
                "drain, 1 ms away", name, found[OURS.name], found[name], config=config, jobs=jobs
            )
