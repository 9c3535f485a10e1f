"""A worker as a process: payloads say what to do, each event is one line of JSON on stdout.

    python -m tests.faults.worker_program '{"conninfo": …, "options": {…}, "serve": true}'

A payload is a word, or a word with a number of seconds: "wait", "sleep 0.5", "hold_gil 2". The lines
carry `at`, monotonic seconds, which mean the same in every process of one machine.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from typing import Any

import trio

import triojobs

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


def tell(event: str, **fields: Any) -> None:
    # One write: lines of several threads do not mix, and os._exit loses nothing.
    line = json.dumps({"event": event, "at": time.monotonic(), **fields}) + "\n"
    os.write(1, line.encode())


class TellingHandler(logging.Handler):
    """Tells our log records."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(
            "log",
            name=getattr(record, "event", ""),
            logger=record.name,
            level=record.levelname,
            text=record.getMessage(),
        )


def hold_gil(seconds: float) -> None:
    """Call C code that keeps the interpreter's lock."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


async def do(word: str, seconds: float) -> Any:
    match word:
        case "return":
            return "returned"
        case "wait":
            await trio.sleep_forever()
        case "sleep":
            await trio.sleep(seconds)
        case "block_loop":
            time.sleep(seconds)  # noqa: ASYNC251 - the fault
        case "hold_gil":
            hold_gil(seconds)
            await trio.lowlevel.checkpoint()
        case "exit":
            os._exit(9)
        case "segfault":
            ctypes.string_at(0)
        case "system_exit":
            raise SystemExit(3)
        case "stubborn":
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()
        case _:
            raise ValueError(f"nobody knows how to {word}")
    return word


async def handle(job: triojobs.Job[Any]) -> Any:
    fields = {"job": job.id, "attempt": job.attempt}
    tell("began", **fields)
    word, _, seconds = str(job.payload).partition(" ")
    try:
        value = await do(word, float(seconds or 0))
    except trio.Cancelled:
        tell("cancelled", **fields)
        raise
    tell("returned", **fields)
    return value


async def main(settings: dict[str, Any]) -> None:
    workers = [triojobs.Worker(plain, handle, concurrency=settings.get("concurrency", 10))]
    options = settings.get("options", {})
    group: triojobs.WorkerGroup | None = None
    try:
        if settings.get("serve"):
            async with trio.open_nursery() as nursery:
                group = await nursery.start(serve, settings["conninfo"], workers, options)
                tell("open", group=str(group.group_id))
        else:
            async with triojobs.open_worker_group(settings["conninfo"], workers, **options) as group:
                tell("open", group=str(group.group_id))
                await group.wait_stopped()
    finally:
        if group is not None:
            report = group.report
            tell(
                "report",
                settled=dict(report.settled),
                released=report.released,
                abandoned=list(report.abandoned),
                unknown_claims=report.unknown_claims,
                duration=report.duration,
                groups=[str(group_id) for group_id in report.group_ids],
                stale=group.statistics().stale,
                registrations=group.statistics().registrations,
            )


async def serve(
    conninfo: str, workers: Any, options: dict[str, Any], *, task_status: Any = trio.TASK_STATUS_IGNORED
) -> None:
    await triojobs.serve(conninfo, workers, task_status=task_status, **options)


if __name__ == "__main__":
    log = logging.getLogger("triojobs")
    log.setLevel(logging.INFO)
    log.addHandler(TellingHandler())
    log.propagate = False
    trio.run(main, json.loads(sys.argv[1]))
