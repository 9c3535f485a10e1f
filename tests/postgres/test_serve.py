"""`serve`: what signals do to a program, what else ends it, and what it leaves as it was.

Signals go to real processes, one only after the effect of the last has been seen: the kernel merges
equal signals that are not delivered yet.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.looking import blocked, locked, places, rows, until
from tests.tools.running import outcomes, plain

BOTH = (signal.SIGTERM, signal.SIGINT)

PROGRAM = """
import json, sys, time
import trio, triojobs

conninfo, options = sys.argv[1], json.loads(sys.argv[2])

def say(word):
    print(word, flush=True)

async def handler(job):
    say("started")
    match job.payload:
        case "asks":
            await trio.to_thread.run_sync(sys.stdin.readline)
            return "answered"
        case "sleeps":
            try:
                await trio.sleep_forever()
            finally:
                say("cancelled")
        case "shields":
            try:
                await trio.sleep_forever()
            finally:
                say("cancelled")
                with trio.CancelScope(shield=True):
                    await trio.sleep_forever()
        case "blocks":
            while True:
                time.sleep(0.1)
        case "exits":
            raise SystemExit(3)

async def tell_when_stopping(group):
    while group.statistics().free:
        await trio.sleep(0.01)
    say("stopping")

async def serve(*, task_status):
    report = await triojobs.serve(
        conninfo, [triojobs.Worker(triojobs.Queue("plain"), handler)], task_status=task_status, **options
    )
    say(f"left {report.settled['done']} {report.released}")

async def main():
    async with trio.open_nursery() as nursery:
        group = await nursery.start(serve)
        nursery.start_soon(tell_when_stopping, group)

say("up")
trio.run(main)
say("after")
sys.stdin.readline()
"""


# The same without a nursery of its own, which would wrap what a handler raises.
BARE = (
    PROGRAM.replace("trio.run(main)", "trio.run(serve)")
    .replace("*, task_status", "")
    .replace("task_status=task_status, ", "")
)


class Process:
    """A program that serves; what it says is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    async def next_line(self) -> str:
        assert self._process.stdout is not None
        with trio.fail_after(30):
            line = await trio.to_thread.run_sync(self._process.stdout.readline, abandon_on_cancel=True)
        assert line, "it has ended"
        return line.rstrip("\n")

    async def says(self, *lines: str) -> None:
        for line in lines:
            assert await self.next_line() == line

    async def says_until(self, last: str) -> list[str]:
        said = [await self.next_line()]
        while said[-1] != last:
            said.append(await self.next_line())
        return said

    def write_line(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    async def is_killed_by(self, number: int) -> None:
        """Send it again and again, since equal signals are merged while nobody has seen them."""
        with trio.fail_after(30):
            while self._process.poll() is None:
                self.send(number)
                await trio.sleep(0.05)
        assert self._process.returncode == -number

    async def ends(self) -> tuple[int, str]:
        """Wait for its end; return its exit status and what it wrote to stderr."""
        with trio.fail_after(30):
            _, errors = await trio.to_thread.run_sync(self._process.communicate, abandon_on_cancel=True)
        return self._process.returncode, errors


@contextmanager
def serving(conninfo: str, program: str = PROGRAM, **options: Any) -> Iterator[Process]:
    command = [sys.executable, "-c", program, conninfo, json.dumps({"grace_period": 3600.0} | options)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


async def enqueue(conninfo: str, *payloads: str) -> list[int]:
    async with triojobs.open_client(conninfo) as client:
        return await client.enqueue_many(plain, payloads)


# Signals.


@pytest.mark.parametrize("number", BOTH)
async def test_the_first_signal_lets_handlers_end_and_claims_no_more(conninfo: str, number: int) -> None:
    with serving(conninfo) as process:
        (job_id,) = await enqueue(conninfo, "asks")
        await process.says("up", "started")
        process.send(number)
        await process.says("stopping")
        (waits,) = await enqueue(conninfo, "asks")
        process.write_line()
        await process.says("left 1 0", "after")
        process.write_line()
        assert await process.ends() == (0, "")
    assert outcomes(conninfo, job_id) == [(1, "done")]
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(waits, 0)]


@pytest.mark.parametrize("number", BOTH)
async def test_the_first_signal_cancels_handlers_after_the_grace_period(conninfo: str, number: int) -> None:
    with serving(conninfo, grace_period=0.1) as process:
        (job_id,) = await enqueue(conninfo, "sleeps")
        await process.says("up", "started")
        process.send(number)
        await process.says("stopping", "cancelled", "left 0 1", "after")
        process.write_line()
        status, errors = await process.ends()
    assert status == 0
    assert "did not end within grace_period" in errors
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


@pytest.mark.parametrize(("first", "second"), [BOTH, BOTH[::-1], (signal.SIGINT, signal.SIGINT)])
async def test_the_second_signal_cancels_handlers_at_once(conninfo: str, first: int, second: int) -> None:
    with serving(conninfo) as process:
        (job_id,) = await enqueue(conninfo, "sleeps")
        await process.says("up", "started")
        process.send(first)
        await process.says("stopping")
        process.send(second)
        await process.says("cancelled", "left 0 1", "after")
        process.write_line()
        assert await process.ends() == (0, "")
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]
    assert rows(conninfo, "SELECT FROM triojobs.worker_groups WHERE closed_at IS NULL") == []


@pytest.mark.parametrize("third", BOTH)
async def test_the_third_signal_ends_the_process_as_that_signal_does(conninfo: str, third: int) -> None:
    with serving(conninfo) as process:
        (job_id,) = await enqueue(conninfo, "shields")
        await process.says("up", "started")
        process.send(signal.SIGTERM)
        await process.says("stopping")
        process.send(signal.SIGINT)
        await process.says("cancelled")
        process.send(third)
        assert await process.ends() == (-third, "")
    assert rows(conninfo, "SELECT id FROM triojobs.leases") == [(job_id,)]  # for a rescuer


async def test_a_process_whose_loop_is_blocked_ends_when_somebody_insists(conninfo: str) -> None:
    with serving(conninfo) as process:
        await enqueue(conninfo, "blocks")
        await process.says("up", "started")
        await process.is_killed_by(signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
async def test_a_signal_while_the_group_is_being_opened_stops_it_as_soon_as_it_is_open(
    conninfo: str, number: int
) -> None:
    (job_id,) = await enqueue(conninfo, "sleeps")
    with locked(conninfo, "LOCK TABLE triojobs.migrations") as gate, serving(conninfo) as process:
        await process.says("up")
        await blocked(conninfo, "client")
        process.send(number)
        gate.rollback()
        words = await process.says_until("after")
        process.write_line()
        assert await process.ends() == (0, "")
    assert words[0] == "stopping"
    assert "started" not in words
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


async def test_a_process_that_is_still_opening_ends_when_somebody_insists(conninfo: str) -> None:
    with locked(conninfo, "LOCK TABLE triojobs.migrations"), serving(conninfo) as process:
        await process.says("up")
        await blocked(conninfo, "client")
        await process.is_killed_by(signal.SIGTERM)


async def test_after_serve_ctrl_c_is_pythons_again(conninfo: str) -> None:
    with serving(conninfo) as process:
        await process.says("up")
        await until(conninfo, "SELECT count(*) = 1 FROM triojobs.worker_groups")
        process.send(signal.SIGTERM)
        await process.says("stopping", "left 0 0", "after")
        process.send(signal.SIGINT)
        status, errors = await process.ends()
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in errors


async def test_a_handler_that_exits_ends_the_program_with_its_status(conninfo: str) -> None:
    with serving(conninfo, program=BARE) as process:
        (other,) = await enqueue(conninfo, "sleeps")
        await process.says("up", "started")
        (exits,) = await enqueue(conninfo, "exits")
        await process.says("started", "cancelled")
        status, _ = await process.ends()
    assert status == 3
    assert outcomes(conninfo, exits) == [(1, "failed")]
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(other, 0)]


# In a program.


async def no_op(job: triojobs.Job[Any]) -> str:
    return "done"


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in BOTH]


async def test_nursery_start_returns_the_open_group_whose_stop_ends_it(conninfo: str) -> None:
    before = handlers()
    reports: list[triojobs.ShutdownReport] = []

    async def serve(*, task_status: Any) -> None:
        workers = [triojobs.Worker(plain, no_op)]
        reports.append(await triojobs.serve(conninfo, workers, task_status=task_status, name="served"))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            group = await nursery.start(serve)
            assert isinstance(group, triojobs.WorkerGroup)
            assert group.name == "served"
            assert await group.client.result(await group.client.enqueue(plain, None)) == "done"
            assert handlers() != before
            group.stop()
    assert reports == [group.report]
    assert reports[0].settled["done"] == 1
    assert handlers() == before


@pytest.mark.parametrize("number", BOTH)
async def test_a_signal_in_the_program_itself_ends_it_without_an_exception(
    conninfo: str, number: int
) -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            serve = partial(triojobs.serve, conninfo, [triojobs.Worker(plain, no_op)])
            group = await nursery.start(serve)
            signal.raise_signal(number)
    assert group.report.group_ids == (group.group_id,)


async def test_a_cancel_from_outside_is_passed_on_and_the_rows_go_back(conninfo: str) -> None:
    before = handlers()
    started = trio.Event()

    async def sleep(job: triojobs.Job[Any]) -> None:
        started.set()
        await trio.sleep_forever()

    (job_id,) = await enqueue(conninfo, "x")
    with trio.fail_after(30), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(triojobs.serve, conninfo, [triojobs.Worker(plain, sleep)])
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert handlers() == before
    assert rows(conninfo, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


def test_outside_of_the_main_thread_it_is_refused_with_what_to_do_instead(conninfo: str) -> None:
    caught: list[BaseException] = []

    def in_thread() -> None:
        try:
            trio.run(triojobs.serve, conninfo, [triojobs.Worker(plain, no_op)])
        except BaseException as exc:
            caught.append(exc)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join(30)
    (error,) = caught
    assert isinstance(error, RuntimeError)
    assert "open_worker_group" in str(error)
    assert places(conninfo) == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"grace_period": -1.0}, triojobs.OptionError),
        ({"lease_margin": 99.0}, triojobs.OptionError),
        ({"no_such_option": 1}, TypeError),
    ],
)
async def test_a_refused_option_comes_bare_and_leaves_the_signals_alone(
    conninfo: str, options: dict[str, Any], error: type[Exception]
) -> None:
    before = handlers()
    with pytest.raises(error) as caught:
        await triojobs.serve(conninfo, [triojobs.Worker(plain, no_op)], **options)
    assert next(iter(options)) in str(caught.value)
    assert handlers() == before
    with pytest.raises(triojobs.OptionError, match="workers"):
        await triojobs.serve(conninfo, [])


async def test_a_server_out_of_reach_at_start_comes_bare() -> None:
    before = handlers()
    with trio.fail_after(30), pytest.raises(triojobs.DatabaseError) as caught:
        await triojobs.serve("host=127.0.0.1 port=1 user=x dbname=x", [triojobs.Worker(plain, no_op)])
    assert caught.value.transient
    assert handlers() == before


async def test_an_error_that_ends_the_group_comes_bare(conninfo: str) -> None:
    async def exits(job: triojobs.Job[Any]) -> None:
        raise SystemExit(3)

    await enqueue(conninfo, "x")
    with trio.fail_after(30), pytest.raises(SystemExit) as caught:
        await triojobs.serve(conninfo, [triojobs.Worker(plain, exits)])
    assert caught.value.code == 3
