"""The program under test, everybody beside it, and the ways to disturb it.

Our group runs in the main task, as a program's would; the rival's group and the outsider's client stand
for other processes: nothing is injected into them. What goes to the database is also looked at: some
invariants must hold at every moment, and can only break when the database changes.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, TypeVar

import trio

import triojobs
from triojobs._group import GroupContext
from triojobs._lease import Lease
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._model import Registration
from triojobs._open import ClientContext
from triojobs._queue import Worker
from triojobs._store import Compared

from .conductor import Conductor
from .determinism import lift_shields
from .jobs import DISOBEYS, Handlers
from .program import CHILDREN, JOBS, RETRY, rows
from .record import Case, ClaimName, Exit, Record

T = TypeVar("T")

VIRTUAL_LIMIT: Final = 200.0  # seconds; longer is a hang
HEAD_START: Final = 0.03  # seconds of ours before the rival: it shall get what is given back, not everything
PATIENCE: Final = 3  # how often a run is asked to end before its loop is broken off

FAULTS: Final = ("refused", "lost_before", "lost_after", "late")
"""refused: a clean, transient error. lost: no reply, before or after the call had its effect. late: no
reply, and the effect comes when nobody waits for it any more (a single statement whose client gave up)."""

# Others are transactions that end with their connection, or whose repetition waits for the first one's lock.
CAN_BE_LATE: Final = frozenset({"claim", "settle", "register", "mark_waiting", "enqueue_each", "beat"})


class Boom(Exception):
    """What the sibling raises."""


class PlainStore(MemoryStore):
    """A MemoryStore whose calls take a time of their own each, and which is looked at after each."""

    def __init__(self, world: World) -> None:
        super().__init__(world.database, crossing=self._cross)
        self.world = world
        world.record.stores.append(self)

    async def _cross(self, operation: str, fn: Callable[[], T], /) -> T:
        def looked_at() -> T:
            try:
                return fn()
            finally:
                self.world.look()

        return await self.world.conductor.cross(looked_at)


class FaultyStore(PlainStore):
    """The store under test: its calls have numbers, and one may fail."""

    async def register(self, registration: Registration, lease: Lease) -> None:
        self.world.record.ours.add(registration.group_id)
        await super().register(registration, lease)

    async def compare(
        self,
        group_id: uuid.UUID,
        known: Callable[[], Sequence[tuple[int, int]]],
        missing: Callable[[Sequence[tuple[int, int]]], None],
    ) -> Compared | None:
        swept: set[ClaimName] = set()

        def noted() -> Sequence[tuple[int, int]]:
            claims = known()
            swept.update(
                (row.id, row.group_id, row.claim_no)
                for row in self.world.database.tables.leases.values()
                if row.group_id == group_id and (row.id, row.claim_no) not in claims
            )
            return claims

        try:
            return await super().compare(group_id, noted, missing)
        except triojobs.DatabaseError:
            self.world.record.swept |= swept  # without the reply the report cannot count them
            raise

    async def _call(
        self,
        operation: str,
        line: trio.CapacityLimiter,
        effect: Callable[[], T],
        reply: Callable[[T], None] | None = None,
        *,
        deadline: float | None = None,
    ) -> T:
        record = self.world.record

        def numbered() -> T:
            # In the thread: calls that were cancelled on entry have no number.
            fault, j = record.case.fault, len(record.calls)
            record.calls.append(operation)
            if fault is None or fault.j != j:
                return effect()
            record.failed_call = operation
            if fault.kind == "lost_after" or (fault.kind == "late" and operation not in CAN_BE_LATE):
                self._note_lost(operation, effect())
            elif fault.kind == "late":
                self.world.later(lambda: self._note_lost(operation, effect()))
            raise triojobs.DatabaseError(
                f"call {j} fails: {fault.kind}",
                operation=operation,
                transient=True,
                committed=False if fault.kind == "refused" else None,
            )

        return await super()._call(operation, line, numbered, reply, deadline=deadline)

    def _note_lost(self, operation: str, value: Any) -> None:
        if operation == "claim":
            _, claims = value
            self.world.record.lost_claims |= {(c.job_id, c.group_id, c.claim_no) for c in claims}


class World:
    """Everything that runs in one run. `break_off` is called when it does not end."""

    def __init__(self, case: Case, conductor: Conductor, break_off: Callable[[], None]) -> None:
        self.case = case
        self.break_off = break_off
        self._given_up = 0
        self.conductor = conductor
        self.database = MemoryDatabase()
        self.record = Record(case, self.database)
        self.program = self.record.program
        self.handlers = Handlers(self.record.journal, conductor, CHILDREN)
        self.outer = trio.CancelScope()
        self.boom = trio.Event()
        self.quiet = trio.Event()
        self.others_began, self.others_ended, self.ours_ended = trio.Event(), trio.Event(), trio.Event()
        self.outsider_busy = self.program.outsider
        self.nursery: trio.Nursery
        self.database.tables.enqueue(rows(self.program.kinds), 0.0)

    async def main(self) -> None:
        trio.lowlevel.spawn_system_task(self._watch)
        trio.lowlevel.spawn_system_task(self._others)
        try:
            await self.others_began.wait()
            await self._ours()
        except BaseException as exc:
            self.record.error = exc
        self.record.exit = self._take_stock()
        self.record.points = self.conductor.points
        self.ours_ended.set()
        while not self.others_ended.is_set():
            try:
                await self.others_ended.wait()
            except KeyboardInterrupt as exc:  # it came when we were leaving already
                self.record.failed_with(exc)

    async def _others(self) -> None:
        """Not below the main task: a Ctrl-C there is none of their business."""
        try:
            async with trio.open_nursery() as self.nursery:
                if self.program.rival:
                    self.nursery.start_soon(self._rival)
                if self.program.outsider:
                    self.nursery.start_soon(self._outsider)
                self.others_began.set()
                await self.ours_ended.wait()
                if self.program.rival:
                    await self.quiet.wait()
                else:
                    self.nursery.cancel_scope.cancel()
        except BaseException as exc:
            self.record.stuck = self.record.stuck or f"the others fell over {exc!r}"
        finally:
            self.others_ended.set()

    async def _ours(self) -> None:
        with self.outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sibling)
                context = GroupContext(
                    partial(FaultyStore, self), self._workers(self.handlers), self.record.options
                )
                async with context as group:
                    self.record.group = group
                    self.handlers.client = group.client
                    await self._until_quiet(group)
                nursery.cancel_scope.cancel()

    async def _until_quiet(self, group: triojobs.WorkerGroup) -> None:
        async with trio.open_nursery() as nursery:

            async def until_stopped() -> None:
                await group.wait_stopped()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_stopped)
            await self.quiet.wait()
            nursery.cancel_scope.cancel()

    async def _sibling(self) -> None:
        await self.boom.wait()
        self.record.raised_boom = True
        raise Boom

    def _workers(self, handlers: Handlers) -> list[Worker[Any, Any]]:
        return [
            Worker(JOBS, handlers.handle, concurrency=self.program.slots, retry=RETRY),
            Worker(CHILDREN, handlers.handle, concurrency=1, retry=RETRY),
        ]

    # Other processes.

    async def _rival(self) -> None:
        handlers = Handlers(self.record.journal, self.conductor, CHILDREN)
        context = GroupContext(partial(PlainStore, self), self._workers(handlers), self.record.options)
        with trio.move_on_after(HEAD_START):
            await self.ours_ended.wait()
        async with context as group:
            self.record.rival = group
            handlers.client = group.client
            await self.quiet.wait()

    async def _outsider(self) -> None:
        async with ClientContext(PlainStore(self), close_timeout=5.0) as client:
            await self._interfere(client)
        self.outsider_busy = False
        self.look()

    async def _interfere(self, client: triojobs.Client) -> None:
        first, second = await client.enqueue_many(JOBS, ["sleeps", triojobs.NewJob("instant", delay=0.3)])
        keyed = await client.enqueue(JOBS, "fails_once", key="outsider", delay=0.1)
        await self._cancel(client, 1 + self.case.seed % len(self.program.kinds))
        swapped = await client.try_enqueue(JOBS, "sleeps", key="outsider", on_conflict="replace")
        assert swapped.id == keyed
        if swapped.replaced:
            self.record.replaced.add(keyed)
        await self._cancel(client, first)
        await self._cancel(client, second)
        await client.enqueue(JOBS, "instant")

    async def _cancel(self, client: triojobs.Client, job_id: int) -> None:
        cancels = self.record.cancels
        cancels.setdefault(job_id, math.inf)
        if await client.cancel(job_id, reason="by an outsider"):
            cancels[job_id] = min(cancels[job_id], trio.current_time())

    def later(self, effect: Callable[[], object]) -> None:
        """Have an effect when its caller has given up."""

        async def happen() -> None:
            await self.conductor.pause()
            await self.conductor.pause()
            effect()
            self.look()

        self.nursery.start_soon(happen)

    # The way out of a run that would hang.

    async def _watch(self) -> None:
        while True:
            await trio.sleep(VIRTUAL_LIMIT)
            self.give_up(f"still running after {VIRTUAL_LIMIT:g} virtual seconds")

    def give_up(self, why: str) -> None:
        """Lift every shield and cancel; if that does not help, break the loop off."""
        self.record.stuck = self.record.stuck or why
        self._given_up += 1
        if self._given_up > PATIENCE:
            self.break_off()
        for task in _tasks(trio.lowlevel.current_root_task()):
            lift_shields(task)
        self.outer.cancel()
        self.nursery.cancel_scope.cancel()
        self.quiet.set()

    # Looking.

    def look(self) -> None:
        """Note what must hold at every moment and does not; see whether all is done."""
        self.record.noticed += _unowned(self.record)
        self.record.noticed += _unleased(self.record)
        tables = self.database.tables
        if not (tables.ready or tables.scheduled or tables.leases or self.outsider_busy):
            self.quiet.set()

    def _take_stock(self) -> Exit:
        record, tables = self.record, self.database.tables
        registrations = [] if record.group is None else record.group._registrations
        lines = [vars(store).items() for store in record.stores if isinstance(store, FaultyStore)]
        return Exit(
            at=trio.current_time(),
            leases=[row.id for row in tables.leases.values() if row.group_id in record.ours],
            open_groups=[g for g in record.ours if g in tables.groups and tables.groups[g].closed_at is None],
            handlers=[run.name for run in record.journal.running() if run.fence[0] in record.ours],
            held=[job_id for live in registrations for job_id in live.ledger.held_ids()],
            borrowed=[
                name
                for name, line in chain.from_iterable(lines)
                if isinstance(line, trio.CapacityLimiter) and line.borrowed_tokens
            ],
        )


def _unowned(record: Record) -> Iterator[str]:
    """Rows that are claimed although no ledger knows: nobody would settle or give them back."""
    tables = record.database.tables
    for group in (record.group, record.rival):
        for live in () if group is None else group._registrations:
            known = set(live.ledger.known())
            for row in tables.leases.values():
                claim = (row.id, row.claim_no)
                lost = (row.id, row.group_id, row.claim_no) in record.lost_claims
                if row.group_id == live.group_id and claim not in known and not lost:
                    yield f"owned-at-all-times: claim {claim} is leased, and no ledger has it"


def _unleased(record: Record) -> Iterator[str]:
    """Handlers at work whose job anybody may claim."""
    tables = record.database.tables
    for run in record.journal.running():
        group_id, claim_no = run.fence
        if tables.fenced(group_id, run.job_id, claim_no) is not None:
            continue
        ended = tables.outcome_of_claim(group_id, run.job_id, claim_no)
        excused = ended == "done" or (ended is not None and "retire" in record.injected)
        if not excused and not (run.kind in DISOBEYS and "lose" in record.injected):
            yield f"leased-while-it-runs: {run.name} has no lease"


def _tasks(root: trio.lowlevel.Task | None) -> Iterator[trio.lowlevel.Task]:
    if root is None:
        return
    yield root
    for nursery in root.child_nurseries:
        for task in nursery.child_tasks:
            yield from _tasks(task)
