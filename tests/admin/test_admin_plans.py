"""Plans of the admin's reads and acts beside 300,000 ended, 100,000 due and 300,000 future jobs.

A page must not cost more for what lies behind it. So each statement is looked at with what really ran:
which tables it walks, how many pages it touches, and that its second half (how far the search came)
runs only when the first has found too little.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
from plans import Plan, explain, reads_all, recorded
from tools import PATIENCE, SCHEMA, Connection, Group, open_session, put

from triojobs._admin_model import JobFilter
from triojobs._admin_store import prepare_admin_session
from triojobs._explanation import AHEAD_LIMIT
from triojobs._model import JobStatus
from triojobs._sql import counting, explaining, listing, pausing, selecting, statistics
from triojobs._sql.cancelling import cancelling
from triojobs._sql.deleting import deleting
from triojobs._sql.editing import Changes, editing
from triojobs._sql.rescheduling import rescheduling
from triojobs._sql.retrying import retrying
from triojobs._sql.selecting import Bounds, Search

FILL = """
SELECT setval('triojobs.job_ids', 2100000);
SELECT triojobs.add_partitions();
INSERT INTO triojobs.jobs (id, queue, payload, key, metadata, run_at, enqueued_at)
SELECT n, CASE WHEN n % 150000 = 1 THEN 'rare' ELSE 'q' END, 'x', CASE WHEN n % 100 = 0 THEN 'k' || n END,
       CASE WHEN n % 1000 = 0 THEN '{"tenant": 1}'::jsonb ELSE '{}' END,
       now() - interval '4 d' + n * interval '1 s', now() - interval '4 d' + n * interval '1 s'
FROM generate_series(1, 300000) n;
INSERT INTO triojobs.outcomes (job_id, group_id, claim_no, attempt, status, claimed_at, finished_at)
SELECT n, '00000000-0000-0000-0000-000000000001', n, 1, CASE WHEN n % 30000 = 0 THEN 'killed' ELSE 'done' END,
       now() - interval '4 d' + n * interval '1 s', now() - interval '4 d' + n * interval '1 s'
FROM generate_series(1, 300000) n;
INSERT INTO triojobs.jobs (id, queue, payload, run_at, enqueued_at)
SELECT 1500000 + n, 'q', 'x', now(), now() - interval '1 h' FROM generate_series(1, 400000) n;
INSERT INTO triojobs.scheduled (id, queue, priority, run_at, attempts, max_attempts)
SELECT 1500000 + n, 'later', 0, now() + interval '1 d' + n * interval '1 ms', 0, 5
FROM generate_series(1, 300000) n;
INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT 1800000 + n, 'q', n % 3, now() - interval '1 h' + n * interval '1 ms', 0, 5
FROM generate_series(1, 100000) n;
INSERT INTO triojobs.worker_groups (id, name, host, pid, version, lease_duration, lease_until, closed_at)
SELECT gen_random_uuid(), 'old', 'h', 1, '0', 600, now() - interval '1 d', now() - interval '1 d'
FROM generate_series(1, 20000) n;
"""
LARGE = {"jobs_0", "jobs_1", "outcomes_0", "ready", "scheduled"}


class Grown:
    """A session on the large tables, with a few jobs that run."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        conn.execute("SET statement_timeout = 0")  # of the filling alone
        for part in FILL.split(";\n"):
            conn.execute(part)  # type: ignore[call-overload]
        self.group = Group(conn)
        put(conn, 20)
        self.group.claim(conn, 20)
        conn.execute("VACUUM ANALYZE")

    def plans(self, fn: Any, *args: Any, **options: Any) -> list[Plan]:
        """Return the plan of each statement of `fn(conn, schema, …)`."""
        return [explain(self.conn, each) for each in recorded(self.conn, fn, SCHEMA, *args, **options)]

    def page(self, which: JobFilter, *, newest_first: bool = True, bounds: Bounds | None = None) -> Plan:
        """Return the plan of the first slice of a page of 50."""
        search = Search(which, which.statuses, newest_first)
        if bounds is None:
            bounds = selecting.time_bounds(self.conn, SCHEMA, which)
        (plan,) = self.plans(listing.summaries, search, bounds, limit=50)
        return plan


@pytest.fixture
def database(fresh_database: str) -> str:
    """The shared one is grown."""
    return fresh_database


@pytest.fixture(scope="module")
def grown(shared_database: str) -> Iterator[Grown]:
    with open_session(shared_database, prepare_threshold=None) as conn:
        prepare_admin_session(conn, call_timeout=PATIENCE)
        yield Grown(conn)


def rows_read(plan: Plan, *relations: str) -> float:
    """Return how many rows came out of scans of these relations, all loops together."""
    return sum(
        node["Actual Rows"] * node["Actual Loops"]
        for node in plan.nodes("Scan")
        if node.get("Relation Name") in relations
    )


FULL_PAGES: dict[str, JobFilter] = {
    "everything": JobFilter(),
    "a queue": JobFilter(queue="q"),
    "done, below a backlog": JobFilter(status="done"),
    "done of a queue": JobFilter(status="done", queue="q"),
    "waiting": JobFilter(status=["pending", "failed"]),
    "pending": JobFilter(status="pending"),
    "alive": JobFilter(status=["pending", "failed", "running"]),
    "ended or waiting": JobFilter(status=["done", "pending"]),
}


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("name", FULL_PAGES)
def test_a_full_page_reads_its_rows_and_no_more(grown: Grown, name: str, newest_first: bool) -> None:
    plan = grown.page(FULL_PAGES[name], newest_first=newest_first)
    assert plan.root["Actual Rows"] == 50
    assert plan.pages < 4000
    assert rows_read(plan, *LARGE) < 1000
    assert not plan.walked & LARGE
    (mark,) = plan.nodes("Aggregate")
    assert mark["Actual Loops"] == 0


def test_the_few_killed_jobs_are_found_without_the_done(grown: Grown) -> None:
    plan = grown.page(JobFilter(status=["killed", "cancelled"], queue="q"))
    assert plan.root["Actual Rows"] == 10
    assert plan.pages < 600
    assert plan.nodes("Index", Index_Name="outcomes_0_job_id_idx")


def test_the_jobs_of_a_key_are_found_by_it(grown: Grown) -> None:
    plan = grown.page(JobFilter(key="k500", queue="q"))
    assert plan.root["Actual Rows"] == 1
    assert plan.pages < 100
    assert plan.nodes("Index", Index_Name="jobs_0_key_id_idx")


def test_running_jobs_are_found_among_the_leases(grown: Grown) -> None:
    plan = grown.page(JobFilter(status="running"))
    assert plan.root["Actual Rows"] == 20
    assert rows_read(plan, *LARGE) < 200


@pytest.mark.parametrize("hours", [1, 12.7])
def test_jobs_that_ended_lately_are_not_sought_among_all_that_ended(grown: Grown, hours: float) -> None:
    which = JobFilter(finished_since=dt.datetime.now(dt.UTC) - dt.timedelta(hours=hours))
    for plan in grown.plans(selecting.time_bounds, which):
        assert plan.pages < 1500
        assert rows_read(plan, *LARGE) <= selecting.LATELY + 50_000  # a range of blocks holds others, too
        assert not plan.walked & LARGE
    page = grown.page(which)
    assert page.root["Actual Rows"] == (0 if hours == 1 else 50)
    assert page.pages < 4000


def test_given_ids_are_looked_up_one_by_one(grown: Grown) -> None:
    plan = grown.page(JobFilter(ids=[7, 8, 1_999_999, 4_000_000]))
    assert plan.root["Actual Rows"] == 2
    assert plan.pages < 200
    assert not plan.walked & LARGE


def test_a_slice_of_a_search_without_hits_is_bounded(grown: Grown) -> None:
    for which in (
        JobFilter(queue="nobody's"),
        JobFilter(metadata={"tenant": 2}),
        JobFilter(status="pending", queue="nobody's"),
    ):
        plan = grown.page(which)
        assert plan.root["Actual Rows"] == 1  # how far it came
        candidates = rows_read(plan, *LARGE)
        assert candidates <= 2 * selecting.CHEAP_SLICE + 10, which
    plan = grown.page(JobFilter(status="cancelled", metadata={"tenant": 2}, key=None))
    assert rows_read(plan, *LARGE) < 100


def test_a_time_is_found_by_probing_ids(grown: Grown) -> None:
    since = dt.datetime.now(dt.UTC) - dt.timedelta(days=2)
    which = JobFilter(enqueued_since=since, enqueued_until=since + dt.timedelta(minutes=1))
    plans = grown.plans(selecting.time_bounds, which)
    assert all(plan.pages < 2000 for plan in plans)
    bounds = selecting.time_bounds(grown.conn, SCHEMA, which)
    assert bounds.high - bounds.low < 2 * 3600 + 60 + 40
    page = grown.page(which)
    assert page.root["Actual Rows"] == 50
    assert page.pages < 6000


def test_a_job_and_its_history_are_looked_up_by_id(grown: Grown) -> None:
    for job_id in (30_000, 1_600_000, 2_100_001):
        (plan,) = grown.plans(listing.read_job, job_id)
        assert plan.pages < 150
        assert not plan.walked & LARGE


@pytest.mark.parametrize("statistics", ["none", "of empty tables"])
@pytest.mark.parametrize("name", FULL_PAGES)
def test_plans_made_while_the_tables_were_small_do_not_walk_them(
    db: Connection, name: str, statistics: str
) -> None:
    if statistics == "of empty tables":
        db.execute("VACUUM ANALYZE")
    prepare_admin_session(db, call_timeout=PATIENCE)
    put(db, 3)
    which = FULL_PAGES[name]
    (statement,) = recorded(db, listing.summaries, SCHEMA, Search(which, which.statuses), Bounds(), limit=50)
    plan = explain(db, statement)
    assert plan.would_walk <= {"worker_groups"}
    # Candidates come in the order of an index; sorted or hashed they would all be read first.
    assert not plan.nodes("Aggregate", Strategy="Hashed")
    below = [str(node["Sort Key"]) for node in plan.nodes("Sort") if node is not plan.root]
    assert all(".no DESC" in key for key in below), below


@pytest.mark.parametrize("closed", [True, False])
def test_a_page_of_groups_is_read_in_order_beside_20_000_closed_ones(grown: Grown, closed: bool) -> None:
    (plan,) = grown.plans(listing.groups, closed=closed, before=None, limit=50)
    assert plan.root["Actual Rows"] == (50 if closed else 1)
    assert rows_read(plan, "worker_groups") < 200
    assert plan.pages < 400


def test_names_of_queues_are_found_by_jumping_from_one_to_the_next(grown: Grown) -> None:
    (plan,) = grown.plans(counting.names, after="", limit=100)
    assert rows_read(plan, "ready", "scheduled") <= 4
    assert rows_read(plan, "worker_groups") <= counting.GROUPS_LOOKED_AT
    assert not plan.walked & LARGE


def test_counts_read_the_narrow_tables_alone(grown: Grown) -> None:
    plans = grown.plans(counting.counts, ["q", "later", "nobody's"])
    assert not set().union(*(plan.walked for plan in plans)) & LARGE
    (plan,) = [plan for plan in plans if plan.nodes("Scan", Relation_Name="scheduled")]
    assert rows_read(plan, "jobs_0", "jobs_1", "outcomes_0") == 0
    # Each waiting row once, and one of each priority.
    assert rows_read(plan, "ready", "scheduled") < 400_000 + 10


def test_counts_of_large_queues_are_cut_off(grown: Grown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "COUNTED", 1000)
    monkeypatch.setattr(counting, "CAPPED", 2000)
    monkeypatch.setattr(counting, "SAMPLE", 5000)
    plans = grown.plans(counting.counts, ["q", "later"])
    assert len(plans) == 4
    assert sum(rows_read(plan, "ready", "scheduled") for plan in plans) < 30_000


def test_what_ended_lately_is_read_from_the_end_of_the_outcomes(grown: Grown) -> None:
    (plan,) = grown.plans(counting.recent, window=1e9)
    (heap,) = [n for n in plan.nodes("Bitmap Heap Scan", Relation_Name="outcomes_0") if n["Actual Loops"]]
    assert heap["Actual Rows"] == counting.RECENT
    assert heap["Rows Removed by Index Recheck"] < 30_000  # the rest of a block range
    assert plan.pages < 200_000
    assert not plan.walked & LARGE


def test_statistics_read_no_table_of_ended_jobs(grown: Grown) -> None:
    plans = grown.plans(statistics.statistics)
    sampled = {n["Relation Name"] for plan in plans for n in plan.nodes("Sample Scan")}
    assert sampled == {"ready", "scheduled"}
    walked = {
        n["Index Name"] for p in plans for n in p.nodes("Scan", Relation_Name="outcomes_0") if reads_all(n)
    }
    assert walked == {"outcomes_0_job_id_idx"}  # of killed and cancelled jobs
    for plan in plans:
        assert rows_read(plan, "jobs_0", "jobs_1") <= counting.RECENT + 100
        assert rows_read(plan, "outcomes_0") <= 3 * counting.RECENT


def test_explaining_counts_what_is_ahead_by_the_order_of_claims(grown: Grown) -> None:
    for job_id, ahead in ((1_900_000, 66_667), (1_800_001, 33_333), (1_600_000, 0), (30_000, 0)):
        (plan,) = grown.plans(explaining.facts, job_id)
        assert not plan.walked & LARGE
        # Priority 1 and 2 come before 0; no more than the limit are counted.
        assert rows_read(plan, "ready") <= min(ahead, AHEAD_LIMIT) + 5
        assert plan.pages < 2000


# Steering. 500 jobs in each place, of hundreds of thousands.

EVERY = frozenset(JobStatus)
ACTS = {
    "cancel": cancelling("no", EVERY),
    "retry": retrying(EVERY),
    "hurry": rescheduling(None, 0.0, EVERY),
    "put off": rescheduling(None, 600.0, EVERY),
    "edit": editing(Changes(priority=7)),
    "delete": deleting(EVERY),
}
PLACES = {"ended": 1, "later": 1_500_001, "due": 1_800_001}


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_an_act_looks_its_jobs_up_one_by_one(grown: Grown, act: str, wait: bool) -> None:
    ids = [start + n * 199 for start in PLACES.values() for n in range(500)]
    plans = grown.plans(ACTS[act], ids, wait=wait)
    for plan in plans:
        assert not plan.would_walk & LARGE
        # Some indexes and a row of each of 1,500 jobs in up to five tables.
        assert plan.pages < 120_000
        assert rows_read(plan, *LARGE) <= 5 * len(ids)
    assert any(plan.nodes("LockRows") for plan in plans)


@pytest.mark.parametrize("act", ACTS)
def test_an_act_on_one_job_costs_nothing_for_the_others(grown: Grown, act: str) -> None:
    for job_id in PLACES.values():
        for plan in grown.plans(ACTS[act], [job_id], wait=True):
            assert plan.pages < 150
            assert rows_read(plan, *LARGE) <= 5


@pytest.mark.parametrize("statistics", ["none", "of empty tables"])
@pytest.mark.parametrize("act", ACTS)
def test_plans_of_acts_made_while_the_tables_were_small_do_not_walk_them(
    db: Connection, act: str, statistics: str
) -> None:
    if statistics == "of empty tables":
        db.execute("VACUUM ANALYZE")
    prepare_admin_session(db, call_timeout=PATIENCE)
    ids = put(db, 3)
    for statement in recorded(db, ACTS[act], SCHEMA, ids, wait=False):
        plan = explain(db, statement)
        assert not plan.would_walk
        assert not plan.nodes("Hash")


def test_the_batches_of_a_bulk_act_go_on_where_the_one_before_ended(grown: Grown) -> None:
    search = Search(JobFilter(queue="later"), frozenset({JobStatus.PENDING}), newest_first=False)
    bounds = selecting.present(grown.conn, SCHEMA, search.which)
    first = selecting.find(grown.conn, SCHEMA, search, bounds, limit=500)
    assert len(first.ids) == 500
    assert first.rest is not None
    (plan,) = grown.plans(selecting.find, search, first.rest, limit=500)
    assert rows_read(plan, *LARGE) < 2_000
    assert plan.pages < 5_000


def test_the_look_for_claims_before_a_pause_touches_no_job(grown: Grown) -> None:
    (plan,) = grown.plans(pausing.claims_in_flight)
    assert rows_read(plan, *LARGE) == 0
