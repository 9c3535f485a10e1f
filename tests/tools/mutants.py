"""Mutants: the production code with one place changed, to see a named test fail.

A mutant that no test notices is a rule that nobody guards.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import pytest
import trio

Patch: TypeAlias = Callable[[pytest.MonkeyPatch], None]
Test: TypeAlias = Callable[..., Awaitable[None]]
Mutant: TypeAlias = tuple[Patch, Test, dict[str, Any]]
"""The change, the test that must notice it, and what the test is called with."""


def code(owner: Any, name: str, *changes: tuple[str, str]) -> Patch:
    """Change parts of a function's source; each must be there once, or the mutant would be the original."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        function = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in changes:
            assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
            source = source.replace(old, new)
        made: dict[str, Any] = {}
        exec(compile(source, f"<mutant of {name}>", "exec"), vars(sys.modules[function.__module__]), made)
        patch.setattr(owner, name, made[name])

    return apply


def sql(module: Any, name: str, old: str, new: str) -> Patch:
    """Change a part of a statement."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        text = getattr(module, name)
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        patch.setattr(module, name, text.replace(old, new))

    return apply


def all_of(*patches: Patch) -> Patch:
    """Make several changes, which are one mistake together."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        for each in patches:
            each(patch)

    return apply


async def noticed(test: Test, **values: Any) -> None:
    """Run a test that must fail because of what it asserts or waits for, and not by an accident."""
    wanted = {name: values[name] for name in inspect.signature(test).parameters if name in values}
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - looked at below
        await test(**wanted)
    signs = (AssertionError, pytest.fail.Exception, trio.TooSlowError, trio.Cancelled)
    for leaf in _leaves(caught.value):
        assert isinstance(leaf, signs) or type(leaf).__module__.startswith("triojobs"), repr(leaf)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
