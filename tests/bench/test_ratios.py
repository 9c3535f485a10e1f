"""How rounds become ratios, and samples percentiles."""

from __future__ import annotations

import pytest

from bench.latency import percentile
from bench.rounds import compare, interleave


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was busy in the second round: both sides were three times slower.
    line = compare("drain", "sql", [300.0, 110.0, 330.0], [600.0, 200.0, 600.0], unit="jobs/s", config="")

    assert (line["ratio"], line["spread"]) == (0.55, [0.5, 0.55])
    assert (line["ours"], line["peer"]) == (300.0, 600.0)


def test_each_round_runs_everything_once_and_begins_with_another() -> None:
    order: list[str] = []

    def runner(name: str) -> int:
        order.append(name)
        return len(order)

    found = interleave({name: lambda name=name: runner(name) for name in "abc"}, rounds=3)  # type: ignore[misc]

    assert order == [*"abc", *"bca", *"cab"]
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([5.0], 99, 5.0), ([1.0, 2.0], 50, 1.0), (list(range(1, 101)), 99, 99), (list(range(1, 101)), 50, 50)],
)
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(
    values: list[float], percent: float, expected: float
) -> None:
    assert percentile(values, percent) == expected
