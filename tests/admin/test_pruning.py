"""What is too old goes, what is not stays; whole ranges at once, the rest job by job."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
from faces import FACES, Face, every_status, open_face
from tools import PATIENCE, SCHEMA, Connection, Group, blocked, count, place, put, put_one

import triojobs
from triojobs import JobNotFoundError, Pruned, Retention
from triojobs import _pruning as pruning
from triojobs._model import Outcome
from triojobs._sql import operate
from triojobs._sql import retention as retention_sql

Connect = Callable[[], Connection]

NOTHING_KEPT = Retention(done=0.0, killed=0.0, cancelled=0.0)
DAYS = (
    "UPDATE triojobs.outcomes SET finished_at = finished_at - %s * interval '1 day' WHERE job_id = ANY (%s)"
)


@pytest.fixture
def database(fresh_database: str) -> str:
    """Ranges are dropped here."""
    return fresh_database


@pytest.fixture
def auto(db: Connection) -> triojobs.SyncAdmin:
    """An admin on a connection in autocommit, which repeats nothing."""
    return triojobs.admin_on(db)


def age(db: Connection, days: float, *ids: int) -> None:
    """Let jobs have been enqueued, and have ended, so long ago."""
    db.execute(DAYS, [days, list(ids)])
    db.execute(
        "UPDATE triojobs.jobs SET enqueued_at = enqueued_at - %s * interval '1 day' WHERE id = ANY (%s)",
        [days, list(ids)],
    )


def end(db: Connection, group: Group, outcome: Outcome, **options: Any) -> int:
    """Return a job that ended in this way."""
    job_id = put_one(db, **{"priority": 9} | options)
    claims = group.claim(db, 1)
    assert [c.job_id for c in claims] == [job_id]
    group.settle(db, claims, outcome)
    return job_id


def end_cancelled(db: Connection) -> int:
    job_id = put_one(db, priority=9)
    operate.cancel(db, SCHEMA, job_id, "no")
    return job_id


def fill_range(db: Connection, n: int = 0, *, jobs: int = 100, days: float = 8.0) -> list[int]:
    """Fill a range with done jobs of this age, and let later ids be given out from the next one."""
    low = n * retention_sql.WIDTH
    ids = list(range(low + 1, low + jobs + 1))
    db.execute(
        "INSERT INTO triojobs.jobs (id, queue, payload, run_at, enqueued_at)"
        " SELECT i, 'q', 'x', now(), now() - %(days)s * interval '1 day' FROM unnest(%(ids)s::bigint[]) i",
        {"ids": ids, "days": days},
    )
    db.execute(
        "INSERT INTO triojobs.outcomes (job_id, attempt, status, finished_at)"
        " SELECT i, 1, 'done', now() - %(days)s * interval '1 day' FROM unnest(%(ids)s::bigint[]) i",
        {"ids": ids, "days": days},
    )
    db.execute("SELECT setval('triojobs.job_ids', %s)", [(n + 1) * retention_sql.WIDTH + 1])
    db.execute("SELECT triojobs.add_partitions()")
    return ids


def tables(db: Connection) -> set[int]:
    """Return the numbers of the ranges that have partitions."""
    rows = db.execute(
        "SELECT c.relname FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace"
        " WHERE s.nspname = 'triojobs' AND c.relname ~ '^(jobs|outcomes)_[0-9]+$' AND c.relkind = 'r'"
    ).fetchall()
    names = {row[0] for row in rows}
    numbers = {int(name.partition("_")[2]) for name in names}
    assert names == {f"{parent}_{n}" for parent in ("jobs", "outcomes") for n in numbers}
    return numbers


# How long what is kept.


@pytest.mark.parametrize(
    ("days", "gone"), [(6.9, set()), (7.1, {"done"}), (30.1, {"done", "killed", "cancelled"})]
)
async def test_done_jobs_are_kept_for_a_week_killed_and_cancelled_ones_for_thirty_days(
    db: Connection, group: Group, face: Face, days: float, gone: set[str]
) -> None:
    jobs = {
        "done": end(db, group, Outcome.DONE),
        "killed": end(db, group, Outcome.KILLED),
        "cancelled": end_cancelled(db),
    }
    age(db, days, *jobs.values())
    assert await face("prune", dry_run=True) == Pruned(jobs=len(gone))
    assert count(db, "jobs") == 3
    assert await face("prune") == Pruned(jobs=len(gone))
    assert {word for word, job_id in jobs.items() if place(db, job_id)[0] == "nowhere"} == gone
    assert count(db, "jobs") == 3 - len(gone)


async def test_a_queue_may_have_a_rule_of_its_own(db: Connection, group: Group, face: Face) -> None:
    ids = {q: put_one(db, queue=q) for q in ("audit", "noise", "q")}
    for claims in (group.claim(db, queue=queue) for queue in ids):
        group.settle(db, claims, Outcome.DONE)
    age(db, 2, *ids.values())
    rule = Retention(done=86400.0, queues={"audit": Retention(done=math.inf), "noise": Retention(done=0)})
    assert await face("prune", rule) == Pruned(jobs=2)
    assert {q for q, job_id in ids.items() if place(db, job_id)[0] == "done"} == {"audit"}


def test_what_waits_or_runs_is_never_too_old(db: Connection, group: Group, admin: triojobs.SyncAdmin) -> None:
    jobs = every_status(db, group)
    again = end(db, group, Outcome.KILLED)
    assert operate.retry(db, SCHEMA, again)
    age(db, 1000, again, *jobs.values())
    kept = {"failed", "running", "scheduled", "ready"}
    assert admin.prune(NOTHING_KEPT).jobs == len(jobs) - len(kept)
    assert {word for word, job_id in jobs.items() if place(db, job_id)[0] != "nowhere"} == kept
    assert place(db, again) == ("ready", 0)
    assert count(db, "jobs") == len(kept) + 1


def test_the_last_end_of_a_job_counts(db: Connection, group: Group, admin: triojobs.SyncAdmin) -> None:
    job_id = end(db, group, Outcome.KILLED)
    age(db, 100, job_id)
    assert operate.retry(db, SCHEMA, job_id)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    assert admin.prune() == Pruned()
    age(db, 8, job_id)
    assert admin.prune() == Pruned(jobs=1)


def test_for_ever_is_for_ever(db: Connection, group: Group, admin: triojobs.SyncAdmin) -> None:
    jobs = [end(db, group, Outcome.DONE), end_cancelled(db)]
    age(db, 3650, *jobs)
    for_ever = Retention(done=math.inf, killed=math.inf, cancelled=math.inf)
    assert admin.prune(for_ever) == Pruned()
    assert admin.prune(Retention(done=math.inf)) == Pruned(jobs=1)
    assert [place(db, job_id)[0] for job_id in jobs] == ["done", "nowhere"]


def test_worker_groups_leave_a_range_a_day_to_go_as_a_whole(
    db: Connection, group: Group, auto: triojobs.SyncAdmin
) -> None:
    young, old = end(db, group, Outcome.DONE), end(db, group, Outcome.DONE)
    age(db, 7.5, young)
    age(db, 8.5, old)
    run = triojobs._admin_store.drive_sync  # type: ignore[attr-defined]
    steps = pruning.prune(Retention(), slack=pruning.LATER, dry_run=False)
    assert run(steps, auto._run) == Pruned(jobs=1)
    assert [place(db, job_id)[0] for job_id in (young, old)] == ["done", "nowhere"]


# Ranges.


async def test_a_range_of_which_nothing_is_kept_is_dropped(db: Connection, face: Face) -> None:
    fill_range(db)
    assert tables(db) == {0, 1, 2, 3}
    assert await face("prune", dry_run=True) == Pruned(ranges=1)
    assert tables(db) == {0, 1, 2, 3}
    assert await face("prune") == Pruned(ranges=1)
    assert tables(db) == {1, 2, 3}
    assert count(db, "jobs") == count(db, "outcomes") == 0
    assert put_one(db) > retention_sql.WIDTH


def test_what_has_to_stay_is_moved_with_its_attempts(
    db: Connection, group: Group, admin: triojobs.SyncAdmin
) -> None:
    jobs = every_status(db, group)
    young = end(db, group, Outcome.DONE)
    again = end(db, group, Outcome.KILLED)
    assert operate.retry(db, SCHEMA, again)
    ids = [*jobs.values(), young, again]
    age(db, 100, *(job_id for job_id in ids if job_id != young))
    old = fill_range_after(db, ids)
    kept = [jobs[w] for w in ("failed", "running", "scheduled", "ready")] + [young, again]
    before = [(place(db, i), everything_of(db, i)) for i in kept]
    assert admin.prune() == Pruned(ranges=1, moved=len(kept))
    assert [(place(db, i), everything_of(db, i)) for i in kept] == before
    assert tables(db) == {1, 2, 3}
    assert count(db, "jobs_default") == count(db, "jobs") == len(kept)
    assert {place(db, i)[0] for i in old} == {"nowhere"}
    # They live on where they are, and go when it is their time.
    assert sorted(c.job_id for c in group.claim(db)) == sorted([jobs["ready"], again])
    with pytest.raises(JobNotFoundError):
        admin.job(old[0])


def fill_range_after(db: Connection, ids: list[int]) -> list[int]:
    """Put old done jobs into range 0, which has some already."""
    return [i for i in fill_range_with_gap(db, max(ids)) if i not in ids]


def fill_range_with_gap(db: Connection, last: int) -> list[int]:
    more = list(range(last + 1, last + 51))
    for statement in (
        "INSERT INTO triojobs.jobs (id, queue, payload, run_at, enqueued_at)"
        " SELECT i, 'q', 'x', now(), now() - interval '100 days' FROM unnest(%s::bigint[]) i",
        "INSERT INTO triojobs.outcomes (job_id, attempt, status, finished_at)"
        " SELECT i, 1, 'done', now() - interval '100 days' FROM unnest(%s::bigint[]) i",
    ):
        db.execute(statement, [more])  # type: ignore[call-overload]
    db.execute("SELECT setval('triojobs.job_ids', %s)", [retention_sql.WIDTH + 1])
    db.execute("SELECT triojobs.add_partitions()")
    # Enqueued before what is kept, as ids are in the order of the enqueues.
    db.execute("UPDATE triojobs.jobs SET enqueued_at = now() - interval '100 days'")
    return more


def everything_of(db: Connection, job_id: int) -> list[Any]:
    return [
        db.execute("SELECT * FROM triojobs.jobs WHERE id = %s", [job_id]).fetchall(),
        db.execute("SELECT * FROM triojobs.outcomes WHERE job_id = %s ORDER BY no", [job_id]).fetchall(),
    ]


def test_a_range_of_which_too_much_has_to_stay_goes_job_by_job(
    db: Connection, admin: triojobs.SyncAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "MOVED", 10)
    ids = fill_range(db, jobs=40)
    db.execute("UPDATE triojobs.outcomes SET status = 'killed' WHERE job_id <= 11")
    assert admin.prune(dry_run=True) == Pruned(jobs=29)
    assert admin.prune() == Pruned(jobs=29)
    assert tables(db) == {0, 1, 2, 3}
    assert [i for i in ids if place(db, i)[0] == "killed"] == ids[:11]
    db.execute("UPDATE triojobs.outcomes SET finished_at = now() - interval '31 days' WHERE job_id = 1")
    assert admin.prune() == Pruned(ranges=1, moved=10)


def test_the_range_that_ids_come_from_stays(db: Connection, group: Group, admin: triojobs.SyncAdmin) -> None:
    age(db, 8, *(end(db, group, Outcome.DONE) for _ in range(3)))
    assert admin.prune() == Pruned(jobs=3)
    assert 0 in tables(db)


def test_an_id_that_was_reserved_long_ago_finds_a_place(db: Connection, admin: triojobs.SyncAdmin) -> None:
    fill_range(db)
    admin.prune()
    assert put_one(db, job_id=500) == 500
    assert place(db, 500) == ("ready", 0)
    assert admin.prune(NOTHING_KEPT) == Pruned()
    assert place(db, 500) == ("ready", 0)


def test_a_range_with_rows_in_the_default_partition_goes_job_by_job(
    db: Connection, admin: triojobs.SyncAdmin
) -> None:
    fill_range(db)
    db.execute("DROP TABLE triojobs.outcomes_0")
    db.execute(
        "INSERT INTO triojobs.outcomes (job_id, attempt, status, finished_at)"
        " SELECT id, 1, 'done', now() - interval '9 days' FROM triojobs.jobs"
    )
    assert admin.prune() == Pruned(jobs=100)
    assert count(db, "jobs") == count(db, "outcomes") == 0


# Against others.


def drop_without_a_limit(conn: Connection) -> Any:
    """Drop range 0, and wait for the lock as long as it takes."""
    return conn.execute("SELECT triojobs.drop_range(0, '{}', 1000000000, 1000)").fetchone()


def test_beside_a_long_reader_a_range_is_put_off_and_nobody_waits_for_long(
    db: Connection, connect: Connect, admin: triojobs.SyncAdmin
) -> None:
    fill_range(db)
    with (reader := connect()).transaction():
        reader.execute("SELECT count(*) FROM triojobs.jobs")
        pruned = admin.prune()
        assert (pruned.ranges, pruned.postponed) == (0, 1)
        assert pruned.jobs == 100  # one by one it does not disturb anybody
    assert tables(db) == {0, 1, 2, 3}
    assert admin.prune() == Pruned(ranges=1)


def test_a_claim_waits_for_a_drop_as_long_as_it_takes_and_gets_its_rows(
    db: Connection, connect: Connect
) -> None:
    fill_range(db)
    ids = put(db, 3)
    group, a = Group(db), connect()
    with a.transaction():
        assert retention_sql.drop_range(a, SCHEMA, 0, [], seen=2**40, most=10) == 0
        late = blocked(db, connect(), group.claim)
    assert [c.job_id for c in late.result()] == ids
    assert all(c.payload == b"x" for c in late.result())


def test_a_retry_that_comes_before_the_drop_keeps_its_job(db: Connection, auto: triojobs.SyncAdmin) -> None:
    fill_range(db)
    seen = retention_sql.horizon(db, SCHEMA, 0.0).seen
    assert operate.retry(db, SCHEMA, 7)
    assert retention_sql.drop_range(db, SCHEMA, 0, [], seen=seen, most=10) == 1
    assert place(db, 7) == ("ready", 0)
    assert [c.payload for c in Group(db).claim(db)] == [b"x"]


def test_a_job_that_was_retried_and_ended_again_before_the_drop_is_kept(db: Connection) -> None:
    fill_range(db)
    group = Group(db)
    seen = retention_sql.horizon(db, SCHEMA, 0.0).seen
    assert operate.retry(db, SCHEMA, 7)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    assert retention_sql.drop_range(db, SCHEMA, 0, [], seen=seen, most=10) == 1
    assert place(db, 7) == ("done", 1)


def test_a_drop_waits_for_a_retry_and_a_retry_for_a_drop(db: Connection, connect: Connect) -> None:
    fill_range(db)
    a, b = connect(), connect()
    with a.transaction():
        assert operate.retry(a, SCHEMA, 7)
        late = blocked(db, b, drop_without_a_limit)
    assert late.result() == (1,)
    assert place(db, 7) == ("ready", 0)
    fill_range(db, 1)
    with a.transaction():
        assert retention_sql.drop_range(a, SCHEMA, 1, [], seen=2**40, most=10) == 0
        retry = blocked(db, b, operate.retry, SCHEMA, retention_sql.WIDTH + 1)
    with pytest.raises(JobNotFoundError):
        retry.result()


def test_a_range_in_which_too_much_came_to_life_meanwhile_stays(db: Connection) -> None:
    fill_range(db)
    for job_id in (1, 2, 3):
        assert operate.retry(db, SCHEMA, job_id)
    assert retention_sql.drop_range(db, SCHEMA, 0, [], seen=2**40, most=2) is None
    assert tables(db) == {0, 1, 2, 3}


def test_a_job_retried_and_ended_again_is_not_deleted_for_its_older_end(db: Connection, group: Group) -> None:
    job_id = end(db, group, Outcome.DONE)
    age(db, 8, job_id)
    seen = retention_sql.horizon(db, SCHEMA, 0.0).seen
    operate.retry(db, SCHEMA, job_id)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    act = pruning.deleting(pruning.ENDED, latest=seen)
    assert act(db, SCHEMA, [job_id], wait=False).ids == frozenset()
    assert place(db, job_id) == ("done", 1)


def test_two_who_prune_do_not_disturb_each_other(db: Connection, connect: Connect) -> None:
    fill_range(db)
    a, b = connect(), connect()
    with a.transaction():
        assert retention_sql.drop_range(a, SCHEMA, 0, [], seen=2**40, most=10) == 0
        late = blocked(db, b, drop_without_a_limit)
    assert late.result() == (None,)


async def test_a_role_that_does_not_own_the_tables_deletes_job_by_job(db: Connection, database: str) -> None:
    fill_range(db)
    db.execute("DROP ROLE IF EXISTS pruner")
    db.execute("CREATE ROLE pruner LOGIN")
    try:
        db.execute("GRANT USAGE ON SCHEMA triojobs TO pruner")
        db.execute("GRANT ALL ON ALL TABLES IN SCHEMA triojobs TO pruner")
        db.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA triojobs TO pruner")
        async with open_face("SyncAdmin", f"{database} options='-c role=pruner'") as face:
            assert await face("prune") == Pruned(jobs=100, postponed=1)
    finally:
        db.execute("DROP OWNED BY pruner")
        db.execute("DROP ROLE pruner")


# Keys and groups.


async def test_keys_go_with_their_jobs(db: Connection, group: Group, face: Face) -> None:
    jobs = [end(db, group, Outcome.DONE, key=f"k{n}", hold=hold) for n, hold in enumerate(("kept", "ended"))]
    jobs.append(end(db, group, Outcome.DONE, key="young", hold="kept"))
    jobs.append(end(db, group, Outcome.DONE, key="long", hold="until", hold_seconds=3600.0))
    jobs.append(end(db, group, Outcome.DONE, key="short", hold="until", hold_seconds=0.0))
    age(db, 8, *(i for i in jobs if i != jobs[2]))
    db.execute("DELETE FROM triojobs.jobs WHERE id = ANY (%s)", [[i for i in jobs if i != jobs[2]]])
    assert (await face("prune")).keys == 3
    assert {row[0] for row in db.execute("SELECT key FROM triojobs.keys")} == {"young", "long"}


def test_a_key_that_somebody_takes_over_is_left_to_him(db: Connection, connect: Connect) -> None:
    old = put_one(db, key="k")
    db.execute("DELETE FROM triojobs.jobs WHERE id = %s", [old])
    db.execute("DELETE FROM triojobs.ready WHERE id = %s", [old])
    gone = retention_sql.gone_keys(db, SCHEMA, retention_sql.FIRST_KEY, 10)
    assert gone.gone == [("q", "k", old)]
    with (a := connect()).transaction():
        new = put_one(a, key="k")
        assert retention_sql.delete_keys(db, SCHEMA, gone.gone) == 0
    assert retention_sql.delete_keys(db, SCHEMA, gone.gone) == 0
    assert db.execute("SELECT job_id FROM triojobs.keys").fetchall() == [(new,)]


def test_a_taker_waits_for_the_deletion_of_a_key_and_has_it(db: Connection, connect: Connect) -> None:
    old = put_one(db, key="k")
    db.execute("DELETE FROM triojobs.jobs WHERE id = %s", [old])
    db.execute("DELETE FROM triojobs.ready WHERE id = %s", [old])
    with (a := connect()).transaction():
        assert retention_sql.delete_keys(a, SCHEMA, [("q", "k", old)]) == 1
        late = blocked(db, connect(), put_one, key="k")
    new = late.result()
    assert db.execute("SELECT job_id FROM triojobs.keys").fetchall() == [(new,)]


async def test_registrations_go_when_no_job_can_name_them(db: Connection, face: Face) -> None:
    old, lately, alive = Group(db), Group(db), Group(db)
    db.execute("UPDATE triojobs.worker_groups SET registered_at = registered_at - interval '40 days'")
    for each, days in ((old, 31), (lately, 29)):
        db.execute(
            "UPDATE triojobs.worker_groups SET closed_at = now() - %s * interval '1 day' WHERE id = %s",
            [days, each.id],
        )
        db.execute("INSERT INTO triojobs.drains (group_id, reason) VALUES (%s, 'x')", [each.id])
    db.execute("INSERT INTO triojobs.drains (group_id, reason) VALUES (%s, 'x')", [alive.id])
    assert await face("prune") == Pruned(groups=1)
    assert {row[0] for row in db.execute("SELECT id FROM triojobs.worker_groups")} == {lately.id, alive.id}
    assert db.execute("SELECT group_id FROM triojobs.drains").fetchall() == [(alive.id,)]


# Taking turns, progress, cancellation.


def test_of_all_groups_one_has_the_turn(db: Connection, connect: Connect) -> None:
    with (a := connect()).transaction():
        assert retention_sql.take_turn(a, SCHEMA, 60.0)
        late = blocked(db, connect(), retention_sql.take_turn, SCHEMA, 60.0)
    assert late.result() is False
    assert not retention_sql.take_turn(db, SCHEMA, 60.0)
    db.execute("UPDATE triojobs.chores SET next_at = now()")
    assert retention_sql.take_turn(db, SCHEMA, 60.0)
    assert not retention_sql.take_turn(db, SCHEMA, 60.0)


async def test_progress_is_told_and_a_cancelled_call_ends_between_calls(
    db: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "ROWS", 10)
    fill_range(db, jobs=35)
    db.execute("SELECT setval('triojobs.job_ids', 40)")  # the range is in use
    told: list[Pruned] = []
    with trio.CancelScope() as scope:
        async with triojobs.open_admin(database, call_timeout=PATIENCE) as admin:

            def note(pruned: Pruned) -> None:
                told.append(pruned)
                if pruned.jobs == 20:
                    scope.cancel()

            await admin.prune(progress=note)
    assert scope.cancelled_caught
    assert told == [Pruned(jobs=10), Pruned(jobs=20)]
    assert count(db, "jobs") == 15


@pytest.mark.parametrize("name", FACES)
async def test_what_cannot_be_meant_is_refused(name: str, database: str) -> None:
    async with open_face(name, database) as face:
        for options in ({"retention": 7}, {"progress": 7}, {"dry_run": 1}):
            with pytest.raises(triojobs.OptionError):
                await face("prune", **options)


def test_in_the_callers_transaction_nothing_is_pruned(db: Connection, auto: triojobs.SyncAdmin) -> None:
    with db.transaction(), pytest.raises(triojobs.TriojobsError, match="autocommit"):
        auto.prune()


@pytest.mark.parametrize(
    "options",
    [
        {"done": -1.0},
        {"killed": "a day"},
        {"cancelled": math.nan},
        {"interval": 0.0},
        {"queues": ["q"]},
        {"queues": {"": Retention()}},
        {"queues": {"q": 7.0}},
        {"queues": {"q": Retention(queues={"x": Retention()})}},
    ],
    ids=repr,
)
def test_a_retention_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(triojobs.OptionError):
        Retention(**options)
