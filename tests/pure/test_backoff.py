"""Delays: their bounds, their jitter, and no overflow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triojobs._backoff import RECONNECT_LIMIT, Backoff, reconnect_delay
from triojobs._errors import OptionError

middle = lambda: 0.5  # noqa: E731 - no jitter in either direction
attempts = st.integers(1, 10**9)
randoms = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("attempt", "delay"),
    [(1, 1.0), (2, 2.0), (3, 4.0), (11, 1024.0), (12, 2048.0), (13, 3600.0), (99, 3600.0)],
)
def test_the_delay_doubles_up_to_the_limit(attempt: int, delay: float) -> None:
    assert Backoff().delay(attempt, middle) == delay


@pytest.mark.parametrize(("random", "delay"), [(0.0, 90.0), (0.5, 100.0), (1.0, 110.0)])
def test_jitter_moves_the_delay_by_its_share_in_either_direction(random: float, delay: float) -> None:
    backoff = Backoff(first=100.0, jitter=0.1)
    assert backoff.delay(1, lambda: random) == pytest.approx(delay)


@given(
    st.builds(
        Backoff,
        first=st.floats(0, 1e6),
        factor=st.floats(1, 1000),
        limit=st.floats(1e6, 3e8),
        jitter=st.floats(0, 1),
    ),
    attempts,
    randoms,
)
def test_every_delay_lies_between_zero_and_the_limit(backoff: Backoff, attempt: int, random: float) -> None:
    assert 0.0 <= backoff.delay(attempt, lambda: random) <= backoff.limit


@given(attempts, randoms)
def test_without_jitter_delays_never_shrink(attempt: int, random: float) -> None:
    backoff = Backoff(jitter=0.0)
    assert backoff.delay(attempt, lambda: random) <= backoff.delay(attempt + 1, lambda: random)


@given(attempts, randoms)
def test_reconnects_are_never_at_once_and_never_late(failures: int, random: float) -> None:
    assert 0.1 <= reconnect_delay(failures, lambda: random) <= RECONNECT_LIMIT


@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=30, max_size=30))
def test_a_server_that_refuses_is_asked_less_than_five_times_a_second(randoms: list[float]) -> None:
    at, tries = 0.0, [0.0]
    for failures, random in enumerate(randoms, 1):
        at += reconnect_delay(failures, lambda random=random: random)  # type: ignore[misc]
        tries.append(at)
    assert all(fifth - first > 1.0 for first, fifth in zip(tries, tries[4:], strict=False))


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("first", -1.0, "finite seconds >= 0"),
        ("first", float("nan"), "finite seconds >= 0"),
        ("first", True, "finite seconds >= 0"),
        ("first", "1", "finite seconds >= 0"),
        ("limit", 0.5, "finite seconds >= 1"),
        ("limit", float("inf"), "finite seconds >= 1"),
        ("factor", 0.9, "1 to 1000"),
        ("factor", 1001, "1 to 1000"),
        ("factor", float("nan"), "1 to 1000"),
        ("factor", "2", "1 to 1000"),
        ("factor", None, "1 to 1000"),
        ("jitter", -0.1, "0 to 1"),
        ("jitter", 1.1, "0 to 1"),
        ("jitter", "0", "0 to 1"),
        ("jitter", True, "0 to 1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object, limit: str) -> None:
    with pytest.raises(OptionError, match=limit) as caught:
        Backoff(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == f"Backoff.{field}"
