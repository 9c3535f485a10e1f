"""One run: everything that `Case` names, from the seed to what is left behind."""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import trio
import trio.testing

from triojobs._memory import MemoryDatabase

from .conductor import Conductor
from .determinism import deterministic
from .injections import inject
from .record import Case, Record
from .world import World


def run(case: Case) -> Record:
    """Run one case and return what it left behind; raises nothing."""
    with deterministic(case.seed) as own, _quiet():
        try:
            return _run(case, own)
        except BrokenOffError as exc:
            stuck = str(exc)
        with mock.patch.object(sys, "unraisablehook"):
            gc.collect()  # the tasks that were left standing complain when they go
        return Record(case, MemoryDatabase(), stuck=stuck)


def _run(case: Case, own: random.Random) -> Record:
    world: World
    conductor = Conductor(own, case.shots, fire=lambda: inject(world), spin=lambda why: world.give_up(why))
    clock = trio.testing.MockClock(autojump_threshold=0)
    world = World(case, conductor, break_off=lambda: _break(clock))
    try:
        trio.run(world.main, clock=clock, instruments=[conductor])
    except KeyboardInterrupt as exc:  # it came when everything was over
        world.record.failed_with(exc)
    except BaseException as exc:
        if isinstance(exc.__cause__, BrokenOffError):
            raise BrokenOffError(world.record.stuck) from None
        world.record.stuck = world.record.stuck or f"the harness fell over {exc!r}"
        world.record.error = exc
    return world.record


class BrokenOffError(Exception):
    """Nothing else ended the run."""


def _break(clock: trio.testing.MockClock) -> None:
    """Let Trio itself fall over, which asks the time in each pass."""

    def current_time() -> float:
        raise BrokenOffError

    vars(clock)["current_time"] = current_time


@contextmanager
def _quiet() -> Iterator[None]:
    """The runs provoke errors by the thousand; formatting them would take most of the time."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def collect_rarely() -> None:
    """In a process that runs thousands of small programs, looking for cycles takes a sixth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
