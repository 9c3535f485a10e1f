"""Gates: somebody is stopped at a named point, and goes on when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import trio

T = TypeVar("T")
PATIENCE = 60.0  # seconds for what takes milliseconds; only a hang needs them


class Gate:
    """Stops tasks at one point until it is opened."""

    def __init__(self) -> None:
        self._reached = trio.Event()
        self._open = trio.Event()

    async def pass_through(self) -> None:
        """Report that somebody is here, and wait until the gate is open."""
        self._reached.set()
        with trio.fail_after(PATIENCE):
            await self._open.wait()

    async def reached(self) -> None:
        """Wait until a task stands before the gate, or has passed it."""
        with trio.fail_after(PATIENCE):
            await self._reached.wait()

    def open(self) -> None:
        """Let everybody through from now on."""
        self._open.set()


class ThreadGate:
    """Stops threads at one point until it is opened. Made in a Trio task; `pass_through` is for threads."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._reached = trio.Event()
        self._open = threading.Event()

    def pass_through(self) -> None:
        """Report that somebody is here, and wait until the gate is open."""
        self._token.run_sync_soon(self._reached.set)
        assert self._open.wait(PATIENCE), "nobody opened the gate"

    async def reached(self) -> None:
        """Wait until a thread stands before the gate, or has passed it."""
        with trio.fail_after(PATIENCE):
            await self._reached.wait()

    def open(self) -> None:
        """Let everybody through from now on."""
        self._open.set()

    def before(self, fn: Callable[..., T], *, call: int = 1) -> Callable[..., T]:
        """Return `fn` with this gate before its n-th call."""
        return self._wrapped(fn, call, after=False)

    def after(self, fn: Callable[..., T], *, call: int = 1) -> Callable[..., T]:
        """Return `fn` with this gate between the end and the return of its n-th call."""
        return self._wrapped(fn, call, after=True)

    def _wrapped(self, fn: Callable[..., T], call: int, *, after: bool) -> Callable[..., T]:
        calls = 0

        def gated(*args: Any, **kwargs: Any) -> T:
            nonlocal calls
            calls += 1
            mine = calls == call
            if mine and not after:
                self.pass_through()
            result = fn(*args, **kwargs)
            if mine and after:
                self.pass_through()
            return result

        return gated
