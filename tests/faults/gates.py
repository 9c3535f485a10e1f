"""Gates: one of our statements is stopped at a point, in a thread or on the loop, until the test has done its part."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

import pytest
import trio

from triojobs import _bridge
from triojobs._bridge import Call
from triojobs._sql import claim as claim_sql
from triojobs._sql import settle as settle_sql
from triojobs._sql.exchange import Ready

from .rig import PATIENCE

BEFORE, COMMITTED, RETURNING = POINTS = ("before the statement", "committed", "before its return")

CLAIM = ((claim_sql.Asked, "claim"), (claim_sql.Asked, "now"))
SETTLE = ((settle_sql, "settle"), (settle_sql, "settle_done"))


def every(*args: Any, **options: Any) -> bool:
    """Choose each call."""
    return True


class StatementGate:
    """Stops who executes a statement, once, at a point of `POINTS`.

    Args:
        statements: the functions of `triojobs._sql` that execute it, as owner and name; one that is a generator
            runs on the loop. which: whether to stop this call of it.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *statements: tuple[Any, str],
        point: str,
        which: Callable[..., bool] = every,
    ) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self._point: str | None = point
        self._chosen: Any = None  # the thread, or task, whose call was chosen
        for owner, name in statements:
            original = getattr(owner, name)
            wrapped = self._on_loop if inspect.isgeneratorfunction(original) else self._in_thread
            patch.setattr(owner, name, wrapped(original, which))
        finish, reached = Call.finish, _bridge.reached_on_loop

        def finishing(call: Call) -> None:
            finish(call)  # the ledger knows; the thread has yet to return
            if threading.get_ident() == self._chosen:
                self._stop(RETURNING)

        async def reaching(operation: str, point: str) -> None:
            await reached(operation, point)
            if point == "committed" and trio.lowlevel.current_task() is self._chosen:
                while self._is_closed(RETURNING):
                    await trio.lowlevel.checkpoint()
                self._point = None

        patch.setattr(Call, "finish", finishing)
        patch.setattr(_bridge, "reached_on_loop", reaching)

    def _in_thread(self, original: Callable[..., Any], which: Callable[..., bool]) -> Callable[..., Any]:
        @wraps(original)
        def statement(*args: Any, **options: Any) -> Any:
            chosen = self._chosen is None and self._point is not None and which(*args, **options)
            if chosen:
                self._chosen = threading.get_ident()
                self._stop(BEFORE)
            result = original(*args, **options)
            if chosen:
                self._stop(COMMITTED)
            return result

        return statement

    def _on_loop(self, original: Callable[..., Any], which: Callable[..., bool]) -> Callable[..., Any]:
        @wraps(original)
        def statement(*args: Any, **options: Any) -> Generator[Ready, None, Any]:
            chosen = self._chosen is None and self._point is not None and which(*args, **options)
            if chosen:
                self._chosen = trio.lowlevel.current_task()
                yield from self._wait(BEFORE)
            result = yield from original(*args, **options)
            if chosen:
                yield from self._wait(COMMITTED)
            return result

        return statement

    def _is_closed(self, at: str) -> bool:
        if self._point != at:
            return False
        self.reached.set()
        return not self.open.is_set()

    def _wait(self, at: str) -> Generator[Ready, None, None]:
        while self._is_closed(at):
            yield Ready.WRITABLE  # which it is: the others have their turn, and we look again

    def _stop(self, at: str) -> None:
        if self._is_closed(at):
            assert self.open.wait(PATIENCE)
