"""What is called from the wrong place raises at once, and says what to call instead."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

import triojobs
from triojobs._flusher import Flusher
from triojobs._group import GroupContext, with_workers
from triojobs._memory import MemoryStore
from triojobs._options import GroupOptions

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
Client = triojobs.Client
NOWHERE = "host=nowhere.invalid"

ENQUEUES: dict[str, Callable[[triojobs.Client], Any]] = {
    "enqueue": lambda c: c.enqueue(plain, 1),
    "try_enqueue": lambda c: c.try_enqueue(plain, 1),
    "enqueue_many": lambda c: c.enqueue_many(plain, [1]),
    "try_enqueue_many": lambda c: c.try_enqueue_many(plain, [1]),
    "enqueue_stream": lambda c: c.enqueue_stream(plain, items()),
}
OTHERS: dict[str, Callable[[triojobs.Client], Any]] = {
    "new_job_id": lambda c: c.new_job_id(),
    "get": lambda c: c.get(1),
    "result": lambda c: c.result(1),
    "as_completed": lambda c: c.as_completed([1]),
    "cancel": lambda c: c.cancel(1),
}
SYNC: dict[str, tuple[Callable[[triojobs.SyncClient], Any], str]] = {
    "__enter__": (lambda c: c.__enter__(), "open_client"),
    "enqueue": (lambda c: c.enqueue(plain, 1), "await client.enqueue"),
    "try_enqueue": (lambda c: c.try_enqueue(plain, 1), "await client.try_enqueue"),
    "enqueue_many": (lambda c: c.enqueue_many(plain, [1]), "await client.enqueue_many"),
    "try_enqueue_many": (lambda c: c.try_enqueue_many(plain, [1]), "await client.try_enqueue_many"),
    "new_job_id": (lambda c: c.new_job_id(), "await client.new_job_id"),
    "get": (lambda c: c.get(1), "await client.get"),
    "result": (lambda c: c.result(1), "await client.result"),
    "cancel": (lambda c: c.cancel(1), "await client.cancel"),
}


async def items() -> AsyncIterator[int]:
    yield 1


@pytest.fixture
async def client() -> triojobs.Client:
    """A client whose flusher does not run: nothing of it is reached."""
    store = MemoryStore()
    return Client(store, Flusher(store))


def methods(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def test_no_method_is_forgotten_here() -> None:
    assert methods(Client) == {*ENQUEUES, *OTHERS, "enqueue_from_thread"}
    assert methods(triojobs.SyncClient) == {*SYNC, "close"} - {"__enter__"}


@pytest.mark.parametrize("method", [*ENQUEUES, *OTHERS])
async def test_a_method_for_tasks_raises_in_a_thread_before_it_is_awaited(
    client: triojobs.Client, method: str
) -> None:
    call = {**ENQUEUES, **OTHERS}[method]
    with pytest.raises(triojobs.TriojobsError) as caught:
        await trio.to_thread.run_sync(call, client)
    assert f"{method} was called from the wrong place" in str(caught.value)
    assert "SyncClient" in caught.value.hint
    assert ("enqueue_from_thread" in caught.value.hint) == (method in ENQUEUES)


@pytest.mark.parametrize("method", ENQUEUES)
async def test_a_method_for_tasks_is_a_coroutine_function_to_those_who_ask(
    client: triojobs.Client, method: str
) -> None:
    if hasattr(inspect, "markcoroutinefunction"):  # Python 3.12
        assert inspect.iscoroutinefunction(getattr(client, method))


async def test_enqueue_from_thread_raises_in_a_task(client: triojobs.Client) -> None:
    with pytest.raises(triojobs.TriojobsError, match=r"await client\.enqueue"):
        client.enqueue_from_thread(plain, 1)


@pytest.mark.parametrize("method", SYNC)
async def test_a_method_that_blocks_raises_in_a_task(method: str) -> None:
    call, instead = SYNC[method]
    sync = triojobs.SyncClient(NOWHERE)
    with pytest.raises(triojobs.TriojobsError, match="wrong place") as caught:
        call(sync)
    assert f"`{instead}" in caught.value.hint or instead in caught.value.hint
    sync.close()


async def test_a_group_is_stopped_by_another_method_in_a_thread() -> None:
    async def handler(job: triojobs.Job[Any]) -> None: ...

    workers: list[triojobs.Worker[Any, Any]] = [triojobs.Worker(plain, handler)]
    options = with_workers(GroupOptions(name="test"), workers)
    async with GroupContext(MemoryStore, workers, options) as group:
        with pytest.raises(triojobs.TriojobsError, match="use stop_from_thread"):
            await trio.to_thread.run_sync(group.stop)
        for method in (group.wait_stopped, group.wait_idle):
            with pytest.raises(triojobs.TriojobsError, match="call it from a Trio task"):
                await trio.to_thread.run_sync(method)
        await trio.to_thread.run_sync(group.stop_from_thread)
        await group.wait_stopped()
