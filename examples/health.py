"""A worker that tells Kubernetes, or whoever asks, how it is: /livez and /readyz on port 8086.

    pip install "triojobs[binary,embedded]" "hypercorn[trio]"
    python examples/health.py [postgresql://localhost/shop] [--bind 127.0.0.1:8086]

    livenessProbe:  {httpGet: {path: /livez, port: 8086}}
    readinessProbe: {httpGet: {path: /readyz, port: 8086}}

Without a database of yours it starts one for itself. SIGTERM ends it: not ready at once, gone when its handlers have
ended.
"""

from __future__ import annotations

import argparse
from contextlib import AsyncExitStack
from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as serve_http

import triojobs

numbers = triojobs.Queue("numbers", int)


async def work(job: triojobs.Job[int]) -> None:
    await trio.sleep(job.payload)


async def main(conninfo: str | None, bind: str) -> None:
    config = Config()
    config.bind = [bind]
    async with AsyncExitStack() as stack:
        if conninfo is None:
            conninfo = await stack.enter_async_context(triojobs.open_embedded_postgres())
        triojobs.migrate(conninfo)
        async with trio.open_nursery() as nursery:
            group = await nursery.start(triojobs.serve, conninfo, [triojobs.Worker(numbers, work)])
            http = partial(
                serve_http, triojobs.health_app(group), config, shutdown_trigger=trio.sleep_forever
            )
            (url,) = await nursery.start(http)
            print(f"{url}/readyz", flush=True)
            await group.wait_stopped()
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("conninfo", nargs="?")
    parser.add_argument("--bind", default="127.0.0.1:8086")
    arguments = parser.parse_args()
    trio.run(main, arguments.conninfo, arguments.bind)
