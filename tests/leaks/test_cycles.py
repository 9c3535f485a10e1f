"""Opening and closing again and again leaves nothing: no thread, descriptor, session, token, task, object or row.

The counts of `census` must be the same after the warm-up and at the end, exactly. The process may grow by
less than one Python object in two cycles (seen: none), and by less than GROWTH in all (seen in the first 300
cycles of a group: 2 MiB; in the 2,100 after them 0.3 MiB).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

import triojobs
from tests.leaks.census import Census, census, count_objects, no_session_left, resident_memory
from tests.tools import looking

CYCLES = 100  # a cycle of a group takes 60 ms; `-m long` runs a thousand
WARM_UP = 0.25  # of the cycles, before them: caches, Trio's threads, the allocator's arenas
GROWTH = 2 * 1024**2  # bytes

numbers: triojobs.Queue[int, int] = triojobs.Queue("numbers", int, result=int)
Cycle = Callable[[str, int], Awaitable[None]]


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Keep pytest from collecting what cancelled cycles log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Boom(Exception):
    """What the body of a cycle raises."""


class Gate:
    """A handler that waits until it is cancelled, and says when it has begun."""

    def __init__(self) -> None:
        self.begun = trio.Event()

    async def wait(self, job: triojobs.Job[int]) -> int:
        self.begun.set()
        await trio.sleep_forever()
        raise AssertionError


async def double(job: triojobs.Job[int]) -> int:
    return 2 * job.payload


async def commits(job: triojobs.Job[int]) -> int:
    return await job.commit(lambda conn: 2 * job.payload)


def group(conninfo: str, handler: Any, **options: Any) -> Any:
    return triojobs.open_worker_group(
        conninfo, [triojobs.Worker(numbers, handler)], grace_period=0.0, **options
    )


# Cycles of a group.


async def idle(conninfo: str, n: int) -> None:
    async with group(conninfo, double):
        pass


async def with_jobs(conninfo: str, n: int) -> None:
    handler = commits if n % 2 else double
    async with group(conninfo, handler, isolation="task" if n % 3 else "slot") as opened:
        job_id = await opened.client.enqueue(numbers, n)
        other = await trio.to_thread.run_sync(opened.client.enqueue_from_thread, numbers, n)
        assert await opened.client.result(job_id, numbers) == 2 * n
        assert await opened.client.result(other, numbers) == 2 * n


async def stopped_with_a_job_at_work(conninfo: str, n: int) -> None:
    gate = Gate()
    async with group(conninfo, gate.wait) as opened:
        job_id = await opened.client.enqueue(numbers, n)
        await gate.begun.wait()
        opened.stop()
        await opened.wait_stopped()
    await remove(conninfo, job_id)


async def cancelled_with_a_job_at_work(conninfo: str, n: int) -> None:
    gate = Gate()
    with trio.CancelScope() as scope:
        async with group(conninfo, gate.wait) as opened:
            job_id = await opened.client.enqueue(numbers, n)
            await gate.begun.wait()
            scope.cancel()
            await trio.sleep_forever()
    await remove(conninfo, job_id)


async def body_raises_with_a_job_at_work(conninfo: str, n: int) -> None:
    gate = Gate()
    with pytest.raises(Boom):
        async with group(conninfo, gate.wait) as opened:
            job_id = await opened.client.enqueue(numbers, n)
            await gate.begun.wait()
            raise Boom
    await remove(conninfo, job_id)


async def job_is_cancelled(conninfo: str, n: int) -> None:
    gate = Gate()
    async with group(conninfo, gate.wait) as opened:
        job_id = await opened.client.enqueue(numbers, n)
        await gate.begun.wait()
        assert await opened.client.cancel(job_id)
        with pytest.raises(triojobs.JobCancelledError):
            await opened.client.result(job_id)


async def cannot_open(conninfo: str, n: int) -> None:
    with pytest.raises(triojobs.SchemaError):
        async with group(conninfo, double, schema="missing"):
            pass


# Cycles of a client.


async def client(conninfo: str, n: int) -> None:
    async with triojobs.open_client(conninfo) as opened:
        job_id = await opened.enqueue(numbers, n)
        info = await opened.get(job_id)
        assert info is not None
        await opened.cancel(job_id)


async def client_cancelled_while_it_waits(conninfo: str, n: int) -> None:
    with trio.CancelScope() as scope:
        async with triojobs.open_client(conninfo) as opened, trio.open_nursery() as nursery:
            job_id = await opened.enqueue(numbers, n)
            nursery.start_soon(opened.result, job_id)
            await trio.to_thread.run_sync(opened.enqueue_from_thread, numbers, n)
            scope.cancel()
    looking.rows(conninfo, "DELETE FROM triojobs.ready")


async def client_body_raises(conninfo: str, n: int) -> None:
    with pytest.raises(Boom):
        async with triojobs.open_client(conninfo):
            raise Boom


async def remove(conninfo: str, job_id: int) -> None:
    """Make sure that the job was given back, and take it out of the next cycle's way."""
    assert looking.rows(conninfo, "DELETE FROM triojobs.ready WHERE id = %s RETURNING attempts", job_id) == [
        (0,)
    ]


GROUP_CYCLES = (
    idle,
    with_jobs,
    stopped_with_a_job_at_work,
    cancelled_with_a_job_at_work,
    body_raises_with_a_job_at_work,
    job_is_cancelled,
    cannot_open,
)
CLIENT_CYCLES = (client, client_cancelled_while_it_waits, client_body_raises)


async def run(cycles: tuple[Cycle, ...], conninfo: str, count: int) -> None:
    for n in range(count):
        await cycles[n % len(cycles)](conninfo, n)


async def counted(conninfo: str) -> Census:
    await no_session_left(conninfo)
    return census()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cycles", [GROUP_CYCLES, CLIENT_CYCLES], ids=["group", "client"])
@pytest.mark.parametrize("count", [CYCLES, pytest.param(1000, marks=pytest.mark.long)])
async def test_cycles_leave_nothing(conninfo: str, cycles: tuple[Cycle, ...], count: int) -> None:
    await run(cycles, conninfo, int(WARM_UP * count))
    before, objects, memory = await counted(conninfo), count_objects(), resident_memory()
    await run(cycles, conninfo, count)
    assert await counted(conninfo) == before
    assert count_objects() - objects < count / 2
    assert resident_memory() - memory < GROWTH
    assert looking.places(conninfo).keys() <= {"jobs", "outcomes"}
    assert looking.rows(conninfo, "SELECT * FROM triojobs.waiting") == []
    assert looking.rows(conninfo, "SELECT id FROM triojobs.worker_groups WHERE closed_at IS NULL") == []
