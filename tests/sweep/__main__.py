"""Sweep everything (`--json`), a mode, or repeat one run: `python -m tests.sweep --mode cancel --seed 3 --k 117`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context

from . import gate
from .campaign import cases, failures
from .harness import run
from .injections import MODES
from .invariants import violations
from .record import Case, Fault
from .world import FAULTS

SEEDS = 3  # every kind of job once
PART = 100  # cases that a process takes at once


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--json", action="store_true", help="run all; print one JSON object on one line")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="with --json: how many")
    parser.add_argument("--mode", help=f"one of {', '.join(MODES)}, or two of them: a+b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, help="inject before this step; without: never")
    parser.add_argument("--k2", type=int, help="and once more before this one")
    parser.add_argument("--fault", help=f"j:kind, the j-th call fails; kinds: {', '.join(FAULTS)}")
    parser.add_argument("--all", action="store_true", help="every k; --step sets the stride")
    parser.add_argument("--step", type=int, default=1)
    asked = parser.parse_args()
    if asked.json:
        return everything(asked.seeds)
    if asked.mode is None or not set(asked.mode.split("+")) <= set(MODES):
        parser.error(f"--mode is {asked.mode}, but must be of {', '.join(MODES)}")
    fault = None
    if asked.fault:
        j, _, kind = asked.fault.partition(":")
        fault = Fault(int(j), kind)
    case = Case(asked.mode, asked.seed, asked.k, asked.k2, fault)
    if not asked.all:
        return show(case)
    return sweep(case, asked.step)


def everything(seeds: int) -> int:
    """Run the whole sweep in two processes, then the gates; print what came of it."""
    began = time.perf_counter()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        chosen = list(chain.from_iterable(pool.map(cases_of, range(seeds))))
        parts = [chosen[n : n + PART] for n in range(0, len(chosen), PART)]
        wrong = list(chain.from_iterable(pool.map(failures, parts)))
    for what in wrong:
        print(what, file=sys.stderr)
    gate_runs, gate_violations = gate.sweep()
    answer = {
        "runs": len(chosen),
        "violations": len(wrong),
        "gate_runs": gate_runs,
        "gate_violations": gate_violations,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(answer))
    return bool(wrong or gate_violations)


def cases_of(seed: int) -> list[Case]:
    """Return the cases of a seed, for another process."""
    return list(cases(seed))


def show(case: Case) -> int:
    record = run(case)
    print(f"{record.points} steps, {len(record.calls)} calls, {record.exit.at:g} virtual seconds")
    for j, call in enumerate(record.calls):
        print(f"  call {j}: {call}")
    for each in record.journal.runs:
        print(f"  job {each.job_id} {each.kind}: attempt {each.attempt}, claim {each.fence[1]}, {each.ended}")
    if record.error is not None:
        traceback.print_exception(record.error)
    found = violations(record)
    print("\n".join(found) or "everything holds")
    return bool(found)


def sweep(case: Case, step: int) -> int:
    base = run(Case(case.mode, case.seed, None, None, case.fault))
    began, bad, names = time.perf_counter(), 0, Counter[str]()
    print(f"K = {base.points}, {len(base.calls)} calls")
    for k in range(0, base.points, step):
        at_k = Case(case.mode, case.seed, k, None, case.fault)
        found = violations(run(at_k))
        if found:
            bad += 1
            names.update(what.split(":")[0] for what in found)
            if bad <= 5:
                print(at_k.command, *found, sep="\n    ")
    runs = len(range(0, base.points, step))
    print(f"{runs} runs, {bad} bad, {(time.perf_counter() - began) / runs * 1000:.1f} ms each; {dict(names)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
