"""One job with everything that is known of it."""

from __future__ import annotations

import psycopg
import pytest
import trio
from faces import Face, every_status
from psycopg.rows import dict_row
from tools import SCHEMA, Connection, Group, make_due, put_one

import triojobs
from triojobs._model import Outcome
from triojobs._sql import groups


async def test_a_job_has_its_attempts_with_who_when_and_how(db: Connection, face: Face) -> None:
    first, second = Group(db), Group(db)
    db.execute("UPDATE triojobs.worker_groups SET name = 'web-1', host = 'h1' WHERE id = %s", [first.id])
    job_id = put_one(db, max_attempts=3)
    first.settle(db, first.claim_one(db), Outcome.FAILED, error="oops", delay=0.0)
    make_due(db)
    second.claim_one(db)
    second.lapse(db)
    groups.rescue(db, SCHEMA)
    first.claim_one(db)
    details = await face("job", job_id)
    assert (details.info.id, details.info.status, details.info.attempts) == (job_id, "running", 3)
    summary = [(a.number, a.status, a.group, a.group_name, a.host) for a in details.history]
    assert summary == [
        (1, "failed", first.id, "web-1", "h1"),
        (2, "failed", second.id, "test", "localhost"),
        (3, "running", first.id, "web-1", "h1"),
    ]
    assert details.history[0].error == "oops"
    assert details.history[1].error == f"rescued: the lease of worker group {second.id} ended"
    for attempt in details.history[:2]:
        assert attempt.claimed_at <= attempt.finished_at
        assert attempt.duration == (attempt.finished_at - attempt.claimed_at).total_seconds()
    assert (details.history[2].finished_at, details.history[2].duration) == (None, None)


async def test_a_job_that_never_ran_has_no_attempts_or_only_its_cancellation(
    db: Connection, group: Group, face: Face
) -> None:
    jobs = every_status(db, group)
    assert (await face("job", jobs["ready"])).history == ()
    (only,) = (await face("job", jobs["cancelled waiting"])).history
    assert (only.number, only.status, only.error) == (0, "cancelled", "never")
    assert (only.group, only.group_name, only.claimed_at, only.duration) == (None, None, None, None)


async def test_a_group_whose_row_is_gone_is_named_by_its_id(db: Connection, face: Face) -> None:
    group = Group(db)
    job_id = put_one(db)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    db.execute("DELETE FROM triojobs.worker_groups")
    (only,) = (await face("job", job_id)).history
    assert (only.status, only.group, only.group_name, only.host) == ("done", group.id, None, None)


async def test_payload_and_result_are_typed_by_the_queue(conninfo: str) -> None:
    numbers: triojobs.Queue[int, int] = triojobs.Queue("numbers", int, result=int)

    async def double(job: triojobs.Job[int]) -> int:
        return 2 * job.payload

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(numbers, double)]) as group:
        job_id = await group.client.enqueue(numbers, 21)
        with trio.fail_after(30):
            await group.client.result(job_id)
    async with triojobs.open_admin(conninfo) as admin:
        details = await admin.job(job_id, numbers)
        assert (details.info.payload, details.info.result) == (21, 42)
        assert [attempt.group for attempt in details.history] == list(group.report.group_ids)
        with pytest.raises(triojobs.OptionError):
            await admin.job(job_id, triojobs.Queue("other", int))


async def test_an_unknown_job_is_named(face: Face) -> None:
    with pytest.raises(triojobs.JobNotFoundError) as caught:
        await face("job", 4711)
    assert caught.value.job_id == 4711


def test_a_history_shows_the_last_thousand_attempts(db: Connection, admin: triojobs.SyncAdmin) -> None:
    job_id = put_one(db)
    db.execute(
        "INSERT INTO triojobs.outcomes (job_id, group_id, claim_no, attempt, status)"
        " SELECT %s, gen_random_uuid(), 1, n, 'failed' FROM generate_series(1, 1500) n",
        [job_id],
    )
    history = admin.job(job_id).history
    assert [attempt.number for attempt in history] == list(range(501, 1501))


def test_a_read_in_the_callers_transaction_sees_what_it_has_written(conninfo: str) -> None:
    with psycopg.connect(conninfo, row_factory=dict_row, cursor_factory=psycopg.ClientCursor) as conn:
        job_id = triojobs.enqueue_on(conn, triojobs.Queue("q"), 1)
        assert [job.id for job in triojobs.admin_on(conn).jobs().items] == [job_id]
        assert triojobs.admin_on(conn).job(job_id).info.payload == 1
        assert (conn.row_factory, conn.cursor_factory) == (dict_row, psycopg.ClientCursor)
        conn.rollback()
    with triojobs.SyncAdmin(conninfo) as admin:
        assert admin.jobs().items == ()
