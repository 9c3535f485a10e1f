"""Volume: what a million other rows cost. Finished jobs, waiting jobs, scheduled jobs, queues.

The rate of the first jobs that are run, from the first handler's start to the last one's, beside the
same in a database without the million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, LiteralString

from .contenders import OURS
from .drain import JOBS, RATE
from .rounds import Line, compare, interleave
from .running import BenchError
from .server import Database, Server

__all__ = ["backlog", "history"]

MILLION: Final = 1_000_000
# Whole transitions in one statement each: what a million claims and settles leave behind, in a second.
FINISH: Final[LiteralString] = """
WITH taken AS (DELETE FROM triojobs.ready RETURNING id)
INSERT INTO triojobs.outcomes (job_id, group_id, claim_no, attempt, status, claimed_at)
SELECT id, '00000000-0000-4000-8000-000000000000', id, 1, 'done', clock_timestamp() FROM taken
"""
POSTPONE: Final[LiteralString] = """
WITH taken AS (DELETE FROM triojobs.ready RETURNING *)
INSERT INTO triojobs.scheduled (id, queue, priority, run_at, attempts, max_attempts)
SELECT id, queue, priority, now() + interval '1 day', attempts, max_attempts FROM taken
"""
SPREAD: Final[LiteralString] = """
WITH taken AS (DELETE FROM triojobs.ready RETURNING *),
     body AS (UPDATE triojobs.jobs SET queue = 'other ' || id % 1000)
INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT id, 'other ' || id % 1000, priority, run_at, attempts, max_attempts FROM taken
"""
LEFT: Final[LiteralString] = """
SELECT count(*) AS finished, count(*) - count(DISTINCT job_id) AS repeated,
       (SELECT count(*) FROM triojobs.leases) AS running
FROM triojobs.outcomes
"""


def fill(database: Database, *, jobs: int, others: int, before: LiteralString | None) -> None:
    """Make `others` rows and what `before` makes of them, then the jobs to run; or the others behind them."""
    if before is None:
        OURS.fill(database, "best", jobs=jobs + others)
        return
    OURS.fill(database, "best", jobs=others)
    database.execute(before, "SELECT triojobs.add_partitions()")
    with OURS.program(database, "best", "bulk", jobs=jobs) as program:
        program.start().hear("seconds")


def first_jobs(server: Server, *, jobs: int, others: int, before: LiteralString | None) -> float:
    """Return the rate at which the first `jobs` jobs are run, with all these others around."""
    make = partial(fill, jobs=jobs, others=others, before=before)
    template = server.template(("volume", jobs, others, before), make)
    with server.database(template) as database:
        was = database.counts(LEFT)["finished"]
        with OURS.program(database, "best", "work", jobs=jobs) as program:
            started: float = program.start().hear("started")
            ended: float = program.hear("handled")
            handled = program.last()["count"]
        counts = database.counts(LEFT)
        if counts != {"finished": was + handled, "repeated": 0, "running": 0} or handled < jobs:
            raise BenchError(f"{handled} handlers ran, but the database says {counts}, {was} of them before")
    return jobs / (ended - started)


def beside_none(
    server: Server, kinds: dict[str, LiteralString | None], *, jobs: int | None, rounds: int
) -> Iterator[Line]:
    """Yield a line for each kind of others."""
    jobs = jobs or JOBS
    runs = {"none": partial(first_jobs, server, jobs=jobs, others=0, before=None)}
    for kind, before in kinds.items():
        runs[kind] = partial(first_jobs, server, jobs=jobs, others=MILLION, before=before)
    found = interleave(runs, rounds)
    for kind in kinds:
        yield compare(
            f"drain, {MILLION:,} {kind}",
            "none",
            found[kind],
            found["none"],
            unit=RATE,
            config=OURS.configs["best"].said,
            jobs=jobs,
        )


def history(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """A drain with a million finished jobs beside one with none."""
    return beside_none(server, {"finished": FINISH}, jobs=jobs, rounds=rounds)


def backlog(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """A drain of the first of a million waiting jobs; with a million scheduled ones; with 1,000 queues."""
    kinds = {"waiting behind": None, "scheduled": POSTPONE, "waiting in 1,000 other queues": SPREAD}
    return beside_none(server, kinds, jobs=jobs, rounds=rounds)
