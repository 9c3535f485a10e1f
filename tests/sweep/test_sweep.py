"""A part of the sweep: other points for each mode and seed. `python -m tests.sweep --json` runs all."""

from __future__ import annotations

import pytest

from .campaign import cases, failures
from .injections import MODES

STRIDE = 29
SEEDS = range(6)  # both isolations, with and without rivals, outsiders, a cap and notifications


@pytest.mark.parametrize("seed", SEEDS)
def test_no_injection_at_any_point_breaks_an_invariant(seed: int) -> None:
    chosen = list(cases(seed, stride=STRIDE))
    assert {case.mode for case in chosen} > set(MODES)
    assert {case.fault.kind for case in chosen if case.fault} == {
        "refused",
        "lost_before",
        "lost_after",
        "late",
    }
    wrong = failures(chosen)
    assert not wrong, "\n".join(wrong)
