"""Run chaos: `python -m tests.chaos --jobs 5000 --json`. Exit code 1 when something is wrong."""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from .checks import Findings
from .mutants import MUTANTS
from .plan import Plan
from .run import chaos

SHOWN = 10  # of each check's complaints
WIDTH = 300  # characters of one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000, help="how many to enqueue (default 5000)")
    parser.add_argument("--workers", type=int, default=4, help="processes, at least 3 (default 4)")
    parser.add_argument(
        "--stops", type=int, default=2, help="at least so many stops beyond a lease (default 2)"
    )
    parser.add_argument("--seconds", type=float, help="give up after so long (default 120 + jobs / 50)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="a wrong runtime, which must be noticed")
    parser.add_argument("--keep", type=Path, help="a new directory in which journals and stderr stay")
    parser.add_argument("--json", action="store_true", help="one line on stdout; progress goes to stderr")
    asked = parser.parse_args()
    if asked.jobs < 1 or asked.workers < 3:
        parser.error("at least one job and three workers: one is stopped, one killed, one goes on")
    if asked.keep is not None and asked.keep.exists():
        parser.error(f"{asked.keep} exists")
    seconds = 120 + asked.jobs / 50 if asked.seconds is None else asked.seconds
    plan = Plan(asked.jobs, asked.workers, asked.stops, seconds, asked.seed, asked.mutant, asked.keep)
    logging.disable(logging.WARNING)  # the driver's own client is disturbed, too
    say(f"seed {plan.seed}")
    result = trio.run(run_until_signal, plan)
    if isinstance(result, int):
        return 128 + result
    findings, figures = result
    summary = summarize(findings, figures, plan)
    for name, complaints in findings.wrong.items():
        for complaint in complaints[:SHOWN]:
            say(f"{name}: {complaint[:WIDTH]}")
    if asked.json:
        print(json.dumps(summary))
    else:
        for key, value in summary.items():
            print(f"{key:>18}  {value}")
    return bool(summary["violations"])


async def run_until_signal(plan: Plan) -> tuple[Findings, dict[str, Any]] | int:
    """Run; on the first SIGINT or SIGTERM stop everything and return the signal's number."""
    received: list[int] = []

    async def obey(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            received.append(number)
            scope.cancel()

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(obey, signals, scope)
                result = await chaos(plan, say)
            nursery.cancel_scope.cancel()
    return received[0] if scope.cancelled_caught else result


def summarize(findings: Findings, figures: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the figures by the names under which they are published."""
    given_up = figures.pop("given_up")
    return {
        "jobs": findings.jobs,
        "done": findings.statuses["done"],
        "lost": findings.count("lost"),
        "double_outcomes": findings.count("double_outcomes"),
        "overlaps": findings.count("overlaps"),
        "overlaps_stopped": findings.overlaps_stopped,
        "duplicates": findings.duplicates,
        **figures,
        "killed": findings.statuses["killed"],
        "cancelled": findings.statuses["cancelled"],
        "past_checkpoint": findings.count("past_checkpoint"),
        "unexcused_duplicates": findings.count("unexcused"),
        "wrong": {name: len(found) for name, found in findings.wrong.items()},
        "violations": sum(map(len, findings.wrong.values())) + given_up,
        "seed": plan.seed,
    }


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
