"""A part of the sweep: other points for each mode and seed. `-m long` and `python -m tests.sweep --json` run all."""

from __future__ import annotations

import pytest

from .campaign import failures, parts, sweep
from .injections import MODES
from .jobs import KINDS
from .program import FAMILY, program
from .record import Case, Fault

STRIDE = 13  # of two seeds that have a rival and an outsider
SEEDS = (0, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_injection_at_any_point_breaks_an_invariant(seed: int) -> None:
    tallies = [sweep(part, STRIDE) for part in parts(seed)]
    wrong = [what for tally in tallies for what in tally.wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(FAMILY))
def test_no_injection_at_every_point_breaks_an_invariant(seed: int) -> None:
    wrong = [what for part in parts(seed) for what in sweep(part).wrong]
    assert not wrong, "\n".join(wrong)


def test_a_campaign_has_every_mode_and_fault() -> None:
    chosen = list(parts(0))
    assert {part.mode for part in chosen} > set(MODES)
    assert {part.fault for part in chosen} == {None, "refused", "lost_before", "lost_after", "late"}


def test_a_family_of_seeds_has_every_kind_of_job_and_neighbour() -> None:
    family = [program(seed) for seed in range(FAMILY)]
    assert sorted(kind for one in family for kind in one.kinds) == sorted(KINDS)
    assert {one.isolation for one in family} == {"slot", "task"}
    assert {one.notify for one in family} == {one.rival for one in family} == {True, False}
    assert {one.outsider for one in family} == {True, False}


@pytest.mark.parametrize(
    "case",
    [
        Case("sigint", 4, 34, None, Fault(2, "refused")),  # interrupted on entry, and the first close refused
        Case("retire", 5, 255, None, Fault(3, "lost_before")),
        Case("sigint", 2, 13, None, Fault(1, "lost_after")),  # Ctrl-C beside a registration without a reply
    ],
    ids=lambda case: case.command,
)
def test_what_once_went_wrong(case: Case) -> None:
    assert failures([case]) == []
