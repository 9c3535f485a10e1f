"""How one tests one's handlers, without a server: `pytest examples/test_handlers.py`."""

from __future__ import annotations

from collections.abc import Callable

import trio
from worker import Resize, pictures, resize, workers

import triojobs
from triojobs import testing


async def test_a_picture_is_resized(autojump_clock: trio.testing.MockClock) -> None:
    run = await testing.run_handler(workers[0], Resize("ada.png", 640))
    assert (run.outcome, run.result) == ("done", "ada.png is 640 wide")


async def test_what_takes_too_long_is_tried_again_in_a_minute(autojump_clock: trio.testing.MockClock) -> None:
    run = await testing.run_handler(workers[0], Resize("huge.png", 1_000_000), attempt=2)
    assert (run.outcome, run.delay) == ("failed", 60)


async def test_a_whole_queue_is_worked_off(autojump_clock: trio.testing.MockClock) -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_client(database) as client:
        ids = await client.enqueue_many(pictures, [Resize(f"{n}.png", n) for n in (320, 640, 1280)])
        report = await testing.drain(database, workers)
        assert report.settled["done"] == 3
        assert await client.result(ids[1], pictures) == "640.png is 640 wide"


def test_a_cancel_at_any_instant_leaves_one_picture() -> None:
    """A deploy may come at any checkpoint of a handler: `explore` tries each of them."""
    stored: dict[str, int] = {}

    async def resize_and_store(job: triojobs.Job[Resize]) -> str:
        told = await resize(job)
        stored[job.payload.picture] = job.payload.width  # idempotent: a repetition writes the same
        await trio.sleep(1)
        return told

    found = testing.explore(
        triojobs.Worker(pictures, resize_and_store),
        Resize("ada.png", 640),
        before=stored.clear,
        check=stored_once(stored),
    )
    assert found.cancelled > 0


def stored_once(stored: dict[str, int]) -> Callable[[testing.Explored[str]], None]:
    def check(run: testing.Explored[str]) -> None:
        assert run.result == "ada.png is 640 wide"
        assert stored == {"ada.png": 640}

    return check
