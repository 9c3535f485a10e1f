"""Rows 32 to 34, 36, 37, 50: handlers that do not obey, raise at the wrong time, or return nonsense."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.looking import rows, until, value
from triojobs import _stubborn

from .processes import WorkerProcess
from .rig import (
    AT_ONCE,
    SHORT,
    Figures,
    Journal,
    logged,
    outcomes,
    plain,
    rescue_bound,
    running,
    wait_until,
    waiting,
)

Start = Callable[..., WorkerProcess]
BRIEF: dict[str, Any] = SHORT | {"lease_duration": 2.0, "lease_margin": 0.5, "beat_interval": 0.3}


@pytest.mark.parametrize("how", ["swallows", "shields"])
async def test_row_32_a_handler_swallows_or_shields_its_cancellation(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """For longer than the lease, and somebody looks for dead groups: the beats go on until it ends."""
    monkeypatch.setattr(_stubborn, "STUBBORN_INTERVAL", 0.5)
    began, go_on = trio.Event(), trio.Event()

    async def stubborn(job: triojobs.Job[Any]) -> int:
        began.set()
        if how == "shields":
            with trio.CancelScope(shield=True):
                await go_on.wait()
        while not go_on.is_set():
            with trio.move_on_after(0.05, shield=True):
                await go_on.wait()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled:
                continue  # the fault
        return job.attempt

    rival = Journal()
    left = trio.Event()

    async def live() -> None:
        with scope:
            async with triojobs.open_worker_group(
                conninfo, [triojobs.Worker(plain, stubborn)], **BRIEF
            ) as group:
                groups.append(group)
                await trio.sleep_forever()
        left.set()

    scope = trio.CancelScope()
    groups: list[triojobs.WorkerGroup] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await wait_until(lambda: groups)
        job_id = await groups[0].client.enqueue(plain, None)
        await began.wait()
        async with triojobs.open_worker_group(conninfo, [rival.worker()], **BRIEF):
            scope.cancel()
            lease = "SELECT lease_until FROM triojobs.worker_groups WHERE id = %s"
            cancelled = value(conninfo, lease, groups[0].group_id)
            await until(conninfo, "SELECT clock_timestamp() > %s", cancelled)  # that lease would be over
            await until(conninfo, "SELECT lease_until > %s + interval '0.5 s' FROM triojobs.worker_groups"
                        " WHERE id = %s", cancelled, groups[0].group_id)  # fmt: skip
            await wait_until(lambda: logged(caplog, "handler_does_not_end"))
            assert rows(conninfo, "SELECT id FROM triojobs.leases") == [(job_id,)]
            assert not left.is_set()
            go_on.set()
            with trio.fail_after(30):
                await left.wait()
    assert "in stubborn" in logged(caplog, "handler_does_not_end")[0].getMessage()
    assert rival.began == []
    assert outcomes(conninfo) == [(1, "done")]  # it returned in the end, and that counts
    assert groups[0].report.settled["done"] == 1
    assert running(conninfo) == 0


async def test_row_33_a_handler_never_ends(conninfo: str, worker: Start, figures: Figures) -> None:
    """The group waits, keeps the lease and logs the stack; in the end `hard_stop` ends the process."""
    rival = Journal()
    options = BRIEF | {"hard_stop_after": 3.0}
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(plain, "stubborn")
        process = worker(conninfo, options=options, stubborn_interval=0.5, hard_stop=True)
        await trio.to_thread.run_sync(lambda: process.wait_for("began"))
        async with triojobs.open_worker_group(conninfo, [rival.worker()], **BRIEF) as group:
            sent = process.send(signal.SIGINT)
            reported = await trio.to_thread.run_sync(
                lambda: process.wait_for("log", name="handler_does_not_end", count=2)
            )
            assert "in do\n    await trio.sleep_forever()" in reported["text"]
            stop = await trio.to_thread.run_sync(lambda: process.wait_for("hard_stop"))
            assert (stop["reason"], stop["jobs"]) == ("handler", [job_id])
            assert rival.began == []
            assert await trio.to_thread.run_sync(process.wait) == 70
            figures.note("hard stop", stop["at"] - sent, at_most=options["hard_stop_after"] + 1.0)
            ended = time.monotonic()
            with trio.fail_after(30):
                assert await client.result(job_id) == 2
            figures.note("job back", time.monotonic() - ended, at_most=rescue_bound(BRIEF) + 1.0)
            assert group.statistics().rescued == 1
    assert outcomes(conninfo) == [(1, "failed"), (2, "done")]
    assert running(conninfo) == 0


async def test_row_34_a_handler_raises_while_it_is_being_cancelled(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By itself and out of a nursery, when the lease is lost in an outage: the group lives on."""
    began: list[tuple[str, int]] = []

    async def fail() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("from a child")

    async def handler(job: triojobs.Job[Any]) -> int:
        began.append((job.payload, job.attempt))
        if began.count((job.payload, 1)) > 1:
            return job.attempt
        if job.payload == "nursery":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(trio.sleep_forever)
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("while being cancelled")

    with fault_proxy(conninfo) as (proxy, through):
        worker = triojobs.Worker(plain, handler)
        async with triojobs.open_worker_group(through, [worker], **BRIEF) as group:
            ids = await group.client.enqueue_many(plain, ["alone", "nursery"])
            await wait_until(lambda: len(began) == 2)
            proxy.cut()
            await wait_until(lambda: not group.statistics().running)
            proxy.heal()
            with trio.fail_after(30):
                async with triojobs.open_client(conninfo) as client:
                    assert [await client.result(job_id) for job_id in ids] == [1, 1]  # refunded
            assert group.statistics().registrations == 2
    assert group.report.released == 2
    assert outcomes(conninfo) == [(1, "done")] * 2
    texts = " ".join(record.getMessage() for record in logged(caplog, "error_aside"))
    assert len(logged(caplog, "error_aside")) == 2
    assert "KeyError: 'while being cancelled'" in texts
    assert "ValueError: from a child" in texts
    assert running(conninfo) == 0


async def test_row_36_results_that_cannot_be_written_and_payloads_that_cannot_be_read(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> Any:
        return object() if job.payload == "nonsense" else "fine"

    worker = triojobs.Worker(plain, handler, retry=AT_ONCE)
    async with triojobs.open_worker_group(conninfo, [worker], **SHORT) as group:
        unreadable = value(conninfo, "SELECT nextval('triojobs.job_ids')")
        insert = "SELECT triojobs.insert_job(%s, 'plain', %s, 'cbor', NULL, '{}', 0, 5, NULL, NULL, now())"
        rows(conninfo, insert, unreadable, b"\xff\xff")
        nonsense = await group.client.enqueue(plain, "nonsense", max_attempts=2)
        healthy = await group.client.enqueue(plain, "healthy")
        with trio.fail_after(30):
            with pytest.raises(triojobs.JobFailedError, match="result is <object object") as caught:
                await group.client.result(nonsense)
            assert caught.value.attempts == 2  # a failed attempt, as another version may do better
            with pytest.raises(triojobs.JobFailedError, match="the payload cannot be read") as caught:
                await group.client.result(unreadable)
            assert caught.value.attempts == 1  # these bytes will never be a payload
            assert await group.client.result(healthy) == "fine"
            assert group.statistics().registrations == 1
    assert running(conninfo) == 0


async def test_row_37_error_texts_that_are_huge_or_hold_nul(conninfo: str) -> None:
    async def handler(job: triojobs.Job[Any]) -> None:
        raise ValueError(job.payload * 10_000)

    worker = triojobs.Worker(plain, handler)
    async with triojobs.open_worker_group(conninfo, [worker], **SHORT) as group:
        texts = ("a\0é", "😀")
        ids = await group.client.enqueue_many(plain, [triojobs.NewJob(t, max_attempts=1) for t in texts])
        with trio.fail_after(30):
            async with group.client.as_completed(ids) as completions:
                infos = [info async for info in completions]
        assert group.statistics().settled == 2
    for info in infos:
        assert info.status == "killed"
        assert info.error is not None
        assert 8000 < len(info.error.encode()) <= 8192
        assert info.error.startswith("ValueError: ")
        assert info.error.endswith("…[truncated]")
        assert "\0" not in info.error


class Treacherous(logging.Handler):
    """A user's log handler that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.events: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.events.add(getattr(record, "event", ""))
        raise RuntimeError(f"the log is full: {record.getMessage()}")

    def __enter__(self) -> Treacherous:
        logging.getLogger("triojobs").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("triojobs").removeHandler(self)


class Moody:
    """A user's codec that raises whatever it likes."""

    name = "moody"
    changed = False  # its mind: it no longer reads what it wrote

    def encode(self, value: Any) -> bytes:
        if value == "unencodable":
            raise ZeroDivisionError("while encoding")
        return str(value).encode()

    def decode(self, data: bytes, type: Any) -> Any:
        if self.changed and data == b"undecodable":
            raise ZeroDivisionError("while decoding")
        return data.decode()


async def test_row_50_the_users_log_handler_and_codec_raise(conninfo: str) -> None:
    codec = Moody()
    moody: triojobs.Queue[Any, Any] = triojobs.Queue("moody", codec=codec)
    started = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> Any:
        match job.payload:
            case "raises late":
                started.set()
                try:
                    await trio.sleep_forever()
                finally:
                    raise KeyError("while being cancelled")
            case "returns nonsense":
                return "unencodable"
        return "fine"

    async with triojobs.open_client(conninfo) as client:
        bad = await client.enqueue_many(
            moody, [triojobs.NewJob(p, max_attempts=1) for p in ("undecodable", "returns nonsense")]
        )
    codec.changed = True
    with fault_proxy(conninfo) as (proxy, through), Treacherous() as log:
        workers = [triojobs.Worker(queue, handler, retry=AT_ONCE) for queue in (plain, moody)]
        async with triojobs.open_worker_group(through, workers, **BRIEF) as group:
            for job_id, where in zip(bad, ("while decoding", "while encoding"), strict=True):
                with trio.fail_after(30), pytest.raises(triojobs.JobFailedError, match=where):
                    await group.client.result(job_id)
            late = await group.client.enqueue(plain, "raises late")
            with trio.fail_after(30):
                await started.wait()
            # An outage: nearly everything that may be logged is.
            proxy.cut()
            await wait_until(lambda: not group.statistics().running)
            await wait_until(lambda: {"beat_failed", "claim_failed", "listen_failed"} <= log.events)
            proxy.heal()
            await wait_until(lambda: group.statistics().registrations == 2)
            with trio.fail_after(30):
                async with triojobs.open_client(conninfo) as client:
                    healthy = [await client.enqueue(queue, "fine") for queue in (plain, moody)]
                    assert [await client.result(job_id) for job_id in healthy] == ["fine", b"fine"]
        assert {"error_aside", "registered_again"} <= log.events
    assert running(conninfo) == 0
    assert waiting(conninfo) == {late: 0}
