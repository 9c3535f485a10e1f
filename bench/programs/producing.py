"""What the asyncio and Trio programs share: how producers send, how workers wait for their end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from wire import ORDER, now, payload, say, wait_for_end, wait_for_start

Payload = dict[str, Any]


async def produce(
    one: Callable[[Payload], Awaitable[Any]],
    many: Callable[[list[Payload]], Awaitable[Any]],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Send `jobs` payloads: `bulk` in chunks, `single` one after another, `paced` at a rate."""
    jobs: int = ORDER["jobs"]
    wait_for_start()
    begun = now()
    if ORDER["do"] == "bulk":
        for no in range(0, jobs, ORDER["chunk"]):
            await many([payload(i) for i in range(no, min(no + ORDER["chunk"], jobs))])
    elif ORDER["do"] == "single":
        for no in range(jobs):
            await one(payload(no))
    else:
        for no in range(jobs):
            await sleep(max(0.0, begun + no / ORDER["rate"] - now()))
            await one(payload(no) | {"at": now()})
    say(seconds=now() - begun)


async def asyncio_end() -> None:
    """Return when the bench has seen enough. The thread is a daemon: it never keeps a failed program alive."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        wait_for_end()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    await ended.wait()
