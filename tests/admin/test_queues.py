"""Queues in figures."""

from __future__ import annotations

import datetime as dt
import statistics
from typing import Any

import pytest
from faces import Face, every_status, serve
from tools import SCHEMA, Connection, Group, put, put_one

import triojobs
from triojobs._model import Outcome
from triojobs._sql import counting, groups, operate, pausing
from triojobs._sql import statistics as statistics_sql


@pytest.fixture
def database(fresh_database: str) -> str:
    """The server's statistics of an emptied database lag behind."""
    return fresh_database


NOTHING = {"done": 0, "failed": 0, "killed": 0, "cancelled": 0}


async def test_a_queue_shows_what_stands_in_it(db: Connection, face: Face) -> None:
    group = serve(db, q=4, other=2)
    every_status(db, group)
    every_status(db, group, queue="other")
    put(db, 3)
    pausing.pause(db, SCHEMA, "other", "maintenance")
    page = await face("queues")
    assert page.next is None
    other, q = page.items
    assert (other.name, other.ready, other.scheduled, other.running, other.failed) == ("other", 1, 2, 1, 1)
    assert (q.name, q.ready, q.scheduled, q.running, q.failed) == ("q", 4, 2, 1, 1)
    assert q.exact
    assert (q.groups, q.slots, other.slots) == (1, 4, 2)
    assert (q.paused_at, q.pause_reason) == (None, None)
    assert other.pause_reason == "maintenance"
    assert other.paused_at.tzinfo is dt.UTC
    alone = await face("queue", "q")
    assert (alone.name, alone.ready, alone.slots, alone.ended) == (q.name, q.ready, q.slots, q.ended)


async def test_the_oldest_due_job_is_found_whatever_its_priority_and_place(
    db: Connection, face: Face
) -> None:
    def ago(hours: float) -> dt.datetime:
        return dt.datetime.now(dt.UTC) - dt.timedelta(hours=hours)

    for priority, hours in ((9, 1), (5, 3), (0, 2)):
        put_one(db, priority=priority, run_at=ago(hours))
    put_one(db, queue="asleep", delay=3600.0)
    found = await face("queue", "q")
    assert found.oldest_due_age == pytest.approx(3 * 3600, abs=60)
    assert found.oldest_due_at == pytest.approx(ago(3), abs=dt.timedelta(seconds=60))
    assert (await face("queue", "asleep")).oldest_due_age is None
    # Due, but nobody has moved it to `ready`, because nobody serves the queue.
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '5 h'")
    asleep = await face("queue", "asleep")
    assert (asleep.ready, asleep.scheduled) == (1, 0)
    assert asleep.oldest_due_age == pytest.approx(5 * 3600, abs=60)


async def test_groups_that_cannot_claim_do_not_count_as_serving(db: Connection, face: Face) -> None:
    serve(db, q=1)
    serve(db, q=2, lease_duration=1e-6)
    closed = serve(db, q=4)
    groups.close_group(db, SCHEMA, closed.id)
    Group(db)  # of an older version: it does not say
    found = await face("queue", "q")
    assert (found.groups, found.slots) == (1, 1)


async def test_a_queue_that_nobody_knows_is_empty(face: Face) -> None:
    found = await face("queue", "nothing", window=60.0)
    assert (found.ready, found.scheduled, found.running, found.groups) == (0, 0, 0, 0)
    assert (found.ended, found.throughput, found.window) == (NOTHING, 0.0, 60.0)
    assert (found.wait, found.run, found.oldest_due_at) == (None, None, None)


async def test_queues_are_known_from_jobs_groups_pauses_and_what_ended_lately(
    db: Connection, face: Face
) -> None:
    group = serve(db, served=1, **{"10": 1})
    put_one(db, queue="ready")
    put_one(db, queue="scheduled", delay=60.0)
    put_one(db, queue="running")
    put_one(db, queue="ended")
    group.claim(db, queue="running")
    group.settle(db, group.claim(db, queue="ended"), Outcome.DONE)
    pausing.pause(db, SCHEMA, "paused", "x")
    page = await face("queues")
    assert [q.name for q in page.items] == [
        "10",
        "ended",
        "paused",
        "ready",
        "running",
        "scheduled",
        "served",
    ]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_pages_hold_every_queue_once_and_in_order(db: Connection, face: Face, limit: int) -> None:
    serve(db, a=1, e=1)
    for name in "gbdb":
        put_one(db, queue=name)
        put_one(db, queue=name + "x", delay=60.0)
    put_one(db, queue="ü")
    found: list[str] = []
    after: str | None = None
    while True:
        page = await face("queues", limit=limit, after=after)
        found += [q.name for q in page.items]
        if page.next is None:
            break
        after = page.next
    assert found == sorted(["a", "e", "g", "gx", "b", "bx", "d", "dx", "ü"])


# What ended lately.


def spread_over_time(db: Connection) -> None:
    """Let job n be due at a round time, claimed n seconds later, and end n/10 seconds after that."""
    db.execute(
        "UPDATE triojobs.jobs SET run_at = now() - interval '2 min', enqueued_at = now() - interval '2 min'"
    )
    db.execute(
        "UPDATE triojobs.outcomes o SET claimed_at = j.run_at + j.id * interval '1 s',"
        " finished_at = j.run_at + j.id * interval '1.1 s' FROM triojobs.jobs j WHERE j.id = o.job_id"
    )


async def test_rates_and_latencies_are_those_of_what_ended(db: Connection, face: Face) -> None:
    group = Group(db)
    ids = put(db, 20)
    claims = group.claim(db)
    group.settle(db, claims[:14], Outcome.DONE)
    group.settle(db, claims[14:17], Outcome.KILLED)
    group.settle(db, claims[17:], Outcome.FAILED, delay=3600.0)
    put_one(db, queue="other")
    group.settle(db, group.claim(db, queue="other"), Outcome.DONE)
    spread_over_time(db)
    found = await face("queue", "q", window=300.0)
    assert found.ended == {"done": 14, "failed": 3, "killed": 3, "cancelled": 0}
    assert found.window == 300.0
    assert found.throughput == pytest.approx(20 / 300)
    assert found.wait is not None
    assert found.run is not None
    cuts = statistics.quantiles(ids, n=100, method="inclusive")
    assert (found.wait.p50, found.wait.p95, found.wait.p99) == pytest.approx((cuts[49], cuts[94], cuts[98]))
    assert found.run.p95 == pytest.approx(cuts[94] / 10)


async def test_what_ended_before_the_window_is_not_counted(db: Connection, face: Face) -> None:
    group = Group(db)
    put(db, 4)
    group.settle(db, group.claim(db), Outcome.DONE)
    db.execute("UPDATE triojobs.outcomes SET finished_at = now() - job_id * interval '1 min'")
    assert (await face("queue", "q", window=150.0)).ended["done"] == 2
    assert (await face("queue", "q", window=1e6)).ended["done"] == 4


async def test_the_window_says_how_far_the_last_outcomes_reach(
    db: Connection, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(db)
    put(db, 30)
    group.settle(db, group.claim(db), Outcome.DONE)
    db.execute("UPDATE triojobs.outcomes SET finished_at = now() - (31 - job_id) * interval '10 s'")
    monkeypatch.setattr(counting, "RECENT", 12)
    found = await face("queue", "q", window=3600.0)
    assert found.window == pytest.approx(120, abs=30)
    assert found.ended["done"] == 12
    assert found.throughput == pytest.approx(12 / found.window)


async def test_the_wait_is_that_of_first_attempts(db: Connection, face: Face) -> None:
    group = Group(db)
    job_id = put_one(db)
    group.settle(db, group.claim(db), Outcome.KILLED)
    db.execute(
        "UPDATE triojobs.jobs SET run_at = now() - interval '9 d', enqueued_at = now() - interval '9 d'"
    )
    db.execute(
        "UPDATE triojobs.outcomes SET claimed_at = (SELECT run_at FROM triojobs.jobs) + interval '5 s'"
    )
    operate.retry(db, SCHEMA, job_id)
    group.settle(db, group.claim(db), Outcome.DONE)
    found = await face("queue", "q")
    assert found.ended == NOTHING | {"done": 1, "killed": 1}
    assert found.wait == triojobs.Quantiles(5.0, 5.0, 5.0)


# Estimates.


def test_beyond_a_million_large_queues_are_estimated_and_small_ones_counted(
    db: Connection, admin: triojobs.SyncAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.execute(
        "INSERT INTO triojobs.ready SELECT 100000 + n, 'large', 0, now(), n % 2, 5 FROM generate_series(1, 20000) n"
    )
    db.execute(
        "INSERT INTO triojobs.scheduled SELECT 200000 + n, 'large', 0, now() + interval '1 h', 0, 5"
        " FROM generate_series(1, 30000) n"
    )
    put(db, 7, queue="small")
    db.execute("ANALYZE triojobs.ready")
    db.execute("ANALYZE triojobs.scheduled")
    exact = admin.queue("large")
    assert (exact.ready, exact.scheduled, exact.failed, exact.exact) == (20000, 30000, 10000, True)
    monkeypatch.setattr(counting, "COUNTED", 40_000)
    monkeypatch.setattr(counting, "CAPPED", 1_000)
    monkeypatch.setattr(counting, "SAMPLE", 10_000)
    large, small = admin.queues().items
    assert (small.ready, small.exact, large.exact) == (7, True, False)
    assert large.ready == pytest.approx(20000, rel=0.4)
    assert large.scheduled == pytest.approx(30000, rel=0.4)
    assert large.failed == pytest.approx(10000, rel=0.4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("limit", 0), ("after", ""), ("after", 7), ("window", 0), ("window", float("inf")), ("window", "1")],
    ids=repr,
)
async def test_what_cannot_be_meant_is_refused(face: Face, field: str, value: Any) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        await face("queues", **{field: value})
    assert caught.value.field == field


# All queues together.


async def test_statistics_count_what_stands_in_the_tables(db: Connection, group: Group, face: Face) -> None:
    jobs = [every_status(db, group, queue=queue) for queue in "ab"]
    put_one(db, queue="a", run_at=dt.datetime.now(dt.UTC) - dt.timedelta(hours=2))
    db.execute(
        "UPDATE triojobs.leases SET claimed_at = now() - interval '90 min' WHERE id = %s",
        [jobs[0]["running"]],
    )
    db.execute("SELECT pg_stat_force_next_flush()")  # or these rows would be reported after the analysis
    db.execute("VACUUM ANALYZE")
    found = await face("statistics")
    exact = {name: each.value for name, each in found.items() if each.exact}
    assert exact["RUNNING_JOBS"] == 2
    assert exact["PENDING_JOBS"] == 5
    assert exact["FAILED_JOBS"] == 2
    assert exact["ACTIVE_JOBS"] == 9
    assert exact["STALE_RUNNING_JOBS"] == 1
    assert exact["LONGEST_RUNNING_JOB_MINS"] == pytest.approx(90, abs=1)
    assert exact["QUEUE_BACKLOG"] == 3
    assert (dt.datetime.now(dt.UTC) - exact["OLDEST_PENDING_JOB"]).total_seconds() == pytest.approx(
        7200, abs=60
    )
    assert (exact["KILLED_JOBS"], exact["CANCELLED_JOBS"]) == (2, 4)
    assert (exact["KILLED_JOBS_TODAY"], exact["KILLED_JOBS_PAST_7_DAYS"]) == (2, 2)
    estimates = {name: each.value for name, each in found.items() if not each.exact}
    assert (estimates["TOTAL_JOBS"], estimates["DONE_JOBS"], estimates["COMPLETED_JOBS"]) == (17, 2, 8)
    assert (estimates["JOBS_PAST_HOUR"], estimates["JOBS_PAST_7_DAYS"]) == (17, 17)
    assert estimates["AVG_JOBS_PER_MINUTE_PAST_HOUR"] == pytest.approx(17 / 60)
    assert (estimates["SUCCESS_RATE"], estimates["FAILURE_RATE"]) == (50.0, 50.0)
    assert estimates["AVG_JOB_DURATION_MINS"] > 0
    assert found["DB_SIZE"].value > 100_000
    assert {each.name for each in found.values()} == set(found)


async def test_periods_are_told_by_when_jobs_were_enqueued(db: Connection, face: Face) -> None:
    put(db, 40)
    db.execute("UPDATE triojobs.jobs SET enqueued_at = now() - (41 - id) * interval '6 h'")
    found = {name: each.value for name, each in (await face("statistics")).items()}
    assert found["JOBS_PAST_HOUR"] == 0
    assert found["JOBS_PAST_24_HOURS"] == pytest.approx(4, abs=1)
    assert found["JOBS_PAST_7_DAYS"] == pytest.approx(28, abs=1)
    assert 0 <= found["JOBS_TODAY"] <= 4


async def test_of_nothing_there_is_nothing_to_tell(face: Face) -> None:
    found = {name: each.value for name, each in (await face("statistics")).items()}
    assert found["TOTAL_JOBS"] == found["ACTIVE_JOBS"] == found["JOBS_TODAY"] == 0
    for name in ("OLDEST_PENDING_JOB", "MOST_RECENT_JOB", "SUCCESS_RATE", "AVG_JOB_DURATION_MINS"):
        assert found[name] is None


def test_a_job_that_was_retried_and_killed_again_is_killed_once(
    db: Connection, group: Group, admin: triojobs.SyncAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = put_one(db)
    for _ in range(3):
        group.settle(db, group.claim(db), Outcome.KILLED)
        operate.retry(db, SCHEMA, job_id)
    assert admin.statistics()["KILLED_JOBS"].value == 0
    group.settle(db, group.claim(db), Outcome.KILLED)
    assert admin.statistics()["KILLED_JOBS"] == triojobs.Statistic("KILLED_JOBS", 1, "jobs", True)
    monkeypatch.setattr(statistics_sql, "BAD_ENDS", 1)
    assert not admin.statistics()["KILLED_JOBS"].exact
