"""Single enqueues of tasks and threads travel together, and everybody is answered."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

import triojobs
from tests.tools.gates import PATIENCE, Gate
from triojobs import _flusher
from triojobs._client import Client
from triojobs._errors import DatabaseError
from triojobs._flusher import Flusher
from triojobs._memory import MemoryStore
from triojobs._model import Enqueued, NewRow

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


class Recorded(MemoryStore):
    """A store that remembers its shared commits, and stops before those for which a gate stands."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[list[Any]] = []
        self.gates: dict[int, Gate] = {}
        self.errors: dict[int, BaseException] = {}

    @property
    def rows(self) -> list[Any]:
        """All that was sent."""
        return [row for commit in self.commits for row in commit]

    def gate(self, commit: int) -> Gate:
        """Put a gate before this commit, counted from 0."""
        return self.gates.setdefault(commit, Gate())

    async def enqueue_each(
        self, rows: Sequence[NewRow], *, deadline: float | None = None
    ) -> list[Enqueued | triojobs.TriojobsError]:
        number = len(self.commits)
        self.commits.append([plain.decode_payload(row.payload, row.encoding) for row in rows])
        if number in self.gates:
            await self.gates[number].pass_through()
        if number in self.errors:
            raise self.errors[number]
        return await super().enqueue_each(rows, deadline=deadline)


class Rig:
    """An open client on a recorded store."""

    def __init__(self, store: Recorded, flusher: Flusher, nursery: trio.Nursery) -> None:
        self.store = store
        self.flusher = flusher
        self.client = Client(store, flusher)
        self.nursery = nursery
        self.ends: dict[Any, Any] = {}
        self.threads: list[threading.Thread] = []

    def start(self, payload: Any, **options: Any) -> None:
        """Enqueue in a task; `ends` gets the answer."""
        self.nursery.start_soon(self._enqueue, payload, options)

    async def _enqueue(self, payload: Any, options: dict[str, Any]) -> None:
        try:
            self.ends[payload] = await self.client.enqueue(plain, payload, **options)
        except Exception as exc:
            self.ends[payload] = exc

    def start_thread(self, payload: Any, **options: Any) -> threading.Thread:
        """Enqueue in a thread that Trio does not know."""

        def work() -> None:
            try:
                self.ends[payload] = self.client.enqueue_from_thread(plain, payload, **options)
            except BaseException as exc:
                self.ends[payload] = exc

        thread = threading.Thread(target=work)
        thread.start()
        self.threads.append(thread)
        return thread

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what threads do: a bound, not an order."""
        with trio.fail_after(PATIENCE):
            while not condition():
                await trio.sleep(0.001)

    async def occupy(self) -> Gate:
        """Have a commit in flight, so that whoever comes now has to wait."""
        gate = self.store.gate(0)
        self.start("in flight")
        await gate.reached()
        return gate


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    store = Recorded()
    flusher = Flusher(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher.run)
        r = Rig(store, flusher, nursery)
        try:
            yield r
        finally:
            for gate in store.gates.values():
                gate.open()
            flusher.close(deadline=store.now() + PATIENCE)
            with trio.CancelScope(shield=True):
                await r.until(lambda: not any(thread.is_alive() for thread in r.threads))


async def in_thread(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await trio.to_thread.run_sync(partial(fn, *args, **options))


# Shared commits.


async def test_tasks_and_threads_share_the_next_commit() -> None:
    async with rig() as r:
        gate = await r.occupy()
        for n in range(20):
            r.start(f"task {n}")
            r.start_thread(f"thread {n}")
        await r.until(lambda: r.flusher.waiting == 40)
        gate.open()
        await r.until(lambda: len(r.ends) == 41)
    assert [len(commit) for commit in r.store.commits] == [1, 40]
    assert len(set(r.ends.values())) == 41
    assert all(isinstance(job_id, int) for job_id in r.ends.values())


async def test_rows_travel_in_the_order_in_which_they_came() -> None:
    async with rig() as r:
        gate = await r.occupy()
        for n in range(10):
            r.start(n)
            await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert r.store.commits[1] == list(range(10))


async def test_an_idle_flusher_touches_no_database() -> None:
    async with rig() as r:
        await trio.testing.wait_all_tasks_blocked()
        assert r.store.commits == []
        r.start(1)
        await r.until(lambda: 1 in r.ends)
        await trio.testing.wait_all_tasks_blocked()
        assert r.store.commits == [[1]]
    assert r.store.commits == [[1]]


async def test_each_caller_gets_its_own_answer() -> None:
    async with rig() as r:
        holder = await r.client.enqueue(plain, "holder", key="taken")
        gate = r.store.gate(1)
        r.start("in flight", key="x")
        await gate.reached()
        r.start("good", key="free")
        r.start("taken", key="taken")
        r.start("returned", key="taken", on_conflict="return")
        r.start("unknown", job_id=10**6)
        r.start_thread("taken in a thread", key="taken")
        await r.until(lambda: r.flusher.waiting == 5)
        gate.open()
    assert len(r.store.commits) == 3
    assert isinstance(r.ends["good"], int)
    assert r.ends["returned"] == holder
    for name in ("taken", "taken in a thread"):
        assert isinstance(r.ends[name], triojobs.DuplicateJobError)
        assert r.ends[name].job_id == holder
    assert isinstance(r.ends["unknown"], triojobs.OptionError)


async def test_a_commit_carries_at_most_a_thousand_rows() -> None:
    async with rig() as r:
        gate = await r.occupy()
        for n in range(2100):
            r.start(n)
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert [len(commit) for commit in r.store.commits] == [1, 1000, 1000, 100]


async def test_a_commit_carries_at_most_so_many_bytes_or_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flusher, "BATCH_BYTES", 100)
    async with rig() as r:
        gate = await r.occupy()
        for n, size in enumerate((40, 40, 40, 200, 10, 10)):
            r.start(f"{n}" + "x" * size)
            await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert [[row[0] for row in commit] for commit in r.store.commits[1:]] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5"],
    ]


async def test_rows_with_a_key_do_not_hold_up_the_others() -> None:
    async with rig() as r:
        gate = r.store.gate(0)
        r.start("key", key="k")
        await gate.reached()
        assert isinstance(await r.client.enqueue(plain, "plain"), int)
        assert "key" not in r.ends
        gate.open()


async def test_callers_of_one_failed_commit_raise_errors_of_their_own() -> None:
    cause = OSError("cause")
    error = DatabaseError("gone", committed=None, transient=True)
    error.__cause__ = cause
    async with rig() as r:
        gate = await r.occupy()
        r.store.errors[1] = error
        r.start("a")
        r.start_thread("b")
        await r.until(lambda: r.flusher.waiting == 2)
        gate.open()
        await r.until(lambda: len(r.ends) == 3)
    assert r.store.commits[1:] in ([["a", "b"]], [["b", "a"]])  # and nothing was repeated
    for name in ("a", "b"):
        found = r.ends[name]
        assert isinstance(found, DatabaseError)
        assert found is not error
        assert (str(found), found.committed, found.transient) == (str(error), None, True)
        assert found.__cause__ is cause
    assert r.ends["a"] is not r.ends["b"]


async def test_a_defect_of_ours_answers_everybody_and_is_not_hidden() -> None:
    store = Recorded()
    store.errors[0] = ZeroDivisionError("defect")
    flusher = Flusher(store)
    with pytest.RaisesGroup(pytest.RaisesExc(ZeroDivisionError), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flusher.run)
            with pytest.raises(DatabaseError, match="defect") as caught, trio.CancelScope(shield=True):
                await Client(store, flusher).enqueue(plain, 1)
    assert caught.value.committed is None
    with pytest.raises(trio.ClosedResourceError):
        await Client(store, flusher).enqueue(plain, 1)


# The hand-off.


async def test_a_task_that_is_cancelled_before_the_hand_off_writes_nothing() -> None:
    async with rig() as r:
        gate = await r.occupy()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.client.enqueue, plain, "cancelled")
                await r.until(lambda: r.flusher.waiting == 1)
                scope.cancel()
        assert scope.cancelled_caught
        assert r.flusher.waiting == 0
        gate.open()
    assert r.store.commits == [["in flight"]]


async def test_a_task_that_is_cancelled_after_the_hand_off_gets_its_answer() -> None:
    async with rig() as r:
        gate = r.store.gate(0)
        with trio.CancelScope() as scope:

            @r.nursery.start_soon
            async def cancel() -> None:
                await gate.reached()
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                gate.open()

            job_id = await r.client.enqueue(plain, "handed off")
        assert r.store.status_of(job_id) == "pending"
        assert not scope.cancelled_caught


async def test_a_task_that_is_cancelled_before_the_call_writes_nothing() -> None:
    async with rig() as r:
        with trio.CancelScope() as scope:
            scope.cancel()
            await r.client.enqueue(plain, 1)
        await trio.testing.wait_all_tasks_blocked()
    assert r.store.commits == []


async def test_a_threads_time_is_over_before_the_hand_off_and_nothing_is_written() -> None:
    async with rig() as r:
        gate = await r.occupy()
        with pytest.raises(DatabaseError, match=r"not begun within 0\.01 s") as caught:
            await in_thread(r.client.enqueue_from_thread, plain, "late", timeout=0.01)
        assert (caught.value.committed, caught.value.transient) == (False, True)
        assert r.flusher.waiting == 0
        gate.open()
    assert r.store.commits == [["in flight"]]


async def test_a_thread_whose_time_is_over_after_the_hand_off_gets_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = [0.0]

    def monotonic() -> float:
        readings.append(readings[-1])
        return readings[-1]

    monkeypatch.setattr(_flusher, "time", SimpleNamespace(monotonic=monotonic))
    async with rig() as r:
        gate = r.store.gate(0)
        thread = r.start_thread("handed off", timeout=5.0)
        await gate.reached()
        readings[:] = [10.0]
        await r.until(lambda: len(readings) > 1)  # it has looked at the clock
        assert thread.is_alive()
        gate.open()
        await r.until(lambda: len(r.ends) == 1)
    assert isinstance(r.ends["handed off"], int)


async def test_a_worker_thread_whose_task_is_cancelled_before_the_hand_off_writes_nothing() -> None:
    async with rig() as r:
        gate = await r.occupy()
        with trio.fail_after(PATIENCE), trio.CancelScope() as scope:
            scope.cancel()
            with trio.CancelScope(shield=True) as shield:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def lift_the_shield() -> None:
                        await r.until(lambda: r.flusher.waiting == 1)
                        shield.shield = False

                    await in_thread(r.client.enqueue_from_thread, plain, "cancelled")
        assert scope.cancelled_caught
        assert r.flusher.waiting == 0
        gate.open()
    assert r.store.commits == [["in flight"]]


async def test_a_worker_thread_whose_task_is_cancelled_after_the_hand_off_gets_its_answer() -> None:
    async with rig() as r:
        gate = r.store.gate(0)
        answers: list[int] = []

        def work() -> None:
            answers.append(r.client.enqueue_from_thread(plain, "handed off"))

        with trio.CancelScope() as scope:

            @r.nursery.start_soon
            async def cancel() -> None:
                await gate.reached()
                scope.cancel()
                gate.open()

            await in_thread(work)
    assert len(answers) == 1
    assert r.store.commits == [["handed off"]]


# Back-pressure.


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flusher, "PENDING_LIMIT", 2)


async def full(r: Rig) -> Gate:
    gate = await r.occupy()
    for name in ("first", "second"):
        r.start_thread(name)
    await r.until(lambda: r.flusher.waiting == 2)
    return gate


@pytest.mark.usefixtures("small_limit")
async def test_threads_wait_for_room_and_get_it() -> None:
    async with rig() as r:
        gate = await full(r)
        threads = [r.start_thread(n) for n in range(10)]
        r.start("a task")  # waits by itself, so it needs no limit
        await r.until(lambda: r.flusher.waiting == 3)
        gate.open()
        await r.until(lambda: not any(thread.is_alive() for thread in threads))
    assert len({r.ends[n] for n in range(10)}) == 10
    assert len(r.store.commits) > 2


@pytest.mark.usefixtures("small_limit")
async def test_a_thread_that_finds_no_room_in_time_writes_nothing() -> None:
    async with rig() as r:
        gate = await full(r)
        with pytest.raises(DatabaseError, match=r"not begun within 0\.01 s") as caught:
            await in_thread(r.client.enqueue_from_thread, plain, "late", timeout=0.01)
        assert caught.value.committed is False
        gate.open()
    assert "late" not in r.store.rows


@pytest.mark.usefixtures("small_limit")
async def test_a_thread_that_waits_for_room_obeys_the_cancel_of_its_task() -> None:
    async with rig() as r:
        gate = await full(r)
        with trio.fail_after(PATIENCE), trio.CancelScope() as scope:
            scope.cancel()
            with trio.CancelScope(shield=True) as shield:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def lift_the_shield() -> None:
                        shield.shield = False

                    await in_thread(r.client.enqueue_from_thread, plain, "cancelled")
        assert scope.cancelled_caught
        gate.open()
    assert "cancelled" not in r.store.rows


@pytest.mark.usefixtures("small_limit")
async def test_a_thread_that_waits_for_room_is_refused_by_the_closing() -> None:
    async with rig() as r:
        gate = await full(r)
        thread = r.start_thread("no room")
        await trio.testing.wait_all_tasks_blocked()
        r.flusher.close(deadline=r.store.now() + PATIENCE)
        await r.until(lambda: not thread.is_alive())
        assert isinstance(r.ends["no room"], trio.ClosedResourceError)
        gate.open()


# Closing.


async def test_closing_commits_what_waits_and_refuses_what_comes_later() -> None:
    async with rig() as r:
        gate = await r.occupy()
        r.start("task")
        r.start_thread("thread")
        await r.until(lambda: r.flusher.waiting == 2)
        r.flusher.close(deadline=r.store.now() + PATIENCE)
        with pytest.raises(trio.ClosedResourceError):
            await r.client.enqueue(plain, "later")
        with pytest.raises(trio.ClosedResourceError):
            await in_thread(r.client.enqueue_from_thread, plain, "later")
        gate.open()
        await r.flusher.ended.wait()
        await r.until(lambda: len(r.ends) == 3)
    assert sorted(r.store.commits[1]) == ["task", "thread"]
    assert all(isinstance(end, int) for end in r.ends.values())


async def test_closing_refuses_what_was_not_begun_by_its_deadline() -> None:
    async with rig() as r:
        gate = await r.occupy()
        r.start("task")
        r.start_thread("thread")
        await r.until(lambda: r.flusher.waiting == 2)
        r.flusher.close(deadline=r.store.now())
        r.flusher.close(deadline=r.store.now() + PATIENCE)  # a second closing does not prolong the first
        gate.open()
        await r.flusher.ended.wait()
        await r.until(lambda: len(r.ends) == 3)
    assert isinstance(r.ends["in flight"], int)
    assert isinstance(r.ends["task"], trio.ClosedResourceError)
    assert isinstance(r.ends["thread"], trio.ClosedResourceError)
    assert r.store.commits == [["in flight"]]


async def test_closing_does_not_try_a_broken_database_again() -> None:
    async with rig() as r:
        gate = await r.occupy()
        r.store.errors[0] = DatabaseError("gone", transient=True, committed=None)
        r.start("task")
        r.start("keyed", key="k")
        await r.until(lambda: r.ends.get("keyed") is not None)  # the other lane is idle again
        r.start_thread("thread")
        await r.until(lambda: r.flusher.waiting == 2)
        r.flusher.close(deadline=r.store.now() + PATIENCE)
        gate.open()
        await r.flusher.ended.wait()
        await r.until(lambda: len(r.ends) == 4)
    assert isinstance(r.ends["in flight"], DatabaseError)
    assert isinstance(r.ends["task"], trio.ClosedResourceError)
    assert isinstance(r.ends["thread"], trio.ClosedResourceError)
    assert len(r.store.commits) == 2


async def test_a_flusher_that_is_cancelled_goes_on_until_it_is_closed() -> None:
    store = Recorded()
    flusher = Flusher(store)
    client = Client(store, flusher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher.run)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            assert isinstance(await in_thread(client.enqueue_from_thread, plain, 1), int)
        flusher.close(deadline=store.now() + PATIENCE)
    assert flusher.ended.is_set()


def test_a_thread_that_calls_after_the_end_of_the_program_is_refused() -> None:
    async def main() -> tuple[Flusher, MemoryStore]:
        store = MemoryStore()
        return Flusher(store), store  # never run, never closed: the program has died

    flusher, store = trio.run(main)
    store.now = lambda: 0.0  # type: ignore[method-assign]
    with pytest.raises(trio.ClosedResourceError):
        Client(store, flusher).enqueue_from_thread(plain, 1)
    assert flusher.waiting == 0


async def test_a_client_of_another_trio_program_is_refused() -> None:
    async def main() -> Client:
        store = MemoryStore()
        return Client(store, Flusher(store))

    client = await trio.to_thread.run_sync(trio.run, main)
    with pytest.raises(triojobs.TriojobsError, match=r"another trio\.run.*open a client in this one"):
        await client.enqueue(plain, 1)
