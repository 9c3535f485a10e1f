"""`testing.explore`: handlers that keep their promise under every cancel, and those that do not."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import trio

import triojobs
from triojobs import testing

queue: triojobs.Queue[str, str] = triojobs.Queue("explored", str, result=str)
SENT: list[str] = []


def once(run: testing.Explored[str]) -> None:
    assert len(SENT) == 1, f"sent {len(SENT)} times"


async def sends_then_waits(job: triojobs.Job[str]) -> str:
    SENT.append(job.payload)
    await trio.sleep(1)
    return "sent"


async def waits_then_sends(job: triojobs.Job[str]) -> str:
    await trio.sleep(1)
    SENT.append(job.payload)  # no checkpoint follows, so a cancel cannot come in between
    return "sent"


async def commits(job: triojobs.Job[str]) -> str:
    await trio.sleep(1)

    def work(transaction: Any) -> str:
        transaction.writes.append(job.payload)
        return "sent"

    sent = await job.commit(work)
    await trio.sleep(1)  # a cancel here changes nothing any more
    return sent


@dataclass(frozen=True)
class Letter:
    to: str


async def test_inside_trio_it_says_where_to_call_it() -> None:
    with pytest.raises(triojobs.TriojobsError, match="synchronous test"):
        testing.explore(triojobs.Worker(queue, waits_then_sends), "ada")


def test_a_handler_that_is_safe_passes_and_was_really_cancelled() -> None:
    done = testing.explore(
        triojobs.Worker(queue, waits_then_sends), "ada", before=SENT.clear, check=once, seeds=2
    )
    assert done.cancelled > 2
    assert done.runs > done.cancelled


def test_a_handler_alone_gets_a_queue_of_its_payloads_class() -> None:
    seen: list[object] = []

    async def handler(job: triojobs.Job[Letter]) -> None:
        await trio.sleep(1)
        seen.append(job.payload)

    done = testing.explore(handler, Letter("ada"), before=seen.clear)
    assert done.cancelled > 1
    assert seen == [Letter("ada")]


def test_what_is_no_handler_is_refused() -> None:
    with pytest.raises(triojobs.OptionError, match="worker is 'handler', but must be"):
        testing.explore("handler", "ada")  # type: ignore[arg-type]


def test_a_handler_that_doubles_its_effect_is_found_and_the_run_can_be_repeated() -> None:
    worker = triojobs.Worker(queue, sends_then_waits)
    with pytest.raises(testing.ExplorationError, match="sent 2 times") as caught:
        testing.explore(worker, "ada", before=SENT.clear, check=once)
    found = caught.value
    with pytest.raises(testing.ExplorationError, match="sent 2 times") as again:
        testing.explore(worker, "ada", before=SENT.clear, check=once, only=(found.seed, found.k))
    assert str(again.value) == str(found)
    assert f"only=({found.seed}, {found.k})" in str(found)


def test_a_commit_writes_once_wherever_the_cancel_comes() -> None:
    def check(run: testing.Explored[str]) -> None:
        assert (run.writes, run.job.status, run.result) == (["ada"], "done", "sent")

    done = testing.explore(triojobs.Worker(queue, commits), "ada", check=check)
    assert done.cancelled > 5


def test_a_handler_that_fails_first_keeps_its_attempts_exact() -> None:
    async def handler(job: triojobs.Job[str]) -> str:
        await trio.sleep(0.1)
        if job.attempt == 1:
            raise ConnectionError
        return "second"

    def check(run: testing.Explored[str]) -> None:
        assert (run.result, run.job.attempts) == ("second", 2)

    assert testing.explore(triojobs.Worker(queue, handler), "ada", check=check).cancelled


def test_a_handler_that_swallows_the_cancel_is_done_and_not_called_again() -> None:
    async def handler(job: triojobs.Job[str]) -> str:
        with trio.move_on_after(1):
            await trio.sleep_forever()
        with trio.CancelScope(shield=True):
            await trio.sleep(0.5)
        return "clean"

    testing.explore(triojobs.Worker(queue, handler), "ada")


def test_a_handler_that_kills_the_group_is_told_with_its_error() -> None:
    class OwnError(BaseException):
        pass

    async def handler(job: triojobs.Job[str]) -> str:
        raise OwnError

    with pytest.raises(OwnError):
        testing.explore(triojobs.Worker(queue, handler), "ada")


def test_a_job_that_never_ends_is_told() -> None:
    async def handler(job: triojobs.Job[str]) -> str:
        raise triojobs.Snooze(3600)

    with pytest.raises(testing.ExplorationError, match="did not end"):
        testing.explore(triojobs.Worker(queue, handler), "ada", only=(0, 5))


def test_job_options_are_those_of_enqueue_and_are_checked_before_any_run() -> None:
    async def handler(job: triojobs.Job[str]) -> str:
        return f"{job.key} {job.max_attempts}"

    def check(run: testing.Explored[str]) -> None:
        assert run.result == "k 2"

    testing.explore(triojobs.Worker(queue, handler), "ada", key="k", max_attempts=2, check=check)
    with pytest.raises(triojobs.OptionError, match="priority"):
        testing.explore(triojobs.Worker(queue, handler), "ada", priority=-1)


def test_trio_still_has_the_switches_that_make_runs_repeatable() -> None:
    from trio._core import _run

    assert isinstance(_run._ALLOW_DETERMINISTIC_SCHEDULING, bool)
    assert isinstance(_run._r, random.Random)
