"""PgQueuer as measured: python run_pgqueuer.py ORDER; the database comes from PG* variables."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import uvloop
from pgqueuer import AsyncpgDriver, Job, Queries, QueueManager
from producing import Payload, asyncio_end, produce
from wire import ORDER, Handled, say, wait_for_start

CONFIG = ORDER["config"]


@asynccontextmanager
async def connected() -> AsyncIterator[AsyncpgDriver]:
    connection = await asyncpg.connect()
    yield AsyncpgDriver(connection)
    await connection.close()


async def prepare() -> None:
    async with connected() as driver:
        queries = Queries(driver)
        await queries.install()
        if CONFIG.get("optimize_autovacuum"):
            await queries.optimize_autovacuum()


async def work() -> None:
    handled = Handled()
    wait_for_start()
    async with connected() as driver:
        manager = QueueManager(Queries(driver))

        if ORDER.get("measure") == "latency":

            @manager.entrypoint("bench")
            async def timed(job: Job) -> None:
                handled.one_sent_at(json.loads(job.payload or b"")["at"])
        else:

            @manager.entrypoint("bench")
            async def counted(job: Job) -> None:
                handled.one()

        async def stop() -> None:
            await asyncio_end()
            manager.shutdown.set()

        stopping = asyncio.create_task(stop())
        say(open=True)
        await manager.run(**CONFIG.get("run", {}))
        await stopping
    handled.say_all()


async def send() -> None:
    async with connected() as driver:
        queries = Queries(driver)

        async def one(payload: Payload) -> None:
            await queries.enqueue("bench", json.dumps(payload).encode())

        async def many(payloads: list[Payload]) -> None:
            n = len(payloads)
            await queries.enqueue(["bench"] * n, [json.dumps(p).encode() for p in payloads], [0] * n)

        await produce(one, many)


main = {"prepare": prepare, "work": work}.get(ORDER["do"], send)
(uvloop if CONFIG.get("uvloop") else asyncio).run(main())
