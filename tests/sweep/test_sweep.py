"""A part of the sweep: other points for each mode and seed. `python -m tests.sweep --json` runs all."""

from __future__ import annotations

import pytest

from .campaign import SWEPT, cases, failures
from .record import Case, Fault

STRIDE = 29
SEEDS = (1, 2)


@pytest.mark.long  # some runs turn round and round (see campaign.SWEPT), so it cannot be counted on yet
@pytest.mark.parametrize("seed", SEEDS)
def test_no_injection_at_any_point_breaks_an_invariant(seed: int) -> None:
    chosen = list(cases(seed, stride=STRIDE))
    assert {case.mode for case in chosen} > set(SWEPT)
    assert {case.fault.kind for case in chosen if case.fault} == {
        "refused",
        "lost_before",
        "lost_after",
        "late",
    }
    wrong = failures(chosen)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "case",
    [
        Case("sigint", 4, 34, None, Fault(2, "refused")),  # interrupted on entry, and the first close refused
        Case("retire", 5, 255, None, Fault(3, "lost_before")),
    ],
    ids=lambda case: case.command,
)
def test_what_once_went_wrong(case: Case) -> None:
    assert failures([case]) == []
