"""The beat thread's loop, by itself: what it does not do once its group closes."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from triojobs._beacon import Beacon
from triojobs._beats import BeatControl, BeatLoop
from triojobs._lease import Lease
from triojobs._model import Registration
from triojobs._sql.groups import Beat


class Line:
    """Notes what it was asked for; the first call is the beat, during which the group begins to close."""

    def __init__(self, control: BeatControl) -> None:
        self._control = control
        self.asked: list[str] = []

    def call(self, operation: str, fn: Callable[[Any], Any]) -> Beat:
        self.asked.append(operation)
        self._control.stop()
        return Beat([], witnessed=True)


def test_a_group_that_closes_during_a_beat_does_nothing_more_for_others() -> None:
    control = BeatControl()
    line = Line(control)
    lease = Lease(duration=30.0, margin=5.0, interval=6.0)
    registration = Registration(uuid.uuid4(), "g", "h", 1, "0", 30.0)
    events: Any = None
    BeatLoop(line, "triojobs", lambda *_: None, registration, lease, Beacon(), events, control).run()  # type: ignore[arg-type]
    assert line.asked == ["beating"]
