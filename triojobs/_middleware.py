"""Middleware: what a program wraps around its handlers. Pure composition, done once for each worker."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ._errors import OptionError

if TYPE_CHECKING:
    from ._job import Job

__all__ = ["Middleware", "NextStep", "checked_middleware", "wrapped"]

NextStep: TypeAlias = Callable[["Job[Any]"], Awaitable[Any]]
"""The rest of the way to the handler: `result = await next_step(job)`."""

Middleware: TypeAlias = Callable[["Job[Any]", NextStep], Awaitable[Any]]
"""`async def middleware(job, next_step)`: runs around a handler, and returns what `next_step` returned.

It runs where the handler does: under the job's timeout and cancel scope, in clean context variables. What
it raises counts as raised by the handler, what it returns is the job's result.
"""


def checked_middleware(value: Sequence[Middleware]) -> tuple[Middleware, ...]:
    """Return middleware as a tuple, or raise OptionError."""
    found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    for each in found:
        if not callable(each) or inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise OptionError("middleware", each, "async functions that take a job and the next step")
    return found


def wrapped(handler: NextStep, middleware: Sequence[Middleware]) -> NextStep:
    """Return the handler inside of its middleware, the first of which is the outermost."""
    for each in reversed(middleware):
        handler = functools.partial(_step, each, handler)
    return handler


def _step(middleware: Middleware, next_step: NextStep, job: Job[Any]) -> Awaitable[Any]:
    return middleware(job, next_step)
