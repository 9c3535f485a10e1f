"""The program that runs behind the gate, and what is done to it.

A call of the bridge passes named points in its thread (`triojobs._bridge.reached`), or on the loop
(`reached_on_loop`); one more is in the work of `job.commit` and `job.transact`, between two statements. A gate
stops the thread, or the task, at one of them; the injection is delivered on the event loop, Trio takes a few
steps, the thread goes on. (mode, operation,
occurrence, point) names a run. The journal is written by the handlers.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import psycopg
import trio

import triojobs
from tests.tools.running import end_sessions, retire_groups
from triojobs import _bridge

MODES: Final = ("cancel", "sibling", "stop", "sigint", "own_scope", "retire", "terminate", "lost")
"""What is injected.

cancel     the scope around everything is cancelled
sibling    a task next to the group raises
stop       group.stop()
sigint     SIGINT: KeyboardInterrupt in the main task
own_scope  every running handler's own scope, inside of it, is cancelled
retire     a rival rescues every registration of the group: their claims become failed attempts
terminate  the server ends every session of the group: the call at the gate fails before its effect, or
           has had it; others fail in their middle
lost       the call at the gate raises as if its connection had died, whatever it did on the server
"""
ENDING: Final = frozenset({"cancel", "sibling", "stop", "sigint"})  # of the group
WORKING: Final = "working"
POINTS: Final = ("enter", "connected", WORKING, "executed", "committed", "exit")
STEPS: Final = 5  # of the loop between the injection and the release of the thread
NUMBER: Final = re.compile(r"\d+")
PATIENCE: Final = 30.0  # seconds for what takes a tenth of one; only a hang needs them
KINDS: Final = ("instant", "sleeps", "thread", "fails_once", "nursery", "commits", "transacts")
OPTIONS: Final[dict[str, Any]] = {
    "name": "gate",
    "grace_period": 1.0,
    "close_timeout": 5.0,
    "call_timeout": 4.0,
    "lease_duration": 20.0,
    "lease_margin": 5.0,
    "beat_interval": 2.0,
    "job_connections": 1,
}
UNIT: Final = 0.005  # seconds of a piece of work

jobs: triojobs.Queue[str, str] = triojobs.Queue("gate", str, result=str)
children: triojobs.Queue[str, str] = triojobs.Queue("gate_children", str, result=str)


class Place(NamedTuple):
    """The occurrence-th time (from 0) that a call of this operation comes to this point."""

    operation: str
    occurrence: int
    point: str

    @property
    def modes(self) -> tuple[str, ...]:
        """What can happen here: a reply is lost only where there may be one."""
        return MODES if self.point == "executed" else tuple(mode for mode in MODES if mode != "lost")


class Boom(Exception):
    """What the sibling raises."""


@dataclass(eq=False)
class Run:
    """One call of a handler.

    Attributes:
        ended: running, returned, failed, interrupted.
        committed: job.commit came back. transacted: job.transact did; None: it was not called, or nobody knows.
        unwanted: its cancel came while the work of its commit, or transact, was between two statements.
    """

    job_id: int
    fence: Any
    ended: str = "running"
    committed: bool = False
    transacted: bool | None = None
    unwanted: bool = False

    @property
    def status(self) -> str | None:
        """The outcome that must stand under this fence; None: the claim was given back."""
        if self.committed or self.ended == "returned":
            return "done"
        return "failed" if self.ended == "failed" else None


class Program(trio.abc.Instrument):
    """A worker group, its handlers, and the injection into it: at a place, or before the k-th task step."""

    def __init__(self, conninfo: str, mode: str, place: Place | None, k: int | None = None) -> None:
        self.conninfo = conninfo
        self.mode = mode
        self.place = place
        self.k = k
        self.steps = 0
        self.seen: list[Place] = []
        self.runs: list[Run] = []
        self.overlaps: list[int] = []
        self.injected_at: float | None = None
        self.ended_at = 0.0
        self.error: BaseException | None = None
        self.group: triojobs.WorkerGroup | None = None
        self._active: Counter[int] = Counter()
        self._counted: Counter[tuple[str, str]] = Counter()
        self._own_scopes: set[trio.CancelScope] = set()
        self._lock = threading.Lock()
        self._go_on = threading.Event()
        self._outer = trio.CancelScope()
        self._boom = trio.Event()
        self._all_done = trio.Event()

    # The gate, in the call's thread or task.

    def reached(self, operation: str, point: str) -> None:
        if self._is_here(operation, point):
            go_on = self._go_on
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._inject, go_on)
                go_on.wait(PATIENCE)
            self._lose()

    async def reached_on_loop(self, operation: str, point: str) -> None:
        if self._is_here(operation, point):
            self._inject(self._go_on)
            while not self._go_on.is_set():
                await trio.lowlevel.checkpoint()  # shielded by the bridge
            self._lose()

    def _lose(self) -> None:
        if self.mode == "lost":
            raise psycopg.OperationalError("the reply was lost")

    def _is_here(self, operation: str, point: str) -> bool:
        operation = NUMBER.sub("N", operation)  # ids and batch sizes differ from run to run
        with self._lock:
            occurrence = self._counted[operation, point]
            self._counted[operation, point] += 1
            here = Place(operation, occurrence, point)
            self.seen.append(here)
        return here == self.place

    # On the loop.

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.steps == self.k:
            self._deliver()
        self.steps += 1

    def _inject(self, go_on: threading.Event) -> None:
        trio.lowlevel.spawn_system_task(_release, go_on)
        self._deliver()

    def _deliver(self) -> None:
        self.injected_at = time.monotonic()
        if self.mode == "cancel":
            self._outer.cancel()
        elif self.mode == "sibling":
            self._boom.set()
        elif self.mode == "sigint":
            signal.raise_signal(signal.SIGINT)
        elif self.mode == "own_scope":
            for scope in self._own_scopes:
                scope.cancel()
        elif self.mode == "retire":
            retire_groups(self.conninfo)
        elif self.mode == "terminate":
            end_sessions(self.conninfo)
        elif self.mode == "stop" and self.group is not None:
            self.group.stop()

    def run(self) -> None:
        """Run it; keeps what it raised."""
        before = _bridge.reached, _bridge.reached_on_loop
        _bridge.reached, _bridge.reached_on_loop = self.reached, self.reached_on_loop
        try:
            trio.run(self._main, instruments=[self])
        except BaseException as exc:
            self.error = exc
        finally:
            _bridge.reached, _bridge.reached_on_loop = before
            self._go_on.set()
            self.ended_at = time.monotonic()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        retry = triojobs.Backoff(first=0.01, limit=0.02)
        workers = [
            triojobs.Worker(jobs, self._handle, concurrency=2, retry=retry),
            triojobs.Worker(children, self._handle, concurrency=1, retry=retry),
        ]
        with trio.move_on_after(PATIENCE) as patience, self._outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sibling)
                async with triojobs.open_worker_group(self.conninfo, workers, **OPTIONS) as group:
                    self.group = group
                    await self._until_done(group)
                nursery.cancel_scope.cancel()
        assert not patience.cancelled_caught, "the program hangs"

    async def _until_done(self, group: triojobs.WorkerGroup) -> None:
        async with trio.open_nursery() as nursery:

            async def leave(wait: Callable[[], Any]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(leave, group.wait_stopped)
            nursery.start_soon(leave, self._all_done.wait)

    async def _sibling(self) -> None:
        await self._boom.wait()
        raise Boom

    async def _handle(self, job: triojobs.Job[str]) -> str:
        run = Run(job.id, job.fence)
        self.runs.append(run)
        if self._active[job.id]:
            self.overlaps.append(job.id)
        self._active[job.id] += 1
        try:
            with trio.CancelScope() as own_scope:
                self._own_scopes.add(own_scope)
                await getattr(self, f"_{job.payload}")(job, run)
            if own_scope.cancelled_caught:
                raise ValueError("its own scope was cancelled")
        except BaseException as exc:
            cancelled = trio.current_effective_deadline() == -math.inf
            run.ended = "interrupted" if cancelled or not isinstance(exc, Exception) else "failed"
            raise
        else:
            run.ended = "returned"
            return job.payload
        finally:
            self._active[job.id] -= 1
            self._own_scopes.discard(own_scope)
            if len({r.job_id for r in self.runs if r.status == "done"}) == len(KINDS) + 1:
                self._all_done.set()

    async def _instant(self, job: triojobs.Job[str], run: Run) -> None:
        """No checkpoint at all."""

    _child = _instant

    async def _sleeps(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.sleep(UNIT)

    async def _thread(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.to_thread.run_sync(threading.Event().wait, UNIT)

    async def _fails_once(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.lowlevel.checkpoint()
        if job.attempt == 1:
            raise ValueError("the first attempt fails")

    async def _nursery(self, job: triojobs.Job[str], run: Run) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, UNIT)
                nursery.start_soon(trio.sleep, 2 * UNIT)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2 * UNIT)

    async def _commits(self, job: triojobs.Job[str], run: Run) -> None:
        def work(conn: psycopg.Connection[Any]) -> str:
            conn.execute("INSERT INTO public.gate_sent VALUES (%s)", [job.id])
            triojobs.enqueue_on(conn, children, "child")
            self._be_between_statements(f"committing job {job.id}", run)
            return job.payload

        await job.commit(work)
        run.committed = True
        await trio.sleep(UNIT)

    async def _transacts(self, job: triojobs.Job[str], run: Run) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            conn.execute("INSERT INTO public.gate_transacted VALUES (%s, %s, %s)", [job.id, *job.fence])
            self._be_between_statements(f"committing job {job.id}", run)

        run.transacted = False
        try:
            await job.transact(work)
        except triojobs.DatabaseError as exc:
            run.transacted = None if exc.committed is None else exc.committed
            raise
        run.transacted = True

    def _be_between_statements(self, operation: str, run: Run) -> None:
        """In the thread of a work: the server has nothing that could be broken off."""
        _bridge.reached(operation, WORKING)
        try:
            trio.from_thread.check_cancelled()
        except trio.Cancelled:
            run.unwanted = True
            heard = threading.Event()  # by everybody on the loop whom the cancel concerns
            self._token.run_sync_soon(trio.lowlevel.spawn_system_task, _release, heard)
            heard.wait(PATIENCE)


async def _release(go_on: threading.Event) -> None:
    for _ in range(STEPS):
        await trio.lowlevel.checkpoint()
    go_on.set()
