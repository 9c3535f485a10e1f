"""A case is a name: it repeats exactly. Trio's private switches, on which that rests, are pinned."""

from __future__ import annotations

import random

import pytest
from trio._core import _run

from .harness import run
from .record import Case, Fault, Record


def story(record: Record) -> tuple[object, ...]:
    """What happened, in order, without the ids of objects."""
    runs = [(r.job_id, r.kind, r.attempt, r.fence, r.ended, r.started_at) for r in record.journal.runs]
    tables = record.database.tables
    rows = [
        (o.job_id, o.no, o.status, o.claim_no, o.finished_at) for h in tables.outcomes.values() for o in h
    ]
    return record.points, record.calls, runs, rows, record.injections


@pytest.mark.parametrize(
    "case",
    [
        Case("cancel", 1, 150),
        Case("retire+cancel", 2, 100, 140),
        Case("sigint", 4, 90, None, Fault(7, "lost_after")),
    ],
    ids=lambda case: case.command,
)
def test_a_case_repeats_exactly(case: Case) -> None:
    assert story(run(case)) == story(run(case))


def test_another_seed_is_another_story() -> None:
    assert story(run(Case("cancel", 1))) != story(run(Case("cancel", 7)))


def test_trio_still_has_the_switches_that_order_its_tasks() -> None:
    assert isinstance(_run._ALLOW_DETERMINISTIC_SCHEDULING, bool)
    assert isinstance(_run._r, random.Random)
