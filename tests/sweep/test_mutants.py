"""The harness is sharp: it notices each wrong variant of the runtime, by an invariant that is meant for it."""

from __future__ import annotations

import pytest

from . import mutants
from .invariants import NAMES
from .mutants import MUTANTS, Mutant, kill


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_killed(mutant: Mutant) -> None:
    assert kill(mutant) is not None, f"survived {mutants.LIMIT} runs"


def test_no_mutant_is_killed_by_the_runtime_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "LIMIT", 20)
    harmless = Mutant("harmless", lambda patch: None, frozenset(NAMES), mode="cancel")
    assert kill(harmless) is None
