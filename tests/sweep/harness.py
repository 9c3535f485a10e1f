"""One run: everything that `Case` names, from the seed to what is left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import trio
import trio.testing

from .conductor import Conductor
from .determinism import deterministic
from .injections import inject
from .record import Case, Record
from .world import World


def run(case: Case) -> Record:
    """Run one case and return what it left behind; raises nothing."""
    with deterministic(case.seed) as own, _quiet():
        world: World
        conductor = Conductor(
            own, case.shots, fire=lambda: inject(world), spin=lambda why: world.give_up(why)
        )
        world = World(case, conductor)
        clock = trio.testing.MockClock(autojump_threshold=0)
        try:
            trio.run(world.main, clock=clock, instruments=[conductor])
        except KeyboardInterrupt as exc:  # it came when everything was over
            world.record.error = world.record.error or exc
        except BaseException as exc:
            world.record.stuck = world.record.stuck or f"the harness fell over {exc!r}"
            world.record.error = exc
        return world.record


@contextmanager
def _quiet() -> Iterator[None]:
    """The runs provoke errors by the thousand; formatting them would take most of the time."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
