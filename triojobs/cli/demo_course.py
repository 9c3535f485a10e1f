"""The course of `triojobs demo`: some hundred jobs, from the first enqueue to the last count.

The demo is a user's program that comes along: `demo_story` has its queues, handlers and producers,
`demo_books` its tables and its counting, `demo_view` what is shown. Here are the course of a run,
and what signals do to it.

A run that was interrupted, or killed, is finished by the next demo on the same data: `demo_books`
knows the unfinished run, and only e-mails that have no job yet are enqueued.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
import trio

import triojobs

from .._errors import checked_seconds
from .._options import checked_schema
from .._sql.failures import UNREACHABLE_HINT, connect
from .demo_books import NOTHING, Books, Counts, Run
from .demo_outage import Outages, told
from .demo_story import Story
from .demo_view import Result, View, open_view
from .ending import Failure, OutputError

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
    patience: float

    def server(self) -> AbstractAsyncContextManager[str]:
        """Open what the jobs are kept in."""
        return triojobs.open_embedded_postgres(self.data) if self.dsn is None else _given(self.dsn)

    @property
    def keeps(self) -> bool:
        """Whether the jobs outlive the demo."""
        return self.dsn is not None or self.data is not None

    @property
    def again(self) -> str:
        """What becomes of the jobs that wait."""
        if not self.keeps:
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
                    self.view.note("stopping before any job runs")
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
        self._outages = Outages(view.note, self._limiter, patience=settings.patience)

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
        await self._reach(conninfo)
        await self._ask(migrate)
        books = Books(conninfo, settings.schema)
        run = await self._ask(books.open_run, settings.emails)
        missing = await self._ask(books.missing, run)
        before = await self._ask(books.counts, run)
        self._greet(run, missing, before)
        story = Story(books, run, self._limiter, self._outages)
        began = trio.current_time()
        released = 0
        with interrupts.work:
            async with self._opened(conninfo, story) as group:
                interrupts.working = True
                await self._watch(group, story, books, run, missing, before, interrupts)
            released = group.report.released
        seconds = trio.current_time() - began
        counts = await self._ask(books.counts, run)
        if counts.finished:
            await self._ask(books.mark_finished, run)
        await self._check_rollback(story, books)
        return Result(
            counts,
            released=released,
            seconds=seconds,
            worked=counts.ended - before.ended,
            signal=None if counts.finished else interrupts.first,
        )

    @asynccontextmanager
    async def _opened(self, conninfo: str, story: Story) -> AsyncIterator[triojobs.WorkerGroup]:
        """Open the worker group, also when the database goes away in this very moment."""
        while True:
            opened = triojobs.open_worker_group(
                conninfo,
                story.workers(),
                name="demo",
                schema=self._settings.schema,
                grace_period=GRACE_PERIOD,
                lease_duration=LEASE_DURATION,
                lease_margin=LEASE_MARGIN,
                beat_interval=BEAT_INTERVAL,
            )
            async with AsyncExitStack() as stack:
                try:
                    group = await stack.enter_async_context(opened)
                except triojobs.DatabaseError as exc:
                    await self._outages.pause(exc)
                    continue
                yield group
                return

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
                counts = await self._ask(books.counts, run)
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
            there = await self._ask(books.exists, story.rolled_back)
            fate = "exists all the same: a bug, please report it" if there else "does not exist"
            self._view.note(f"job {story.rolled_back}, whose transaction was rolled back, {fate}")

    async def _reach(self, conninfo: str) -> None:
        """Connect once: an address where nobody answers is told at once, and not waited for."""

        def reach() -> None:
            connect(conninfo, operation="connecting", application_name="triojobs demo").close()

        try:
            await trio.to_thread.run_sync(reach, limiter=self._limiter)
        except triojobs.DatabaseError as exc:
            if exc.hint == UNREACHABLE_HINT:
                raise
            await self._outages.in_thread(reach)

    async def _ask(self, call: Callable[..., T], *args: Any) -> T:
        return await self._outages.in_thread(partial(call, *args))


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


def run(jobs: int, *, dsn: str | None, data: str | None, schema: str, patience: float, as_json: bool) -> None:
    """Play the demo from the command line, and leave with its exit code unless it is 0."""
    checked_schema(schema)
    checked_seconds("patience", patience)
    settings = Settings(emails=jobs, dsn=dsn, data=data, schema=schema, patience=patience)
    logging.getLogger("triojobs.worker").setLevel(logging.ERROR)  # jobs that fail are part of the story
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
        if as_json:
            view.finish(Result(NOTHING, released=0, seconds=0.0, worked=0, signal=outcome))
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


def _failure(exc: BaseException, settings: Settings) -> Failure | OutputError | None:
    """Return one line for what a user can mend, None for what is our own mistake.

    Several tasks may meet the same trouble at once: the first of them tells it.
    """
    leaves = list(_leaves(exc))
    if not all(isinstance(leaf, triojobs.TriojobsError | psycopg.Error | OutputError) for leaf in leaves):
        return None
    first = next((leaf for leaf in leaves if isinstance(leaf, OutputError)), leaves[0])
    if isinstance(first, OutputError):
        return first
    if isinstance(first, triojobs.OptionError) and first.field == "data_dir":
        return Failure(str(first).replace("data_dir is", "--data is"))
    if isinstance(first, psycopg.Error):
        first = told(first)
    if settings.dsn is None and "were not found" in str(first):
        return Failure(f"{first}, or name a server with --dsn")
    later = isinstance(first, triojobs.DatabaseError) and first.transient
    return Failure(f"{first}; {settings.again}" if later and settings.keeps else str(first))


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
