"""procrastinate as measured: python run_procrastinate.py ORDER; the database comes from PG* variables."""

from __future__ import annotations

import asyncio
import logging

from procrastinate import App, PsycopgConnector
from producing import Payload, asyncio_end, produce
from wire import ORDER, Handled, say, wait_for_start

CONFIG = ORDER["config"]
logging.getLogger("procrastinate").setLevel(logging.ERROR)
app = App(connector=PsycopgConnector(**CONFIG.get("pool", {})))
handled = Handled()


@app.task(name="bench", queue="bench")
async def bench(at: float | None = None, **rest: object) -> None:
    if at is None:
        handled.one()
    else:
        handled.one_sent_at(at)


async def prepare() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def work() -> None:
    wait_for_start()
    async with app.open_async():
        running = asyncio.create_task(
            app.run_worker_async(install_signal_handlers=False, **CONFIG.get("worker", {}))
        )
        say(open=True)
        ended = asyncio.create_task(asyncio_end())
        await asyncio.wait([running, ended], return_when=asyncio.FIRST_COMPLETED)
        running.cancel()  # its documented way to stop: gracefully
        await asyncio.gather(running, return_exceptions=True)
    handled.say_all()


async def send() -> None:
    async with app.open_async():

        async def one(payload: Payload) -> None:
            await bench.defer_async(**payload)

        async def many(payloads: list[Payload]) -> None:
            await bench.batch_defer_async(*payloads)

        await produce(one, many)


asyncio.run({"prepare": prepare, "work": work}.get(ORDER["do"], send)())
