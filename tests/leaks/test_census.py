"""The census is sharp: whatever a scope may leave behind changes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.leaks.census import SESSIONS, census
from tests.tools import looking


@contextmanager
def descriptor(nursery: trio.Nursery) -> Iterator[None]:
    opened = os.open("/dev/null", os.O_RDONLY)
    yield
    os.close(opened)


@contextmanager
def thread(nursery: trio.Nursery) -> Iterator[None]:
    ended = threading.Event()
    waiting = threading.Thread(target=ended.wait, name="triojobs-breaker")
    waiting.start()
    yield
    ended.set()
    waiting.join()


@contextmanager
def busy_trio_thread(nursery: trio.Nursery) -> Iterator[None]:
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        ended.wait()

    trio.lowlevel.start_thread_soon(work, lambda result: None, name="settling from triojobs settler")
    begun.wait()
    yield
    ended.set()


@contextmanager
def task(nursery: trio.Nursery) -> Iterator[None]:
    nursery.start_soon(trio.sleep_forever)
    yield


@contextmanager
def token(nursery: trio.Nursery) -> Iterator[None]:
    limiter = trio.CapacityLimiter(1)
    limiter.acquire_nowait()
    yield
    limiter.release()


@contextmanager
def instrument(nursery: trio.Nursery) -> Iterator[None]:
    added = trio.abc.Instrument()
    trio.lowlevel.add_instrument(added)
    yield
    trio.lowlevel.remove_instrument(added)


@contextmanager
def object_of_ours(nursery: trio.Nursery) -> Iterator[None]:
    kept = [triojobs.Queue("kept")]
    yield
    kept.clear()


@pytest.mark.parametrize(
    "leak", [descriptor, thread, busy_trio_thread, task, token, instrument, object_of_ours]
)
async def test_each_kind_of_leak_changes_the_census(leak: Callable[[trio.Nursery], Any]) -> None:
    before = census()
    async with trio.open_nursery() as nursery:
        without = census()
        with leak(nursery):
            assert census() != without
        nursery.cancel_scope.cancel()
    if leak is not busy_trio_thread:  # it becomes idle a moment later
        assert census() == before


def test_a_session_is_seen(conninfo: str) -> None:
    with psycopg.connect(conninfo):
        assert looking.value(conninfo, SESSIONS) is False
