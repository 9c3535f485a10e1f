"""A worker group under a program's signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Unpack

import trio

from ._group import WorkerGroup
from ._health import notify_systemd
from ._model import ShutdownReport
from ._open import GroupKeywords, open_worker_group
from ._queue import Worker

__all__ = ["serve"]

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


async def serve(
    conninfo: str,
    workers: Sequence[Worker[Any, Any]],
    *,
    task_status: trio.TaskStatus[WorkerGroup] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[GroupKeywords],
) -> ShutdownReport:
    """Run a worker group until SIGTERM or SIGINT; return its report.

    The first signal stops gracefully, the second cancels the handlers, the third ends the process at
    once as that signal does by default, even when a handler blocks the event loop. A group that is still
    being opened is stopped as soon as it is open; it starts nothing. Usable with `nursery.start`, which
    returns the open group. Under systemd (``Type=notify``, ``WatchdogSec=``) it says when it is ready, that it lives,
    and when it stops.

    Args:
        options: those of `open_worker_group`.

    Raises: as `open_worker_group`; RuntimeError outside of the main thread, where no signal arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "triojobs.serve handles signals and must run in the main thread; elsewhere use open_worker_group"
        )
    stopping = False
    abort = trio.CancelScope()
    group: WorkerGroup | None = None

    def stop() -> None:
        nonlocal stopping
        stopping = True
        if group is not None:
            group.stop()

    def cancel() -> None:
        abort.cancel(reason="a second signal arrived")

    with _obeying_signals(stop, cancel), abort:
        async with open_worker_group(conninfo, workers, **options) as group:
            if stopping:
                group.stop()  # its tasks have not begun: nothing is claimed
            async with trio.open_nursery() as nursery:
                nursery.start_soon(notify_systemd, group)
                task_status.started(group)
                await group.wait_stopped()
                nursery.cancel_scope.cancel()
    return ShutdownReport() if group is None else group.report


@contextmanager
def _obeying_signals(first: Callable[[], None], second: Callable[[], None]) -> Iterator[None]:
    """Have the first signal call `first` on the event loop, the second `second`; the third is deadly.

    Handlers of our own, because `trio.open_signal_receiver` hands signals to a task: with the loop blocked
    nobody could end the program.
    """
    token = trio.lowlevel.current_trio_token()
    received = 0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            token.run_sync_soon(first if received == 1 else second)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: it was not installed from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
