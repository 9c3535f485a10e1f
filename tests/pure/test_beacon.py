"""When a loop that does not turn is told, when it is given up, and what is never held against it."""

from __future__ import annotations

import math

import pytest

from triojobs._beacon import TURN_INTERVAL, Beacon


def watched(**options: float) -> Beacon:
    """A beacon that is lit and was looked at once, at time 0."""
    beacon = Beacon(**options)
    beacon.watched(lambda: None)
    beacon.light()
    assert beacon.look(0.0) is None
    return beacon


def look_until(beacon: Beacon, end: float, *, start: float = 0.0) -> list[float]:
    """Look at each interval after `start`; return when something was told."""
    steps = round((end - start) / TURN_INTERVAL)
    times = [start + (n + 1) * TURN_INTERVAL for n in range(steps)]
    return [now for now in times if beacon.look(now) is not None]


def test_a_loop_that_turns_is_never_told() -> None:
    beacon = watched()
    for n in range(1, 1000):
        beacon.turn()
        assert beacon.look(n * TURN_INTERVAL) is None
    assert beacon.blocks == 0


def test_a_blocked_loop_is_told_within_a_second_and_then_now_and_then() -> None:
    beacon = watched()
    assert look_until(beacon, 15.0) == [0.75, 1.5, 3.0, 6.0, 12.0]
    assert beacon.blocks == 1


def test_what_is_told_is_how_long_the_loop_has_not_turned() -> None:
    beacon = watched()
    assert [beacon.look(n * TURN_INTERVAL) for n in range(1, 7)] == [None, None, 0.75, None, None, 1.5]


def test_each_block_is_counted_once() -> None:
    beacon = watched()
    assert look_until(beacon, 2.0) == [0.75, 1.5]
    beacon.turn()
    assert look_until(beacon, 4.0, start=2.0) == [3.0, 3.75]  # the look at 2.25 saw the turn
    assert beacon.blocks == 2


@pytest.mark.parametrize("pause", [0.6, 40.0, 86400.0])
def test_a_process_that_was_stopped_accuses_nobody(pause: float) -> None:
    """Both threads wake at the same time, and the watcher may look first."""
    beacon = watched()
    beacon.turn()
    assert beacon.look(0.25) is None
    assert beacon.look(0.25 + pause) is None
    beacon.turn()
    assert look_until(beacon, 0.7, start=0.25) == []
    assert (beacon.blocks, beacon.dead_for) == (0, None)


def test_a_loop_is_dead_when_it_has_not_turned_for_the_time_that_was_given() -> None:
    beacon = watched(dead_after=5.0)
    look_until(beacon, 4.75)
    assert beacon.dead_for is None
    look_until(beacon, 5.0, start=4.75)
    assert beacon.dead_for == 5.0


def test_a_loop_may_be_blocked_for_ever_when_that_was_asked_for() -> None:
    beacon = watched(dead_after=math.inf)
    look_until(beacon, 10_000.0)
    assert beacon.dead_for is None


def test_nobody_looks_while_nothing_is_in_hand() -> None:
    beacon = Beacon()
    beacon.watched(lambda: None)
    assert beacon.next_look(7.0) == math.inf
    beacon.light()
    assert beacon.next_look(7.0) == 7.0 + TURN_INTERVAL
    assert beacon.put_out(lambda: 0)
    assert beacon.next_look(8.0) == math.inf


def test_it_burns_as_long_as_something_is_in_hand() -> None:
    beacon = watched()
    assert not beacon.put_out(lambda: 3)
    assert beacon.lit
    assert beacon.put_out(lambda: 0)
    assert not beacon.lit


def test_the_time_before_it_was_lit_does_not_count() -> None:
    beacon = watched()
    look_until(beacon, 0.5)
    beacon.put_out(lambda: 0)
    assert beacon.look(0.75) is None
    beacon.light()
    assert look_until(beacon, 101.0, start=100.0) == [101.0]


def test_lighting_wakes_the_watcher_and_the_loop_once() -> None:
    calls: list[str] = []
    beacon = Beacon(on_lit=lambda: calls.append("loop"))
    beacon.watched(lambda: calls.append("watcher"))
    beacon.light()
    beacon.light()
    assert calls == ["watcher", "loop"]
    beacon.put_out(lambda: 0)
    beacon.light()
    assert calls == ["watcher", "loop"] * 2


def test_without_a_watcher_the_loop_gives_no_sign() -> None:
    calls: list[str] = []
    beacon = Beacon(on_lit=lambda: calls.append("loop"))
    beacon.light()
    assert calls == []
    beacon.watched(lambda: None)  # a first claim may be booked before the watcher is there
    assert calls == ["loop"]
