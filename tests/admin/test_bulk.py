"""All jobs that a filter names: in batches, oldest first, counted beforehand."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import trio
from faces import Face, every_status
from tools import SCHEMA, Connection, Group, blocked, count, history, make_due, place, put, put_one, read

import triojobs
from triojobs import BulkResult, JobFilter
from triojobs._model import Outcome
from triojobs._sql import notify, operate, selecting

ENDED = ["done", "killed", "cancelled"]


def places(db: Connection, jobs: dict[str, int]) -> dict[str, str]:
    return {word: place(db, job_id)[0] for word, job_id in jobs.items()}


ACTS: dict[str, tuple[JobFilter, dict[str, Any], dict[str, str]]] = {
    "cancel_many": (
        JobFilter(queue="q"),
        {"reason": "no"},
        {
            "ready": "cancelled",
            "scheduled": "cancelled",
            "failed": "cancelled",
        },  # and the running one is asked
    ),
    "retry_many": (
        JobFilter(queue="q", status=ENDED),
        {},
        dict.fromkeys(("done", "killed", "cancelled running", "cancelled waiting"), "ready"),
    ),
    "reschedule_many": (JobFilter(queue="q"), {}, {"scheduled": "ready", "failed": "ready"}),
    "edit_many": (JobFilter(queue="q"), {"priority": 7}, {}),
    "delete_many": (
        JobFilter(queue="q"),
        {},
        dict.fromkeys(
            ("done", "killed", "cancelled running", "cancelled waiting", "ready", "scheduled", "failed"),
            "nowhere",
        ),
    ),
}
TOUCHED = {"cancel_many": 4, "retry_many": 4, "reschedule_many": 3, "edit_many": 2, "delete_many": 7}


@pytest.mark.parametrize("act", ACTS)
async def test_an_act_on_a_filter_changes_what_matches_and_can_be_changed(
    db: Connection, group: Group, face: Face, act: str
) -> None:
    jobs, others = every_status(db, group), every_status(db, group, queue="other")
    before, untouched = places(db, jobs), places(db, others)
    which, options, moves = ACTS[act]
    result = await face(act, which, dry_run=True, **options)
    assert result == BulkResult(TOUCHED[act], 0)
    assert places(db, jobs) == before
    assert await face(act, which, **options) == result
    assert places(db, jobs) == before | moves
    assert places(db, others) == untouched
    if act == "cancel_many":
        assert read(db, jobs["running"]).cancel_reason == "no"
        assert read(db, others["running"]).cancel_reason is None
    if act == "edit_many":
        priorities = {word: read(db, job_id).priority for word, job_id in jobs.items()}
        assert {word for word, priority in priorities.items() if priority == 7} == {"ready", "scheduled"}


@pytest.mark.parametrize(
    ("status", "touched"), [("pending", 2), ("failed", 1), ("running", 1), (["failed", "running"], 2)]
)
async def test_the_statuses_of_the_filter_are_obeyed(
    db: Connection, group: Group, face: Face, status: Any, touched: int
) -> None:
    every_status(db, group)
    assert await face("cancel_many", JobFilter(status=status)) == BulkResult(touched, 0)


@pytest.mark.parametrize("batch", [1, 3, 7, 1000])
async def test_batches_are_told_of_one_by_one_and_leave_nothing_out(
    db: Connection, face: Face, batch: int
) -> None:
    ids = put(db, 17)
    told: list[BulkResult] = []
    result = await face("cancel_many", JobFilter(queue="q"), batch=batch, progress=told.append)
    assert result == BulkResult(17, 0)
    assert told[-1] == result
    steps = [b.touched - a.touched for a, b in zip([BulkResult(0, 0), *told], told, strict=False)]
    assert all(step <= batch for step in steps)
    assert {place(db, job_id) for job_id in ids} == {("cancelled", 0)}


async def test_what_is_retried_waits_in_its_old_order(db: Connection, group: Group, face: Face) -> None:
    ids = put(db, 9)
    group.settle(db, group.claim(db), Outcome.KILLED)
    assert await face("retry_many", JobFilter(status="killed"), batch=2) == BulkResult(9, 0)
    assert [claim.job_id for claim in group.claim(db)] == ids


async def test_jobs_that_come_meanwhile_are_left(db: Connection, face: Face) -> None:
    put(db, 4)

    def enqueue_more(result: BulkResult) -> None:
        if result.touched <= 4:
            put(db, 2)

    result = await face("cancel_many", JobFilter(queue="q"), batch=2, progress=enqueue_more)
    assert result == BulkResult(4, 0)
    assert count(db, "ready") >= 4


async def test_jobs_with_a_key_are_retried_unless_it_has_passed_on(
    db: Connection, group: Group, face: Face
) -> None:
    old = put_one(db, key="k1", hold="ended")
    other = put_one(db, key="k2", hold="ended")
    plain = put_one(db)
    group.settle(db, group.claim(db), Outcome.KILLED)
    put_one(db, key="k1", hold="ended", delay=60.0)
    assert await face("retry_many", JobFilter(status="killed")) == BulkResult(2, 1)
    assert [place(db, i) for i in (old, other, plain)] == [("killed", 1), ("ready", 0), ("ready", 0)]


async def test_of_two_ended_jobs_of_one_key_the_one_that_has_it_is_retried(
    db: Connection, group: Group, face: Face
) -> None:
    first = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim(db), Outcome.KILLED)
    second = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim(db), Outcome.KILLED)
    assert await face("retry_many", JobFilter(key="k", status="killed")) == BulkResult(1, 1)
    assert [place(db, i)[0] for i in (first, second)] == ["killed", "ready"]


async def test_jobs_that_were_tried_before_are_not_edited(db: Connection, group: Group, face: Face) -> None:
    tried, fresh = put(db, 2)
    group.settle(db, group.claim(db, 1), Outcome.KILLED)
    assert operate.retry(db, SCHEMA, tried)
    assert await face("edit_many", JobFilter(queue="q"), max_attempts=9) == BulkResult(1, 1)
    assert [read(db, i).max_attempts for i in (tried, fresh)] == [5, 9]


async def test_groups_and_queues_are_told_once_for_each_batch(
    db: Connection, group: Group, face: Face
) -> None:
    put(db, 6)
    group.claim(db, 3)
    notify.mark_waiting(db, SCHEMA, group.id, ["q"])
    db.execute("LISTEN triojobs")
    db.execute(f'LISTEN "{notify.group_channel(group.id)}"')  # type: ignore[call-overload]
    await face("cancel_many", JobFilter(queue="q"))
    await face("retry_many", JobFilter(status="cancelled"))
    heard = [n.channel for n in db.notifies(timeout=30, stop_after=2)]
    assert heard == [notify.group_channel(group.id), "triojobs"]


async def test_a_lot_of_jobs_is_cancelled_retried_and_deleted(
    db: Connection, group: Group, face: Face
) -> None:
    put(db, 3000)
    assert await face("cancel_many", JobFilter(queue="q")) == BulkResult(3000, 0)
    assert await face("retry_many", JobFilter(queue="q", status="cancelled")) == BulkResult(3000, 0)
    assert len(group.claim(db, 1000)) == 1000
    assert await face("delete_many", JobFilter(queue="q")) == BulkResult(2000, 0)
    assert (count(db, "jobs"), count(db, "leases"), count(db, "ready")) == (1000, 1000, 0)


@pytest.mark.parametrize("act", ACTS)
def test_in_the_callers_transaction_an_act_on_a_filter_comes_with_its_commit(
    db: Connection, group: Group, connect: Any, act: str
) -> None:
    jobs = every_status(db, group)
    before = places(db, jobs)
    which, options, moves = ACTS[act]
    conn = connect()

    def work() -> BulkResult:
        told: list[BulkResult] = []
        result: BulkResult = getattr(triojobs.admin_on(conn), act)(
            which, batch=2, progress=told.append, **options
        )
        assert told[-1] == result
        return result

    with conn.transaction(force_rollback=True):
        assert work() == BulkResult(TOUCHED[act], 0)
    assert places(db, jobs) == before
    with conn.transaction():
        assert work() == BulkResult(TOUCHED[act], 0)
        assert places(db, jobs) == before
    assert places(db, jobs) == before | moves


# What stands in the way.


def test_a_job_that_somebody_holds_is_done_after_its_batch(
    db: Connection, connect: Any, admin: triojobs.SyncAdmin
) -> None:
    ids = put(db, 5)
    told: list[BulkResult] = []
    gate = connect()
    gate.execute("BEGIN")
    gate.execute("SELECT FROM triojobs.ready WHERE id = %s FOR UPDATE", [ids[2]])
    call = blocked(
        db,
        connect(),
        lambda conn: triojobs.admin_on(conn).cancel_many(JobFilter(queue="q"), progress=told.append),
    )
    assert count(db, "ready") == 1  # the others are cancelled already
    gate.execute("ROLLBACK")
    assert call.result() == BulkResult(5, 0)
    assert told == [BulkResult(5, 0)]
    assert admin.jobs(JobFilter(status="cancelled")).items[2].id == ids[2]


def test_a_job_that_moved_out_of_the_filter_meanwhile_is_left(db: Connection, connect: Any) -> None:
    first, second = put(db, 2)
    group = Group(db)
    with (gate := connect()).transaction():
        gate.execute("SELECT FROM triojobs.ready WHERE id = %s FOR UPDATE", [first])
        call = blocked(
            db, connect(), lambda conn: triojobs.admin_on(conn).cancel_many(JobFilter(status="pending"))
        )
        # The claim that the gate stands for takes the job; it is running when its turn comes.
        claims = group.claim(gate, 1)
    assert [c.job_id for c in claims] == [first]
    assert call.result() == BulkResult(1, 1)
    assert place(db, first) == ("leases", 1)
    assert read(db, first).cancel_reason is None
    assert place(db, second) == ("cancelled", 0)


async def test_an_error_says_how_many_had_been_changed(
    db: Connection, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = put(db, 6)
    find, calls = selecting.find, []

    def fail_at_the_third(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise triojobs.DatabaseError("injected", transient=True)
        return find(*args, **options)

    monkeypatch.setattr(selecting, "find", fail_at_the_third)
    with pytest.raises(triojobs.DatabaseError) as caught:
        await face("cancel_many", JobFilter(ids=ids), batch=2)
    assert caught.value.__notes__ == ["4 job(s) had been changed before"]
    assert count(db, "ready") == 2


async def test_a_callback_that_raises_ends_the_call_between_batches(db: Connection, face: Face) -> None:
    put(db, 6)

    def refuse(result: BulkResult) -> None:
        if result.touched >= 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        await face("cancel_many", JobFilter(queue="q"), batch=2, progress=refuse)
    assert count(db, "ready") == 2


async def test_a_cancelled_call_ends_between_batches(db: Connection, conninfo: str) -> None:
    put(db, 10)
    with trio.CancelScope() as scope:
        async with triojobs.open_admin(conninfo) as admin:
            await admin.cancel_many(JobFilter(queue="q"), batch=3, progress=lambda result: scope.cancel())
    assert scope.cancelled_caught
    assert count(db, "ready") == 7


# Refused.


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("which", "options", "field"),
    [
        (None, {}, "which"),
        (JobFilter(), {}, "which"),
        ({"queue": "q"}, {}, "which"),
        (JobFilter(queue="q", status=ENDED), {"batch": 0}, "batch"),
        (JobFilter(queue="q", status=ENDED), {"batch": 10_001}, "batch"),
        (JobFilter(queue="q", status=ENDED), {"progress": 7}, "progress"),
        (JobFilter(queue="q", status=ENDED), {"dry_run": 1}, "dry_run"),
    ],
    ids=["none", "empty", "no filter", "no batch", "large batch", "no function", "no flag"],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_touched(
    db: Connection,
    group: Group,
    admin: triojobs.SyncAdmin,
    act: str,
    which: Any,
    options: dict[str, Any],
    field: str,
) -> None:
    jobs = every_status(db, group)
    before = places(db, jobs)
    with pytest.raises(triojobs.OptionError) as caught:
        getattr(admin, act)(which, **(ACTS[act][1] | options))
    assert caught.value.field == field
    assert places(db, jobs) == before


@pytest.mark.parametrize(
    ("act", "status"),
    [
        ("cancel_many", "done"),
        ("retry_many", "pending"),
        ("retry_many", None),
        ("reschedule_many", "running"),
        ("edit_many", ["failed", "done"]),
        ("delete_many", "running"),
    ],
    ids=repr,
)
def test_a_filter_of_which_nothing_can_be_changed_is_refused(
    db: Connection, admin: triojobs.SyncAdmin, act: str, status: Any
) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        getattr(admin, act)(JobFilter(queue="q", status=status), **ACTS[act][1])
    assert caught.value.field == "status"


def test_an_act_sees_what_its_filter_says_of_times_and_keys(
    db: Connection, group: Group, admin: triojobs.SyncAdmin
) -> None:
    put(db, 3)
    group.settle(db, group.claim(db), Outcome.KILLED, error="boom")
    db.execute("UPDATE triojobs.outcomes SET finished_at = now() - interval '1 h' WHERE job_id <= 2")
    since = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=30)
    assert admin.retry_many(JobFilter(status="killed", finished_since=since)) == BulkResult(1, 0)
    make_due(db)
    assert history(db, 3) == [(1, "killed", "boom")]
