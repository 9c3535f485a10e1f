"""The sweep in parts: a mode at every point, two injections at once, calls of the store that fail.

How many points and calls there are is measured by each part, on a run of its own without an injection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .harness import run
from .injections import ENDING, MODES
from .invariants import violations
from .record import Case, Fault, Record
from .world import FAULTS

__all__ = ["Part", "Tally", "failures", "parts", "sweep"]

# At every point the ways to end, to interrupt and to dispossess a group; the others at every third, each
# seed at other ones: what they disturb lasts for longer than three steps.
EVERYWHERE = frozenset({"cancel", "sibling", "stop", "own_scope", "sigint", "retire"})
THINNED = 3
# Once more while the first is being obeyed; `retire+cancel` and the like end what is being renewed.
DOUBLED = (*sorted(ENDING), "lose+cancel", "own_scope+cancel", "retire+cancel", "restart+sigint")
DOUBLED_STEP = 8
DOUBLED_WITHIN = 120  # points from the first to the second


@dataclass(frozen=True)
class Part:
    """Cases that belong together: of one seed, and a mode, or a mode twice, or a kind of fault."""

    seed: int
    mode: str = "cancel"
    doubled: bool = False
    fault: str | None = None


@dataclass
class Tally:
    """What came of some runs: how many, and of each that is wrong its command and what did not hold."""

    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    def check(self, case: Case) -> Record:
        """Run a case and note what does not hold."""
        record = run(case)
        self.runs += 1
        if found := violations(record):
            self.wrong.append("\n    ".join([case.command, *found]))
        return record


def parts(seed: int) -> Iterator[Part]:
    """Yield the parts of a seed."""
    yield from (Part(seed, mode) for mode in MODES)
    yield from (Part(seed, mode, doubled=True) for mode in DOUBLED)
    yield from (Part(seed, fault=kind) for kind in FAULTS)


def sweep(part: Part, stride: int = 1) -> Tally:
    """Run a part; with a stride every so many of its points, others for each mode and seed."""
    tally = Tally()
    if part.fault is not None:
        _sweep_fault(part.seed, part.fault, stride, tally)
    elif part.doubled:
        _sweep_doubled(part.seed, part.mode, stride, tally)
    else:
        _sweep_mode(part.seed, part.mode, stride, tally)
    return tally


def failures(cases: list[Case]) -> list[str]:
    """Run single cases; return what is wrong."""
    tally = Tally()
    for case in cases:
        tally.check(case)
    return tally.wrong


def _sweep_mode(seed: int, mode: str, stride: int, tally: Tally) -> None:
    points = tally.check(Case(mode, seed)).points
    step = stride if mode in EVERYWHERE else stride * THINNED
    for k in range((seed + MODES.index(mode)) % step, points, step):
        tally.check(Case(mode, seed, k))


def _sweep_doubled(seed: int, mode: str, stride: int, tally: Tally) -> None:
    points = tally.check(Case(mode, seed)).points
    step, n = stride * DOUBLED_STEP, DOUBLED.index(mode)
    for k in range((seed + n) % step, points, step):
        tally.check(Case(mode, seed, k, k + 1 + (7 * k + 13 * n) % DOUBLED_WITHIN))


def _sweep_fault(seed: int, kind: str, stride: int, tally: Tally) -> None:
    calls, n = len(tally.check(Case("cancel", seed)).calls), FAULTS.index(kind)
    for j in range((seed + n) % stride, calls, stride):
        fault = Fault(j, kind)
        points = tally.check(Case("cancel", seed, fault=fault)).points
        tally.check(Case(MODES[(j + n) % len(MODES)], seed, (37 * j + 11 * n) % points, fault=fault))
