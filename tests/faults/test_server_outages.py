"""Rows 11 to 14, 23, 30d: servers that end sessions, crash, are not there, have no room, lose commits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import rows, value
from triojobs._backoff import RECONNECT_LIMIT

from .rig import (
    SHORT,
    Figures,
    Journal,
    exit_bound,
    logged,
    outcomes,
    plain,
    rescue_bound,
    running,
    wait_until,
)
from .servers import Server
from .sessions import disturb_sessions, terminate

# What a group of ours may need after the server is back: its longest pause, and one call.
RECONNECTED = RECONNECT_LIMIT + SHORT["call_timeout"]


async def test_row_11_sessions_of_every_role_are_terminated_all_the_time(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    await disturb_sessions(conninfo, conninfo, lambda role: terminate(conninfo, role))
    assert logged(caplog, "listen_lost")


async def test_row_12_the_server_crashes_and_recovers(
    server: Server, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    """Down for less than the lease: jobs in flight go on, what ended meanwhile is written afterwards."""
    conninfo = server.conninfo
    journal = Journal()
    options = SHORT | {"lease_duration": 30.0, "lease_margin": 5.0, "beat_interval": 0.3}
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **options) as group:
        ids = await group.client.enqueue_many(plain, ["wait"] * 3)
        await journal.wait_for_beginnings(3)
        server.crash()
        journal.go_on.set()  # they end while nobody can be told
        await wait_until(lambda: logged(caplog, "settle_failed") and logged(caplog, "beat_failed"))
        back_at = await trio.to_thread.run_sync(server.start)
        await wait_until(lambda: group.statistics().settled == 3)
        figures.note("settled after the server was back", time.monotonic() - back_at, at_most=RECONNECTED)
        # Nobody notifies before LISTEN is there again; the poll goes on.
        late = await group.client.enqueue(plain, "return")
        with trio.fail_after(30):
            assert await group.client.result(late) == 1
        figures.note("claimed again after the server was back", time.monotonic() - back_at,
                     at_most=RECONNECTED + options["poll_interval"] + 1.0)  # fmt: skip
        assert group.statistics().registrations == 1
    assert sorted(journal.returned) == [(job_id, 1) for job_id in [*ids, late]]
    assert outcomes(conninfo) == [(1, "done")] * 4
    assert running(conninfo) == 0


async def test_row_13_no_server_at_the_start(figures: Figures) -> None:
    nowhere = "host=127.0.0.1 port=1 user=nobody dbname=none password=secret"
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    began = trio.current_time()
    with pytest.raises(triojobs.DatabaseError) as caught:
        async with triojobs.open_worker_group(nowhere, [Journal().worker()], **SHORT):
            raise AssertionError("must not open")
    figures.note("refused after", trio.current_time() - began, at_most=SHORT["call_timeout"] + 1.0)
    assert caught.value.transient
    assert caught.value.committed is False
    assert "secret" not in str(caught.value)
    # Trio's idle worker threads stay for everybody's use: at most the one that tried to connect.
    assert threading.active_count() <= before[0] + 1
    assert len(os.listdir("/proc/self/fd")) == before[1]

    command = [sys.executable, "-m", "triojobs", "migrate", "--dsn", nowhere]
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: while ")
    assert "secret" not in line


async def test_row_14_the_server_is_down_while_the_group_shuts_down(
    server: Server, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    conninfo = server.conninfo
    journal, later = Journal(), Journal()
    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(conninfo, [journal.worker()], **SHORT) as group:
            ids = await group.client.enqueue_many(plain, ["wait", "wait"])
            await journal.wait_for_beginnings(2)
            server.stop()
            began = trio.current_time()
            scope.cancel()
    figures.note("exit", trio.current_time() - began, at_most=exit_bound(SHORT))
    assert group.report.abandoned == tuple(ids)
    assert group.report.released == 0
    (record,) = logged(caplog, "abandoned")
    assert record.job_ids == ids  # type: ignore[attr-defined]

    server.start()
    assert running(conninfo) == 2
    later.go_on.set()
    opened = time.monotonic()
    async with triojobs.open_worker_group(conninfo, [later.worker()], **SHORT) as rescuer:
        with trio.fail_after(30):
            assert [await rescuer.client.result(job_id) for job_id in ids] == [2, 2]
    figures.note("rescued", time.monotonic() - opened, at_most=rescue_bound(SHORT) + 1.0)
    assert sorted(outcomes(conninfo)) == [(1, "failed")] * 2 + [(2, "done")] * 2
    assert running(conninfo) == 0


async def test_row_23_the_server_has_no_connection_left(
    make_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(max_connections="12", superuser_reserved_connections="2")
    server.copy_template()
    server.start()
    admin = server.conninfo
    for statement in (
        "CREATE ROLE app LOGIN",
        "GRANT USAGE ON SCHEMA triojobs TO app",
        "GRANT ALL ON ALL TABLES IN SCHEMA triojobs TO app",
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA triojobs TO app",
    ):
        rows(admin, statement)  # type: ignore[arg-type]
    app = psycopg.conninfo.make_conninfo(admin, user="app")
    journal = Journal()
    journal.go_on.set()
    lease: LiteralString = "SELECT lease_until FROM triojobs.worker_groups"
    async with triojobs.open_worker_group(app, [journal.worker()], **SHORT) as group:
        hogs: list[psycopg.Connection[Any]] = []
        ended = {"claim": 0, "settle": 0, "listen": 0}
        job_id = await group.client.enqueue(plain, "return")
        await wait_until(lambda: group.statistics().settled == 1)
        try:
            with trio.fail_after(30):
                # Everything that becomes free is taken by others, until nothing of these roles is left.
                while not all(ended.values()) or not logged(caplog, "claim_failed"):
                    take_all(app, hogs)
                    for role in ended:
                        ended[role] += terminate(admin, role)
                    take_all(app, hogs)
                    await trio.sleep(0.02)
            with pytest.raises(psycopg.OperationalError, match=r"connection slots|too many"):
                psycopg.connect(app)
            with pytest.raises(triojobs.DatabaseError) as caught:
                async with triojobs.open_client(app):
                    raise AssertionError("must not open")
            assert caught.value.transient
            late = enqueue_by_sql(hogs[0])
            seen = value(admin, lease)
            tries = len(logged(caplog, "claim_failed"))
            began = trio.current_time()
            await wait_until(lambda: value(admin, lease) > seen)  # the heartbeat has kept its own
            await wait_until(lambda: len(logged(caplog, "claim_failed")) >= tries + 2)
            rate = (len(logged(caplog, "claim_failed")) - tries) / (trio.current_time() - began)
            assert rate < 20
            assert "later" in logged(caplog, "claim_failed")[-1].getMessage()  # what to do: wait
        finally:
            for hog in hogs:
                hog.close()
        with trio.fail_after(30):
            assert await group.client.result(late) == 1
        assert group.statistics().registrations == 1
    assert sorted(journal.returned) == [(job_id, 1), (late, 1)]
    assert outcomes(admin) == [(1, "done")] * 2


def take_all(conninfo: str, hogs: list[psycopg.Connection[Any]]) -> None:
    """Open connections until the server refuses."""
    while True:
        try:
            hogs.append(psycopg.connect(conninfo, autocommit=True))
        except psycopg.OperationalError:
            return


def enqueue_by_sql(conn: psycopg.Connection[Any]) -> int:
    """Enqueue on a connection that is there already."""
    return triojobs.enqueue_on(conn, plain, "return")


async def test_row_30d_the_server_crashes_and_loses_commits_of_claims(
    make_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """Asynchronous commits, and the process that writes them out is stopped and then killed."""
    server = make_server(synchronous_commit="off")
    server.copy_template()
    server.start()
    conninfo = server.conninfo
    first, second = trio.Event(), trio.Event()
    began: list[tuple[str, int]] = []
    cancelled: list[tuple[str, str | None]] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        began.append((job.payload, job.attempt))
        try:
            await {"first": first, "second": second}[job.payload].wait()
        except trio.Cancelled:
            cancelled.append((job.payload, job.cancel_reason))
            raise
        return "done"

    worker = triojobs.Worker(plain, handler, concurrency=1)
    options = SHORT | {"lease_duration": 30.0, "lease_margin": 5.0}
    async with triojobs.open_worker_group(conninfo, [worker], **options) as group:
        ids = await group.client.enqueue_many(plain, ["first", "second"])
        await wait_until(lambda: began == [("first", 1)])
        rows(conninfo, "CHECKPOINT")  # so far everything is safe
        walwriter = server.backend("walwriter")
        os.kill(walwriter, signal.SIGSTOP)
        first.set()
        await wait_until(lambda: began[-1] == ("second", 1))
        await wait_until(lambda: group.statistics().settled == 1)
        os.kill(walwriter, signal.SIGKILL)  # which crashes and restarts the server
        await wait_until(lambda: cancelled)
        second.set()
        with trio.fail_after(30):
            assert [await group.client.result(job_id) for job_id in ids] == ["done", "done"]
        assert group.statistics().stale == 1  # the lost claim: whatever its handler did was not written
        assert group.statistics().registrations == 1
    (compared,) = logged(caplog, "compared")
    assert compared.job_ids == [ids[1]]  # type: ignore[attr-defined]  # its claim is gone: cancelled
    assert compared.released == 1  # type: ignore[attr-defined]  # its outcome is gone: runs again
    assert cancelled == [("second", "the database lost this claim")]
    assert sorted(began) == [("first", 1), ("first", 1), ("second", 1), ("second", 1)]
    assert outcomes(conninfo) == [(1, "done")] * 2
    assert running(conninfo) == 0
