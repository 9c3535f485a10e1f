"""Cancel a handler at every instant at which it can be cancelled, for the tests of programs.

A schedule point is the boundary before one step of any task. Cancels are delivered at checkpoints and
each checkpoint ends a step, so cancelling before each step in turn covers every state in which an
outside cancel can be observed. After each cancel another group finishes the job, as after a deploy.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar, Unpack

import trio
import trio.testing

from ._client import info_of
from ._errors import OptionError, TriojobsError
from ._group import GroupContext
from ._job import Job
from ._memory import MemoryDatabase, MemoryStore
from ._middleware import wrapped
from ._model import JobInfo, JobStatus
from ._options import GroupOptions, checked_count
from ._queue import JobOptions, NewJob, Queue, Worker, new_row

__all__ = ["Exploration", "ExplorationError", "Explored", "explore"]

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")
Handler = Callable[[Job[PayloadT]], Awaitable[ResultT]]

STEPS: Final = 20_000  # task steps in which a job must have ended; one call of a handler takes some fifty
# Nothing but the job makes steps: no polls and no beats while it waits for its next attempt.
OPTIONS: Final = GroupOptions(
    name="explore",
    job_connections=1,
    lease_duration=4e6,
    lease_margin=1.0,
    beat_interval=1e6,
    poll_interval=1e6,
    listening_poll_interval=1e6,
)


@dataclass(frozen=True, slots=True)
class Explored(Generic[ResultT]):
    """One run, as `check` sees it.

    Attributes:
        seed, k: which run: cancelled before step `k`; None: not at all.
        calls: how often the handler was called. job: as it stands after its end.
        writes: what `work` appended to its transactions' `writes`, committed ones only.
        enqueued: the jobs that exist beside this one.
    """

    seed: int
    k: int | None
    calls: int
    job: JobInfo[Any]
    writes: list[Any]
    enqueued: list[JobInfo[Any]]

    @property
    def result(self) -> Any:
        """What the handler returned, as plain values."""
        return self.job.result


@dataclass(frozen=True, slots=True)
class Exploration:
    """What `explore` did.

    Attributes:
        runs: how many in all. cancelled: in how many the handler was called once more because of it.
    """

    runs: int
    cancelled: int


class ExplorationError(AssertionError):
    """A run in which something did not hold.

    Attributes:
        seed, k: repeat it alone with `explore(…, only=(seed, k))`.
    """

    def __init__(self, what: str, *, seed: int, k: int | None) -> None:
        self.seed = seed
        self.k = k
        where = "without a cancel" if k is None else f"cancelled before step {k}"
        super().__init__(f"{what} ({where}, seed {seed}); repeat it with explore(…, only=({seed}, {k}))")


def as_worker(
    given: Worker[PayloadT, ResultT] | Handler[PayloadT, ResultT], payload: PayloadT
) -> Worker[PayloadT, ResultT]:
    """Return the worker, or one of a made-up queue for a handler alone."""
    if isinstance(given, Worker):
        return given
    if not callable(given):
        raise OptionError("worker", given, "a triojobs.Worker, or a handler")
    queue: Queue[PayloadT, ResultT] = Queue("handler", type(payload))
    return Worker(queue, given)


def explore(
    worker: Worker[PayloadT, ResultT] | Handler[PayloadT, ResultT],
    payload: PayloadT,
    *,
    check: Callable[[Explored[ResultT]], object] | None = None,
    before: Callable[[], object] | None = None,
    seeds: int = 1,
    only: tuple[int, int | None] | None = None,
    **job_options: Unpack[JobOptions],
) -> Exploration:
    """Cancel a worker's handler before each schedule point in turn, finish the job, and check.

    Each run has a memory database and a mock clock of its own: sleeps take no time. In `job.commit` the
    handler gets a `MemoryTransaction`. Handlers that cross to threads or talk to servers do that for
    real, while the mock clock jumps: give them stand-ins.

    Held for every run by `explore` itself: the group ends; nothing stays running; the cancel costs no
    attempt; a handler that returned, or committed, is done and is not called again; the job ends.

    Args:
        worker: its queue, handler, timeout and retry policy are used, one job at a time. A handler alone
            gets a queue of the payload's class.
        payload: of the job. job_options: its options, as of `Client.enqueue`.
        check: called after each run; raises (AssertionError) when your own invariant does not hold, for
            instance that an e-mail was sent once.
        before: called before each run, to reset your stand-ins.
        seeds: how many orders of the scheduler to try (1 to 10,000).
        only: (seed, k) of one run to repeat.

    Raises:
        ExplorationError: something did not hold; its cause is what `check` raised, if that was it.
        OptionError: an argument is refused. TriojobsError: called from inside Trio.

    Source: the sweep of triojobs' own tests, which does the same to the worker group itself.
    """
    if trio.lowlevel.in_trio_run():
        raise TriojobsError(
            "explore was called from the wrong place",
            operation="exploring",
            hint="it runs Trio itself, many times: call it from a synchronous test",
        )
    worker = as_worker(worker, payload)
    new = NewJob(payload, **job_options)
    new_row(worker.queue, new)  # refused before the first run
    if only is not None:
        return _summary([_run(worker, new, *only, check, before)])
    courses: list[Course[ResultT]] = []
    for seed in range(checked_count("seeds", seeds, most=10_000)):
        plain = _run(worker, new, seed, None, check, before)
        courses.append(plain)
        courses += [_run(worker, new, seed, k, check, before) for k in range(plain.steps)]
    return _summary(courses)


@dataclass
class Course(Generic[ResultT]):
    """The making of one run.

    Written by the handler: how often it was called and returned, and whether a cancel met it.
    `steps`: of the first group. `cancelled`: it was cancelled.
    """

    worker: Worker[Any, ResultT]
    new: NewJob[Any]
    seed: int
    k: int | None
    calls: int = 0
    returned: int = 0
    interrupted: bool = False
    steps: int = 0
    cancelled: bool = False
    ended: trio.Event = field(default_factory=trio.Event)

    def fail(self, what: str) -> ExplorationError:
        return ExplorationError(what, seed=self.seed, k=self.k)

    async def main(self) -> Explored[ResultT]:
        database = MemoryDatabase()
        job_id = database.make_up(new_row(self.worker.queue, self.new), attempt=1, last_error="")
        with Cancel(self.k) as first:
            await self._work(database, job_id)
        self.steps, self.cancelled = first.steps, first.scope.cancel_called
        self._check_given_back(database, job_id)
        with Cancel(None):
            await self._work(database, job_id)
        if not database.status_of(job_id).ended:
            raise self.fail(f"the job did not end within {STEPS} steps of its tasks")
        return self._explored(database, job_id)

    async def _work(self, database: MemoryDatabase, job_id: int) -> None:
        """Open a group, and leave it when the job has ended."""
        if database.status_of(job_id).ended:
            return
        own = Worker(
            self.worker.queue,
            self._handle,
            concurrency=1,
            timeout=self.worker.timeout,
            retry=self.worker.retry,
        )
        make_store = partial(WatchedStore, database, job_id, self.ended)
        async with GroupContext(make_store, [own], OPTIONS):
            await self.ended.wait()

    async def _handle(self, job: Job[Any]) -> ResultT:
        self.calls += 1
        try:
            handler = wrapped(self.worker.handler, self.worker.middleware)
            value: ResultT = await handler(job)
        except trio.Cancelled:
            self.interrupted = True
            raise
        self.returned += 1
        return value

    def _check_given_back(self, database: MemoryDatabase, job_id: int) -> None:
        raw = database.tables.read(job_id)
        assert raw is not None
        status = JobStatus(raw.status)
        if status is JobStatus.RUNNING:
            raise self.fail("the job is running although its group has ended")
        failed = sum(o.status == "failed" for o in database.outcomes_of(job_id))
        if self.cancelled and not status.ended and raw.attempts != failed:
            raise self.fail(f"the cancel cost an attempt: {raw.attempts} counted, {failed} failed")
        if self.returned and status is not JobStatus.DONE:
            raise self.fail(f"the handler returned, but the job is {status}")
        database.check_invariants()

    def _explored(self, database: MemoryDatabase, job_id: int) -> Explored[ResultT]:
        database.check_invariants()
        raw = database.tables.read(job_id)
        assert raw is not None
        if self.returned > 1:
            raise self.fail(f"the handler ran {self.returned} times to its end")
        others = [database.tables.read(other) for other in sorted(database.tables.jobs) if other != job_id]
        return Explored(
            seed=self.seed,
            k=self.k,
            calls=self.calls,
            job=info_of(raw, None),
            writes=list(database.writes),
            enqueued=[info_of(other, None) for other in others if other is not None],
        )


class Cancel(trio.abc.Instrument):
    """A cancel scope that counts the steps of tasks, and cancels before the k-th of them (or of STEPS)."""

    def __init__(self, k: int | None) -> None:
        self.scope = trio.CancelScope()
        self.steps = 0
        self._at = STEPS if k is None else k

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.steps == self._at:
            self.scope.cancel(reason="explore")
        self.steps += 1

    def __enter__(self) -> Cancel:
        trio.lowlevel.add_instrument(self)
        self.scope.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> bool | None:
        trio.lowlevel.remove_instrument(self)
        return self.scope.__exit__(*exc_info)


class WatchedStore(MemoryStore):
    """Tells when the job has ended."""

    def __init__(self, database: MemoryDatabase, job_id: int, ended: trio.Event) -> None:
        super().__init__(database)
        self._job_id = job_id
        self._ended = ended

    async def settle(self, *args: Any, **options: Any) -> None:
        await super().settle(*args, **options)
        self._look()

    async def commit_work(self, *args: Any) -> Any:
        value = await super().commit_work(*args)
        self._look()
        return value

    def _look(self) -> None:
        if self.status_of(self._job_id).ended:
            self._ended.set()


def _run(
    worker: Worker[Any, ResultT],
    new: NewJob[Any],
    seed: int,
    k: int | None,
    check: Callable[[Explored[ResultT]], object] | None,
    before: Callable[[], object] | None,
) -> Course[ResultT]:
    if before is not None:
        before()
    course = Course(worker, new, seed, k)
    clock = trio.testing.MockClock(autojump_threshold=0)
    with repeatable(seed), _quiet():
        try:
            explored = trio.run(course.main, clock=clock)
        except ExplorationError:
            raise
        except Exception as exc:
            raise course.fail(f"the worker group ended with {exc!r}") from exc
    if check is not None:
        try:
            check(explored)
        except Exception as exc:
            raise course.fail(f"your check failed: {exc}") from exc
    return course


def _summary(courses: list[Course[ResultT]]) -> Exploration:
    return Exploration(runs=len(courses), cancelled=sum(course.interrupted for course in courses))


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Let a seed decide the order of Trio's tasks, and `random`, while the block runs.

    Trio shuffles each batch of tasks on purpose; the two switches that hold it still are private to it
    (a test pins them). Where a later Trio lacks them, runs are as thorough but may not repeat exactly.
    """
    from trio._core import _run as scheduler

    order: random.Random = getattr(scheduler, "_r", random.Random())
    before = getattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", False)
    kept, jitter = order.getstate(), random.getstate()
    setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)  # noqa: B010 - Final for type checkers
    order.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", before)  # noqa: B010
        order.setstate(kept)
        random.setstate(jitter)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hundreds of runs log the same warnings; those of the run that fails are in its error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
