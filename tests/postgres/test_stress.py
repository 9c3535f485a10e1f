"""Everything at once, at random, with a checker of what must hold whatever happens.

TRIOJOBS_STRESS_SECONDS makes it longer, TRIOJOBS_STRESS_SEED another one.
"""

from __future__ import annotations

import os

import pytest
from stress import Stress

SECONDS = float(os.environ.get("TRIOJOBS_STRESS_SECONDS", "8"))
SEED = int(os.environ.get("TRIOJOBS_STRESS_SEED", "1"))


@pytest.mark.timeout(SECONDS * 2 + 120)
def test_random_actors_lose_nothing_run_nothing_twice_and_do_not_deadlock(database: str) -> None:
    stress = Stress(database, seed=SEED)
    stress.run(seconds=SECONDS)
    print(dict(stress.counts), len(stress.claims), "claims")
    for step in (
        "claim",
        "settle",
        "settle_again",
        "sweep",
        "close",
        "rescue",
        "cancel",
        "retry",
        "snapshot",
    ):
        assert stress.counts[step] > 5, f"{step} hardly happened: {stress.counts}"
    assert len(stress.claims) > 500
