"""Events tell what happens in a group; nobody who reads them, or does not, can make the group wait."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from triojobs import testing

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


async def handler(job: triojobs.Job[Any]) -> Any:
    match job.payload:
        case "fails":
            raise ValueError("once" if job.attempt == 1 else "again")
        case "commits":
            await job.commit(lambda transaction: "committed")
        case "waits":
            await trio.sleep_forever()
    return job.payload


async def read(channel: trio.MemoryReceiveChannel[triojobs.GroupEvent]) -> list[triojobs.GroupEvent]:
    return [event async for event in channel]


async def test_every_reader_hears_everything_until_the_end(autojump_clock: Any) -> None:
    database = testing.MemoryDatabase()
    worker = triojobs.Worker(plain, handler, concurrency=4)
    heard: list[list[triojobs.GroupEvent]] = []
    opened = testing.open_memory_group(database, [worker], grace_period=0.0)
    async with trio.open_nursery() as nursery, opened as group:

        async def listen(channel: trio.MemoryReceiveChannel[triojobs.GroupEvent]) -> None:
            heard.append(await read(channel))

        nursery.start_soon(listen, group.events())
        nursery.start_soon(listen, group.events())
        client = group.client
        done = await client.enqueue(plain, "done")
        await client.result(done)
        committed = await client.enqueue(plain, "commits")
        await client.result(committed)
        failing = await client.enqueue(plain, "fails", max_attempts=2)
        with pytest.raises(triojobs.JobFailedError):
            await client.result(failing)
        waiting = await client.enqueue(plain, "waits")
        while not group.statistics().running:
            await trio.sleep(0.1)
        group_id = group.group_id
    assert heard[0] == heard[1]
    told = [(type(e).__name__, getattr(e, "job_id", None), getattr(e, "outcome", None)) for e in heard[0]]
    assert [each for each in told if each[0] != "GroupIdle"] == [
        ("GroupStarted", None, None),
        ("JobClaimed", done, None),
        ("JobSettled", done, "done"),
        ("JobClaimed", committed, None),
        ("JobSettled", committed, "done"),
        ("JobClaimed", failing, None),
        ("JobSettled", failing, "failed"),
        ("JobClaimed", failing, None),
        ("JobSettled", failing, "killed"),
        ("JobClaimed", waiting, None),
        ("JobReleased", waiting, None),
        ("GroupStopped", None, None),
    ]
    idle = [n for n, each in enumerate(told) if each[0] == "GroupIdle"]
    assert all(told[n - 1][0] != "GroupIdle" for n in idle)
    assert told[idle[-1] - 1][0] in ("JobSettled", "GroupStarted")
    assert {event.group_id for event in heard[0]} == {group_id}
    last = heard[0][-1]
    assert isinstance(last, triojobs.GroupStopped)
    assert last.report == group.report


async def test_a_reader_that_does_not_read_loses_events_and_nothing_else() -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)]) as group:
        channel = group.events(buffer=5)
        ids = await group.client.enqueue_many(plain, ["x"] * 50)
        await group.wait_idle()
        dropped = group.statistics().events_dropped
        assert group.report.settled["done"] == len(ids)
        assert dropped >= 2 * len(ids) - 6
    assert len(await read(channel)) == 6


async def test_a_reader_may_go_at_any_time() -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)]) as group:
        async with group.events() as channel:
            assert isinstance(await channel.receive(), triojobs.GroupStarted)
        await group.client.result(await group.client.enqueue(plain, "x"))
        assert group.statistics().events_dropped == 0
    assert group.report.settled["done"] == 1
    assert await read(group.events()) == []  # nothing will happen any more


async def test_a_lost_lease_and_the_new_registration_are_told() -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)]) as group:
        channel = group.events()
        first = group.group_id
        group._registrations[-1].lose("somebody else closed it")
        events: list[triojobs.GroupEvent] = []
        with trio.fail_after(30):
            while not (events and isinstance(events[-1], triojobs.GroupStarted) and events[-1].again):
                events.append(await channel.receive())
        assert triojobs.LeaseLost(first, "somebody else closed it") in events
        assert group.group_id == events[-1].group_id != first
