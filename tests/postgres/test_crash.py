"""A server that crashes and loses the claims that it had confirmed (synchronous_commit = off)."""

from __future__ import annotations

import logging
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.crashing import PATIENCE, crashing_server
from tests.tools.looking import rows, until
from triojobs._comparison import LOST

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


class Handler:
    """Its first run goes on until it is cancelled, and then returns all the same."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.log: list[tuple[str, int, str | None]] = []

    async def __call__(self, job: triojobs.Job[Any]) -> str:
        run = "second" if self.log else "first"
        self.log.append((f"{run} starts", job.attempt, job.cancel_reason))
        if run == "first":
            self.started.set()
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                self.log.append((f"{run} ends", job.attempt, job.cancel_reason))
        return run


@pytest.mark.parametrize("how", ["stop_at_once_and_start", "crash_one_process"])
@pytest.mark.parametrize("notify", [True, False])
async def test_a_claim_that_a_crash_lost_is_given_up_before_its_job_is_claimed_again(
    how: str, notify: bool, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    async with crashing_server() as server:
        triojobs.migrate(server.conninfo)
        async with triojobs.open_worker_group(
            server.conninfo,
            [triojobs.Worker(plain, handler, concurrency=1)],  # no free slot, so no claim brings the news
            beat_interval=0.5,
            poll_interval=0.2,
            notify=notify,
        ) as group:
            await until(server.conninfo, "SELECT count(*) = 1 FROM triojobs.worker_groups")
            walwriter = server.hold_back_wal()
            with psycopg.connect(server.conninfo) as conn:
                conn.execute("SET synchronous_commit = on")  # the job is durable, and all before it
                job_id = triojobs.enqueue_on(conn, plain, None)
            with trio.fail_after(PATIENCE):
                await handler.started.wait()
                await getattr(server, how)(walwriter)
                assert await group.client.result(job_id) == "second"
            assert group.statistics().stale == 1
            assert group.statistics().registrations == 1
        assert rows(server.conninfo, "SELECT attempt, status FROM triojobs.outcomes") == [(1, "done")]
    assert handler.log == [("first starts", 1, None), ("first ends", 1, LOST), ("second starts", 1, None)]
    assert group.report.settled["done"] == 1
    [compared] = [r for r in caplog.records if getattr(r, "event", "") == "compared" and r.job_ids]
    assert compared.job_ids == [job_id]


async def test_a_settlement_that_a_crash_lost_is_found_as_a_row_that_nobody_knows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The job was done; its row is leased again under our name, and no ledger has it."""
    runs: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> int:
        runs.append(job.attempt)
        if len(runs) == 1:
            walwriters.append(server.hold_back_wal())
            with psycopg.connect(server.conninfo, autocommit=True) as conn:
                conn.execute("SET synchronous_commit = on")
                conn.execute("CREATE TABLE public.anything ()")  # durable, and so is the claim before it
        return len(runs)

    walwriters: list[int] = []
    async with crashing_server() as server:
        triojobs.migrate(server.conninfo)
        async with triojobs.open_worker_group(
            server.conninfo, [triojobs.Worker(plain, handler)], beat_interval=0.5, poll_interval=0.2
        ) as group:
            job_id = await group.client.enqueue(plain, None)
            with trio.fail_after(PATIENCE):
                assert await group.client.result(job_id) == 1
                await server.stop_at_once_and_start(walwriters[0])
                assert await group.client.result(job_id) == 2
            assert (group.statistics().stale, group.statistics().registrations) == (0, 1)
        assert rows(server.conninfo, "SELECT attempt, status FROM triojobs.outcomes") == [(1, "done")]
    assert runs == [1, 1]
    assert [r.released for r in caplog.records if getattr(r, "event", "") == "compared"] == [1]


async def test_a_clean_restart_disturbs_no_handler(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing was lost, so there is nothing to compare."""
    started, go_on = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        started.set()
        await go_on.wait()
        return "undisturbed"

    async with crashing_server() as server:
        triojobs.migrate(server.conninfo)
        async with triojobs.open_worker_group(
            server.conninfo, [triojobs.Worker(plain, handler)], beat_interval=0.2, poll_interval=0.2
        ) as group:
            job_id = await group.client.enqueue(plain, None)
            await started.wait()
            before = group.statistics().lease_until
            await server.restart()
            with trio.fail_after(PATIENCE):
                while group.statistics().lease_until <= before + 1.0:  # it beats again
                    await trio.sleep(0.02)
                go_on.set()
                assert await group.client.result(job_id) == "undisturbed"
            assert group.statistics().registrations == 1
    events = {getattr(record, "event", "") for record in caplog.records}
    assert "lease_lost" not in events
    assert [r.job_ids for r in caplog.records if getattr(r, "event", "") == "compared"] in ([], [[]])
