"""Do something before a given step of the event loop, counted from where a test arms it."""

from __future__ import annotations

import signal
from collections.abc import Callable

import trio


def ctrl_c() -> None:
    """Send SIGINT to this process."""
    signal.raise_signal(signal.SIGINT)


def hear_ctrl_c() -> None:
    """Let SIGINT be KeyboardInterrupt, also where a shell started this in the background and it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Shot(trio.abc.Instrument):
    """Calls `fire` once, before step number `k` of those that begin while it is `armed`."""

    def __init__(self, k: int, fire: Callable[[], None] = ctrl_c) -> None:
        self._left = k
        self._fire = fire
        self.armed = False
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.armed and not self.fired:
            self._left -= 1
            if self._left < 0:
                self.fired = True
                self._fire()
