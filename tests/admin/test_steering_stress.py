"""Everything at once, at random, with operators who steer what others run.

TRIOJOBS_STRESS_SECONDS makes it longer, TRIOJOBS_STRESS_SEED another one.
"""

from __future__ import annotations

import os

import pytest
from steering_stress import SteeringStress

SECONDS = float(os.environ.get("TRIOJOBS_STRESS_SECONDS", "8"))
SEED = int(os.environ.get("TRIOJOBS_STRESS_SEED", "1"))


@pytest.mark.timeout(SECONDS * 2 + 120)
def test_operators_among_random_actors_lose_nothing_run_nothing_twice_and_do_not_deadlock(
    fresh_database: str,
) -> None:
    stress = SteeringStress(fresh_database, seed=SEED)
    stress.run(seconds=SECONDS)
    print(dict(stress.counts), len(stress.claims), "claims")
    for step in (
        "claim",
        "settle",
        "rescue",
        "reschedule",
        "edit",
        "delete",
        "retry_one",
        "cancel_many",
        "retry_many",
        "reschedule_many",
        "edit_many",
        "delete_many",
        "pause",
        "snapshot",
    ):
        assert stress.counts[step] > 3, f"{step} hardly happened: {stress.counts}"
    assert len(stress.claims) > 300
    assert stress.pauses
