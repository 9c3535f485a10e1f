"""A worker process: one group over all queues until SIGTERM, or until the program that started it is gone.

python -m tests.chaos.worker <conninfo> <journal> [mutant]
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

import triojobs

from . import mutants
from .journal import Journal
from .plan import GROUP_OPTIONS
from .workload import QUEUES, Handlers

CONCURRENCY = 16
RETRY = triojobs.Backoff(first=0.05, factor=1.5, limit=1.0)
# What the members of the fleet do differently, by their number.
VARIANTS: dict[int, dict[str, Any]] = {
    2: {"isolation": "task"},
    3: {"notify": False},
    4: {"concurrency": 24, "job_connections": 1},
}
START_AGAIN = 0.1  # seconds before the group is opened again after the server was out of reach


async def run(conninfo: str, journal: Journal, name: str) -> None:
    """Keep a group open until SIGTERM; write its report."""
    handlers = Handlers(journal)
    options = GROUP_OPTIONS | VARIANTS.get(int(name.split("-")[1]), {})
    workers = [
        triojobs.Worker(queue, handlers.handle, concurrency=CONCURRENCY, retry=RETRY) for queue in QUEUES
    ]
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(die_with_parent)
            while True:
                try:
                    async with triojobs.open_worker_group(conninfo, workers, name=name, **options) as group:
                        handlers.client = group.client  # no checkpoint since the group began
                        nursery.start_soon(stop_at_signal, signals, group)
                        await group.wait_stopped()
                    break
                except triojobs.DatabaseError as exc:
                    if not exc.transient:
                        raise
                    await trio.sleep(START_AGAIN)  # the server is restarting
            nursery.cancel_scope.cancel()
    report = dataclasses.asdict(group.report)
    journal.write("closed", **{**report, "group_ids": [str(each) for each in group.report.group_ids]})


async def stop_at_signal(signals: AsyncIterator[int], group: triojobs.WorkerGroup) -> None:
    async for _ in signals:
        group.stop()


async def die_with_parent() -> None:
    """End at once when the other end of stdin is closed: nobody would stop this process any more."""
    while True:
        await trio.lowlevel.wait_readable(sys.stdin.fileno())
        if not os.read(sys.stdin.fileno(), 1024):
            os._exit(3)


def main() -> None:
    conninfo, path, *mutant = sys.argv[1:]
    logging.basicConfig(format="%(created).3f %(name)s %(message)s", level=logging.WARNING)
    for name in mutant:
        mutants.apply(name)
    trio.run(run, conninfo, Journal(Path(path)), Path(path).stem)


if __name__ == "__main__":
    main()
