"""triojobs as measured: python run_triojobs.py ORDER; the database comes from PG* variables."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import trio
from producing import Payload, produce
from wire import ORDER, Handled, now, payload, say, wait_for_end, wait_for_start

import triojobs

CONFIG: dict[str, Any] = ORDER["config"]
QUEUE = triojobs.Queue("bench")
CONNINFO = ""  # libpq reads PG*


def worker(handled: Handled) -> triojobs.Worker[Any, Any]:
    """Return the worker of the order's configuration, with a handler that only counts."""
    if ORDER.get("measure") == "latency":

        async def timed(job: triojobs.Job[Any]) -> None:
            handled.one_sent_at(job.payload["at"])

        return triojobs.Worker(QUEUE, timed, **CONFIG.get("worker", {}))

    async def counted(job: triojobs.Job[Any]) -> None:
        handled.one()

    return triojobs.Worker(QUEUE, counted, **CONFIG.get("worker", {}))


async def work() -> None:
    """Run a worker group until the bench has seen enough."""
    handled = Handled()
    workers = [worker(handled)]
    await trio.to_thread.run_sync(wait_for_start)
    async with triojobs.open_worker_group(CONNINFO, workers, **CONFIG.get("group", {})):
        say(open=True)
        await trio.to_thread.run_sync(wait_for_end)
    handled.say_all()


async def start() -> None:
    """Say how long a group needs until its first handler runs, and how long an idle one needs to close."""
    first = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        first.set()

    await trio.to_thread.run_sync(wait_for_start)
    begun = now()
    async with triojobs.open_worker_group(CONNINFO, [triojobs.Worker(QUEUE, handler)]) as group:
        await first.wait()
        claimed = now()
        await group.wait_idle()
        leaving = now()
    say(until_claim=claimed - begun, exit=now() - leaving)


async def send() -> None:
    """Enqueue through a client, from one task."""
    async with triojobs.open_client(CONNINFO) as client:

        async def one(what: Payload) -> None:
            await client.enqueue(QUEUE, what)

        async def many(what: list[Payload]) -> None:
            await client.enqueue_many(QUEUE, what)

        await produce(one, many, trio.sleep)


async def send_from_tasks() -> None:
    """Enqueue through one client from `callers` tasks, each one job after another."""
    async with triojobs.open_client(CONNINFO) as client:

        async def caller(first: int) -> None:
            for no in range(first, ORDER["jobs"], ORDER["callers"]):
                await client.enqueue(QUEUE, payload(no))

        await trio.to_thread.run_sync(wait_for_start)
        begun = now()
        async with trio.open_nursery() as nursery:
            for first in range(ORDER["callers"]):
                nursery.start_soon(caller, first)
        say(seconds=now() - begun)


async def send_from_threads() -> None:
    """Enqueue through one client from `callers` plain threads, each one job after another."""
    async with triojobs.open_client(CONNINFO) as client:

        def caller(first: int) -> None:
            for no in range(first, ORDER["jobs"], ORDER["callers"]):
                client.enqueue_from_thread(QUEUE, payload(no))

        def all_callers() -> None:
            threads = [threading.Thread(target=caller, args=[n]) for n in range(ORDER["callers"])]
            wait_for_start()
            begun = now()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            say(seconds=now() - begun)

        await trio.to_thread.run_sync(all_callers)


def send_without_trio() -> None:
    """Enqueue through a SyncClient, one job after another."""
    with triojobs.SyncClient(CONNINFO) as client:
        wait_for_start()
        begun = now()
        for no in range(ORDER["jobs"]):
            client.enqueue(QUEUE, payload(no))
        say(seconds=now() - begun)


def send_inside() -> None:
    """Enqueue in transactions of the caller's, where the notification goes inside, one job in each."""
    with psycopg.connect(CONNINFO) as conn:
        wait_for_start()
        begun = now()
        for no in range(ORDER["jobs"]):
            with conn.transaction():
                triojobs.enqueue_on(conn, QUEUE, payload(no))
        say(seconds=now() - begun)


if __name__ == "__main__":
    do = ORDER["do"]
    if do == "prepare":
        triojobs.migrate(CONNINFO)
    elif do in ("sync", "inside"):
        {"sync": send_without_trio, "inside": send_inside}[do]()
    else:
        tasks = {"work": work, "start": start, "tasks": send_from_tasks, "threads": send_from_threads}
        trio.run(tasks.get(do, send))
