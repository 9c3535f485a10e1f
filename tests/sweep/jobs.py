"""The handlers under test, and the journal of what they did.

Each kind of job is one way to treat cancellation. The journal is written by the handlers alone and
compared with the rows afterwards; it knows nothing of ledgers and stores.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

import triojobs
from triojobs._model import Fence

KINDS = (
    "instant",
    "sleeps",
    "fails_once",
    "nursery",
    "raises_while_cancelled",
    "enqueues",
    "commits",
    "swallows",
)
CHILD = "child"  # enqueued by `enqueues`


@dataclass(eq=False)
class Run:
    """One call of a handler.

    `ended`: running, returned, failed (raised while nobody cancelled it), interrupted. `committed`:
    Job.commit has returned.
    """

    job_id: int
    kind: str
    fence: Fence
    attempt: int
    ended: str = "running"
    committed: bool = False

    @property
    def counts(self) -> str | None:
        """The status that this run must leave behind; None: the claim is given back."""
        if self.committed or self.ended == "returned":
            return "done"
        return "failed" if self.ended == "failed" else None


@dataclass
class Journal:
    """What the handlers did."""

    runs: list[Run] = field(default_factory=list)
    active: Counter[int] = field(default_factory=Counter)
    overlaps: list[int] = field(default_factory=list)
    completed: set[int] = field(default_factory=set)
    everything: trio.Event = field(default_factory=trio.Event)

    def begin(self, job: triojobs.Job[Any]) -> Run:
        run = Run(job.id, job.payload, job.fence, job.attempt)
        self.runs.append(run)
        if self.active[job.id]:
            self.overlaps.append(job.id)
        self.active[job.id] += 1
        return run

    def end(self, run: Run) -> None:
        self.active[run.job_id] -= 1
        if run.counts == "done":
            self.completed.add(run.job_id)
            if len(self.completed) == len(KINDS) + 1:
                self.everything.set()


class Handlers:
    """Runs each kind of job and keeps the journal.

    Args:
        unit: seconds that a piece of work takes. client: of the group, once it is open.
    """

    def __init__(self, journal: Journal, unit: float) -> None:
        self.journal = journal
        self.unit = unit
        self.interrupt: Callable[[], None] | None = None  # raises KeyboardInterrupt in the next handler
        self.client: triojobs.Client
        self.children = triojobs.Queue("children", str)

    async def handle(self, job: triojobs.Job[str]) -> str:
        run = self.journal.begin(job)
        body: Callable[[triojobs.Job[str], Run], Awaitable[None]] = getattr(self, job.payload)
        try:
            if self.interrupt is not None:
                interrupt, self.interrupt = self.interrupt, None
                interrupt()
            await body(job, run)
            if self.interrupt is not None:
                interrupt, self.interrupt = self.interrupt, None
                interrupt()
        except BaseException as exc:
            # The rule of the runtime, looked at from outside: what is raised under a cancel is its echo.
            cancelled = trio.current_effective_deadline() == -math.inf
            foreign = not isinstance(exc, Exception)
            run.ended = "interrupted" if cancelled or foreign else "failed"
            raise
        else:
            run.ended = "returned"
            return job.payload
        finally:
            self.journal.end(run)

    async def instant(self, job: triojobs.Job[str], run: Run) -> None:
        """Has no checkpoint at all."""

    child = instant

    async def sleeps(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.sleep(self.unit)

    async def fails_once(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.lowlevel.checkpoint()
        if job.attempt == 1:
            raise ValueError("the first attempt fails")

    async def nursery(self, job: triojobs.Job[str], run: Run) -> None:
        """Has tasks of its own and a clean-up that takes its time."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, self.unit)
                nursery.start_soon(trio.sleep, 2 * self.unit)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(4 * self.unit)

    async def raises_while_cancelled(self, job: triojobs.Job[str], run: Run) -> None:
        try:
            await trio.sleep(2 * self.unit)
        except trio.Cancelled as exc:
            raise RuntimeError("the clean-up failed") from exc

    async def enqueues(self, job: triojobs.Job[str], run: Run) -> None:
        while True:
            try:
                await self.client.try_enqueue(self.children, CHILD, key=f"child of {job.id}")
                return
            except triojobs.DatabaseError:
                await trio.sleep(self.unit)  # the key makes the repetition safe

    async def commits(self, job: triojobs.Job[str], run: Run) -> None:
        while not run.committed:
            try:
                await job.commit(lambda transaction: "committed")
            except triojobs.DatabaseError as exc:
                if exc.committed is not False:
                    raise
            else:
                run.committed = True
        await trio.sleep(self.unit)

    async def swallows(self, job: triojobs.Job[str], run: Run) -> None:
        """Ignores the first cancel and returns."""
        with contextlib.suppress(trio.Cancelled):
            await trio.sleep(2 * self.unit)
