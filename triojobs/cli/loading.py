"""From `MODULE:ATTRIBUTE` to the workers that it names; what is not there is told in one line.

The attribute is a Worker, a list of them, or a function without arguments that gives these: plain, async,
or an async context manager that keeps open what the handlers need. An async function that gives nothing
has done everything by itself.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from .ending import Failure

if TYPE_CHECKING:
    from .. import Worker

__all__ = ["load", "opened"]

SHAPE = "MODULE:ATTRIBUTE, as in app.jobs:workers"


def load(name: str) -> object:
    """Import a module, with the current directory importable, and return its attribute."""
    module_name, colon, attribute = name.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise click.BadParameter(f"{name!r} is not {SHAPE}", param_hint=f"'{SHAPE.partition(',')[0]}'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: object = _module(module_name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Failure(f"{module_name} has no attribute {attribute}; {_candidates(module_name)}") from None
    return found


def _module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(exc.name + ".")):
            raise Failure(
                f"there is no module {exc.name}; run the command in the directory that holds it, "
                "or set PYTHONPATH"
            ) from None
        raise Failure(f"importing {name}: {exc}{_where(exc)}; install it") from exc
    except SyntaxError as exc:
        raise Failure(f"importing {name}: {exc.msg} ({exc.filename}, line {exc.lineno})") from exc
    except Exception as exc:
        raise Failure(f"importing {name}: {type(exc).__name__}: {exc}{_where(exc)}") from exc
    except SystemExit as exc:
        raise Failure(
            f"importing {name}: it ends the program{_where(exc)}; guard its start by __name__"
        ) from exc


def _where(exc: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if "importlib" not in f.filename]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _candidates(module_name: str) -> str:
    from .. import Worker

    def fits(value: object) -> bool:
        return isinstance(value, Worker) or (
            isinstance(value, (list, tuple)) and bool(value) and all(isinstance(w, Worker) for w in value)
        )

    names = [name for name, value in vars(sys.modules[module_name]).items() if fits(value)]
    return f"it has workers in: {', '.join(sorted(names))}" if names else "no other one of it holds workers"


@asynccontextmanager
async def opened(thing: object, name: str) -> AsyncIterator[list[Worker[Any, Any]] | None]:
    """Give the workers that a loaded attribute stands for; None: it has done its work by itself."""
    from .. import Worker

    if not callable(thing) or isinstance(thing, Worker):
        yield _checked(thing, name)
        return
    _check_call(thing, name)
    try:
        given: Any = thing()
    except Exception as exc:
        raise Failure(f"calling {name}: {type(exc).__name__}: {exc}{_where(exc)}") from exc
    if isinstance(given, AbstractAsyncContextManager):
        async with given as inner:
            yield _checked(inner, name)
        return
    if inspect.isawaitable(given):
        given = await given
        if given is None:
            yield None
            return
    yield _checked(given, name)


def _check_call(thing: Any, name: str) -> None:
    try:
        inspect.signature(thing).bind()
    except TypeError as exc:
        raise Failure(f"{name} cannot be called without arguments: {exc}") from None
    except ValueError:
        pass  # it has no signature: the call will tell


def _checked(given: object, name: str) -> list[Worker[Any, Any]]:
    from .. import Worker

    if isinstance(given, Worker):
        return [given]
    try:
        workers: list[Any] = list(given)  # type: ignore[call-overload]
    except TypeError:
        workers = [given]
    if workers and all(isinstance(worker, Worker) for worker in workers):
        return workers
    what = "no worker at all" if not workers else f"a {type(given).__name__}"
    raise Failure(f"{name} is, or gives, {what}; it must be a triojobs.Worker, or a list of them")
