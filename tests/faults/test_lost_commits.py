"""More of row 30d: both ways in which a server crashes, what it loses, and a restart that loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import until, value
from triojobs._comparison import LOST

from .rig import PATIENCE, logged, outcomes, plain
from .servers import Server

OFTEN: dict[str, Any] = {"beat_interval": 0.5, "poll_interval": 0.2}


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    """A server that confirms commits before they are durable."""
    server = make_server(synchronous_commit="off")
    server.copy_template()
    server.start()
    return server


def hold_back_commits(server: Server) -> int:
    """From now on only a synchronous commit makes those before it durable. Returns the process that sleeps."""
    walwriter = server.backend("walwriter")
    os.kill(walwriter, signal.SIGSTOP)
    return walwriter


async def restart_at_once(server: Server, walwriter: int) -> None:
    """Do what `pg_ctl restart -m immediate` does."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, server.crash)
        os.kill(walwriter, signal.SIGKILL)  # a sleeper cannot obey
    await trio.to_thread.run_sync(server.start)


async def kill_one_process(server: Server, walwriter: int) -> None:
    """The postmaster ends the others and recovers; its start time, which clients can ask for, stays."""
    started = value(server.conninfo, "SELECT pg_postmaster_start_time()")
    session = psycopg.connect(server.conninfo, autocommit=True)
    os.kill(walwriter, signal.SIGKILL)
    with trio.fail_after(PATIENCE):
        while not session.broken:
            try:
                session.execute("SELECT")
            except psycopg.Error:
                session.close()
            await trio.sleep(0.01)
        while True:
            try:
                assert value(server.conninfo, "SELECT pg_postmaster_start_time()") == started
                return
            except psycopg.OperationalError:
                await trio.sleep(0.01)


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


@pytest.mark.parametrize("crash", [restart_at_once, kill_one_process])
@pytest.mark.parametrize("notify", [True, False])
async def test_a_lost_claim_is_given_up_before_its_job_is_claimed_again(
    crash: Callable[[Server, int], Awaitable[None]],
    notify: bool,
    server: Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is no free slot, so that no claim could bring the news: the listener does, or a beat."""
    handler = Handler()
    worker = triojobs.Worker(plain, handler, concurrency=1)
    async with triojobs.open_worker_group(server.conninfo, [worker], notify=notify, **OFTEN) as group:
        walwriter = hold_back_commits(server)
        with psycopg.connect(server.conninfo) as conn:
            conn.execute("SET synchronous_commit = on")  # the job is durable, and all before it
            job_id = triojobs.enqueue_on(conn, plain, None)
        with trio.fail_after(PATIENCE):
            await handler.started.wait()
            await crash(server, walwriter)
            assert await group.client.result(job_id) == "second"
        assert (group.statistics().stale, group.statistics().registrations) == (1, 1)
    assert outcomes(server.conninfo) == [(1, "done")]
    assert handler.log == [("first starts", 1, None), ("first ends", 1, LOST), ("second starts", 1, None)]
    assert group.report.settled["done"] == 1
    assert [record.job_ids for record in logged(caplog, "compared") if record.job_ids] == [[job_id]]  # type: ignore[attr-defined]


async def test_after_a_lost_settlement_its_row_is_nobodys_and_the_job_runs_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The job was done; then its row is leased again under our name, and no ledger has it."""
    runs: list[int] = []
    sleepers: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> int:
        runs.append(job.attempt)
        if len(runs) == 1:
            sleepers.append(hold_back_commits(server))
            with psycopg.connect(server.conninfo, autocommit=True) as conn:
                conn.execute("SET synchronous_commit = on")
                conn.execute("CREATE TABLE public.anything ()")  # durable, and so is the claim before it
        return len(runs)

    async with triojobs.open_worker_group(
        server.conninfo, [triojobs.Worker(plain, handler)], **OFTEN
    ) as group:
        job_id = await group.client.enqueue(plain, None)
        with trio.fail_after(PATIENCE):
            assert await group.client.result(job_id) == 1
            await restart_at_once(server, sleepers[0])
            assert await group.client.result(job_id) == 2
        assert (group.statistics().stale, group.statistics().registrations) == (0, 1)
    assert outcomes(server.conninfo) == [(1, "done")]
    assert runs == [1, 1]
    assert [record.released for record in logged(caplog, "compared") if record.released] == [1]  # type: ignore[attr-defined]


async def test_a_clean_restart_disturbs_no_handler(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing was lost, so nothing is given up."""
    started, go_on = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> str:
        started.set()
        await go_on.wait()
        return "undisturbed"

    def restart() -> None:
        server.stop()
        server.start()

    async with triojobs.open_worker_group(
        server.conninfo, [triojobs.Worker(plain, handler)], **OFTEN
    ) as group:
        job_id = await group.client.enqueue(plain, None)
        await started.wait()
        await trio.to_thread.run_sync(restart)
        lease = "SELECT lease_until FROM triojobs.worker_groups"
        before = value(server.conninfo, lease)
        await until(server.conninfo, f"SELECT ({lease}) > %s", before, seconds=PATIENCE)  # it beats again
        go_on.set()
        with trio.fail_after(PATIENCE):
            assert await group.client.result(job_id) == "undisturbed"
        assert group.statistics().registrations == 1
    assert outcomes(server.conninfo) == [(1, "done")]
    assert not logged(caplog, "lease_lost")
    assert not [record for record in logged(caplog, "compared") if record.job_ids]  # type: ignore[attr-defined]
