"""Scale: several worker processes on one database."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import psycopg

from .contenders import OURS
from .drain import LOOK, RATE, wait_until_finished
from .rounds import Line, compare, interleave
from .running import BenchError
from .server import Database, Server

__all__ = ["processes"]

JOBS: Final = 200_000
PROCESSES: Final = (1, 2, 4, 8)


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
