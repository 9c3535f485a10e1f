"""A sleeping group never oversleeps a job, in whatever order producer and sleeper take their steps."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import trio
from wakeups import (
    CALLERS_COMMIT,
    HOUR,
    OWN_COMMIT,
    SCHEDULING,
    SOURCES,
    STAGES,
    sets_the_timer,
    sleeper,
    wakes_the_sleeper,
    world,
)

import triojobs
from tests.contract.contract_rig import row
from tests.tools.gates import PATIENCE
from tests.tools.looking import rows, until

ORDERS = list(combinations_with_replacement(STAGES, 2))


@pytest.mark.parametrize(("first", "second"), ORDERS)
@pytest.mark.parametrize("source", ["enqueue", "shared enqueue", *CALLERS_COMMIT])
async def test_a_job_that_is_enqueued_at_any_stage_is_claimed(
    conninfo: str, source: str, first: str, second: str
) -> None:
    assert await wakes_the_sleeper(conninfo, SOURCES[source], first, second)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", sorted({*OWN_COMMIT} - {"enqueue", "shared enqueue"}))
async def test_a_job_that_becomes_claimable_at_any_stage_is_claimed(
    conninfo: str, source: str, stage: str
) -> None:
    assert await wakes_the_sleeper(conninfo, SOURCES[source], stage, stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", SCHEDULING)
async def test_an_earlier_due_time_at_any_stage_sets_the_timer(
    conninfo: str, source: str, stage: str
) -> None:
    assert await sets_the_timer(conninfo, SCHEDULING[source], stage, stage)


async def test_the_timer_starts_the_job_when_it_is_due(conninfo: str) -> None:
    async with world(conninfo) as w, sleeper(w):
        await w.store.go_to("asleep")
        await w.producer.enqueue([row(1, delay=HOUR)])
        await w.settled()
        assert w.left() == 1
        await w.producer.enqueue([row(2, delay=0.1)])
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.outcomes", seconds=PATIENCE)
        assert w.left() == 1


# The mark.


async def test_the_mark_stays_while_the_sleeper_is_woken_and_cleared_when_it_is_busy(conninfo: str) -> None:
    busy = trio.Event()

    async def handler(job: triojobs.Job[int]) -> None:
        if job.payload > 0:
            await busy.wait()

    async with world(conninfo) as w, sleeper(w, handler):
        await w.store.go_to("asleep")
        w.store.calls.clear()
        await w.producer.enqueue([row(0)])  # one slot of two: the claim comes back short
        await w.settled()
        assert w.marked()
        assert set(w.store.calls) == {"claim"}

        await w.producer.enqueue([row(1), row(2)])
        await w.settled()
        assert not w.marked()
        heard = w.store.heard.count("q")
        await w.producer.enqueue([row(3)])
        await w.settled()
        assert w.store.heard.count("q") == heard  # nobody sleeps, nobody is woken
        assert w.left() == 1

        busy.set()
        await until(conninfo, "SELECT count(*) = 4 FROM triojobs.outcomes", seconds=PATIENCE)
        await w.store.until(lambda: w.store.calls[-2:] == ["mark", "claim"])
        await w.settled()
        assert w.marked()


async def reconnected(conninfo: str) -> bool:
    """Crash what a crash of the server loses of the sleep; return whether the mark comes back."""
    async with world(conninfo) as w, sleeper(w):
        await w.store.go_to("asleep")
        rows(conninfo, "TRUNCATE triojobs.waiting")  # unlogged: empty after a crash
        rows(
            conninfo,
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = 'triojobs listen' AND datname = current_database()",
        )
        await w.store.until(lambda: w.store.heard.count("listening") == 2)
        await w.store.asleep()
        return w.marked()


async def test_after_a_reconnect_the_mark_is_made_again(conninfo: str) -> None:
    assert await reconnected(conninfo)


async def test_what_was_enqueued_while_nobody_listened_is_claimed_after_the_reconnect(conninfo: str) -> None:
    async with world(conninfo) as w, sleeper(w):
        await w.store.go_to("asleep")
        rows(conninfo, "TRUNCATE triojobs.waiting")
        await w.producer.enqueue([row()])  # nobody is marked, so nobody is woken
        await w.settled()
        assert w.left() == 1
        rows(
            conninfo,
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = 'triojobs listen' AND datname = current_database()",
        )
        await w.store.until(lambda: w.store.heard.count("listening") == 2)
        await w.store.asleep()
        assert w.left() == 0


async def test_a_mark_that_could_not_be_made_is_made_after_a_pause(conninfo: str) -> None:
    async with world(conninfo) as w:
        w.store.errors["mark"] = triojobs.DatabaseError("gone", transient=True)
        async with sleeper(w):
            w.store.open_gates()
            await w.store.until(lambda: "mark" in w.store.calls)
            await w.settled()
            assert w.marked()
            await w.producer.enqueue([row()])
            await w.settled()
            assert w.left() == 0


async def test_the_mark_goes_with_its_group(conninfo: str) -> None:
    async with world(conninfo) as w:
        async with sleeper(w):
            await w.store.go_to("asleep")
            assert w.marked()
        assert not w.marked()
