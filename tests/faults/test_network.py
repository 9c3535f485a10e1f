"""Rows 16 to 19, 30c: black holes, resets, links of which one end is gone, and short absences."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from typing import Any, LiteralString

import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import blocked, locked, rows, until
from triojobs import _bridge, _listener
from triojobs._backoff import RECONNECT_FIRST, RECONNECT_LIMIT
from triojobs._bridge import clock
from triojobs._sql.connecting import connect_in_time

from .links import Link
from .rig import (
    NEVER_POLLS,
    PATIENCE,
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


class Connects:
    """Watches connects: those in flight, and when each began and ended, by role."""

    def __init__(self) -> None:
        self.in_flight: Counter[str] = Counter()
        self.ended: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        role = options["defaults"]["application_name"].removeprefix("triojobs ")
        began = clock()
        self.in_flight[role] += 1
        try:
            return connect_in_time(*args, **options)
        finally:
            self.in_flight[role] -= 1
            self.ended.setdefault(role, []).append((began, clock()))

    def pauses(self, role: str) -> list[float]:
        """Return the seconds between one connect and the next."""
        spans = self.ended.get(role, [])
        return [began - ended for (_, ended), (began, _) in itertools.pairwise(spans)]


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Connects:
    """Watches the connects of this test."""
    watching = Connects()
    monkeypatch.setattr(_bridge, "connect_in_time", watching)
    return watching


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
    conninfo: str, link: Link, figures: Figures, connects: Connects
) -> None:
    options = SHORT | {"call_timeout": 0.5, "lease_duration": 60.0}
    link.black_hole()
    before, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    began = trio.current_time()
    with pytest.raises(triojobs.DatabaseError) as caught:
        async with triojobs.open_worker_group(link.conninfo, [Journal().worker()], **options):
            raise AssertionError("must not open")
    figures.note("refused at the start", trio.current_time() - began, at_most=options["call_timeout"] + 1.0)
    assert caught.value.transient
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("triojobs")]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    link.heal()

    # A group that lives through it: each connect ends by itself, and the pauses grow.
    journal = Journal()
    async with triojobs.open_worker_group(link.conninfo, [journal.worker()], **options) as group:
        kept = await group.client.enqueue(plain, "wait")
        await journal.wait_for_beginnings(1)
        connects.ended.clear()
        link.black_hole()
        link.proxy.reset()  # the connections are gone, and nobody hears of it
        await wait_until(lambda: len(connects.ended.get("claim", ())) >= 3)
        assert min(connects.pauses("claim")) >= RECONNECT_FIRST / 2 - 0.01  # nobody spins
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


HASTY: dict[str, Any] = SHORT | {"close_timeout": 1.0, "grace_period": 0.2, "lease_duration": 30.0}


@pytest.mark.parametrize("left_by", ["cancel", "stop"])
@pytest.mark.parametrize("when", ["calls wait", "everybody connects", "a commit waits"])
async def test_a_black_hole_keeps_nobody_longer_than_the_bound(
    conninfo: str, link: Link, figures: Figures, connects: Connects, when: str, left_by: str
) -> None:
    """The bound is shorter than twice libpq's least for connecting, and what hangs is begun just before."""
    journal, commits = Journal(), trio.Event()
    committing: triojobs.Queue[Any, Any] = triojobs.Queue("committing")

    async def commit(job: triojobs.Job[Any]) -> None:
        await commits.wait()
        await job.commit(lambda conn: None)

    workers = [journal.worker(), triojobs.Worker(committing, commit)]
    with trio.CancelScope() as scope:
        async with triojobs.open_worker_group(link.conninfo, workers, **HASTY) as group:
            ids = await group.client.enqueue_many(plain, ["wait", "wait"])
            ids.append(await group.client.enqueue(committing, None))
            await wait_until(lambda: group.statistics().running == 3)
            link.black_hole()
            if when == "a commit waits":
                commits.set()
                await wait_until(lambda: connects.in_flight["job"])
            else:
                journal.go_on.set()  # now there is something to settle
                await wait_until(lambda: group.statistics().unsettled == 2)
            if when == "everybody connects":
                await wait_until(lambda: connects.in_flight["settle"] and connects.in_flight["claim"])
            began = trio.current_time()
            if left_by == "cancel":
                scope.cancel()
    figures.note("exit", trio.current_time() - began, at_most=exit_bound(HASTY))
    assert set(group.report.abandoned) == set(ids)
    link.heal()


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


ASLEEP: LiteralString = """
SELECT EXISTS (SELECT FROM triojobs.waiting) AND EXISTS (
    SELECT FROM pg_stat_activity
    WHERE application_name = 'triojobs claim' AND datname = current_database()
      AND state = 'idle' AND ltrim(query, E'\n') LIKE 'SELECT EXISTS %'
)
"""


async def asleep(conninfo: str) -> None:
    """Wait until the group has marked that it sleeps, and its claim after that, which found nothing, is over."""
    await until(conninfo, ASLEEP, seconds=PATIENCE)
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
            closed = "SELECT closed_at < lease_until FROM triojobs.worker_groups WHERE id = %s"
            await wait_until(lambda: group.group_id != first)
            assert rows(conninfo, closed, first) == [
                (True,)
            ]  # by itself, before anybody else might, and first
            journal.go_on.set()
            with trio.fail_after(30):
                assert await rescuer.client.result(job_id) == 1
            assert rescuer.statistics().rescued == 0
    assert journal.began == [(job_id, 1), (job_id, 1)]
    assert outcomes(conninfo) == [(1, "done")]
    assert group.report.released == 1
    assert len(group.report.group_ids) == 2
