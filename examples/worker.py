"""A worker process: a group under SIGTERM and SIGINT, as systemd, Docker and Kubernetes send them.

    python examples/worker.py postgresql://localhost/shop

The first signal stops gracefully: handlers may end within the grace period, the rest is given back without
losing an attempt. A second one cancels the handlers, a third one ends the process at once.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import trio

import triojobs


@dataclass(frozen=True)
class Resize:
    picture: str
    width: int


pictures = triojobs.Queue("pictures", Resize, result=str)


async def resize(job: triojobs.Job[Resize]) -> str:
    with trio.move_on_after(30) as patience:
        await trio.sleep(job.payload.width / 1000)  # what takes its time
    if patience.cancelled_caught:
        raise triojobs.RetryAfter(60)  # a failed attempt; the next one in a minute
    return f"{job.payload.picture} is {job.payload.width} wide"


workers = [triojobs.Worker(pictures, resize, concurrency=4, retry=triojobs.Backoff(first=5.0, limit=600.0))]


async def main(conninfo: str) -> None:
    report = await triojobs.serve(conninfo, workers, grace_period=20.0)
    print(f"done {report.settled['done']}, given back {report.released}, left behind {len(report.abandoned)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, sys.argv[1])
