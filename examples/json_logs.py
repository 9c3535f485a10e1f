"""Logs as JSON, one object on a line, with the fields that triojobs gives to each event.

    pip install "triojobs[binary,embedded]"
    python examples/json_logs.py [postgresql://localhost/shop]

Without a database of yours it starts one for itself.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AsyncExitStack

import trio

import triojobs

mails = triojobs.Queue("mails", str)
OF_EVERY_RECORD = set(vars(logging.makeLogRecord({})))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in OF_EVERY_RECORD}
        line = {"level": record.levelname, "logger": record.name, "message": record.getMessage(), **fields}
        return json.dumps(line, default=str)


async def send(job: triojobs.Job[str]) -> None:
    if "@" not in job.payload:
        raise triojobs.Kill(f"{job.payload!r} is no address")


async def main(conninfo: str | None) -> None:
    async with AsyncExitStack() as stack:
        if conninfo is None:
            conninfo = await stack.enter_async_context(triojobs.open_embedded_postgres())
        triojobs.migrate(conninfo)
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(mails, send)], name="mailer"
        ) as group:
            await group.client.enqueue_many(mails, ["ada@example.com", "nowhere"])
            await group.wait_idle()


if __name__ == "__main__":
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    trio.run(main, sys.argv[1] if sys.argv[1:] else None)
