"""Settings that a role or a database brings along do not change what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from forms import plain
from psycopg.conninfo import make_conninfo

import triojobs
from tests.tools.gates import PATIENCE

BYTES = b"\x00\\x41'\"\xff" + bytes(range(256))


@pytest.mark.parametrize(
    "options",
    [
        "-c standard_conforming_strings=off",
        "-c bytea_output=escape",
        "-c datestyle=sql,dmy -c timezone=Asia/Kathmandu -c intervalstyle=iso_8601",
        "-c default_transaction_isolation=serializable",
        "-c search_path=",
    ],
)
@pytest.mark.parametrize("way", ["return", "commit"])
async def test_bytes_and_times_come_back_equal(conninfo: str, options: str, way: str) -> None:
    jobs: list[triojobs.Job[Any]] = []

    async def handler(job: triojobs.Job[Any]) -> Any:
        jobs.append(job)
        if way == "commit":
            return await job.commit(lambda conn: job.payload)
        return job.payload

    legacy = make_conninfo(conninfo, options=options)
    async with triojobs.open_worker_group(legacy, [triojobs.Worker(plain, handler)]) as group:
        with trio.fail_after(PATIENCE):
            for key in (None, "k"):
                job_id = await group.client.enqueue(plain, BYTES, key=key, metadata={"a": "\\x'"})
                assert await group.client.result(job_id) == BYTES
                info = await group.client.get(job_id)
                assert info is not None
                assert (info.payload, info.metadata) == (BYTES, {"a": "\\x'"})
                assert (jobs[-1].run_at, jobs[-1].enqueued_at) == (info.run_at, info.enqueued_at)
