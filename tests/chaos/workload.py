"""The kinds of jobs, and the handlers that write down what they do.

A handler knows its job's token from the payload and writes begin, each checkpoint that it came through,
and its end, as it sees it: the checks compare this with the rows. Steps carry the clock before and
after the checkpoint, so that the checks see which ones a process came through that had been stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg
import trio

import triojobs

from .journal import Journal, clock

# How often each kind is drawn.
KINDS: Final = {
    "plain": 34,
    "instant": 12,
    "threaded": 6,
    "long": 8,
    "flaky": 10,
    "doomed": 3,
    "kills": 2,
    "asks_for_later": 4,
    "snoozes": 4,
    "times_out": 3,
    "commits": 6,
    "commits_slowly": 3,
    "transacts": 3,
    "spawns": 5,
}
PATIENT: Final = 40  # attempts of jobs that shall get done, however often their process dies
ATTEMPTS: Final = {"doomed": 3}
TIMEOUTS: Final = {"times_out": 0.2}
COMMITTING: Final = frozenset({"commits", "commits_slowly"})
DONE_IN_THE_END: Final = frozenset(KINDS) - {"doomed", "kills"}
ERROR_SHOWN: Final = 60  # characters of a failure that are written down
GAP: Final = 0.3  # seconds longer than asked for: the process may have been stopped meanwhile
STEPS_AFTER_GAP: Final = 10


@dataclass(frozen=True)
class Task:
    """A payload. `snooze_until` is a reading of the machine's monotonic clock."""

    token: str
    kind: str
    snooze_until: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """A result: which attempt at which job made it."""

    token: str
    attempt: int


main_queue = triojobs.Queue("main", Task, result=Receipt)
other_queue = triojobs.Queue("other", Task, result=Receipt, codec=triojobs.JsonCodec())
child_queue = triojobs.Queue("children", Task, result=Receipt)
QUEUES: Final = (main_queue, other_queue, child_queue)

SCHEMA: Final = """
CREATE TABLE chaos_orders (token text);
CREATE TABLE chaos_effects (job_id bigint, group_id uuid, claim_no bigint, kind text, token text);
"""


class Handlers:
    """Runs every kind of job. `client` is the group's, set as soon as it is open."""

    def __init__(self, journal: Journal) -> None:
        self.client: triojobs.Client
        self._journal = journal

    async def handle(self, job: triojobs.Job[Task]) -> Receipt:
        run = RunJournal(self._journal, job)
        run.write("begin", token=job.payload.token, kind=job.payload.kind, attempt=job.attempt)
        body: Callable[[triojobs.Job[Task], RunJournal], Awaitable[None]] = getattr(self, job.payload.kind)
        try:
            await body(job, run)
        except BaseException as exc:
            run.write("end", how=how(exc), raised=raised(exc), error=str(exc)[:ERROR_SHOWN])
            raise
        run.write("end", how="returned")
        return Receipt(job.payload.token, job.attempt)

    async def plain(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        for _ in range(3):
            await run.sleep(0.005)

    async def instant(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        """Has no checkpoint at all."""

    async def threaded(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.through(partial(trio.to_thread.run_sync, time.sleep, 0.02), 0.02)

    async def long(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        for _ in range(100):
            await run.sleep(0.025)

    async def flaky(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.sleep(0.002)
        if job.attempt <= 2:
            raise RuntimeError(f"{job.payload.token} fails at attempt {job.attempt}")

    async def doomed(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.sleep(0.002)
        raise RuntimeError(f"{job.payload.token} fails at attempt {job.attempt}")

    async def kills(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.sleep(0.002)
        raise triojobs.Kill(f"{job.payload.token} ends at attempt {job.attempt}")

    async def asks_for_later(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.sleep(0.002)
        if job.attempt == 1:
            raise triojobs.RetryAfter(0.2, f"{job.payload.token} fails at attempt {job.attempt}")

    async def snoozes(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.sleep(0.002)
        if clock() < job.payload.snooze_until:
            raise triojobs.Snooze(0.3)

    async def times_out(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        await run.sleep(0.002 if job.attempt > 1 else 60.0)

    async def commits(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        """Writes an effect, a follow-up job and the completion in one transaction."""
        await self._commit(job, run, seconds=0.0)

    async def commits_slowly(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        """Is in the middle of its transaction when something happens to its process."""
        await self._commit(job, run, seconds=1.0)

    async def _commit(self, job: triojobs.Job[Task], run: RunJournal, seconds: float) -> None:
        def work(conn: psycopg.Connection[Any]) -> Receipt:
            insert_effect(conn, job)
            conn.execute("SELECT pg_sleep(%s)", [seconds])
            follow_up = Task(f"{job.payload.token}.follow", "plain")
            triojobs.enqueue_on(conn, child_queue, follow_up, metadata={"token": follow_up.token})
            return Receipt(job.payload.token, job.attempt)

        await run.sleep(0.002)
        run.write("committing")
        await run.through(partial(job.commit, work))
        run.write("committed")

    async def transacts(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        """Writes an effect that survives the failure of the first attempt."""
        await run.through(lambda: job.transact(lambda conn: insert_effect(conn, job)))
        run.write("transacted")
        if job.attempt == 1:
            raise RuntimeError(f"{job.payload.token} fails at attempt {job.attempt}")

    async def spawns(self, job: triojobs.Job[Task], run: RunJournal) -> None:
        """Enqueues a child from a thread; a key makes the repetition by a later attempt safe."""
        child = Task(f"{job.payload.token}.child", "plain")

        def enqueue() -> int:
            return self.client.enqueue_from_thread(
                child_queue,
                child,
                key=child.token,
                on_conflict="return",
                metadata={"token": child.token},
                timeout=5.0,
            )

        run.write("intended", tokens=[child.token], form="from handler's thread")
        child_id = await run.through(partial(trio.to_thread.run_sync, enqueue))
        run.write("enqueued", tokens=[child.token], ids=[child_id])


def insert_effect(conn: psycopg.Connection[Any], job: triojobs.Job[Task]) -> None:
    """What the job does to the world, named by its claim."""
    conn.execute(
        "INSERT INTO chaos_effects VALUES (%s, %s, %s, %s, %s)",
        [job.id, *job.fence, job.payload.kind, job.payload.token],
    )


class RunJournal:
    """What one handler writes about its run."""

    def __init__(self, journal: Journal, job: triojobs.Job[Task]) -> None:
        self._journal = journal
        self._named = {"job": job.id, "group": str(job.fence[0]), "claim": job.fence[1]}

    def write(self, event: str, **fields: Any) -> None:
        """Write an event of this run."""
        self._journal.write(event, **self._named, **fields)

    async def sleep(self, seconds: float) -> None:
        """Sleep and write that this checkpoint was passed."""
        await self.through(partial(trio.sleep, seconds), seconds)

    async def through(self, wait: Callable[[], Awaitable[Any]], expected: float = 0.0) -> Any:
        """Await something and write that it was passed.

        After a gap, the process may have been stopped beyond its lease: more checkpoints, without a
        pause, show whether the handler is let through them.
        """
        before = clock()
        value = await wait()
        after = clock()
        self.write("step", before=before, at=after)
        if after - before > expected + GAP:
            for _ in range(STEPS_AFTER_GAP):
                before = clock()
                await trio.lowlevel.checkpoint()
                self.write("step", before=before)
        return value


def raised(exc: BaseException) -> str:
    """Name the type; one name for all the ways in which a session can be lost."""
    return "psycopg.Error" if isinstance(exc, psycopg.Error) else type(exc).__name__


def how(exc: BaseException) -> str:
    """Name the end of a handler as its writer sees it: what is raised under a cancel is the cancel's echo."""
    if isinstance(exc, triojobs.Kill):
        return "kill"
    if isinstance(exc, triojobs.Snooze):
        return "snooze"
    if trio.current_effective_deadline() == -math.inf:
        return "interrupted"
    if isinstance(exc, triojobs.StaleClaimError):
        return "stale"
    return "failed"
