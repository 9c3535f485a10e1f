"""A producer that enqueues one report for each interval, however many producers run.

    python examples/periodic_producer.py postgresql://localhost/shop --every 60

The interval's number is the job's key: of several producers, or of one that was restarted in the middle of an
interval, one makes the job, the others find it.
"""

from __future__ import annotations

import argparse
import time
from contextlib import aclosing

import trio
from trio_util import periodic

import triojobs

reports = triojobs.Queue("reports", dict[str, int])


async def produce(conninfo: str, every: float) -> None:
    async with triojobs.open_client(conninfo) as client, aclosing(periodic(every)) as ticks:
        async for _ in ticks:
            interval = int(time.time() // every)
            try:
                entry = await client.try_enqueue(
                    reports, {"interval": interval}, key=f"report:{interval}", max_attempts=10
                )
            except triojobs.DatabaseError as exc:
                if not exc.transient:
                    raise
                # The key makes the repetition safe: the next tick tries again.
                print(f"not now: {exc}", flush=True)
            else:
                word = "enqueued" if entry.created else "is there"
                print(f"report {interval}: {word} (job {entry.id})", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("conninfo")
    parser.add_argument("--every", type=float, default=60.0, help="seconds (default 60)")
    arguments = parser.parse_args()
    trio.run(produce, arguments.conninfo, arguments.every)
