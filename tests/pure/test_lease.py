"""When to beat, and until when to believe."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triojobs._lease import Lease, rescue_interval


def lease() -> Lease:
    return Lease(duration=30.0, margin=5.0, interval=6.0)


def test_an_unconfirmed_lease_proves_nothing() -> None:
    assert not lease().provable(0.0)
    assert lease().next_beat(100.0) < 100.0


def test_a_lease_is_counted_from_before_the_beat_was_sent_minus_the_margin() -> None:
    held = lease()
    held.confirm(100.0)
    assert held.until == 125.0
    assert held.provable(124.999)
    assert not held.provable(125.0)


def test_the_next_beat_is_one_interval_after_the_last_one_was_sent() -> None:
    held = lease()
    held.confirm(100.0)
    assert held.next_beat(103.0) == 106.0


@pytest.mark.parametrize(
    ("failures", "pause"), [(1, 0.2), (2, 0.4), (3, 0.8), (4, 1.6), (5, 1.6), (500, 1.6)]
)
def test_after_failures_the_next_beat_is_soon_but_not_at_once(failures: int, pause: float) -> None:
    held = lease()
    held.confirm(100.0)
    for _ in range(failures):
        held.fail()
    assert held.next_beat(110.0) == pytest.approx(110.0 + pause)


def test_failures_do_not_prolong_and_success_forgets_them() -> None:
    held = lease()
    held.confirm(100.0)
    held.fail()
    assert held.until == 125.0
    held.confirm(110.0)
    assert held.until == 135.0
    assert held.next_beat(111.0) == 116.0


def test_a_lost_lease_is_over_at_once() -> None:
    held = lease()
    held.confirm(100.0)
    held.lose()
    assert held.lost
    assert held.until == -math.inf
    assert not held.provable(100.0)


@given(
    sent=st.floats(0, 1e6),
    took=st.floats(0, 100),
    duration=st.floats(1, 100),
    share=st.floats(0.01, 0.9),
)
def test_what_we_believe_ends_before_what_the_server_wrote(
    sent: float, took: float, duration: float, share: float
) -> None:
    held = Lease(duration=duration, margin=duration * share, interval=1.0)
    held.confirm(sent)
    server_until = sent + took + duration  # the server counts from when it executes
    assert held.until < server_until


def test_a_short_lease_is_looked_after_more_often() -> None:
    assert (rescue_interval(30.0), rescue_interval(600.0), rescue_interval(12.0)) == (5.0, 5.0, 2.0)
