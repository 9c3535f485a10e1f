"""A part of the gate sweep: each operation stopped at each point, and a cancel before every tenth step.

`python -m tests.sweep.gate` runs all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from tests.tools.mutants import code
from triojobs._bridge import Call
from triojobs._model import Claim
from triojobs._postgres import PostgresStore

from .gate import Gate
from .gate_program import POINTS, WORKING, Place

CALLS = ("registering the worker group", "claiming jobs", "settling N job(s)", "closing the worker group")


@pytest.fixture
def gate(database: str) -> Iterator[Gate]:
    with contextlib.closing(Gate(database)) as opened:
        yield opened


def test_at_every_point_of_every_operation_all_modes_leave_clean_rows(gate: Gate) -> None:
    first: dict[tuple[str, str], Place] = {}
    for place in gate.plain().seen:
        first.setdefault((place.operation, place.point), place)
    assert {place.operation for place in first.values()} >= set(CALLS)
    assert {place.point for place in first.values()} == set(POINTS)
    reached = 0
    for n, place in enumerate(first.values()):
        for turn in (0, 1):
            mode = place.modes[(2 * n + turn) % len(place.modes)]
            program, _ = gate.one(mode, place)
            reached += program.injected_at is not None
    assert not gate.found, "\n".join(gate.found)
    assert reached > len(first)  # threads are free to come to another order now and then


def test_before_every_tenth_step_a_cancel_leaves_clean_rows(gate: Gate) -> None:
    steps = gate.plain().steps
    for k in range(0, steps, 10):
        gate.one("cancel", None, k)
    assert steps > 100
    assert not gate.found, "\n".join(gate.found)


# The gate is sharp.


def test_threads_that_are_abandoned_are_noticed(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    run_sync: Any = trio.to_thread.run_sync

    async def abandoning(fn: Any, *args: Any, abandon_on_cancel: bool = False, **options: Any) -> Any:
        return await run_sync(fn, *args, abandon_on_cancel=True, **options)

    monkeypatch.setattr(trio.to_thread, "run_sync", abandoning)
    _, wrong = gate.one("cancel", Place("registering the worker group", 0, "connected"))
    assert any(what.startswith(("group-closed", "nothing-left-open")) for what in wrong), wrong


@pytest.mark.parametrize("mode", ["cancel", "own_scope"])
def test_work_that_commits_although_it_was_cancelled_meanwhile_is_noticed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    code(Call, "unguarded", ("if unwanted:", "if False:"))(monkeypatch)
    # The server's cancel, which goes out at the same time, may hit the commit and hide the defect.
    for _ in range(10):
        program, wrong = gate.one(mode, Place("committing job N", 0, WORKING))
        assert program.injected_at is not None
        if any(what.startswith("unwanted-work-undone") for what in wrong):
            return
    pytest.fail("not noticed in ten runs")


def test_a_commit_that_is_booked_after_the_way_back_is_noticed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_work: Any = PostgresStore.commit_work

    async def booked_late(
        store: PostgresStore, claim: Claim, work: Any, encode: Any, committed: Callable[[], None]
    ) -> Any:
        value = await commit_work(store, claim, work, encode, lambda: None)
        await trio.lowlevel.checkpoint()  # where a cancel falls between
        committed()
        return value

    monkeypatch.setattr(PostgresStore, "commit_work", booked_late)
    program, wrong = gate.one("cancel", Place("committing job N", 0, "executed"))
    assert program.injected_at is not None
    assert any(what.startswith("done-iff-returned") for what in wrong), wrong
