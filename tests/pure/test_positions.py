"""From where a claim begins: decided by what the claims before gave, and by the clock."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triojobs import _positions
from triojobs._model import Claim
from triojobs._positions import BANDS, BEYOND, MANY, PATIENCE, SLOW, Positions, Stretch

GROUP = uuid.uuid4()


@pytest.fixture(autouse=True, scope="module")
def few_are_worth_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_positions, "MANY", 1)
        yield


def claimed(priority: int, run_at: float, job_id: int, queue: str = "q") -> Claim:
    return Claim(
        job_id, 1, GROUP, queue, 1, 5, priority, run_at, 0.0, b"", b"cbor", None, None, 0.0, None, None, None
    )


def gap(above: int, below: int) -> Stretch:
    return Stretch(None, above, below, -math.inf, 0)


def band(priority: int, run_at: float, job_id: int) -> Stretch:
    return Stretch(priority, 0, 0, run_at, job_id)


def full(
    positions: Positions, *claims: Claim, sent: float = 0.0, now: float = 0.0, again: bool = False
) -> None:
    """Note a claim that gave as many as it wanted; `again`: it went on from positions."""
    starts = positions.starts(["q"], sent) if again else {}
    positions.claimed({"q": len(claims)}, starts, claims, sent=sent, now=now)


def test_the_first_claim_is_from_the_head() -> None:
    assert Positions(1.0).starts(["q", "other"], 0.0) == {}


def test_after_a_full_claim_the_next_goes_on_behind_it() -> None:
    positions = Positions(1.0)
    full(positions, claimed(0, 5.0, 3), claimed(0, 5.0, 4))
    assert positions.starts(["q", "other"], 0.5) == {"q": [gap(BEYOND, 0), band(0, 5.0, 4)]}


def test_each_priority_has_a_position_and_the_gaps_are_looked_into() -> None:
    positions = Positions(1.0)
    full(positions, claimed(9, 1.0, 1), claimed(8, 2.0, 2), claimed(3, 3.0, 3))
    assert positions.starts(["q"], 0.0)["q"] == [
        gap(BEYOND, 9),
        band(9, 1.0, 1),
        band(8, 2.0, 2),
        gap(8, 3),
        band(3, 3.0, 3),
        gap(3, -1),
    ]


@pytest.mark.parametrize("again", [False, True])
def test_after_a_short_claim_the_next_is_from_the_head(again: bool) -> None:
    positions = Positions(1.0)
    full(positions, claimed(0, 5.0, 3))
    starts = positions.starts(["q"], 0.0) if again else {}
    positions.claimed({"q": 2}, starts, [claimed(0, 6.0, 4)], sent=0.1, now=0.1)
    assert positions.starts(["q"], 0.1) == {}


def test_a_queue_that_was_not_asked_keeps_its_position() -> None:
    positions = Positions(1.0)
    full(positions, claimed(0, 5.0, 3))
    positions.claimed({"other": 1}, {}, [], sent=0.1, now=0.1)
    assert list(positions.starts(["q"], 0.2)) == ["q"]


def test_the_head_comes_again_after_the_interval_however_often_one_goes_on() -> None:
    positions = Positions(1.0)
    full(positions, claimed(0, 0.0, 1), sent=10.0, now=10.0)
    for n in range(1, 10):
        full(positions, claimed(0, float(n), n), sent=10.0 + n / 10, now=10.0 + n / 10, again=True)
        assert positions.starts(["q"], 10.0 + n / 10)
    assert positions.starts(["q"], 11.0) == {}
    full(positions, claimed(0, 20.0, 20), sent=11.0, now=11.0)
    assert positions.starts(["q"], 11.9)
    assert positions.starts(["q"], 12.0) == {}


def test_a_walk_from_the_head_that_takes_long_comes_less_often() -> None:
    positions = Positions(1.0)
    full(positions, claimed(0, 0.0, 1), sent=10.0, now=12.0)
    assert positions.starts(["q"], 10.0 + PATIENCE * 2.0 - 0.1)
    assert positions.starts(["q"], 10.0 + PATIENCE * 2.0) == {}


@pytest.mark.parametrize(
    ("rows", "seconds", "worth"), [(MANY, 0.0, True), (MANY - 1, 0.0, False), (1, SLOW, True)]
)
def test_positions_are_for_claims_of_many_rows_and_for_slow_ones(
    monkeypatch: pytest.MonkeyPatch, rows: int, seconds: float, worth: bool
) -> None:
    monkeypatch.setattr(_positions, "MANY", MANY)
    positions = Positions(1.0)
    full(positions, *(claimed(0, float(n), n) for n in range(rows)), sent=0.0, now=seconds)
    assert bool(positions.starts(["q"], seconds)) == worth


def test_what_the_head_finds_behind_is_gone_on_from() -> None:
    """More of them may follow; from the old position they would come once in each interval."""
    positions = Positions(1.0)
    full(positions, claimed(0, 50.0, 50))
    full(positions, claimed(0, 3.0, 3), sent=2.0, now=2.0)
    assert positions.starts(["q"], 2.0)["q"][-1] == band(0, 3.0, 3)


def test_forgetting_leads_to_the_head() -> None:
    positions = Positions(1.0)
    positions.claimed({"q": 1, "p": 1}, {}, [claimed(0, 1.0, 1), claimed(0, 1.0, 2, "p")], sent=0.0, now=0.0)
    positions.forget("q")
    assert list(positions.starts(["q", "p"], 0.0)) == ["p"]
    positions.forget_all()
    assert positions.starts(["q", "p"], 0.0) == {}


def test_only_the_highest_bands_are_gone_on_from_and_the_rest_is_one_gap() -> None:
    positions = Positions(1.0)
    full(positions, *(claimed(2 * n, 1.0, n) for n in range(BANDS + 5)))
    stretches = positions.starts(["q"], 0.0)["q"]
    assert [s.band for s in stretches if s.band is not None] == [2 * n for n in range(BANDS + 4, 4, -1)]
    assert stretches[-1] == gap(10, -1)


@dataclass(frozen=True, order=True)
class Row:
    """A row of the model, in the order of claims."""

    minus_priority: int
    run_at: float
    job_id: int


def lies_in(row: Row, part: Stretch) -> bool:
    priority = -row.minus_priority
    if part.band is None:
        return part.below < priority < part.above
    return priority == part.band and (row.run_at, row.job_id) > (part.run_at, part.job_id)


ARRIVAL = st.tuples(st.integers(0, 4), st.integers(0, 30))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.lists(ARRIVAL, max_size=12), st.integers(1, 5)), min_size=1, max_size=30))
def test_nothing_is_overlooked_for_longer_than_the_interval(
    rounds: list[tuple[list[tuple[int, int]], int]],
) -> None:
    """Rows arrive anywhere, behind positions, too; time goes on by 0.3 s a claim."""
    positions = Positions(1.0)
    rows: dict[Row, float] = {}
    ids = itertools.count(1)
    taken: set[int] = set()
    now = 0.0
    idle = [([], 50)] * 8
    for arrivals, want in [*rounds, *idle]:
        for priority, run_at in arrivals:
            rows[Row(-priority, float(run_at), next(ids))] = now
        starts = positions.starts(["q"], now)
        stretches = starts.get("q")
        seen = sorted(row for row in rows if stretches is None or any(lies_in(row, s) for s in stretches))
        if stretches is not None:  # the stretches are disjoint, and in the order of claims
            assert [row for s in stretches for row in sorted(rows) if lies_in(row, s)] == seen
        found = seen[:want]
        for row in found:
            del rows[row]
            assert row.job_id not in taken
            taken.add(row.job_id)
        claims = [claimed(-row.minus_priority, row.run_at, row.job_id) for row in found]
        positions.claimed({"q": want}, starts, claims, sent=now, now=now)
        # Whatever is older than the interval has had a claim from the head: what that left had no room.
        if stretches is None and len(found) < want:
            assert not rows
        now += 0.3
    assert not rows
