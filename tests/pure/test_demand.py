"""Which queues are asked for how many jobs, and when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triojobs._demand import Demand, share

frees = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1)


# Sharing.


@given(frees, st.integers(0, 200), st.integers(0, 1000))
def test_what_is_shared_is_used_up_and_nobody_gets_more_than_is_free(
    free: dict[str, int], budget: int, turn: int
) -> None:
    given_out = share(free, budget, turn)
    assert sum(given_out.values()) == min(budget, sum(free.values()))
    assert all(0 < n <= free[queue] for queue, n in given_out.items())


@given(frees, st.integers(0, 200), st.integers(0, 1000))
def test_whoever_could_use_more_has_at_most_one_less_than_anybody(
    free: dict[str, int], budget: int, turn: int
) -> None:
    given_out = share(free, budget, turn)
    most = max(given_out.values(), default=0)
    for queue, n in free.items():
        got = given_out.get(queue, 0)
        assert got >= min(n, most - 1)


def test_the_remainder_goes_round() -> None:
    turns = [share({"a": 5, "b": 5, "c": 5}, 1, turn) for turn in range(4)]
    assert turns == [{"a": 1}, {"b": 1}, {"c": 1}, {"a": 1}]


@pytest.mark.parametrize("budgets", [[1], [3], [1, 2], [2, 1, 1], [5, 2]])
def test_a_cap_is_shared_evenly_in_the_long_run(budgets: list[int]) -> None:
    demand = Demand({"a": 50, "b": 50}, linger=0.0, cap=50)
    given_out = {"a": 0, "b": 0}
    for n in range(60):
        budget = budgets[n % len(budgets)]
        # Fifty slots, of which all but the budget run in one queue or the other.
        wants, _ = demand.next_claim({"a": 50 - (50 - budget), "b": 50}, float(n))
        for queue, got in wants.items():
            given_out[queue] += got
    assert abs(given_out["a"] - given_out["b"]) <= max(budgets)


# When to claim.


def test_a_claim_is_made_at_once_when_half_of_the_slots_are_free() -> None:
    demand = Demand({"a": 8}, linger=10.0, cap=None)
    demand.claimed(0.0)
    assert demand.next_claim({"a": 4}, 0.1) == ({"a": 4}, 0.1)


def test_otherwise_it_waits_for_the_linger_since_the_last_claim() -> None:
    demand = Demand({"a": 8}, linger=0.5, cap=None)
    demand.claimed(1.0)
    assert demand.next_claim({"a": 3}, 1.1) == ({}, 1.5)
    assert demand.next_claim({"a": 3}, 1.5) == ({"a": 3}, 1.5)


def test_the_first_free_slot_after_a_pause_waits_for_nobody() -> None:
    demand = Demand({"a": 8}, linger=0.005, cap=None)
    demand.claimed(0.0)
    assert demand.next_claim({"a": 1}, 60.0) == ({"a": 1}, 60.0)


def test_when_one_queue_is_asked_all_hungry_ones_are() -> None:
    demand = Demand({"a": 8, "b": 8, "c": 8}, linger=10.0, cap=None)
    demand.claimed(0.0)
    demand.satisfied("c")
    assert demand.next_claim({"a": 4, "b": 1, "c": 8}, 0.1) == ({"a": 4, "b": 1}, 0.1)


@pytest.mark.parametrize(("free_of_cap", "at_once"), [(2, False), (3, True), (6, True)])
def test_with_a_cap_half_of_the_cap_counts(free_of_cap: int, at_once: bool) -> None:
    demand = Demand({"a": 100, "b": 100}, linger=10.0, cap=6)
    demand.claimed(0.0)
    running = 6 - free_of_cap
    wants, again_at = demand.next_claim({"a": 100 - running, "b": 100}, 0.1)
    assert sum(wants.values()) == (free_of_cap if at_once else 0)
    assert again_at == (0.1 if at_once else 10.0)


def test_nothing_is_asked_beyond_the_cap() -> None:
    demand = Demand({"a": 4, "b": 4}, linger=0.0, cap=3)
    assert demand.next_claim({"a": 2, "b": 3}, 0.0) == ({}, math.inf)  # three run
    assert sum(demand.next_claim({"a": 3, "b": 3}, 0.0)[0].values()) == 1


def test_nothing_is_asked_of_a_queue_without_a_free_slot() -> None:
    demand = Demand({"a": 4, "b": 4}, linger=0.0, cap=None)
    assert demand.next_claim({"a": 0, "b": 1}, 0.0)[0] == {"b": 1}
    assert demand.next_claim({"a": 0, "b": 0}, 0.0) == ({}, math.inf)


# Hunger.


def test_a_queue_is_hungry_until_a_claim_came_back_short_and_again_when_woken() -> None:
    demand = Demand({"a": 4}, linger=0.0, cap=None)
    free = {"a": 4}
    assert demand.next_claim(free, 0.0)[0] == free
    assert demand.next_claim(free, 0.0)[0] == free  # it came back full
    demand.satisfied("a")
    assert demand.next_claim(free, 0.0) == ({}, math.inf)
    demand.woken(["a", "not ours"])
    assert demand.next_claim(free, 0.0)[0] == free
    demand.satisfied("a")
    demand.woken_everywhere()
    assert demand.next_claim(free, 0.0)[0] == free
