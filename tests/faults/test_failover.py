"""Row 22, and what failovers may lose: a primary and a streaming standby, a conninfo with both."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import rows, value

from .rig import SHORT, Figures, Journal, logged, outcomes, plain, running, wait_until
from .servers import Server
from .sessions import suppress_transient

MakeServer = Callable[..., Server]
PATIENT: dict[str, Any] = SHORT | {
    "lease_duration": 30.0, "lease_margin": 5.0, "beat_interval": 1.0, "call_timeout": 2.0
}  # fmt: skip
SWITCHED = 5.0 + 2 * PATIENT["call_timeout"]  # a pause, then a call that finds the other host


def pair(make_server: MakeServer, **primary_settings: str) -> tuple[Server, Server, str]:
    """Start a primary and a standby that follows it; return them and a conninfo that names both."""
    primary, standby = make_server(**primary_settings), make_server()
    primary.copy_template()
    primary.start()
    standby.follow(primary)
    standby.start()
    return primary, standby, both(primary, standby)


def both(primary: Server, standby: Server) -> str:
    return f"host={primary.home},{standby.home} port=5432,5432 user=triojobs dbname=postgres"


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def test_row_22_a_session_becomes_read_only_because_its_server_was_demoted(
    make_server: MakeServer, figures: Figures, caplog: pytest.LogCaptureFixture, exits: ExitStack
) -> None:
    primary, standby, conninfo = await trio.to_thread.run_sync(pair, make_server)
    journal = Journal()
    heard = exits.enter_context(primary.oldest_session())
    async with triojobs.open_worker_group(conninfo, [journal.worker()], **PATIENT) as group:
        before = await group.client.enqueue(plain, "return")
        await wait_until(lambda: group.statistics().settled == 1)  # every session has been used
        in_flight = await group.client.enqueue_many(plain, ["wait", "wait"])
        await journal.wait_for_beginnings(3)
        primary.set("default_transaction_read_only", "on")
        await wait_until(lambda: heard("default_transaction_read_only") == "on")
        journal.go_on.set()
        await wait_until(lambda: logged(caplog, "settle_failed"))
        with pytest.raises(triojobs.DatabaseError, match="read-only") as caught:
            await group.client.enqueue(plain, "return")  # nobody can write it yet
        assert (caught.value.transient, caught.value.committed) == (True, False)
        await trio.to_thread.run_sync(standby.caught_up_with, primary)
        await trio.to_thread.run_sync(standby.promote)
        promoted = time.monotonic()
        await wait_until(lambda: group.statistics().settled == 3)
        figures.note("settled after the promotion", time.monotonic() - promoted, at_most=SWITCHED)
        # The other sessions are still good for reading, at a server that hears of nothing any more.
        late = await group.client.enqueue(plain, "return")
        with trio.fail_after(30):
            await group.client.result(late)
        assert group.statistics().registrations == 1
    assert logged(caplog, "settle_failed")[0].sqlstate == "25006"  # type: ignore[attr-defined]
    assert sorted(journal.began) == [(job_id, 1) for job_id in [before, *in_flight, late]]  # nobody twice
    assert outcomes(standby.conninfo) == [(1, "done")] * 4
    assert running(standby.conninfo) == 0
    assert group.report.abandoned == ()


async def test_a_failover_with_synchronous_replication_loses_nothing(
    make_server: MakeServer, figures: Figures
) -> None:
    """The primary crashes under load: whatever it had answered is there, and nothing runs twice."""
    primary, standby, conninfo = await trio.to_thread.run_sync(pair, make_server)
    primary.set("synchronous_standby_names", "*")
    started: Counter[int] = Counter()
    enqueued: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        started[job.id] += 1
        await trio.sleep(0.01)

    async def produce(client: triojobs.Client) -> None:
        while True:
            with suppress_transient():
                enqueued.append(await client.enqueue(plain, None))
                continue
            await trio.sleep(0.05)

    worker = triojobs.Worker(plain, handler, concurrency=4)
    async with triojobs.open_worker_group(conninfo, [worker], **PATIENT) as group:
        async with trio.open_nursery() as producers:
            for _ in range(3):
                producers.start_soon(produce, group.client)
            await wait_until(lambda: group.statistics().settled >= 100)
            await trio.to_thread.run_sync(primary.crash)
            answered = len(enqueued)
            await trio.to_thread.run_sync(standby.promote)
            promoted = time.monotonic()
            await wait_until(lambda: len(enqueued) >= answered + 20)
            figures.note("enqueued again after the promotion", time.monotonic() - promoted, at_most=SWITCHED)
            producers.cancel_scope.cancel()
        with trio.fail_after(30):
            await group.wait_idle()
        assert group.statistics().registrations == 1
        assert group.statistics().stale == 0
    done = Counter(job_id for (job_id,) in rows(standby.conninfo, "SELECT job_id FROM triojobs.outcomes"))
    assert set(enqueued) <= set(done)
    assert set(done.values()) == {1}
    assert started == done
    assert running(standby.conninfo) == 0


async def test_a_failover_to_an_asynchronous_standby_loses_what_the_guarantee_names_and_no_more(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The standby lacks three commits: an enqueue (lost), an outcome and a claim (their jobs run again)."""
    primary = make_server()
    primary.copy_template()
    primary.start()
    go_on = {word: trio.Event() for word in ("kept", "acknowledged", "claimed")}
    began: list[str] = []
    cancelled: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        began.append(job.payload)
        assert job.attempt == 1
        try:
            await go_on[job.payload].wait()
        except trio.Cancelled:
            cancelled.append(job.payload)
            raise
        return "by " + str(job.attempt)

    with fault_proxy(primary.conninfo, tcp=True) as (proxy, through):
        standby = make_server(primary_conninfo=through)
        await trio.to_thread.run_sync(standby.follow, primary)
        await trio.to_thread.run_sync(standby.start)
        worker = triojobs.Worker(plain, handler, concurrency=2)
        async with triojobs.open_worker_group(both(primary, standby), [worker], **PATIENT) as group:
            ids = await group.client.enqueue_many(plain, ["kept", "acknowledged", "claimed"])
            await wait_until(lambda: len(began) == 2)
            await trio.to_thread.run_sync(standby.caught_up_with, primary)
            proxy.stall()
            lost = await group.client.enqueue(plain, "kept", delay=3600.0)
            go_on["acknowledged"].set()
            await wait_until(lambda: group.statistics().settled == 1)
            await wait_until(lambda: "claimed" in began)
            assert value(standby.conninfo, "SELECT count(*) FROM triojobs.leases") == 2
            proxy.cut()
            await trio.to_thread.run_sync(primary.crash)
            await trio.to_thread.run_sync(standby.promote)
            await wait_until(lambda: cancelled)
            go_on["kept"].set()
            go_on["claimed"].set()
            with trio.fail_after(30):
                assert {await group.client.result(job_id) for job_id in ids} == {"by 1"}
            assert await group.client.get(lost) is None
            assert group.statistics().registrations == 1
    (compared,) = logged(caplog, "compared")
    assert compared.job_ids == [ids[2]]  # type: ignore[attr-defined]
    assert compared.released == 1  # type: ignore[attr-defined]
    assert cancelled == ["claimed"]
    assert Counter(began) == {"kept": 1, "acknowledged": 2, "claimed": 2}
    ended = "SELECT job_id, attempt, status FROM triojobs.outcomes ORDER BY job_id"
    assert rows(standby.conninfo, ended) == [(job_id, 1, "done") for job_id in ids]
    assert running(standby.conninfo) == 0
