"""Gates in threads: one of our statements is stopped at a point, until the test has done what it wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from triojobs._bridge import Call

from .rig import PATIENCE

BEFORE, COMMITTED, RETURNING = POINTS = ("before the statement", "committed", "before its return")


def every(*args: Any, **options: Any) -> bool:
    """Choose each call."""
    return True


class ThreadGate:
    """Stops the thread that executes a statement, once, at a point of `POINTS`.

    Args:
        module, name: the function of `triojobs._sql` that executes it. which: whether to stop this call
            of it.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        module: Any,
        name: str,
        point: str,
        *,
        which: Callable[..., bool] = every,
    ) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self._point: str | None = point
        self._chosen: int | None = None  # the thread whose call was chosen
        original, finish = getattr(module, name), Call.finish

        def statement(*args: Any, **options: Any) -> Any:
            chosen = self._point is not None and which(*args, **options)
            if chosen:
                self._stop(BEFORE)
            result = original(*args, **options)
            if chosen:
                self._stop(COMMITTED)
                self._chosen = threading.get_ident()
            return result

        def finishing(call: Call) -> None:
            finish(call)  # the ledger knows; the thread has yet to return
            if threading.get_ident() == self._chosen:
                self._stop(RETURNING)

        patch.setattr(module, name, statement)
        patch.setattr(Call, "finish", finishing)

    def _stop(self, at: str) -> None:
        if self._point == at:
            self._point = None
            self.reached.set()
            assert self.open.wait(PATIENCE)
