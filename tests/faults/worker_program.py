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
from triojobs import _stubborn

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
somebody_waits = trio.Event()


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


async def pass_checkpoints(job: triojobs.Job[Any]) -> None:
    """Do nothing but pass checkpoints; tell how many were passed after the process stood still."""
    passed, last, stood_still = 0, time.monotonic(), False
    try:
        while True:
            await trio.lowlevel.checkpoint()
            now = time.monotonic()
            passed += stood_still  # the first one may be the one in which it stood still
            stood_still = stood_still or now - last > 2.0
            last = now
    finally:
        tell("passed", job=job.id, checkpoints=passed)


async def do(job: triojobs.Job[Any], word: str, seconds: float) -> Any:
    match word:
        case "return":
            return "returned"
        case "wait":
            somebody_waits.set()
            await trio.sleep_forever()
        case "sleep":
            await trio.sleep(seconds)
        case "clock":
            tell("clock", job=job.id, wall=time.time())
        case "block_loop":
            time.sleep(seconds)
        case "hold_gil":
            hold_gil(seconds)
            await trio.sleep(60)
        case "checkpoints":
            await pass_checkpoints(job)
        case "die":
            await somebody_waits.wait()
            if job.attempt % 2:
                os._exit(9)
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
        value = await do(job, word, float(seconds or 0))
    except trio.Cancelled:
        tell("cancelled", **fields)
        raise
    tell("returned", **fields)
    return value


def hard_stop(why: triojobs.HardStop) -> None:
    tell("hard_stop", reason=why.reason, jobs=list(why.job_ids), stack=why.stack)
    os._exit(70)


class Started:
    """What `serve` reports its open group to."""

    group: triojobs.WorkerGroup | None = None

    def started(self, group: triojobs.WorkerGroup) -> None:
        self.group = group
        tell("open", group=str(group.group_id))


async def main(settings: dict[str, Any]) -> None:
    conninfo, options = settings["conninfo"], settings.get("options", {})
    workers = [triojobs.Worker(plain, handle, concurrency=settings.get("concurrency", 10))]
    begun = Started()
    if "stubborn_interval" in settings:
        _stubborn.STUBBORN_INTERVAL = settings["stubborn_interval"]  # type: ignore[misc]
    if settings.get("hard_stop"):
        options["hard_stop"] = hard_stop
    try:
        if settings.get("serve"):
            await triojobs.serve(conninfo, workers, task_status=begun, **options)
        else:
            async with triojobs.open_worker_group(conninfo, workers, **options) as group:
                begun.started(group)
                await group.wait_stopped()
    finally:
        if begun.group is not None:
            tell_report(begun.group)


def tell_report(group: triojobs.WorkerGroup) -> None:
    tell(
        "report",
        settled=dict(group.report.settled),
        released=group.report.released,
        abandoned=list(group.report.abandoned),
        unknown_claims=group.report.unknown_claims,
        stale=group.statistics().stale,
        registrations=group.statistics().registrations,
    )


def jump(file: str) -> None:
    """Move `time.time` by what a file says: the stand-in for libfaketime."""
    real = time.time

    def moved() -> float:
        with open(file) as offset:
            return real() + int(offset.read().rstrip("s") or 0)

    time.time = moved


if __name__ == "__main__":
    if file := os.environ.get("TRIOJOBS_TEST_CLOCK"):
        jump(file)
    log = logging.getLogger("triojobs")
    log.setLevel(logging.INFO)
    log.addHandler(TellingHandler())
    log.propagate = False
    trio.run(main, json.loads(sys.argv[1]))
