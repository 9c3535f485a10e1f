"""A run always ends: what spins, sleeps for ever or falls over is a violation with the command that repeats it."""

from __future__ import annotations

import contextlib

import pytest
import trio

from . import conductor, injections
from .campaign import failures
from .record import Case
from .world import World

CASE = Case("stop", 0, 60)


async def sleep_for_ever() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def spin() -> None:
    with trio.CancelScope(shield=True):
        while True:
            await trio.lowlevel.checkpoint()


async def spin_whatever_comes() -> None:
    while True:
        with contextlib.suppress(trio.Cancelled), trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("misbehave", "what"),
    [(sleep_for_ever, "virtual seconds"), (spin, "it spins"), (spin_whatever_comes, "it spins")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_run_that_does_not_end_is_a_violation(
    monkeypatch: pytest.MonkeyPatch, misbehave: object, what: str
) -> None:
    monkeypatch.setattr(World, "_sibling", lambda world: misbehave())  # type: ignore[operator]
    monkeypatch.setattr(conductor, "TURN_LIMIT", 2_000)
    (found,) = failures([CASE])
    assert found.startswith(f"{CASE.command}\n    ends: ")
    assert what in found.splitlines()[1]


def test_an_injection_that_falls_over_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_over(world: World) -> None:
        raise RuntimeError("as it did")

    monkeypatch.setattr(injections, "_stop", fall_over)
    (found,) = failures([CASE])
    assert "ends: the injection fell over RuntimeError('as it did')" in found


def test_a_stop_that_comes_while_the_loop_waits_is_obeyed() -> None:
    assert failures([Case("stop", 0, 321)]) == []
