"""Where a thread or a task is, for people who want to know what does not go on."""

from __future__ import annotations

import sys
import traceback
from types import FrameType
from typing import Final

import trio

__all__ = ["stack_of_task", "stack_of_thread"]

FRAMES: Final = 20  # the innermost ones: where it is


def stack_of_thread(ident: int) -> tuple[str, str]:
    """Return the innermost place ("file:line in function") and the stack of a thread; any thread may ask."""
    frame = sys._current_frames().get(ident)
    if frame is None:
        return "a thread that has ended", ""
    return _place(frame), "".join(traceback.format_stack(frame)[-FRAMES:])


def stack_of_task(task: trio.lowlevel.Task) -> str:
    """Return the stack of a task that waits."""
    frames = list(task.iter_await_frames())[-FRAMES:]
    return "".join(traceback.StackSummary.extract(iter(frames)).format())


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
