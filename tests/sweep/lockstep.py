"""Code that blocks, in a real thread that never runs at the same time as the event loop.

The thread has the floor from its start to its first blocking call, which becomes a question that its
Trio task answers in virtual time; then it has the floor again. So the production code of
`enqueue_from_thread` runs unchanged in a foreign thread, and every run can be repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import outcome
import trio

T = TypeVar("T")
Question = Callable[[], Awaitable[Any]]


class LockstepThread(threading.Thread):
    """Runs `fn`; the loop and this thread hand the floor to each other."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        super().__init__(name="lockstep", daemon=True)
        self.result: outcome.Outcome[Any]
        self._fn = fn
        self._question: Question | None = None
        self._answer: outcome.Outcome[Any] = outcome.Value(None)
        self._thread_may_go = threading.Semaphore(0)
        self._loop_may_go = threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self._thread_may_go.acquire()
        self.result = outcome.capture(self._fn)
        self._question = None
        self._loop_may_go.release()

    def go_on(self, answer: outcome.Outcome[Any] | None = None) -> Question | None:
        """On the loop: give the thread the floor until its next question; None: it has ended."""
        self._answer = outcome.Value(None) if answer is None else answer
        self._thread_may_go.release()
        self._loop_may_go.acquire()
        return self._question

    def ask(self, question: Question) -> Any:
        """In the thread: have the loop answer."""
        self._question = question
        self._loop_may_go.release()
        self._thread_may_go.acquire()
        return self._answer.unwrap()


async def run_lockstep(fn: Callable[[], T]) -> T:
    """Run `fn`, which may block on what `determinism` patches, in a thread of its own; to its end.

    Like `trio.to_thread.run_sync`: not abandoned, whatever is cancelled.
    """
    thread = LockstepThread(fn)
    question = thread.go_on()
    while question is not None:
        question = thread.go_on(await outcome.acapture(question))
    thread.join()
    result: T = thread.result.unwrap()
    return result


class LockstepEvent:
    """triojobs._flusher.ThreadEvent for a lockstep thread; set on the loop."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        self._event.set()

    def wait(self, timeout: float | None = None) -> bool:
        return bool(_ask(partial(self._wait, timeout)))

    async def _wait(self, timeout: float | None) -> bool:
        with trio.CancelScope(shield=True) as scope:
            if timeout is not None:
                scope.deadline = trio.current_time() + timeout
            await self._event.wait()
        return self._event.is_set()


def monotonic() -> float:
    """time.monotonic on the virtual clock."""
    return float(_ask(_now))


def check_cancelled() -> None:
    """trio.from_thread.check_cancelled for a lockstep thread."""
    _ask(trio.lowlevel.checkpoint_if_cancelled)


def _ask(question: Question) -> Any:
    thread = threading.current_thread()
    assert isinstance(thread, LockstepThread)
    return thread.ask(question)


async def _now() -> float:
    return trio.current_time()
