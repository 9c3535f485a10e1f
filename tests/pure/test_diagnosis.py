"""What the doctor makes of facts that a test's server cannot be brought to."""

from __future__ import annotations

import datetime as dt

import pytest

from triojobs._diagnosis import (
    ClockFacts,
    Finding,
    Holder,
    Level,
    ServerFacts,
    TableFacts,
    clock,
    holders,
    server,
    tables,
)

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_an_old_server_and_a_standby_are_broken() -> None:
    facts = ServerFacts(130000, "13.0", pooled=False, is_standby=True, autovacuum=True, track_counts=True)
    assert levels(list(server(facts, declared_pooled=False))) == [Level.BROKEN, Level.BROKEN]


def test_a_server_that_does_not_count_rows_has_no_autovacuum() -> None:
    facts = ServerFacts(180000, "18", pooled=False, is_standby=False, autovacuum=True, track_counts=False)
    found = list(server(facts, declared_pooled=False))[-1]
    assert (found.level, found.remedy) == (
        Level.BROKEN,
        "ALTER SYSTEM SET track_counts = on, then SELECT pg_reload_conf()",
    )


@pytest.mark.parametrize(
    ("skew", "round_trip", "level"),
    [
        (0.0, 0.001, Level.OK),
        (0.9, 0.001, Level.OK),
        (-0.9, 0.001, Level.OK),
        (1.1, 0.001, Level.WARNING),
        (-1.1, 0.001, Level.WARNING),
        (1.4, 1.0, Level.OK),  # the answer may have been under way for so long
        (1.6, 1.0, Level.WARNING),
    ],
)
def test_a_skew_is_one_only_beyond_what_the_way_explains(
    skew: float, round_trip: float, level: Level
) -> None:
    facts = ClockFacts(NOW, NOW + dt.timedelta(seconds=skew), round_trip)
    assert levels(list(clock(facts))) == [level]


@pytest.mark.parametrize(
    ("xids", "active", "level"),
    [
        (10, True, Level.OK),
        (None, True, Level.OK),
        (2_000_000, True, Level.WARNING),
        (10, False, Level.WARNING),
    ],
)
def test_a_slot_is_a_finding_when_it_lags_or_nobody_reads_it(
    xids: int | None, active: bool, level: Level
) -> None:
    slot = Holder("replication slot", "s", "physical", None, xids, active)
    assert levels(list(holders([slot], patience=60.0))) == [level]


@pytest.mark.parametrize(
    ("live", "dead", "vacuumed", "level"),
    [
        (0, 100_000, None, Level.OK),
        (0, 100_001, None, Level.WARNING),
        (0, 100_001, 299.0, Level.OK),  # a round comes each minute; this is what it leaves between
        (0, 100_001, 301.0, Level.WARNING),
        (60_000, 110_000, None, Level.OK),
    ],
)
def test_dead_rows_are_many_beside_few_live_ones_and_late_for_vacuum(
    live: int, dead: int, vacuumed: float | None, level: Level
) -> None:
    assert levels(list(tables([TableFacts("t", live, dead, vacuumed, autovacuum=True)]))) == [level]
