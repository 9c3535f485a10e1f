"""The handlers under test, and the journal of what they did.

Each kind of job is one way to treat cancellation, threads, failures and the queue itself. The journal is
written by the handlers alone and compared with the rows afterwards; it knows nothing of ledgers and
stores.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import trio

import triojobs
from triojobs._model import Fence

T = TypeVar("T")
ClaimName = tuple[int, uuid.UUID, int]  # (job id, group id, claim_no)

KINDS: Final = (
    "instant",
    "sleeps",
    "long",
    "threads",
    "fails_once",
    "nursery",
    "stubborn",
    "raises_while_cancelled",
    "mixed",
    "swallows",
    "times_out",
    "snoozes",
    "dies",
    "enqueues",
    "says_goodbye",
    "enqueues_from_thread",
    "commits",
    "transacts",
)
CHILD: Final = "child"  # what handlers enqueue; the payload names the claim: "child:12:<group id>:3"
COMMITTED: Final = "committed"  # the result of `commits`
TIMEOUT: Final = 3.0  # units that `times_out` may take
ENDS: Final = {"dies": "killed"}  # how a kind's jobs end; all others are done
DISOBEYS: Final = frozenset({"stubborn"})  # longer than the lease's margin after a cancel


class Machine(Protocol):
    """Where threads are: virtual ones, or real."""

    async def cross(self, fn: Callable[[], T]) -> T: ...
    async def block(self, fn: Callable[[], T]) -> T: ...


@dataclass(eq=False)
class Run:
    """One call of a handler.

    Attributes:
        ended: running, returned, failed (raised while nobody cancelled it), interrupted, snoozed, killed.
        limit: when its timeout is over. committed: Job.commit has returned. cut: by a scope of its own.
        struck: by Ctrl-C.
        sure, unsure: jobs that it enqueued, by what the calls told. refused: an enqueue found the
        group closed.
    """

    job_id: int
    kind: str
    fence: Fence
    attempt: int
    started_at: float
    ended: str = "running"
    ended_at: float = math.inf
    limit: float = math.inf
    committed: bool = False
    cut: bool = False
    struck: bool = False
    sure: int = 0
    unsure: int = 0
    refused: bool = False

    @property
    def claim(self) -> ClaimName:
        return (self.job_id, *self.fence)

    @property
    def name(self) -> str:
        return f"job {self.job_id} ({self.kind}, claim {self.fence[1]})"

    @property
    def payload_of_child(self) -> str:
        return f"{CHILD}:{self.job_id}:{self.fence[0]}:{self.fence[1]}"


@dataclass
class Journal:
    """What the handlers did, of all groups."""

    runs: list[Run] = field(default_factory=list)
    active: dict[int, list[Run]] = field(default_factory=dict)
    overlaps: list[tuple[Run, Run]] = field(default_factory=list)

    def begin(self, job: triojobs.Job[str]) -> Run:
        run = Run(job.id, job.payload.partition(":")[0], job.fence, job.attempt, trio.current_time())
        if run.kind == "times_out":
            run.limit = run.started_at + TIMEOUT * UNIT
        self.runs.append(run)
        others = self.active.setdefault(job.id, [])
        self.overlaps += [(other, run) for other in others]
        others.append(run)
        return run

    def end(self, run: Run) -> None:
        run.ended_at = trio.current_time()
        self.active[run.job_id].remove(run)

    def running(self) -> Iterator[Run]:
        for runs in self.active.values():
            yield from runs


UNIT: Final = 0.05  # seconds that a piece of work takes


class Handlers:
    """Runs each kind of job and keeps the journal.

    Args:
        machine: for the handlers that cross to threads.
        queues: of the jobs, and of what they enqueue.
    """

    def __init__(self, journal: Journal, machine: Machine, children: triojobs.Queue[str, Any]) -> None:
        self.journal = journal
        self.interrupt: Callable[[], None] | None = None  # raises KeyboardInterrupt in the next handler
        self.own_scopes: set[trio.CancelScope] = set()
        self.client: triojobs.Client
        self._machine = machine
        self._children = children
        self._snoozed: Counter[int] = Counter()

    async def handle(self, job: triojobs.Job[str]) -> str:
        run = self.journal.begin(job)
        body: Callable[[triojobs.Job[str], Run], Awaitable[None]] = getattr(self, run.kind)
        try:
            self._interrupted()
            with trio.CancelScope() as own:
                self.own_scopes.add(own)
                try:
                    await body(job, run)
                finally:
                    self.own_scopes.discard(own)
            run.cut = own.cancelled_caught
            self._interrupted()
        except BaseException as exc:
            run.ended = _ended(exc)
            run.struck = isinstance(exc, KeyboardInterrupt)
            raise
        else:
            run.ended = "returned"
            return run.kind
        finally:
            self.journal.end(run)

    def _interrupted(self) -> None:
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            interrupt()

    # Without triojobs.

    async def instant(self, job: triojobs.Job[str], run: Run) -> None:
        """Has no checkpoint at all."""

    child = instant

    async def sleeps(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.sleep(UNIT)

    async def long(self, job: triojobs.Job[str], run: Run) -> None:
        """Outlives its group's lease several times."""
        await trio.sleep(50 * UNIT)

    async def threads(self, job: triojobs.Job[str], run: Run) -> None:
        await self._machine.cross(lambda: None)
        await self._machine.cross(lambda: None)

    async def fails_once(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.lowlevel.checkpoint()
        if job.attempt == 1:
            raise ValueError("the first attempt fails")

    async def nursery(self, job: triojobs.Job[str], run: Run) -> None:
        """Has tasks of its own and a clean-up that takes its time."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, UNIT)
                nursery.start_soon(trio.sleep, 2 * UNIT)
        finally:
            await _clean_up(4 * UNIT)

    async def stubborn(self, job: triojobs.Job[str], run: Run) -> None:
        """Goes on for longer than the lease's margin after a cancel."""
        try:
            await trio.sleep(2 * UNIT)
        finally:
            await _clean_up(20 * UNIT)

    async def raises_while_cancelled(self, job: triojobs.Job[str], run: Run) -> None:
        try:
            await trio.sleep(2 * UNIT)
        except trio.Cancelled as exc:
            raise RuntimeError("the clean-up failed") from exc

    async def mixed(self, job: triojobs.Job[str], run: Run) -> None:
        """Ends a cancel as a group of Cancelled and errors."""

        async def spoil() -> None:
            try:
                await trio.sleep(2 * UNIT)
            except trio.Cancelled as exc:
                raise RuntimeError("one task fails on its way out") from exc

        async with trio.open_nursery() as nursery:
            nursery.start_soon(spoil)
            await trio.sleep(2 * UNIT)

    async def swallows(self, job: triojobs.Job[str], run: Run) -> None:
        """Ignores the first cancel and returns."""
        with contextlib.suppress(trio.Cancelled):
            await trio.sleep(2 * UNIT)

    async def times_out(self, job: triojobs.Job[str], run: Run) -> None:
        if job.attempt == 1:
            await trio.sleep(2 * TIMEOUT * UNIT)

    async def snoozes(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.lowlevel.checkpoint()
        self._snoozed[job.id] += 1
        if self._snoozed[job.id] == 1:
            raise triojobs.Snooze(UNIT)

    async def dies(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.lowlevel.checkpoint()
        raise triojobs.Kill("it shall not be run again")

    # With triojobs.

    async def enqueues(self, job: triojobs.Job[str], run: Run) -> None:
        await self._enqueue(run)

    async def says_goodbye(self, job: triojobs.Job[str], run: Run) -> None:
        """Enqueues in its clean-up."""
        try:
            await trio.sleep(UNIT)
        finally:
            with trio.CancelScope(shield=True):
                await self._enqueue(run)

    async def enqueues_from_thread(self, job: triojobs.Job[str], run: Run) -> None:
        def work() -> None:
            self.client.enqueue_from_thread(self._children, run.payload_of_child)

        await self._repeated(run, lambda: self._machine.block(work))

    async def commits(self, job: triojobs.Job[str], run: Run) -> None:
        """Completes itself together with the follow-up job; the rest of it changes nothing."""

        def work(transaction: Any) -> str:
            triojobs.enqueue_on(transaction, self._children, run.payload_of_child)
            return COMMITTED

        await self._repeated(run, lambda: job.commit(work))
        run.committed = True
        await trio.sleep(UNIT)

    async def transacts(self, job: triojobs.Job[str], run: Run) -> None:
        """Writes what survives the failure of its first attempt."""

        def work(transaction: Any) -> None:
            triojobs.enqueue_on(transaction, self._children, run.payload_of_child)

        await self._repeated(run, lambda: job.transact(work))
        if job.attempt == 1:
            raise ValueError("the first attempt fails")

    async def _enqueue(self, run: Run) -> None:
        await self._repeated(run, lambda: self.client.enqueue(self._children, run.payload_of_child))

    async def _repeated(self, run: Run, call: Callable[[], Awaitable[object]]) -> None:
        """Call until it succeeds, and note what it told about what was written."""
        while True:
            try:
                await call()
            except trio.Cancelled:
                raise  # nothing was written
            except triojobs.DatabaseError as exc:
                run.unsure += exc.committed is not False
                await trio.sleep(UNIT)
            except triojobs.StaleClaimError:
                raise
            except trio.ClosedResourceError:
                run.refused = True
                raise
            except BaseException:
                run.unsure += 1
                raise
            else:
                run.sure += 1
                return


async def _clean_up(seconds: float) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(seconds)


def _ended(exc: BaseException) -> str:
    # The rules of the runtime, looked at from outside: signals are what they are; whatever else is raised
    # under a cancel is its echo.
    if isinstance(exc, triojobs.Kill):
        return "killed"
    if isinstance(exc, triojobs.Snooze):
        return "snoozed"
    if trio.current_effective_deadline() == -math.inf or not isinstance(exc, Exception):
        return "interrupted"
    return "failed"
