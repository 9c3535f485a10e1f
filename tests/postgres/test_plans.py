"""The plans of the statements on a job's way, with 100,000 jobs due and a million in the future.

A plan is what keeps a claim's cost from growing with the backlog, and a generic plan stays as it was
made: so the same statements are looked at once more with plans that were made while the tables were
small, which is when the sessions of a worker meet them first.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from plans import Plan, explain, recorded
from tools import SCHEMA, Connection, Group, ended, open_session, put

from triojobs._model import Outcome
from triojobs._sql import claim as claim_sql
from triojobs._sql import groups, inspect, operate, settle

# Written in bulk, but into the tables' own columns; ids as the sequence would have given them.
FILL = """
SELECT setval('triojobs.job_ids', 1220000);
INSERT INTO triojobs.jobs (id, queue, payload, run_at)
SELECT n, 'q', 'x', now() FROM generate_series(1, 100000) n;
INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT n, 'q', n % 2, now() - interval '1 h' + n * interval '1 ms', 0, 5 FROM generate_series(1, 100000) n;
INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT 100000 + n, 'many' || n % 1000, n % 2, now() - interval '1 h', 0, 5 FROM generate_series(1, 20000) n;
INSERT INTO triojobs.scheduled (id, queue, priority, run_at, attempts, max_attempts)
SELECT 200000 + n, 'later', n % 2, now() + interval '1 h' + n * interval '1 ms', 0, 5
FROM generate_series(1, 1000000) n;
INSERT INTO triojobs.scheduled (id, queue, priority, run_at, attempts, max_attempts)
SELECT 1210000 + n, 'soon', 0, now() - interval '1 h' + n * interval '1 ms', 0, 5
FROM generate_series(1, 3000) n;
INSERT INTO triojobs.worker_groups (id, name, host, pid, version, lease_duration, lease_until)
SELECT gen_random_uuid(), 'other', 'h', 1, '0', 600, now() + interval '10 min' FROM generate_series(1, 30);
"""
CLAIMED = 2000


class Grown:
    """A session on the large tables, a group, and what it has claimed."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        for part in FILL.split(";\n"):
            conn.execute(part)  # type: ignore[call-overload]
        self.group = Group(conn)
        self.claims = self.group.claim(conn, CLAIMED)
        conn.execute("VACUUM ANALYZE")

    def plans(self, fn: Any, *args: Any, **options: Any) -> list[Plan]:
        """Return the plan of each statement of `fn(conn, schema, …)`."""
        statements = recorded(self.conn, fn, SCHEMA, *args, **options)
        return [explain(self.conn, each) for each in statements]

    def claim(self, wants: dict[str, int]) -> Plan:
        """Return the plan of a claim."""
        (plan,) = self.plans(claim_sql.claim, **claim_options(self.group, wants))
        return plan


def claim_options(group: Group, wants: dict[str, int]) -> dict[str, Any]:
    return {"group_id": group.id, "epoch": group.epoch, "claim_no": 1_000_000, "wants": wants}


@pytest.fixture(scope="module")
def grown(shared_database: str) -> Iterator[Grown]:
    with open_session(shared_database, prepare_threshold=None) as conn:
        yield Grown(conn)


def claimed_rows(plan: Plan) -> int:
    (delete,) = plan.nodes("ModifyTable", Operation="Delete")
    return delete["Actual Rows"]


def test_a_claim_reads_its_rows_in_order_locks_the_group_and_deletes_by_place(grown: Grown) -> None:
    plan = grown.claim({"q": 100})
    assert claimed_rows(plan) == 100
    (look,) = plan.nodes("Index", Index_Name="ready_order")
    assert look["Index Cond"] == "(queue = w.queue)"
    assert look["Actual Rows"] == 100
    (delete,) = plan.nodes("Tid Scan", Relation_Name="ready")
    assert delete["Actual Loops"] == 1
    assert [n["One-Time Filter"] for n in plan.nodes("Result") if "One-Time Filter" in n]
    assert len(plan.nodes("LockRows")) == 2
    (lock,) = plan.nodes("LockRows", Subplan_Name="CTE me")
    assert lock["Plans"][0]["Relation Name"] == "worker_groups"
    assert not plan.walked & {"ready", "scheduled", "leases", "jobs_0", "outcomes_0"}


def test_the_array_of_a_claim_is_made_once(grown: Grown) -> None:
    plan = grown.claim({"q": 100})
    arrays = [n for n in plan.nodes() if str(n.get("Subplan Name", "")).startswith("InitPlan")]
    (array,) = [n for n in arrays if n["Actual Rows"] == 100]
    assert array["Actual Loops"] == 1


def test_a_claim_reads_bodies_one_by_one_from_the_partition_they_are_in(grown: Grown) -> None:
    plan = grown.claim({"q": 100})
    (body,) = plan.nodes("Index Scan", Relation_Name="jobs_0")
    assert body["Index Cond"] == "(id = t.id)"
    assert body["Actual Loops"] == 100
    read = {
        n["Relation Name"]
        for n in plan.nodes()
        if "jobs_" in n.get("Relation Name", "") and n["Actual Loops"]
    }
    assert read == {"jobs_0"}


def test_the_cost_of_a_claim_does_not_depend_on_what_waits_behind_it(grown: Grown) -> None:
    # 100 rows: a page of ready each at worst, index pages of five tables, the body's partition.
    assert grown.claim({"q": 100}).pages < 3000
    assert grown.claim({"q": 1}).pages < 60


def test_a_claim_over_a_thousand_queues_is_a_thousand_short_looks(grown: Grown) -> None:
    plan = grown.claim({f"many{n}": 1 for n in range(1000)})
    assert claimed_rows(plan) == 1000
    (look,) = plan.nodes("Index", Index_Name="ready_order")
    assert look["Actual Loops"] == 1000
    (paused,) = plan.nodes("Scan", Relation_Name="paused_queues")
    assert paused["Actual Loops"] == 1
    assert not plan.walked & {"ready", "leases"}


def test_an_empty_poll_touches_few_pages_beside_a_million_future_rows(grown: Grown) -> None:
    move, due = grown.plans(claim_sql.promote, queues=["later", "empty"])
    (look,) = move.nodes("Index Scan", Index_Name="scheduled_order")
    assert look["Index Cond"] == "((queue = w.queue) AND (run_at <= statement_timestamp()))"
    assert move.pages < 30
    assert due.pages < 30
    assert grown.claim({"later": 100, "empty": 100}).pages < 30
    assert not (move.walked | due.walked) & {"scheduled", "ready"}


def test_a_clock_that_is_not_stable_would_walk_the_future(
    grown: Grown, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = claim_sql.PROMOTE.replace("statement_timestamp()", "clock_timestamp()")
    monkeypatch.setattr(claim_sql, "PROMOTE", mutant)
    move, _ = grown.plans(claim_sql.promote, queues=["later", "empty"])
    assert move.pages > 1000


def test_promotion_takes_a_thousand_rows_by_place(grown: Grown) -> None:
    move, due = grown.plans(claim_sql.promote, queues=["soon", "later"])
    (delete,) = move.nodes("Tid Scan", Relation_Name="scheduled")
    assert (delete["Actual Rows"], delete["Actual Loops"]) == (claim_sql.PROMOTE_LIMIT, 1)
    assert not move.walked & {"scheduled", "ready"}
    assert [n["Actual Rows"] for n in due.nodes("Index", Index_Name="scheduled_order")] == [1]


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
def test_a_settle_locks_the_group_and_finds_each_lease_by_its_key(grown: Grown, outcome: Outcome) -> None:
    batch = [ended(c, outcome) for c in grown.claims[:500]]
    (plan,) = grown.plans(settle.settle, grown.group.id, batch)
    (look,) = plan.nodes("Index Scan", Index_Name="leases_pkey")
    assert look["Index Cond"] == "(id = a.id)"
    assert look["Actual Loops"] == 500
    assert [n["One-Time Filter"] for n in plan.nodes("Result")]
    (lock,) = plan.nodes("LockRows")
    assert lock["Plans"][0]["Relation Name"] == "worker_groups"
    assert lock["Actual Loops"] == 1
    assert not plan.walked & {"leases", "ready", "scheduled"}


def test_what_addresses_a_job_by_its_id_walks_no_table(grown: Grown) -> None:
    running, waiting, future = grown.claims[0].job_id, 99_999, 300_000
    plans = [
        plan
        for job_id in (running, waiting, future)
        for plan in grown.plans(inspect.read_jobs, [job_id]) + grown.plans(inspect.ended, [job_id])
    ]
    plans += grown.plans(operate.cancel, future, "no") + grown.plans(operate.cancel, running, "no")
    plans += grown.plans(operate.retry, running)
    assert len(plans) >= 10
    assert all(plan.pages < 100 for plan in plans)
    assert not set().union(*(p.walked for p in plans)) & {
        "ready",
        "scheduled",
        "leases",
        "jobs_0",
        "outcomes_0",
    }


def test_idle_looks_at_one_row_of_each_queue(grown: Grown) -> None:
    (plan,) = grown.plans(inspect.idle, ["later", "empty"])
    assert not plan.walked & {"ready", "scheduled"}
    assert plan.pages < 100  # the leases of 2,000 running jobs are among them


def test_a_beat_and_a_rescue_round_do_not_look_at_what_waits(grown: Grown) -> None:
    plans = grown.plans(groups.beat, grown.group.id) + grown.plans(groups.rescue)
    assert all(plan.pages < 300 for plan in plans)
    (sweep,) = [p for p in plans if p.nodes("ModifyTable", Relation_Name="leases")]
    assert not sweep.walked & {"ready", "scheduled"}


def test_a_claim_by_nobody_locks_and_reads_nothing(grown: Grown) -> None:
    options = claim_options(grown.group, {"q": 100}) | {"group_id": uuid.uuid4()}
    (plan,) = grown.plans(claim_sql.claim, **options)
    (look,) = plan.nodes("Index", Index_Name="ready_order")
    assert look["Actual Loops"] == 0
    assert plan.pages < 10


@pytest.mark.parametrize("statistics", ["none", "of empty tables"])
def test_plans_made_while_the_tables_were_small_do_not_walk_them(db: Connection, statistics: str) -> None:
    if statistics == "of empty tables":
        db.execute("VACUUM ANALYZE")
    group = Group(db)
    put(db, 5)
    claims = group.claim(db, 3)
    plans = {
        (fn.__name__, n): [explain(db, each) for each in recorded(db, fn, SCHEMA, *args, **options)]
        for n, (fn, args, options) in enumerate(
            (
                (claim_sql.promote, (), {"queues": ["q"]}),
                (claim_sql.claim, (), claim_options(group, {"q": 2})),
                (settle.settle, (group.id, [ended(c, Outcome.FAILED) for c in claims]), {}),
                (inspect.read_jobs, ([1, 2],), {}),
                (settle.settle, (group.id, [ended(c, Outcome.DONE) for c in claims]), {}),
                (operate.cancel, (claims[0].job_id, "no"), {}),
            )
        )
    }
    walked = {name: set().union(*(plan.would_walk for plan in each)) for name, each in plans.items()}
    few_rows = {"worker_groups", "paused_queues"}
    assert {name: tables for name, tables in walked.items() if tables - few_rows} == {}
