"""A worker whose metrics Prometheus scrapes, from http://127.0.0.1:9464/metrics.

    pip install "triojobs[binary,embedded,metrics]"
    python examples/metrics.py [postgresql://localhost/shop] [--port 9464]

Without a database of yours it starts one for itself. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import random
from contextlib import AsyncExitStack

import trio
from prometheus_client import CollectorRegistry, start_http_server

import triojobs
import triojobs.prometheus

numbers = triojobs.Queue("numbers", int)


async def work(job: triojobs.Job[int]) -> None:
    await trio.sleep(random.expovariate(20.0))  # what takes its time: 50 ms on average
    if job.payload % 10 == 0 and job.attempt == 1:
        raise ValueError("each tenth fails at first")


async def produce(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:  # its own: the group's ends when the group stops
        for number in range(1, 1_000_000):
            await client.enqueue(numbers, number)
            await trio.sleep(0.1)


async def main(conninfo: str | None, port: int) -> None:
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        stack.enter_context(triojobs.prometheus.instrument(registry))
        if conninfo is None:
            conninfo = await stack.enter_async_context(triojobs.open_embedded_postgres())
        triojobs.migrate(conninfo)
        # In a thread: a scrape never waits for a handler.
        server, _ = start_http_server(port, "127.0.0.1", registry)
        stack.callback(server.shutdown)
        print(f"http://127.0.0.1:{port}/metrics", flush=True)
        async with trio.open_nursery() as nursery:
            group = await nursery.start(triojobs.serve, conninfo, [triojobs.Worker(numbers, work)])
            nursery.start_soon(produce, conninfo)
            await group.wait_stopped()
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("conninfo", nargs="?")
    parser.add_argument("--port", type=int, default=9464)
    arguments = parser.parse_args()
    trio.run(main, arguments.conninfo, arguments.port)
