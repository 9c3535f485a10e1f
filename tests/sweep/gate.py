"""Cancel at every point of every call, with real threads and a real PostgreSQL: many runs on one database.

    python -m tests.sweep.gate
    python -m tests.sweep.gate --mode cancel --operation "claiming jobs" --occurrence 0 --point committed

Real threads are not repeatable to the step, so the same name may meet another interleaving next time.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from typing import Final

import psycopg

import triojobs
from tests.tools.shots import hear_ctrl_c

from .gate_invariants import violations
from .gate_program import KINDS, MODES, POINTS, Place, Program, jobs

PROCESSES: Final = 2
TABLES: Final = [
    "jobs",
    "outcomes",
    "scheduled",
    "ready",
    "leases",
    "keys",
    "worker_groups",
    "waiting",
    "witnesses",
]
WITNESSES: Final = ["gate_sent", "gate_transacted", "gate_claims"]
# A claim that was given back leaves no row; so a trigger keeps its own books of claims.
WITNESS: Final = """
CREATE TABLE public.gate_sent (job_id bigint);
CREATE TABLE public.gate_transacted (job_id bigint, group_id uuid, claim_no bigint);
CREATE TABLE public.gate_claims (job_id bigint);
CREATE FUNCTION public.gate_note() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO public.gate_claims VALUES (NEW.id); RETURN NULL; END';
CREATE TRIGGER gate_note AFTER INSERT ON triojobs.leases FOR EACH ROW EXECUTE FUNCTION public.gate_note();
"""


@dataclass
class Gate:
    """A migrated database, used again and again."""

    conninfo: str
    runs: int = 0
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.db = psycopg.connect(self.conninfo, autocommit=True, application_name="gate")
        self.db.execute(WITNESS)

    def close(self) -> None:
        self.db.close()

    def one(self, mode: str, place: Place | None, k: int | None = None) -> tuple[Program, list[str]]:
        """Run once; return the program and what did not hold."""
        for table in TABLES:
            self.db.execute(f"DELETE FROM triojobs.{table}")  # type: ignore[arg-type]
        for table in WITNESSES:
            self.db.execute(f"DELETE FROM public.{table}")  # type: ignore[arg-type]
        triojobs.enqueue_many_on(self.db, jobs, list(KINDS))
        program = Program(self.conninfo, mode, place, k)
        with _quiet():
            program.run()
        self.runs += 1
        wrong = violations(program, self.db)
        if wrong:
            self.found.append("\n    ".join([command(mode, place, k), *wrong]))
        return program, wrong

    def plain(self) -> Program:
        """Run without an injection: it tells the places, in the order in which they were reached, and the steps."""
        program, wrong = self.one("none", None)
        assert not wrong, wrong
        return program


def command(mode: str, place: Place | None, k: int | None) -> str:
    """Return the command that repeats a run."""
    if place is None:
        return f"python -m tests.sweep.gate --mode {mode}" + ("" if k is None else f" --k {k}")
    return (
        f"python -m tests.sweep.gate --mode {mode} --operation '{place.operation}'"
        f" --occurrence {place.occurrence} --point {place.point}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def own_gate() -> Iterator[Gate]:
    """A gate on a server of its own, without durability: nobody wants its rows back."""
    from triojobs._embedded_cluster import Cluster, running_cluster

    with running_cluster(Cluster(settings={"fsync": "off", "full_page_writes": "off"})) as conninfo:
        triojobs.migrate(conninfo)
        with contextlib.closing(Gate(conninfo)) as gate:
            yield gate


def sweep() -> tuple[int, int]:
    """Inject every mode at every point, and all that need none before every step; return (runs, bad ones).

    In two processes with a server each. Violations go to stderr.
    """
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_part, range(PROCESSES)))
    for found in chain.from_iterable(found for _, found in parts):
        print(found, file=sys.stderr)
    return sum(runs for runs, _ in parts), sum(len(found) for _, found in parts)


def _part(number: int) -> tuple[int, list[str]]:
    with own_gate() as gate:
        plain = gate.plain()
        at_places = [(mode, place, None) for place in plain.seen for mode in place.modes]
        before_steps = [(mode, None, k) for mode in MODES if mode != "lost" for k in range(plain.steps)]
        for mode, place, k in (at_places + before_steps)[number::PROCESSES]:
            gate.one(mode, place, k)
        return gate.runs, gate.found


def main() -> int:
    hear_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.gate", description=__doc__)
    parser.add_argument("--mode", choices=(*MODES, "none"))
    parser.add_argument("--operation")
    parser.add_argument("--occurrence", type=int, default=0)
    parser.add_argument("--point", choices=POINTS)
    parser.add_argument("--k", type=int, help="before this task step, without a gate")
    asked = parser.parse_args()
    if asked.mode is None:
        began = time.monotonic()
        runs, bad = sweep()
        print(f"{runs} runs, {bad} with violations, {time.monotonic() - began:.1f} s")
        return bool(bad)
    place = None if asked.operation is None else Place(asked.operation, asked.occurrence, asked.point)
    with own_gate() as gate:
        program, wrong = gate.one(asked.mode, place, asked.k)
    for seen in program.seen:
        print(f"  {seen.operation} {seen.occurrence} {seen.point}")
    for run in program.runs:
        print(f"  job {run.job_id}: {run.ended}")
    print("\n".join(wrong) or "everything holds")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
