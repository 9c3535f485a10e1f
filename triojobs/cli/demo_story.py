"""The demo's story: e-mails that are enqueued in three ways, and the activities that they leave.

It is written as a user's program would be: with the public names of triojobs, psycopg, and threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg
import trio

import triojobs

from .demo_books import ACTIVITIES, EMAILS, Books, Run
from .demo_outage import Outages

__all__ = ["Story"]

THREADS: Final = 4  # that enqueue at once
CONCURRENCY: Final = 16  # e-mails at once; 300 of them then take about four seconds
CHUNK: Final = 1000  # e-mails per enqueue_many
QUICK: Final = (0.05, 0.10, 0.20)  # seconds that the pretended mail server takes
SLOW: Final = 2.0  # the same for every 25th; longer than the demo's grace period
RETRY: Final = triojobs.Backoff(first=0.3, factor=2.0, limit=2.0)


@dataclass(frozen=True)
class Email:
    run: int
    number: int
    to: str
    poison: bool = False

    @property
    def seconds(self) -> float:
        """How long the pretended mail server takes."""
        return SLOW if self.number % 25 == 0 and not self.poison else QUICK[self.number % 3]


@dataclass(frozen=True)
class Receipt:
    activity_id: int


@dataclass(frozen=True)
class Activity:
    kind: str
    to: str


emails: triojobs.Queue[Email, Receipt] = triojobs.Queue(EMAILS, Email, result=Receipt)
activities: triojobs.Queue[Activity, Any] = triojobs.Queue(ACTIVITIES, Activity)


class MailboxError(Exception):
    """The pretended mail server refuses the address, today and tomorrow."""


class Story:
    """Handlers and producers of one run."""

    def __init__(self, books: Books, run: Run, limiter: trio.CapacityLimiter, outages: Outages) -> None:
        self._books = books
        self._run = run
        self._limiter = limiter
        self._outages = outages
        self.rolled_back: int | None = None  # the id of the job that must not exist

    def workers(self) -> list[triojobs.Worker[Any, Any]]:
        """Return what runs the jobs."""
        return [
            triojobs.Worker(emails, self.send_email, concurrency=CONCURRENCY, retry=RETRY),
            triojobs.Worker(activities, log_activity, concurrency=4),
        ]

    # What the workers do.

    async def send_email(self, job: triojobs.Job[Email]) -> Receipt:
        """Send; then commit the row, the follow-up job and this job's completion together."""
        email = job.payload
        await trio.sleep(email.seconds)
        if email.poison:
            raise MailboxError(f"there is no mailbox {email.to}")
        if email.number % 10 == 7 and job.attempt == 1:
            raise ConnectionError("the mail server hung up")

        def work(conn: psycopg.Connection[Any]) -> Receipt:
            activity_id = triojobs.enqueue_on(
                conn,
                activities,
                Activity("email sent", email.to),
                schema=self._books.schema,
                metadata={"run": email.run, "number": email.number},
            )
            conn.execute(
                "INSERT INTO triojobs_demo.sent (run, number, job_id, activity_id) VALUES (%s, %s, %s, %s)",
                [email.run, email.number, job.id, activity_id],
            )
            return Receipt(activity_id)

        try:
            return await job.commit(work)
        except triojobs.DatabaseError as exc:
            if not exc.transient:
                raise
            raise triojobs.Snooze(1.0) from exc  # the database is away: not the job's fault, not an attempt

    # Who enqueues. The key makes each enqueue safe to repeat: a number that is there stays as it is.

    async def enqueue(self, client: triojobs.Client, numbers: Sequence[int]) -> None:
        """Enqueue these e-mails: a third each from Trio, from threads and in transactions."""
        from_trio, from_threads, in_transactions = (
            [number for number in numbers if number % 3 == way] for way in range(3)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._enqueue_from_trio, client, from_trio)
            for start in range(THREADS):
                own = from_threads[start::THREADS]
                nursery.start_soon(self._in_thread, partial(self._enqueue_from_thread, client, own))
            nursery.start_soon(self._in_thread, partial(self._enqueue_in_transactions, in_transactions))
        await self._outages.in_thread(partial(self._books.mark_enqueued, self._run))

    async def _enqueue_from_trio(self, client: triojobs.Client, numbers: Sequence[int]) -> None:
        half = len(numbers) // 2
        for start in range(0, half, CHUNK):
            chunk = [self._job(number) for number in numbers[start : min(half, start + CHUNK)]]
            await self._repeated(partial(client.enqueue_many, emails, chunk))
        for number in numbers[half:]:
            await self._repeated(
                partial(client.enqueue, emails, self._email(number), **self._options(number))
            )

    async def _repeated(self, enqueue: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await enqueue()
            except triojobs.DatabaseError as exc:
                await self._outages.pause(exc)
            else:
                self._outages.over()
                return

    def _enqueue_from_thread(self, client: triojobs.Client, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._outages.here(
                partial(client.enqueue_from_thread, emails, self._email(number), **self._options(number))
            )

    def _enqueue_in_transactions(self, numbers: Sequence[int]) -> None:
        left = deque(numbers)

        def enqueue_rest() -> None:
            with self._books.connect() as conn:
                while left:
                    trio.from_thread.check_cancelled()
                    with conn.transaction():
                        self._order(conn, left[0])
                    left.popleft()  # only now: without a reply it is ordered once more
                # And one whose transaction fails: neither its row nor its job will ever exist.
                with conn.transaction(force_rollback=True):
                    self.rolled_back = self._order(conn, self._run.emails + 1)

        self._outages.here(enqueue_rest)

    def _order(self, conn: psycopg.Connection[Any], number: int) -> int:
        job_id = triojobs.enqueue_on(
            conn, emails, self._email(number), schema=self._books.schema, **self._options(number)
        )
        conn.execute(
            "INSERT INTO triojobs_demo.orders (run, number, job_id) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            [self._run.id, number, job_id],
        )
        return job_id

    def _email(self, number: int) -> Email:
        return Email(self._run.id, number, f"user{number}@example.com", poison=number == self._run.poison)

    def _options(self, number: int) -> dict[str, Any]:
        return {
            "max_attempts": 3 if number == self._run.poison else 5,
            "key": f"{self._run.id}/{number}",
            "on_conflict": "return",
            "metadata": {"run": self._run.id, "number": number},
        }

    def _job(self, number: int) -> triojobs.NewJob[Email]:
        return triojobs.NewJob(self._email(number), **self._options(number))

    async def _in_thread(self, work: Any) -> None:
        await trio.to_thread.run_sync(work, limiter=self._limiter)


async def log_activity(job: triojobs.Job[Activity]) -> None:
    """Pretend to write the activity down."""
    await trio.sleep(0.005)
