"""Enqueues in every form, from threads and tasks of the driver; and a client that cancels.

Each batch of tokens is written down before it is tried ("intended") and afterwards as what its producer
knows: enqueued, undone (rolled back, or refused with the word that nothing was committed), or neither
(the reply to a commit was lost). The rows must agree.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import psycopg
import trio
from psycopg.types.json import Jsonb

import triojobs

from .journal import Journal, clock
from .plan import Plan
from .workload import ATTEMPTS, KINDS, PATIENT, TIMEOUTS, Task, main_queue, other_queue

PRODUCERS: Final = 3
BATCH: Final = 12  # most jobs in one transaction
CANCELLED_SHARE: Final = 0.03
CANCEL_RECENT: Final = 60  # cancel one of so many newest jobs: some wait, some run, some have ended
ROLLED_BACK_SHARE: Final = 0.2  # of the outbox' transactions


class Producers:
    """Enqueues until enough jobs are known to be committed.

    Args:
        client: the driver's, open all the time. conninfo: for transactions of the producers' own.
    """

    def __init__(self, plan: Plan, client: triojobs.Client, conninfo: str, journal: Journal) -> None:
        self.committed = 0
        self.recent: list[int] = []
        self._plan = plan
        self._client = client
        self._conninfo = conninfo
        self._journal = journal
        self._tokens = itertools.count(1)
        self._began = clock()

    @property
    def share(self) -> float:
        """How much has been enqueued, 0 to 1."""
        return self.committed / self._plan.jobs

    async def run(self) -> None:
        """Return when `plan.jobs` jobs are committed, spread over `plan.span` seconds."""
        self._began = clock()
        async with trio.open_nursery() as nursery:
            for number in range(PRODUCERS):
                nursery.start_soon(self._produce, random.Random(f"{self._plan.seed} producer {number}"))

    async def _produce(self, rng: random.Random) -> None:
        forms = [self.outbox, self.outbox, self.in_sql, self.one_by_one, self.many, self.from_threads]
        forms.append(self.repeatedly)
        while self.committed < self._plan.jobs:
            tasks = [self._task(rng) for _ in range(rng.randint(1, BATCH))]
            await rng.choice(forms)(tasks, rng)
            ahead = self.share * self._plan.span - (clock() - self._began)
            await trio.sleep(max(0.0, ahead))

    def _task(self, rng: random.Random) -> Task:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        until = clock() + rng.uniform(0.1, 1.0) if kind == "snoozes" else 0.0
        return Task(f"p{next(self._tokens)}", kind, until)

    # The forms.

    async def outbox(self, tasks: Sequence[Task], rng: random.Random) -> None:
        """The producer's own transaction: its writes and the jobs, or neither."""
        rolled_back = rng.random() < ROLLED_BACK_SHARE

        def transaction(conn: psycopg.Connection[Any]) -> list[int]:
            with conn.cursor() as cursor:
                cursor.executemany("INSERT INTO chaos_orders VALUES (%s)", [(t.token,) for t in tasks])
            half = len(tasks) // 2
            ids = [triojobs.enqueue_on(conn, main_queue, task, **options(task)) for task in tasks[:half]]
            return ids + triojobs.enqueue_many_on(conn, other_queue, new_jobs(tasks[half:]))

        await self._in_own_transaction("outbox", tasks, transaction, rolled_back=rolled_back)

    async def in_sql(self, tasks: Sequence[Task], rng: random.Random) -> None:
        """The SQL function, which any language may call."""
        tasks = [task for task in tasks if task.kind not in TIMEOUTS]  # it knows no timeout

        def transaction(conn: psycopg.Connection[Any]) -> list[int]:
            return [self._sql_enqueue(conn, task) for task in tasks]

        await self._in_own_transaction("sql", tasks, transaction, rolled_back=rng.random() < 0.1)

    async def one_by_one(self, tasks: Sequence[Task], rng: random.Random) -> None:
        """Single enqueues of many tasks at once, which share commits."""

        async def one(task: Task) -> None:
            await self._noting(
                "single", [task], lambda: single(self._client.enqueue(main_queue, task, **options(task)))
            )

        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(one, task)

    async def many(self, tasks: Sequence[Task], rng: random.Random) -> None:
        """One call, one transaction."""
        await self._noting("many", tasks, lambda: self._client.enqueue_many(other_queue, new_jobs(tasks)))

    async def from_threads(self, tasks: Sequence[Task], rng: random.Random) -> None:
        """Threads of the program, one job each."""

        def call(task: Task) -> int:
            keywords = options(task)
            if "timeout" in keywords:
                keywords["job_timeout"] = keywords.pop("timeout")
            return self._client.enqueue_from_thread(main_queue, task, timeout=10.0, **keywords)

        async def one(task: Task) -> None:
            await self._noting("thread", [task], lambda: single(trio.to_thread.run_sync(call, task)))

        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(one, task)

    async def repeatedly(self, tasks: Sequence[Task], rng: random.Random) -> None:
        """An id of its own makes an enqueue repeatable until it is answered, and once more for nothing."""
        task = tasks[0]
        self._journal.write("intended", tokens=[task.token], form="repeated")
        job_id: int | None = None
        answers = 0
        while answers < 2:
            try:
                if job_id is None:
                    job_id = await self._client.new_job_id()
                await self._client.enqueue(main_queue, task, job_id=job_id, **options(task))
                answers += 1
            except triojobs.DatabaseError:
                await trio.sleep(0.05)
        assert job_id is not None
        self._note_enqueued([task], [job_id])

    # What they share.

    async def _in_own_transaction(
        self,
        form: str,
        tasks: Sequence[Task],
        transaction: Callable[[psycopg.Connection[Any]], list[int]],
        *,
        rolled_back: bool,
    ) -> None:
        if not tasks:
            return
        self._journal.write("intended", tokens=tokens(tasks), form=form)
        ids: list[int] | None = None
        undone = True  # until COMMIT is sent

        def work() -> None:
            nonlocal ids, undone
            with psycopg.connect(self._conninfo, application_name="producer") as conn:
                made = transaction(conn)
                if rolled_back:
                    conn.rollback()
                    return
                undone = False
                conn.commit()
                ids = made

        try:
            await trio.to_thread.run_sync(work)
        except (psycopg.Error, triojobs.DatabaseError):
            await trio.sleep(0.05)
        if ids is not None:
            self._note_enqueued(tasks, ids)
        elif undone:
            self._journal.write("undone", tokens=tokens(tasks))

    def _sql_enqueue(self, conn: psycopg.Connection[Any], task: Task) -> int:
        payload = {"token": task.token, "kind": task.kind, "snooze_until": task.snooze_until}
        row = conn.execute(
            "SELECT triojobs.enqueue(%s, %s, max_attempts => %s, metadata => %s)",
            [main_queue.name, Jsonb(payload), attempts(task), json.dumps({"token": task.token})],
        ).fetchone()
        assert row is not None
        return int(row[0])

    async def _noting(
        self, form: str, tasks: Sequence[Task], call: Callable[[], Awaitable[list[int]]]
    ) -> None:
        """Enqueue through the client; believe its errors, for the checks to find it out."""
        self._journal.write("intended", tokens=tokens(tasks), form=form)
        try:
            ids = await call()
        except triojobs.DatabaseError as exc:
            if exc.committed is False:
                self._journal.write("undone", tokens=tokens(tasks))
            await trio.sleep(0.05)
        else:
            self._note_enqueued(tasks, ids)

    def _note_enqueued(self, tasks: Sequence[Task], ids: Sequence[int]) -> None:
        self._journal.write("enqueued", tokens=tokens(tasks), ids=list(ids))
        self.committed += len(ids)
        self.recent = [*self.recent[-CANCEL_RECENT:], *ids]


class Canceller:
    """Cancels some of the newest jobs, whatever they do at the moment."""

    def __init__(self, plan: Plan, client: triojobs.Client, journal: Journal) -> None:
        self._rng = random.Random(f"{plan.seed} canceller")
        self._pause = plan.span / (plan.jobs * CANCELLED_SHARE)
        self._client = client
        self._journal = journal

    async def run(self, producers: Producers) -> None:
        """Cancel until cancelled."""
        while True:
            await trio.sleep(self._rng.uniform(0.5, 1.5) * self._pause)
            if producers.recent:
                await self._cancel(self._rng.choice(producers.recent))

    async def _cancel(self, job_id: int) -> None:
        self._journal.write("cancelling", job=job_id)
        try:
            answer = await self._client.cancel(job_id, reason="chaos")
        except triojobs.DatabaseError:
            return
        self._journal.write("cancelled", job=job_id, answer=answer)


def tokens(tasks: Sequence[Task]) -> list[str]:
    """Return the tokens of these tasks."""
    return [task.token for task in tasks]


def attempts(task: Task) -> int:
    """Return how many attempts its kind gets."""
    return ATTEMPTS.get(task.kind, PATIENT)


def options(task: Task) -> dict[str, Any]:
    """Return the keywords to enqueue a task with."""
    keywords: dict[str, Any] = {"max_attempts": attempts(task), "metadata": {"token": task.token}}
    if task.kind in TIMEOUTS:
        keywords["timeout"] = TIMEOUTS[task.kind]
    return keywords


def new_jobs(tasks: Sequence[Task]) -> list[triojobs.NewJob[Task]]:
    """Return the items of one call."""
    return [triojobs.NewJob(task, **options(task)) for task in tasks]


async def single(call: Awaitable[int]) -> list[int]:
    """Return the one id as a list."""
    return [await call]
