"""Leases and outages at the edges of a group's life; `tests/faults` has what may happen in between."""

from __future__ import annotations

import logging
import time
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import blocked, rows

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


async def handler(job: triojobs.Job[Any]) -> None: ...


async def test_a_blocked_loop_loses_neither_its_lease_nor_its_healthy_handlers(conninfo: str) -> None:
    healthy_started = trio.Event()
    go_on = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        if job.payload == "blocks":
            await healthy_started.wait()
            time.sleep(2.5)  # longer than the lease: what this test is about
            go_on.set()
            return "blocked"
        healthy_started.set()
        await go_on.wait()
        return "healthy"

    async with triojobs.open_worker_group(
        conninfo,
        [triojobs.Worker(plain, handler)],
        lease_duration=2.0,
        lease_margin=0.5,
        beat_interval=0.3,
        poll_interval=0.2,
    ) as group:
        ids = await group.client.enqueue_many(plain, ["healthy", "blocks"])
        with trio.fail_after(15):
            assert [await group.client.result(i) for i in ids] == ["healthy", "blocked"]
        assert group.statistics().registrations == 1
    assert rows(conninfo, "SELECT attempt, status FROM triojobs.outcomes") == [(1, "done")] * 2


async def test_a_beat_that_is_under_way_when_the_group_closes_is_no_lease_loss(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")
    with psycopg.connect(conninfo) as gate, trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], beat_interval=0.1):
            gate.execute("SELECT FROM triojobs.worker_groups FOR UPDATE")
            await blocked(conninfo, "heartbeat")
            scope.cancel()
            gate.rollback()
            await trio.lowlevel.checkpoint()
    assert not any(getattr(r, "event", "") in ("lease_lost", "registered_again") for r in caplog.records)
    groups = "SELECT count(*), bool_and(closed_at IS NOT NULL) FROM triojobs.worker_groups"
    assert rows(conninfo, groups) == [(1, True)]


async def test_a_missing_schema_is_told_with_the_command(empty_database: str) -> None:
    with pytest.raises(triojobs.SchemaError, match="triojobs migrate"):
        async with triojobs.open_worker_group(empty_database, [triojobs.Worker(plain, handler)]):
            raise AssertionError("must not open")
