"""An operator drains a group: it claims nothing more, finishes what runs, and closes."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from tools import SCHEMA, Connection, Group

import triojobs
from triojobs._sql import groups, notify, pausing

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


def drain(conninfo: str, group_id: uuid.UUID) -> None:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        assert pausing.drain(conn, SCHEMA, group_id, "deploy")
        notify.notify_group(conn, group_id)


async def test_a_drained_group_finishes_what_runs_and_leaves_the_rest(conninfo: str) -> None:
    started, go_on = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        started.set()
        await go_on.wait()

    worker = triojobs.Worker(plain, handler, concurrency=1)
    # Beats that come by themselves are too far apart for this test: the notification brings one at once.
    async with triojobs.open_worker_group(
        conninfo, [worker], lease_duration=3600.0, lease_margin=5.0, beat_interval=1500.0
    ) as group:
        running, waiting = await group.client.enqueue_many(plain, [1, 2])
        with trio.fail_after(30):
            await started.wait()
            drain(conninfo, group.group_id)
            await group._stop.wait_value(True)
            await trio.testing.wait_all_tasks_blocked()  # nothing is claimed any more
            go_on.set()
            await group.wait_stopped()
    assert group.report.settled["done"] == 1
    assert group.report.released == 0
    async with triojobs.open_client(conninfo) as client:
        infos = [await client.get(job_id) for job_id in (running, waiting)]
        assert [info.status for info in infos if info] == ["done", "pending"]


def test_a_closed_group_cannot_be_drained_and_an_unknown_one_is_named(db: Connection) -> None:
    group = Group(db)
    assert pausing.drain(db, SCHEMA, group.id, "first")
    assert pausing.drain(db, SCHEMA, group.id, "second")
    beat = groups.beat(db, SCHEMA, group.id)
    assert beat is not None
    assert beat.drain == "first"
    groups.close_group(db, SCHEMA, group.id)
    assert not pausing.drain(db, SCHEMA, group.id, "late")
    unknown = uuid.uuid4()
    with pytest.raises(triojobs.GroupNotFoundError) as caught:
        pausing.drain(db, SCHEMA, unknown, "nobody")
    assert caught.value.group_id == unknown


def test_a_request_in_an_open_transaction_does_not_hold_up_beats_claims_and_closing(
    db: Connection, connect: Any
) -> None:
    group = Group(db)
    with connect().transaction() as tx:
        pausing.drain(tx.connection, SCHEMA, group.id, "deploy")
        assert groups.beat(db, SCHEMA, group.id) == groups.Beat([], witnessed=True)
        assert group.claim(db) == []
        assert groups.close_group(db, SCHEMA, group.id) == ([], set())
