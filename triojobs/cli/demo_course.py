"""The course of `triojobs demo`: some hundred jobs, from the first enqueue to the last count.

The demo is a user's program that comes along: `demo_story` has its queues, handlers and producers,
`demo_books` its tables and its counting, `demo_view` what is shown. Here are the course of a run,
and what signals do to it.

A run that was interrupted, or killed, is finished by the next demo on the same data: `demo_books`
knows the unfinished run, and only e-mails that have no job yet are enqueued.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
import trio

import triojobs

from .._errors import sole_error
from .._options import checked_schema
from .demo_books import Books, Counts, Run
from .demo_story import Story
from .demo_view import Result, View, open_view
from .ending import Failure

__all__ = ["run"]

T = TypeVar("T")

# Short enough that a demo after a kill -9 soon goes on, long enough for a busy laptop.
LEASE_DURATION, LEASE_MARGIN, BEAT_INTERVAL = 5.0, 1.0, 1.0  # seconds
# Shorter than the slowest handlers, so that Ctrl-C shows a release.
GRACE_PERIOD: Final = 1.0
LOOK_INTERVAL: Final = 0.1  # seconds between counts, and between frames on a terminal
LOCK_WAIT: Final = 10.0  # seconds for another process that migrates


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    emails: int
    dsn: str | None
    data: str | None
    schema: str

    def server(self) -> AbstractAsyncContextManager[str]:
        """Open what the jobs are kept in."""
        return triojobs.open_embedded_postgres(self.data) if self.dsn is None else _given(self.dsn)

    @property
    def again(self) -> str:
        """What becomes of the jobs that wait."""
        if self.dsn is None and self.data is None:
            return "they are gone with the temporary server; --data DIR would keep them"
        place = "--dsn …" if self.data is None else f"--data {self.data}"
        return f"`triojobs demo {place}` again finishes them"


@asynccontextmanager
async def _given(dsn: str) -> AsyncIterator[str]:
    yield dsn


@dataclass
class Interrupts:
    """SIGINT and SIGTERM: the first stops, the second cancels, the third ends the process at once.

    Written by `obey` → read by `Demo`: `stopping`, which asks for the graceful stop. Before the worker
    group is open the first signal cancels everything.
    """

    view: View
    everything: trio.CancelScope = field(default_factory=trio.CancelScope)
    work: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopping: trio.Event = field(default_factory=trio.Event)
    working: bool = False  # the worker group is open
    first: int | None = None

    async def obey(self, signals: AsyncIterator[int]) -> None:
        """Wait for signals, for ever."""
        received = 0
        async for number in signals:
            received += 1
            if received == 1:
                self.first = number
                self.stopping.set()
                if not self.working:
                    self.everything.cancel(reason="interrupted")
                else:
                    self.view.note(f"stopping: what runs has {GRACE_PERIOD:g} s to end; again to cancel it")
            elif received == 2:
                self.view.note("cancelling what runs; again to end at once")
                self.work.cancel(reason="interrupted twice")
            else:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


class Demo:
    """One course of the demo."""

    def __init__(self, settings: Settings, view: View) -> None:
        self._settings = settings
        self._view = view
        self._limiter = trio.CapacityLimiter(16)  # our own: the default one belongs to everybody

    async def play(self) -> Result | int:
        """Run it to its end. Returns the result, or the signal that came before anything ran."""
        interrupts = Interrupts(self._view)
        outcome: Result | int = 0
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(interrupts.obey, signals)
                with interrupts.everything:
                    if self._settings.dsn is None:
                        self._view.note("starting an embedded PostgreSQL")
                    async with self._settings.server() as conninfo:
                        outcome = await self._play_on(conninfo, interrupts)
                nursery.cancel_scope.cancel()
        return outcome if isinstance(outcome, Result) else interrupts.first or 0

    async def _play_on(self, conninfo: str, interrupts: Interrupts) -> Result:
        settings = self._settings
        migrate = partial(triojobs.migrate, conninfo, schema=settings.schema, lock_wait=LOCK_WAIT)
        await self._in_thread(migrate)
        books = Books(conninfo, settings.schema)
        run = await self._in_thread(books.open_run, settings.emails)
        missing = await self._in_thread(books.missing, run)
        before = await self._in_thread(books.counts, run)
        self._greet(run, missing, before)
        story = Story(books, run, self._limiter)
        began = trio.current_time()
        with interrupts.work:
            async with triojobs.open_worker_group(
                conninfo,
                story.workers(),
                name="demo",
                schema=settings.schema,
                grace_period=GRACE_PERIOD,
                lease_duration=LEASE_DURATION,
                lease_margin=LEASE_MARGIN,
                beat_interval=BEAT_INTERVAL,
            ) as group:
                interrupts.working = True
                await self._watch(group, story, books, run, missing, before, interrupts)
        seconds = trio.current_time() - began
        counts = await self._in_thread(books.counts, run)
        if counts.finished:
            await self._in_thread(books.mark_finished, run)
        await self._check_rollback(story, books)
        return Result(
            counts,
            released=group.report.released,
            seconds=seconds,
            worked=counts.ended - before.ended,
            signal=None if counts.finished else interrupts.first,
        )

    async def _watch(
        self,
        group: triojobs.WorkerGroup,
        story: Story,
        books: Books,
        run: Run,
        missing: list[int],
        before: Counts,
        interrupts: Interrupts,
    ) -> None:
        """Enqueue what is missing and show how the jobs go, until all have ended or the group stops."""
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_produce, partial(story.enqueue, group.client, missing), interrupts, group)
            nursery.start_soon(_leave, group, nursery.cancel_scope)
            while True:
                asked = trio.current_time()
                counts = await self._in_thread(books.counts, run)
                now = trio.current_time()
                elapsed = now - began
                self._view.show(run, counts, (counts.ended - before.ended) / elapsed if elapsed else 0.0)
                if counts.finished:
                    break
                # Counting a hundred thousand jobs takes a while; it must not become the main work.
                await trio.sleep(max(LOOK_INTERVAL, 4 * (now - asked)))
            nursery.cancel_scope.cancel()

    def _greet(self, run: Run, missing: list[int], before: Counts) -> None:
        if not run.resumed:
            self._view.note(f"enqueueing {run.emails} e-mails from Trio, from threads and in transactions")
            return
        rest = f"; {len(missing)} of its e-mails are still to be enqueued" if missing else ""
        self._view.note(
            f"found an unfinished run of {run.emails} e-mails (from {run.started_at[:19]}): "
            f"{before.ended} jobs have ended, {before.waiting} wait, {before.running} were running; "
            f"finishing it, nothing is enqueued twice{rest}"
        )
        if run.emails != self._settings.emails:
            self._view.note(f"--jobs {self._settings.emails} is for the next run")

    async def _check_rollback(self, story: Story, books: Books) -> None:
        if story.rolled_back is not None:
            there = await self._in_thread(books.exists, story.rolled_back)
            fate = "exists all the same: a bug, please report it" if there else "does not exist"
            self._view.note(f"job {story.rolled_back}, whose transaction was rolled back, {fate}")

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)


async def _produce(
    enqueue: Callable[[], Awaitable[None]], interrupts: Interrupts, group: triojobs.WorkerGroup
) -> None:
    """Enqueue until done or interrupted; only then may the group stop, whose client is being used."""
    try:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await interrupts.stopping.wait()
                nursery.cancel_scope.cancel(reason="interrupted")

            nursery.start_soon(cancel)
            await enqueue()
            nursery.cancel_scope.cancel()
    except* trio.ClosedResourceError:
        # A second signal closes the client while threads may be using it.
        if not interrupts.stopping.is_set():
            raise
    await interrupts.stopping.wait()
    group.stop()


async def _leave(group: triojobs.WorkerGroup, scope: trio.CancelScope) -> None:
    await group.wait_stopped()
    scope.cancel()


def run(jobs: int, *, dsn: str | None, data: str | None, schema: str, as_json: bool) -> None:
    """Play the demo from the command line, and leave with its exit code unless it is 0."""
    checked_schema(schema)
    settings = Settings(emails=jobs, dsn=dsn, data=data, schema=schema)
    view = open_view(as_json=as_json)
    try:
        outcome = trio.run(Demo(settings, view).play)
    except KeyboardInterrupt:  # in the moments before the signals are received
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as exc:
        failure = _failure(exc, settings)
        if failure is None:
            raise
        raise failure from exc
    finally:
        view.close()
    if isinstance(outcome, int):
        view.note("interrupted before any job ran")
        raise SystemExit(128 + outcome)
    view.finish(outcome)
    _end(outcome, settings, view)


def _end(result: Result, settings: Settings, view: View) -> None:
    """Say what is left to be said, and leave with the exit code."""
    if result.counts.lost:
        raise Failure(f"{result.counts.lost} job(s) are lost; this is a bug in triojobs, please report it")
    if result.signal is None:
        return
    view.note(f"interrupted: {result.released} job(s) were given back, {result.counts.waiting} wait")
    view.note(settings.again)
    raise SystemExit(128 + result.signal)


def _failure(exc: BaseException, settings: Settings) -> Failure | None:
    """Return one line for what a user can mend, None for what is our own mistake."""
    alone = sole_error(exc)
    if isinstance(alone, triojobs.OptionError) and alone.field == "data_dir":
        return Failure(str(alone).replace("data_dir is", "--data is"))
    if isinstance(alone, triojobs.TriojobsError):
        if settings.dsn is None and "were not found" in str(alone):
            return Failure(f"{alone}, or name a server with --dsn")
        return Failure(str(alone))
    if isinstance(alone, psycopg.Error):
        text = alone.diag.message_primary or str(alone)
        return Failure(f"while using the demo's tables: {text}; check the server and the rights of the user")
    return None
