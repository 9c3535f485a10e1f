"""Rows 16 to 19, 30c: black holes, resets, links of which one end is gone, and short absences."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, rows, until
from triojobs import _listener
from triojobs._backoff import RECONNECT_LIMIT

from .links import Link
from .rig import (
    NEVER_POLLS,
    SHORT,
    Figures,
    Journal,
    call_bound,
    exit_bound,
    logged,
    outcomes,
    plain,
    rescue_bound,
    running,
    wait_until,
)
from .sessions import disturb_sessions


async def test_row_16_a_black_hole_while_replies_are_awaited(
    conninfo: str, link: Link, figures: Figures
) -> None:
    """One call of the client waits for a lock, a handler works: then nothing comes back any more."""
    journal, later = Journal(), Journal()
    ended_at: list[float] = []
    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(link.conninfo, [journal.worker()], **SHORT) as group:
            job_id = await group.client.enqueue(plain, "wait")
            await journal.wait_for_beginnings(1)
            with locked(conninfo, "LOCK TABLE triojobs.jobs IN ACCESS EXCLUSIVE MODE"):
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def call() -> None:
                        with pytest.raises(triojobs.DatabaseError) as caught:
                            await group.client.enqueue(plain, "return")
                        ended_at.append(trio.current_time())
                        assert (caught.value.committed, caught.value.transient) == (None, True)

                    await blocked(conninfo, "enqueue")
                    link.black_hole()
                    began = trio.current_time()
            figures.note("a call", ended_at[0] - began, at_most=call_bound(SHORT))
            began = trio.current_time()
            scope.cancel()
    figures.note("exit", trio.current_time() - began, at_most=exit_bound(SHORT))
    assert group.report.abandoned == (job_id,)
    link.heal()
    later.go_on.set()
    async with triojobs.open_worker_group(conninfo, [later.worker()], **SHORT) as rescuer:
        began = trio.current_time()
        with trio.fail_after(30):
            assert await rescuer.client.result(job_id) == 2
        figures.note("rescued", trio.current_time() - began, at_most=rescue_bound(SHORT) + 1.0)
    assert running(conninfo) == 0


async def test_row_17_a_black_hole_while_connecting(
    conninfo: str, link: Link, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    options = SHORT | {"call_timeout": 2.0, "lease_duration": 60.0}
    link.black_hole()
    before = set(threading.enumerate())
    began = trio.current_time()
    with pytest.raises(triojobs.DatabaseError) as caught:
        async with triojobs.open_worker_group(link.conninfo, [Journal().worker()], **options):
            raise AssertionError("must not open")
    figures.note("refused at the start", trio.current_time() - began, at_most=options["call_timeout"] + 1.0)
    assert caught.value.transient
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("triojobs")]
    link.heal()

    # A group that lives through it: each connect ends by itself, and the pauses grow.
    journal = Journal()
    async with triojobs.open_worker_group(link.conninfo, [journal.worker()], **options) as group:
        kept = await group.client.enqueue(plain, "wait")
        await journal.wait_for_beginnings(1)
        caplog.clear()
        link.black_hole()
        link.proxy.reset()  # the connections are gone, and nobody hears of it
        began = trio.current_time()
        await wait_until(lambda: sum("timeout expired" in r.getMessage() for r in caplog.records) >= 3)
        # Two roles at least try side by side, each for two seconds: nobody spins.
        assert trio.current_time() - began >= 2.0
        link.heal()
        healed = trio.current_time()
        async with triojobs.open_client(conninfo) as client:
            job_id = await client.enqueue(plain, "return")
            with trio.fail_after(30):
                await client.result(job_id)
        figures.note("claimed again", trio.current_time() - healed,
                     at_most=RECONNECT_LIMIT + 2 * options["call_timeout"] + 2.0)  # fmt: skip
        journal.go_on.set()
        await wait_until(lambda: group.statistics().settled == 2)
        assert group.statistics().registrations == 1
    assert sorted(journal.began) == [(kept, 1), (job_id, 1)]
    assert outcomes(conninfo) == [(1, "done")] * 2


async def test_row_18_every_connection_is_reset_all_the_time(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fault_proxy(conninfo, tcp=True) as (proxy, through):
        await disturb_sessions(conninfo, through, proxy.reset)
    assert logged(caplog, "listen_lost")


async def test_row_19_the_link_of_the_listener_is_half_open(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_listener, "PROBE_INTERVAL", 1.0)
    await polling_goes_on(conninfo, figures)
    await a_deaf_listener_is_found_out(conninfo, figures, caplog, probe_interval=1.0)


@pytest.mark.long
async def test_a_half_open_listener_is_found_out_by_the_probe_as_it_ships(
    conninfo: str, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    await a_deaf_listener_is_found_out(conninfo, figures, caplog, probe_interval=15.0)


async def asleep(conninfo: str) -> None:
    """Wait until the group has marked that it sleeps, and its last claim is over."""
    await until(conninfo, "SELECT count(*) FROM triojobs.waiting")
    await trio.testing.wait_all_tasks_blocked()


async def polling_goes_on(conninfo: str, figures: Figures) -> None:
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT) as group:
            await asleep(conninfo)
            assert proxy.freeze("listen") == 1
            job_id = await group.client.enqueue(plain, "return")
            await wait_until(lambda: group.statistics().settled == 1)
            info = await group.client.get(job_id)
    assert info is not None
    assert info.claimed_at is not None
    figures.note("started by the poll", (info.claimed_at - info.enqueued_at).total_seconds(),
                 at_most=SHORT["listening_poll_interval"] + SHORT["call_timeout"])  # fmt: skip


async def a_deaf_listener_is_found_out(
    conninfo: str, figures: Figures, caplog: pytest.LogCaptureFixture, *, probe_interval: float
) -> None:
    """Here nothing is polled, so that only the listener's recovery can find the job."""
    journal = Journal()
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_worker_group(through, [journal.worker()], **SHORT | NEVER_POLLS) as group:
            await asleep(conninfo)
            caplog.clear()
            assert proxy.freeze("listen") == 1
            frozen_at = trio.current_time()
            job_id = await group.client.enqueue(plain, "return")
            await wait_until(lambda: logged(caplog, "listen_lost") or journal.began)
            assert logged(caplog, "listen_lost")
            figures.note("found out", trio.current_time() - frozen_at,
                         at_most=probe_interval + call_bound(SHORT))  # fmt: skip
            with trio.fail_after(30):
                await group.client.result(job_id)  # LISTEN again, then one look
            await asleep(conninfo)
            with trio.fail_after(30):
                await group.client.result(await group.client.enqueue(plain, "return"))  # by a notification


async def test_row_30c_the_database_is_away_for_less_than_the_lease_and_a_rescue(
    conninfo: str, figures: Figures
) -> None:
    """A rival looks for dead groups all the while; the margin is what it has to wait beyond us."""
    options = SHORT | {"lease_duration": 5.0, "lease_margin": 3.5, "beat_interval": 0.4}
    journal, rival = Journal(), Journal()
    other: triojobs.Queue[Any, Any] = triojobs.Queue("other")
    idle = triojobs.Worker(other, rival.handle)
    with fault_proxy(conninfo) as (proxy, through):
        async with (
            triojobs.open_worker_group(conninfo, [idle], **options) as rescuer,
            triojobs.open_worker_group(through, [journal.worker()], **options) as group,
        ):
            first = group.group_id
            job_id = await group.client.enqueue(plain, "wait", max_attempts=1)
            await journal.wait_for_beginnings(1)
            proxy.cut()
            cut_at = trio.current_time()
            await wait_until(lambda: journal.cancelled)
            figures.note("cancelled", trio.current_time() - cut_at,
                         at_most=options["lease_duration"] - options["lease_margin"] + 1.0)  # fmt: skip
            assert outcomes(conninfo) == []
            proxy.heal()
            journal.go_on.set()
            with trio.fail_after(30):
                assert await rescuer.client.result(job_id) == 1
            assert group.group_id != first
            assert rescuer.statistics().rescued == 0
    closed = "SELECT closed_at < lease_until FROM triojobs.worker_groups WHERE id = %s"
    assert rows(conninfo, closed, first) == [(True,)]  # by itself, before anybody else might
    assert journal.began == [(job_id, 1), (job_id, 1)]
    assert outcomes(conninfo) == [(1, "done")]
    assert group.report.released == 1
    assert len(group.report.group_ids) == 2
