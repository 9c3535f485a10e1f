"""One run: a group over a MemoryStore, an injection before step k, and what came of it."""

from __future__ import annotations

import logging
import random
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeVar

import outcome
import trio
import trio.testing

import triojobs
from triojobs._group import GroupContext, WorkerGroup
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._model import NewRow
from triojobs._options import GroupOptions
from triojobs._queue import new_row
from triojobs._store import Compared

from .determinism import deterministic
from .jobs import KINDS, Handlers, Journal

T = TypeVar("T")

MODES: Final = ("cancel", "sibling", "stop", "sigint", "handler_sigint", "lose", "retire")
"""What an injection does.

cancel          the scope around everything is cancelled
sibling         a task next to the group raises
stop            group.stop()
sigint          SIGINT while the scheduler runs: KeyboardInterrupt in the main task
handler_sigint  SIGINT while a handler runs: KeyboardInterrupt in its frame
lose            the lease can no longer be proven: handlers are cancelled, a new registration follows
retire          a rival rescues every registration: their claims become failed attempts
"""

FAULTS: Final = ("refused", "lost_before", "lost_after")
"""refused: a clean, transient error; lost: no reply, before or after the call had its effect."""

LATENCY: Final = 20  # ticks before and after the effect of a call, at most; drawn anew for each call
VIRTUAL_LIMIT: Final = 200.0  # seconds; longer is a hang
STEP_LIMIT: Final = 30_000  # more is a spin
OPTIONS: Final = GroupOptions(name="sweep", grace_period=1.0, close_timeout=5.0, call_timeout=4.0)
OPEN_CALLS: Final = frozenset({"open", "register"})


class Fault(NamedTuple):
    """The j-th call of the store fails."""

    j: int
    kind: str


@dataclass(frozen=True)
class Case:
    """The name of a run. `k` None: nothing is injected; `k2`: the same injection once more."""

    mode: str
    seed: int
    k: int | None = None
    k2: int | None = None
    fault: Fault | None = None
    isolation: Literal["slot", "task"] = "slot"

    def command(self) -> str:
        """Return the command that repeats this run."""
        words = ["python -m tests.sweep --mode", self.mode, "--seed", str(self.seed)]
        words += [] if self.k is None else ["--k", str(self.k)]
        words += [] if self.k2 is None else ["--k2", str(self.k2)]
        words += [] if self.fault is None else ["--fault", f"{self.fault.j}:{self.fault.kind}"]
        words += [] if self.isolation == "slot" else ["--isolation", self.isolation]
        return " ".join(words)


class Boom(Exception):
    """What the sibling raises."""


class StuckError(Exception):
    """The run did not end by itself."""


@dataclass
class Record:
    """What a run left behind."""

    case: Case
    database: MemoryDatabase
    journal: Journal
    stores: list[MemoryStore] = field(default_factory=list)
    groups: list[WorkerGroup] = field(default_factory=list)
    steps: int = 0
    calls: list[str] = field(default_factory=list)
    injected_at: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    error: BaseException | None = None
    stuck: str | None = None
    failed_operation: str | None = None
    swept: int = 0  # rows of claims that never reached the ledger

    @property
    def exit_bound(self) -> float:
        return OPTIONS.exit_bound


class Injector(trio.abc.Instrument):
    """Counts task steps and fires before step k."""

    def __init__(self, shots: list[int], fire: Callable[[], None], give_up: Callable[[str], None]) -> None:
        self._shots = sorted(shots, reverse=True)
        self._fire = fire
        self._give_up = give_up
        self.steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._shots and self.steps >= self._shots[-1]:
            self._shots.pop()
            self._fire()
        self.steps += 1
        if self.steps == STEP_LIMIT:
            self._give_up(f"more than {STEP_LIMIT} steps: it spins")


class SweepStore(MemoryStore):
    """A MemoryStore whose calls take a time of their own each, and of which one may fail."""

    def __init__(self, record: Record, own: random.Random) -> None:
        super().__init__(record.database, crossing=self._cross, fault=self._break)
        self._record = record
        self._own = own
        record.stores.append(self)

    async def _cross(self, operation: str, fn: Callable[[], T], /) -> T:
        # As the bridge: cancellable on entry, then never. Uniform latencies hide abandoned threads.
        before, after = self._own.randrange(LATENCY + 1), self._own.randrange(LATENCY + 1)
        await trio.lowlevel.checkpoint_if_cancelled()
        for _ in range(before + 1):
            await trio.lowlevel.cancel_shielded_checkpoint()
        result = outcome.capture(fn)
        for _ in range(after):
            await trio.lowlevel.cancel_shielded_checkpoint()
        return result.unwrap()

    async def compare(
        self,
        group_id: uuid.UUID,
        known: Callable[[], Sequence[tuple[int, int]]],
        missing: Callable[[Sequence[tuple[int, int]]], None],
    ) -> Compared | None:
        counted: Callable[[], Sequence[tuple[int, int]]] = partial(self._count_strays, group_id, known)
        return await super().compare(group_id, counted, missing)

    def _count_strays(
        self, group_id: uuid.UUID, known: Callable[[], Sequence[tuple[int, int]]]
    ) -> Sequence[tuple[int, int]]:
        # Strays were never in the ledger, so the report cannot name them as released.
        owned = known()
        running = [(r.id, r.claim_no) for r in self.database.tables.leases.values() if r.group_id == group_id]
        self._record.swept += len(set(running) - set(owned))
        return owned

    def _break(self, operation: str, when: Literal["before", "after"]) -> None:
        record = self._record
        if when == "before":
            record.calls.append(operation)
        fault = record.case.fault
        if fault is None or fault.j != len(record.calls) - 1:
            return
        if when != ("after" if fault.kind == "lost_after" else "before"):
            return
        record.failed_operation = operation
        raise triojobs.DatabaseError(
            f"call {fault.j} fails: {fault.kind}",
            operation=operation,
            transient=True,
            committed=False if fault.kind == "refused" else None,
        )


class Scenario:
    """The program under test, and the ways to disturb it."""

    def __init__(self, case: Case, own: random.Random) -> None:
        self.case = case
        self.own = own
        self.database = MemoryDatabase()
        self.journal = Journal()
        self.record = Record(case, self.database, self.journal)
        self.handlers = Handlers(self.journal, unit=0.05)
        self.outer = trio.CancelScope()
        self.boom = trio.Event()
        self.group: WorkerGroup | None = None
        queue: triojobs.Queue[str, str] = triojobs.Queue("jobs", str)
        retry = triojobs.Backoff(first=0.05, limit=0.1)
        self.workers = [
            triojobs.Worker(queue, self.handlers.handle, concurrency=3, retry=retry),
            triojobs.Worker(self.handlers.children, self.handlers.handle, concurrency=1, retry=retry),
        ]
        self.database.tables.enqueue([_row(queue, kind) for kind in KINDS], 0.0)

    async def main(self) -> None:
        trio.lowlevel.spawn_system_task(self._watch)
        with self.outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sibling)
                context = GroupContext(self._make_store, self.workers, self._options())
                async with context as group:
                    self.group = group
                    self.record.groups.append(group)
                    self.handlers.client = group.client
                    await self._body(group)
                nursery.cancel_scope.cancel()

    def _options(self) -> GroupOptions:
        return OPTIONS if self.case.isolation == "slot" else TASK_OPTIONS

    def _make_store(self) -> SweepStore:
        return SweepStore(self.record, self.own)

    async def _body(self, group: WorkerGroup) -> None:
        async with trio.open_nursery() as nursery:

            async def until_stopped() -> None:
                await group.wait_stopped()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_stopped)
            await self.journal.everything.wait()
            nursery.cancel_scope.cancel()

    async def _sibling(self) -> None:
        await self.boom.wait()
        raise Boom

    async def _watch(self) -> None:
        await trio.sleep(VIRTUAL_LIMIT)
        self.give_up(f"still running after {VIRTUAL_LIMIT:g} virtual seconds")

    def give_up(self, why: str) -> None:
        """End a run that would hang: lift every shield and cancel."""
        self.record.stuck = self.record.stuck or why
        self.outer.cancel()
        for task in _tasks(trio.lowlevel.current_root_task()):
            status = task._cancel_status
            while status is not None:
                status._scope.shield = False
                status = status._parent
        self.boom.set()

    def fire(self) -> None:
        """Do what the mode says. Called between two task steps."""
        self.record.injected_at.append(trio.current_time())
        getattr(self, f"_fire_{self.case.mode}")()

    def _fire_cancel(self) -> None:
        self.outer.cancel()

    def _fire_sibling(self) -> None:
        self.boom.set()

    def _fire_stop(self) -> None:
        if self.group is not None:
            self.group.stop()

    def _fire_sigint(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def _fire_handler_sigint(self) -> None:
        self.handlers.interrupt = self._fire_sigint

    def _fire_lose(self) -> None:
        if self.group is not None:
            self.group._registrations[-1].lose("injected")

    def _fire_retire(self) -> None:
        for group_id, row in list(self.database.tables.groups.items()):
            if row.closed_at is None:
                self.database.retire(group_id)


TASK_OPTIONS: Final = GroupOptions(
    name="sweep", grace_period=1.0, close_timeout=5.0, call_timeout=4.0, isolation="task"
)


def run(case: Case) -> Record:
    """Run one case and return what it left behind; raises nothing."""
    with deterministic(case.seed) as own, _quiet():
        scenario = Scenario(case, own)
        record = scenario.record
        shots = [k for k in (case.k, case.k2) if k is not None]
        injector = Injector(shots, scenario.fire, scenario.give_up)
        clock = trio.testing.MockClock(autojump_threshold=0)
        try:
            trio.run(scenario.main, clock=clock, instruments=[injector])
        except BaseException as exc:
            record.error = exc
        record.steps = injector.steps
        record.ended_at = clock.current_time()
    return record


@contextmanager
def _quiet() -> Iterator[None]:
    """The runs provoke errors by the thousand; formatting them would take most of the time."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _row(queue: triojobs.Queue[str, Any], kind: str) -> NewRow:
    return new_row(queue, triojobs.NewJob(kind))


def _tasks(root: trio.lowlevel.Task | None) -> Iterator[trio.lowlevel.Task]:
    if root is None:
        return
    yield root
    for nursery in root.child_nurseries:
        for task in nursery.child_tasks:
            yield from _tasks(task)
