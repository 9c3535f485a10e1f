"""Middleware runs around handlers, where they do, and what it does counts as theirs."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from triojobs import testing

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


def noting(notes: list[str], name: str) -> triojobs.Middleware:
    async def middleware(job: triojobs.Job[Any], next_step: triojobs.NextStep) -> Any:
        notes.append(f"{name} in {job.payload}")
        try:
            return await next_step(job)
        finally:
            notes.append(f"{name} out")

    return middleware


async def run(worker: triojobs.Worker[Any, Any], *payloads: Any, **options: Any) -> list[Any]:
    """Run jobs through a group in memory; return what became of them."""
    database = testing.MemoryDatabase()
    async with testing.open_memory_client(database) as client:
        ids = await client.enqueue_many(plain, list(payloads))
        await testing.drain(database, [worker], **options)
        return [await client.get(job_id) for job_id in ids]


@pytest.mark.parametrize("isolation", ["slot", "task"])
async def test_the_groups_is_outside_of_the_workers_and_the_first_is_outermost(isolation: Any) -> None:
    notes: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        notes.append("handler")
        return "result"

    worker = triojobs.Worker(plain, handler, middleware=[noting(notes, "c"), noting(notes, "d")])
    group = [noting(notes, "a"), noting(notes, "b")]
    (info,) = await run(worker, 1, middleware=group, isolation=isolation)
    assert notes == ["a in 1", "b in 1", "c in 1", "d in 1", "handler", "d out", "c out", "b out", "a out"]
    assert (info.status, info.result) == ("done", "result")


async def test_what_it_raises_and_returns_counts_as_the_handlers(autojump_clock: Any) -> None:
    calls: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        calls.append(job.payload)
        return "of the handler"

    async def decide(job: triojobs.Job[Any], next_step: triojobs.NextStep) -> Any:
        if job.payload == 1:
            raise triojobs.Kill("not today")
        if job.payload == 2 and job.attempt == 1:
            raise ValueError("the first attempt fails")
        if job.payload == 3:
            return "without the handler"
        return f"{await next_step(job)}, wrapped"

    worker = triojobs.Worker(plain, handler, middleware=[decide])
    killed, retried, short, whole = await run(worker, 1, 2, 3, 4)
    assert (killed.status, killed.error) == ("killed", "not today")
    assert (retried.status, retried.attempts, retried.result) == ("done", 2, "of the handler, wrapped")
    assert short.result == "without the handler"
    assert whole.result == "of the handler, wrapped"
    assert sorted(calls) == [2, 4]


async def test_it_runs_under_the_jobs_timeout_and_sees_its_cancel(autojump_clock: Any) -> None:
    seen: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        await trio.sleep_forever()

    async def watch(job: triojobs.Job[Any], next_step: triojobs.NextStep) -> Any:
        try:
            return await next_step(job)
        except trio.Cancelled:
            seen.append("cancelled")
            raise

    worker = triojobs.Worker(plain, handler, timeout=2.0, middleware=[watch])
    (info,) = await run(worker, triojobs.NewJob(1, max_attempts=1))
    assert seen == ["cancelled"]
    assert (info.status, info.error) == ("killed", "timed out after 2 s")


async def test_its_context_variables_reach_the_handler_and_no_other_job() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")
    seen: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> None:
        seen.append(variable.get())

    async def set_it(job: triojobs.Job[Any], next_step: triojobs.NextStep) -> Any:
        assert variable.get() == "clean"
        variable.set(f"of {job.payload}")
        return await next_step(job)

    await run(triojobs.Worker(plain, handler, concurrency=1, middleware=[set_it]), 1, 2, 3)
    assert seen == ["of 1", "of 2", "of 3"]


def test_what_is_no_middleware_is_refused() -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    def generator(job: Any, next_step: Any) -> Any:
        yield

    for wrong in ([generator], ["text"], "text", [None]):
        with pytest.raises(triojobs.OptionError, match="the next step"):
            triojobs.Worker(plain, handler, middleware=wrong)  # type: ignore[arg-type]
        with pytest.raises(triojobs.OptionError, match="the next step"):
            triojobs.open_worker_group("", [triojobs.Worker(plain, handler)], middleware=wrong)  # type: ignore[arg-type]


async def test_a_made_up_job_goes_through_its_workers_middleware() -> None:
    notes: list[str] = []

    async def handler(job: triojobs.Job[Any]) -> None: ...

    await testing.run_handler(triojobs.Worker(plain, handler, middleware=[noting(notes, "m")]), 7)
    assert notes == ["m in 7", "m out"]
