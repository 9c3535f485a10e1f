"""Who is measured: triojobs and bare SQL here, the peers in bench.peers.

A contender names its program, its configurations, and how the database shows that the jobs are done.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, LiteralString

from triojobs._version import VERSION

from .running import BenchError, Program, run_to_end
from .server import Database

__all__ = ["OURS", "PROGRAMS", "SQL", "Config", "Contender"]

PROGRAMS: Final = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Config:
    """One configuration of a contender.

    Attributes:
        said: what it is, for people. options: for its program. most: more jobs than these it is not
            given, because it would take minutes; its rate is the better for it, not the worse.
    """

    said: str
    options: Mapping[str, Any] = field(default_factory=dict)
    most: int = 10_000_000


@dataclass(frozen=True)
class Contender:
    """Something that runs jobs.

    Attributes:
        unfinished: SQL, true while a job is not finished. waiting: SQL, how many jobs wait.
        counts: SQL, one row of named counts: `finished` must be the number of jobs (None: it keeps no
            history), all others zero.
    """

    name: str
    version: str
    command: Sequence[str]
    configs: Mapping[str, Config]
    unfinished: LiteralString
    waiting: LiteralString
    counts: LiteralString

    def program(self, database: Database, config: str, do: str, **order: Any) -> Program:
        """Start its program."""
        options = self.configs[config].options
        defaults = {"jobs": 0, "size": 95, "chunk": 1000}
        return Program(self.command, defaults | {"do": do, "config": options} | order, database)

    def prepare(self, database: Database, config: str) -> None:
        """Create its tables."""
        order = {"do": "prepare", "config": self.configs[config].options, "jobs": 0, "size": 0}
        run_to_end(self.command, order, database)

    def fill(self, database: Database, config: str, *, jobs: int, size: int = 95) -> None:
        """Create its tables and enqueue jobs."""
        self.prepare(database, config)
        if jobs:
            with self.program(database, config, "bulk", jobs=jobs, size=size) as program:
                program.start().hear("seconds")

    def check(self, database: Database, jobs: int, handled: int | None = None) -> None:
        """Raise BenchError unless the database says that exactly these jobs were done, each once."""
        counts = database.counts(self.counts)
        finished = counts.pop("finished")
        wrong = {name: n for name, n in counts.items() if n}
        if finished not in (None, jobs):
            wrong["finished"] = finished
        if handled not in (None, jobs):
            wrong["handled"] = handled
        if wrong:
            raise BenchError(f"{self.name} was given {jobs} jobs, but the database says {wrong}")


COUNTS: Final[LiteralString] = """
SELECT count(DISTINCT job_id) AS finished, count(*) - count(DISTINCT job_id) AS repeated,
       count(*) FILTER (WHERE status <> 'done') AS not_done,
       (SELECT count(*) FROM triojobs.ready) + (SELECT count(*) FROM triojobs.scheduled) AS waiting,
       (SELECT count(*) FROM triojobs.leases) AS running
FROM triojobs.outcomes
"""
UNFINISHED: Final[LiteralString] = (
    "SELECT EXISTS (SELECT FROM triojobs.leases) OR EXISTS (SELECT FROM triojobs.ready)"
)

BATCH: Final = 500  # what the settler writes at once, and the least that a worker with 1,000 slots claims

OURS: Final = Contender(
    name="triojobs",
    version=f"triojobs {VERSION}",
    command=[sys.executable, str(PROGRAMS / "run_triojobs.py")],
    configs={
        "best": Config("concurrency=1000", {"worker": {"concurrency": 1000}}),
        "default": Config("as it comes: concurrency=10"),
        "task": Config(
            'concurrency=1000, isolation="task"',
            {"worker": {"concurrency": 1000}, "group": {"isolation": "task"}},
        ),
    },
    unfinished=UNFINISHED,
    waiting="SELECT count(*) FROM triojobs.ready",
    counts=COUNTS,
)

SQL: Final = Contender(
    name="sql",
    version=f"triojobs {VERSION}",
    command=[sys.executable, str(PROGRAMS / "run_sql.py")],
    configs={"best": Config(f"one thread, the worker's statements, batches of {BATCH}", {"batch": BATCH})},
    unfinished=UNFINISHED,
    waiting="SELECT count(*) FROM triojobs.ready",
    counts=COUNTS,
)
