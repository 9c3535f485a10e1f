"""Sweep everything (`--json`), a mode, or repeat one run: `python -m tests.sweep --mode cancel --seed 3 --k 117`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from typing import NoReturn

from tests.tools.shots import hear_ctrl_c

from . import gate
from .campaign import Tally, parts, sweep
from .harness import collect_rarely, run
from .injections import MODES
from .invariants import violations
from .mutants import LIMIT, MUTANTS, survives
from .program import FAMILY
from .record import Case, Fault, Record
from .world import FAULTS

PROCESSES = 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> int:
    hear_ctrl_c()
    parser = Parser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument(
        "--json",
        action="store_true",
        help="run all, mutants and gates too; print one JSON object on one line (`seconds`: without the gates)",
    )
    parser.add_argument(
        "--seeds",
        type=number(1),
        default=FAMILY,
        help=f"with --json: how many; {FAMILY} have every kind of job",
    )
    parser.add_argument("--mode", type=mode, help=f"one of {', '.join(MODES)}, or two of them: a+b")
    parser.add_argument("--seed", type=number(0), default=0)
    parser.add_argument("--k", type=number(0), help="inject before this step; without: never")
    parser.add_argument("--k2", type=number(0), help="and once more before this later one")
    parser.add_argument(
        "--fault", type=fault, help=f"j:kind, the j-th call fails; kinds: {', '.join(FAULTS)}"
    )
    parser.add_argument("--all", action="store_true", help="every k; --step sets the stride")
    parser.add_argument("--step", type=number(1), default=1)
    asked = parser.parse_args()
    if asked.json:
        return everything(asked.seeds)
    if asked.mode is None:
        parser.error("say --json, or which --mode")
    if asked.k2 is not None and (asked.k is None or asked.k2 <= asked.k):
        parser.error("--k2 needs a --k before it")
    case = Case(asked.mode, asked.seed, asked.k, asked.k2, asked.fault)
    return every_point(replace(case, k=None, k2=None), asked.step) if asked.all else show(case)


# Words of the command line.


class number:
    """A whole number from `least` on."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, text: str) -> int:
        if not text.isdecimal() or int(text) < self.least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {self.least} on")
        return int(text)


def mode(text: str) -> str:
    """A mode, or two."""
    words = text.split("+")
    if len(words) > 2 or not set(words) <= set(MODES):
        raise argparse.ArgumentTypeError(f"{text!r} must be one or two (a+b) of {', '.join(MODES)}")
    return text


def fault(text: str) -> Fault:
    """The number of a call and how it fails."""
    j, _, kind = text.partition(":")
    if not j.isdecimal() or kind not in FAULTS:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be j:kind, as 7:{FAULTS[0]}; kinds: {', '.join(FAULTS)}"
        )
    return Fault(int(j), kind)


# All.


def everything(seeds: int) -> int:
    """Run the whole sweep and the mutants in two processes, then the gates; print what came of it."""
    began = time.perf_counter()
    chosen = list(chain.from_iterable(parts(seed) for seed in range(seeds)))
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=collect_rarely) as pool:
        deaths = pool.map(survives, range(len(MUTANTS)))
        tallies: list[Tally] = list(pool.map(sweep, chosen))
        survivors = [MUTANTS[n].name for n, survived in enumerate(deaths) if survived]
    seconds = time.perf_counter() - began
    wrong = [what for tally in tallies for what in tally.wrong]
    for what in wrong:
        print(what, file=sys.stderr)
    for name in survivors:
        print(f"mutant {name!r} survived {LIMIT} runs", file=sys.stderr)
    gate_runs, gate_violations = gate.sweep()
    answer = {
        "runs": sum(tally.runs for tally in tallies),
        "violations": len(wrong),
        "mutants": len(MUTANTS),
        "mutants_killed": len(MUTANTS) - len(survivors),
        "gate_runs": gate_runs,
        "gate_violations": gate_violations,
        "seconds": round(seconds, 1),
        "gate_seconds": round(time.perf_counter() - began - seconds, 1),
    }
    print(json.dumps(answer))
    return bool(wrong or survivors or gate_violations)


# One, or one mode.


def show(case: Case) -> int:
    """Tell what happens in a run."""
    record = run(case)
    end = "without an end" if record.exit is None else f"{record.exit.at:g} virtual seconds"
    print(f"{record.points} steps, {len(record.calls)} calls, {end}")
    for j, call in enumerate(record.calls):
        print(f"  call {j}: {call}")
    for each in record.journal.runs:
        print(f"  job {each.job_id} {each.kind}: attempt {each.attempt}, claim {each.fence[1]}, {each.ended}")
    if record.error is not None:
        traceback.print_exception(record.error, file=sys.stdout)
    if len(record.injections) < len(case.shots):
        print(f"{len(record.injections)} of {len(case.shots)} injections found something to disturb")
    found = violations(record)
    print("\n".join(found) or "everything holds")
    return bool(found)


def every_point(base: Case, step: int) -> int:
    """Inject at every point, from a base without an injection, which counts too."""
    began, tally = time.perf_counter(), Tally()
    record: Record = tally.check(base)
    for k in range(0, record.points, step):
        tally.check(replace(base, k=k))
    for what in tally.wrong[:5]:
        print(what)
    each = (time.perf_counter() - began) / tally.runs * 1000
    print(f"K = {record.points}, {tally.runs} runs, {len(tally.wrong)} bad, {each:.1f} ms each")
    return bool(tally.wrong)


if __name__ == "__main__":
    sys.exit(main())
