"""For the tests of programs that use triojobs.

In memory, without a server, and with Trio's clock (so `autojump_clock` works)::

    async def test_a_welcome_is_sent(autojump_clock):
        database = testing.MemoryDatabase()
        async with testing.open_memory_client(database) as client:
            job_id = await client.enqueue(emails, SendEmail("ada@example.com"))
            report = await testing.drain(database, workers)
            assert await client.result(job_id, emails) == Receipt("1")

One handler against a made-up job::

    run = await testing.run_handler(triojobs.Worker(emails, send_email), SendEmail("nobody"), attempt=3)
    assert run.outcome == "failed" and run.delay > 60

A handler cancelled at every instant at which it can be cancelled, and then run to its end::

    testing.explore(worker, SendEmail("ada@example.com"), before=outbox.clear, check=lambda run: outbox.one())

The memory store obeys the same contract suite as PostgreSQL. It is no place for jobs of a program that
serves somebody: it dies with the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, Generic, TypeVar, Unpack

import trio

from ._client import info_of
from ._explore import Exploration as Exploration
from ._explore import ExplorationError as ExplorationError
from ._explore import Explored as Explored
from ._explore import Handler, as_worker
from ._explore import explore as explore
from ._group import GroupContext, checked_workers, default_name, with_workers
from ._job import Job
from ._memory import MemoryDatabase as MemoryDatabase
from ._memory import MemoryStore as MemoryStore
from ._memory import MemoryTransaction as MemoryTransaction
from ._middleware import wrapped
from ._model import JobInfo, NewRow, Outcome, ShutdownReport
from ._open import ClientContext, GroupKeywords, open_worker_group
from ._options import GroupOptions, checked_count
from ._queue import NewJob, Worker, new_row

__all__ = [
    "Exploration",
    "ExplorationError",
    "Explored",
    "HandlerRun",
    "MemoryDatabase",
    "MemoryStore",
    "MemoryTransaction",
    "drain",
    "explore",
    "open_memory_client",
    "open_memory_group",
    "run_handler",
]

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")

LOOK: Final = 0.05  # seconds between looks of `drain` for jobs that became due
CLOSE_TIMEOUT: Final = 5.0


def open_memory_group(
    database: MemoryDatabase, workers: Sequence[Worker[Any, Any]], **options: Unpack[GroupKeywords]
) -> GroupContext:
    """Open a worker group whose jobs are in memory: `async with open_memory_group(…) as group: …`.

    Args:
        database: made inside a Trio program; share it between groups and clients of one test.
        options: those of `open_worker_group` that do not name connections.

    Raises: as `open_worker_group`. Cancellation: as there.
    """
    found = checked_workers(workers)
    given: dict[str, Any] = {"name": default_name(), **options}
    settings = with_workers(GroupOptions(**given), found)
    make_store = partial(MemoryStore, database, job_connections=settings.job_connections or 1)
    return GroupContext(make_store, found, settings)


def open_memory_client(database: MemoryDatabase) -> ClientContext:
    """Open a client of jobs in memory: `async with open_memory_client(database) as client: …`."""
    return ClientContext(MemoryStore(database), CLOSE_TIMEOUT)


async def drain(
    database: MemoryDatabase | str,
    workers: Sequence[Worker[Any, Any]],
    *,
    scheduled: bool = True,
    **options: Unpack[GroupKeywords],
) -> ShutdownReport:
    """Run the workers until nothing is left in their queues; return the group's report.

    Args:
        database: a MemoryDatabase, or the conninfo of a migrated PostgreSQL.
        scheduled: whether to wait for jobs that are due later, retries among them, too. On a memory
            database with `autojump_clock` that takes no time.
        options: those of `open_worker_group`.

    Raises: as `open_worker_group`. A job that can never end keeps it for ever: set a limit with
        `trio.fail_after`.

    Cancellation: at any time; what runs is given back.
    """
    opened = (
        open_worker_group(database, workers, **options)
        if isinstance(database, str)
        else open_memory_group(database, workers, **options)
    )
    queues = [worker.queue.name for worker in checked_workers(workers)]
    async with opened as group:
        while True:
            await group.wait_idle()
            if not scheduled or await group._store.idle(queues, scheduled=True):
                break
            pause = (
                LOOK if isinstance(database, str) else database.tables.next_due(queues) - trio.current_time()
            )
            await trio.sleep(max(LOOK, pause))
    return group.report


@dataclass(frozen=True, slots=True)
class HandlerRun(Generic[ResultT]):
    """What became of a job that `run_handler` ran once.

    Attributes:
        outcome: "done", "failed", "killed", "cancelled" or "snoozed".
        result: what the handler returned (or `job.commit` committed), through its codec; None unless done.
        error: text of the failure, as it is stored. exception: what the handler raised, or None.
        delay: seconds until the job would run again; None: it will not.
        enqueued: jobs that the handler enqueued through its transaction or the client that it was given.
        writes: what `work` appended to its transaction's `writes`.
        job: the job as it stands now.
    """

    outcome: Outcome
    result: ResultT | None
    error: str | None
    exception: BaseException | None
    delay: float | None
    enqueued: Sequence[JobInfo[Any]]
    writes: Sequence[Any]
    job: JobInfo[Any]


async def run_handler(
    worker: Worker[PayloadT, ResultT] | Handler[PayloadT, ResultT],
    payload: PayloadT,
    *,
    attempt: int = 1,
    max_attempts: int = 5,
    last_error: str = "made up",
    priority: int = 0,
    key: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    deadline: datetime | None = None,
    database: MemoryDatabase | None = None,
) -> HandlerRun[ResultT]:
    """Run a worker's handler once, against a made-up job, exactly as a worker group would.

    Encoding, timeout, deadline, signals, `job.commit` (with a `MemoryTransaction` in place of a
    connection) and the classification of errors are those of production; only the tables are in memory.

    Args:
        worker: or a handler alone, which gets a queue of the payload's class.
        attempt: which attempt the handler sees, from 1 to `max_attempts`; earlier ones failed with
            `last_error`. Others: as `Client.enqueue`. database: where the job is made; default: a new one.

    Raises:
        OptionError: an argument is out of its range.
        KeyboardInterrupt, SystemExit, …: what a handler raises beyond Exception goes on up.

    Cancellation: at any time.
    """
    worker = as_worker(worker, payload)
    checked_count("attempt", attempt, most=checked_count("max_attempts", max_attempts))
    database = MemoryDatabase() if database is None else database
    new = NewJob(
        payload,
        max_attempts=max_attempts,
        priority=priority,
        key=key,
        metadata=metadata,
        timeout=timeout,
        deadline=deadline,
    )
    once = Once(worker, database, new_row(worker.queue, new), attempt, last_error)
    # No grace: what the handler left behind in its own queue is claimed, but not to be run.
    options = GroupOptions(name="run_handler", job_connections=1, grace_period=0.0)
    async with GroupContext(partial(EndingStore, database, once.ended), [once.worker], options):
        await once.ended.wait()
    return once.run()


class EndingStore(MemoryStore):
    """Tells when the first claim has ended, also of a job whose handler is never called."""

    def __init__(self, database: MemoryDatabase, ended: trio.Event) -> None:
        super().__init__(database)
        self._ended = ended

    async def settle(self, *args: Any, **options: Any) -> None:
        await super().settle(*args, **options)
        self._ended.set()


class Once(Generic[PayloadT, ResultT]):
    """A made-up job, a worker whose handler takes it once, and what came of it."""

    def __init__(
        self,
        worker: Worker[PayloadT, ResultT],
        database: MemoryDatabase,
        row: NewRow,
        attempt: int,
        last_error: str,
    ) -> None:
        self.ended: trio.Event = trio.Event()
        self.worker: Worker[PayloadT, ResultT] = Worker(
            worker.queue, self._handle, concurrency=1, timeout=worker.timeout, retry=worker.retry
        )
        self._original = worker
        self._call_handler = wrapped(worker.handler, worker.middleware)
        self._database = database
        self._exception: BaseException | None = None
        self._job_id = database.make_up(row, attempt=attempt, last_error=last_error)
        self._jobs_before = set(database.tables.jobs)
        self._writes_before = len(database.writes)
        self._outcomes_before = attempt - 1

    async def _handle(self, job: Job[PayloadT]) -> ResultT:
        if job.id != self._job_id or self.ended.is_set():
            await trio.sleep_forever()  # the next attempt, or a follow-up in the same queue: not asked for
        try:
            result: ResultT = await self._call_handler(job)
            return result
        except BaseException as exc:
            self._exception = exc
            raise
        finally:
            self.ended.set()

    def run(self) -> HandlerRun[ResultT]:
        """Read what became of the job."""
        database, queue = self._database, self._original.queue
        raw = database.tables.read(self._job_id)
        assert raw is not None
        waiting = database.tables.scheduled.get(self._job_id)
        ended = database.outcomes_of(self._job_id)[self._outcomes_before :]
        untouched = Outcome.RELEASED if waiting is None else Outcome.SNOOZED
        outcome = Outcome(ended[-1].status) if ended else untouched
        data = ended[-1].result if ended else None
        new = sorted(set(database.tables.jobs) - self._jobs_before)
        return HandlerRun(
            outcome=outcome,
            result=None if data is None else queue.decode_result(data, queue.codec.name),
            error=ended[-1].error if ended else None,
            exception=self._exception,
            delay=None if waiting is None else waiting.run_at - database.clock(),
            enqueued=[info_of(job, None) for job_id in new if (job := database.tables.read(job_id))],
            writes=database.writes[self._writes_before :],
            job=info_of(raw, queue),
        )
