"""A registration says which queues its group serves, and with how many slots."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

import triojobs


async def nothing(job: triojobs.Job[Any]) -> None:
    """Handle a job."""


def workers(**slots: int) -> list[triojobs.Worker[Any, Any]]:
    return [triojobs.Worker(triojobs.Queue(name), nothing, concurrency=n) for name, n in slots.items()]


@pytest.mark.parametrize("cap", [None, 6])
async def test_a_group_writes_its_queues_slots_and_cap_once(conninfo: str, cap: int | None) -> None:
    async with triojobs.open_worker_group(conninfo, workers(a=4, b=3), concurrency=cap) as group:
        with psycopg.connect(conninfo) as conn:
            rows = conn.execute("SELECT id, queues, concurrency FROM triojobs.worker_groups").fetchall()
        assert rows == [(group.group_id, {"a": 4, "b": 3}, cap)]
