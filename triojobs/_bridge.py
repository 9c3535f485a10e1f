"""The crossing between Trio tasks and blocking psycopg calls; the only module that uses threads.

* A call is one short statement or transaction. It is never abandoned (`abandon_on_cancel=False`):
  `trio.Cancelled` out of a call means that it never started; afterwards it runs to its end and its
  result arrives. (Abandoned, 3,000 of 3,000 finished results were lost.)
* It is bounded all the same: the breaker, one plain thread, has a deadline for every call in
  flight. It asks the server to cancel, and a second later shuts the socket down, which ends the
  call in every case: living server, stopped backend, black hole.
* What must happen together with a commit (`on_commit`) happens in the thread, right after it,
  where neither a cancel nor a signal can fall in between.
* Limiters are our own: threads of handlers cannot delay a heartbeat.
* What is short and frequent needs no thread: an exchange runs on the event loop, between waits for its
  socket, and keeps the same promises. A loop that is blocked reads no answer; so the breaker ends the
  exchange, and what had come is read all the same.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import outcome
import psycopg
import trio

from ._errors import DatabaseError, TriojobsError
from ._logs import Log
from ._sql.connecting import connect_in_time
from ._sql.exchange import Ready
from ._sql.failures import READ_ONLY, Remedy, remedy, translate
from ._sql.hosts import Hosts

__all__ = ["Breaker", "BrokenOff", "Call", "Line", "check_cancelled", "on_loop", "run_in_thread"]

T = TypeVar("T")
log = Log("triojobs.bridge")

CANCEL_WAIT: Final = 1.0  # seconds that the server gets to obey a cancel before the socket is shut
RETRIES: Final = 5  # repetitions after a deadlock, a serialization failure or a lock timeout
RESTORE_TIME: Final = 1.0  # seconds for a statement of 60 µs
KEEPALIVE: Final = {
    # Both are needed: keepalives see a peer that is gone while we wait, tcp_user_timeout one that
    # is gone while we send. Neither sees a host that is alive but hung; the breaker does.
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def clock() -> float:
    """Return monotonic seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(BOOTTIME)


BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def on_loop() -> bool:
    """Return whether the caller runs inside a Trio task (where blocking is wrong)."""
    return trio.lowlevel.in_trio_task()


def check_cancelled() -> None:
    """In a thread: raise `trio.Cancelled` if the task that waits for it was cancelled."""
    with contextlib.suppress(RuntimeError):  # not a Trio thread: nobody to ask
        trio.from_thread.check_cancelled()


async def run_in_thread(fn: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """Run a long-lived loop of ours in a thread; the caller ends it by means of its own."""
    return await trio.to_thread.run_sync(fn, limiter=limiter, abandon_on_cancel=False)


def reached(operation: str, point: str) -> None:
    """Say where a call is, in its thread. Does nothing; tests put a gate here.

    The points of each call, in this order: "enter", "connected", "executed" (committed on the server),
    "committed" (booked here), "exit".
    """


async def reached_on_loop(operation: str, point: str) -> None:
    """Say where an exchange is, on the loop. Does nothing, without a checkpoint; tests put a gate here.

    Its points are those of `reached`.
    """


class BrokenOff(Exception):
    """The job was cancelled before its work began, or before it ended."""


class Call:
    """One blocking call in flight, as the breaker sees it.

    `guarded` is False while the user's own work runs: only a cancel of the job breaks that. `unwanted`
    remembers a cancel that came while it was guarded. At `end` its socket is shut; no extension of the
    deadline, at which the server is asked to cancel, goes beyond `latest`, which is before.
    """

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        deadline: float,
        timeout: float,
        end: float = float("inf"),
        *,
        on_loop: bool = False,
    ) -> None:
        self.conn = conn
        self.on_loop = on_loop
        self.deadline = deadline
        self.unread_until = (
            deadline + timeout
        )  # a loop that does not read an answer by then is not waited for
        self.timeout = timeout
        self.end = self.latest = float("inf")
        self.guarded = True
        self.unwanted = False
        self.breaking = False
        self.done = False
        self.uncommitted = False  # inside `transaction`, before its COMMIT: nothing can have been committed
        self.lock = threading.Lock()
        self._on_commit: list[Callable[[], None]] = []
        self._afterwards: list[Callable[[psycopg.Connection[Any]], None]] = []
        self.hurry(end)

    def hurry(self, end: float) -> None:
        """Have it end by `end`, whatever the server does."""
        now = clock()
        self.end = min(self.end, end)
        self.latest = min(self.latest, now + _usable(end - now))
        if self.breaking:
            self.deadline = min(self.deadline, self.end)
        elif self.guarded:
            self.deadline = min(self.deadline, self.latest)

    def extend(self) -> None:
        """Give the next statement of a long call a deadline of its own."""
        self.deadline = min(clock() + self.timeout, self.latest)

    @contextlib.contextmanager
    def unguarded(self) -> Iterator[None]:
        """Lift the deadline while the user's own work runs; only a cancel breaks it off.

        Raises:
            BrokenOff: the cancel came before the block, or the block ended as if there had been none: it
                was not in a statement of its connection, or has swallowed the error of that.
        """
        with self.lock:
            if self.unwanted:
                raise BrokenOff
            self.guarded = False
        try:
            yield
        finally:
            with self.lock:
                unwanted = self.unwanted
                if not self.breaking:
                    self.extend()
                self.guarded = True
        if unwanted:
            raise BrokenOff

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the block one transaction, so that an error before its COMMIT says that nothing was written."""
        self.uncommitted = True
        with self.conn.transaction():
            yield
            self.uncommitted = False

    def on_commit(self, do: Callable[[], None]) -> None:
        """Have `do` called in this thread right after the commit."""
        self._on_commit.append(do)

    def afterwards(self, do: Callable[[psycopg.Connection[Any]], None]) -> None:
        """Have `do(conn)` called after the commit, as a statement of its own; its failure is logged only."""
        self._afterwards.append(do)

    def finish(self) -> None:
        """Run what waits for the commit."""
        for do in self._on_commit:
            do()
        for later in self._afterwards:
            try:
                later(self.conn)
            except psycopg.Error as exc:
                # A hint only: the poll finds what it would have told.
                log.warning("a notification was not sent: %s", exc, extra={"event": "notify_failed"})

    def restart(self) -> None:
        """Forget what a failed attempt asked for."""
        self._on_commit.clear()
        self._afterwards.clear()

    def has_answer(self) -> bool:
        """Whether an answer waits for a loop that is busy with something else: the server is not to blame."""
        with self.lock:
            return self.on_loop and not self.done and _readable(self.conn.fileno())

    def cancel_on_server(self) -> None:
        """Ask the server to cancel the statement; runs in a thread of its own."""
        with contextlib.suppress(psycopg.Error, OSError):
            self.conn.cancel_safe(timeout=CANCEL_WAIT)

    def shut_down(self) -> None:
        """End the call by shutting its socket down. `dup`: the number may not be reused under us."""
        with self.lock:
            if self.done:
                return
            with (
                contextlib.suppress(OSError, psycopg.Error),
                socket.socket(fileno=os.dup(self.conn.fileno())) as twin,
            ):
                twin.shutdown(socket.SHUT_RDWR)


class Breaker:
    """Ends calls that pass their deadline; one thread for all connections of one bridge."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: set[Call] = set()
        self._wakes_at = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False
        self.end = float("inf")  # of every call, see hurry

    @contextlib.contextmanager
    def watch(self, call: Call) -> Iterator[None]:
        """Watch `call` while the block runs."""
        with self._changed:
            self._calls.add(call)
            call.hurry(self.end)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="triojobs-breaker", daemon=True)
                self._thread.start()
            if call.deadline < self._wakes_at:
                self._changed.notify()
        try:
            yield
        finally:
            with call.lock:
                call.done = True
            with self._changed:
                self._calls.discard(call)

    def break_off(self, call: Call) -> None:
        """Break a call off now, or before its work begins: the job that it works for was cancelled."""
        with self._changed, call.lock:
            call.unwanted = True
            if not call.done and not call.guarded:
                call.guarded = True
                call.deadline = clock()
                self._changed.notify()

    def hurry(self, deadline: float) -> None:
        """Have calls end by `deadline`: those in flight, and those that begin before it is changed again."""
        with self._changed:
            self.end = deadline
            for call in self._calls:
                call.hurry(deadline)
            self._changed.notify()

    def close(self) -> None:
        """End the thread. No call may be in flight."""
        with self._changed:
            self._closed = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = clock()
                for call in [c for c in self._calls if c.guarded and c.deadline <= now]:
                    self._break(call, now)
                # Calls that start later have later deadlines, so that mostly nobody notifies.
                self._wakes_at = min((c.deadline for c in self._calls if c.guarded), default=float("inf"))
                wait = None if self._wakes_at == float("inf") else max(0.0, self._wakes_at - now)
                self._changed.wait(wait)

    def _break(self, call: Call, now: float) -> None:
        unread = call.has_answer()
        if unread and now < call.unread_until:
            call.deadline = now + CANCEL_WAIT
            return
        if unread:
            # A server that cannot get rid of its answer holds the locks of its transaction. What has come is
            # read all the same once the loop turns.
            log.warning("an answer was not read in time", extra={"event": "answer_unread"})
            call.breaking = True
        if call.breaking:
            call.deadline = float("inf")
            call.shut_down()
            return
        call.breaking = True
        call.deadline = min(now + CANCEL_WAIT, call.end)
        if call.unwanted:
            log.debug("the work of a cancelled job is broken off", extra={"event": "work_broken_off"})
        else:
            log.warning("a call passed its deadline and is broken off", extra={"event": "call_broken_off"})
        # Elsewhere, so that one deaf server does not delay the breaking of other calls.
        threading.Thread(target=call.cancel_on_server, name="triojobs-cancel", daemon=True).start()


def _readable(fd: int) -> bool:
    poll = select.poll()  # select() refuses descriptors from 1,024 on
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _usable(seconds: float) -> float:
    """Return when to start breaking off what must have ended after `seconds`."""
    return max(seconds - CANCEL_WAIT, seconds / 2, 0.0)


def drive_here(generator: Generator[Ready, None, T], fd: int) -> T:
    """Run a generator of `_sql.exchange` in this thread."""
    poll = select.poll()
    while True:
        try:
            ready = next(generator)
        except StopIteration as end:
            result: T = end.value
            return result
        poll.register(fd, select.POLLIN if ready is Ready.READABLE else select.POLLOUT)
        poll.poll()


async def _drive(generator: Generator[Ready, None, T], fd: int) -> T:
    while True:
        try:
            ready = next(generator)
        except StopIteration as end:
            result: T = end.value
            return result
        if ready is Ready.READABLE:
            await trio.lowlevel.wait_readable(fd)
        else:
            await trio.lowlevel.wait_writable(fd)


class Line:
    """A few dedicated connections for one purpose (mostly one), and the right to use them.

    Connections are opened on demand, checked for a server's farewell before each use, and dropped
    after an error that says that they, or the server behind them, are gone.

    Args:
        prepare: called with each new connection (session settings).
        restore: called with a connection after each call; undoes what the user's work left behind.
        pooled: behind PgBouncer in transaction mode: each call is one explicit transaction, begins with
            `begin` (settings that travel in it), and leaves nothing behind in the session.
        hosts: those of `conninfo`, shared by lines that may learn from each other who answers.
    """

    def __init__(
        self,
        role: str,
        conninfo: str,
        breaker: Breaker,
        *,
        call_timeout: float,
        prepare: Callable[[psycopg.Connection[Any]], None],
        restore: Callable[[psycopg.Connection[Any]], None] | None = None,
        size: int = 1,
        pooled: bool = False,
        begin: Callable[[psycopg.Connection[Any]], None] = lambda conn: None,
        hosts: Hosts | None = None,
    ) -> None:
        self.role = role
        self._conninfo = conninfo
        self._hosts = Hosts(conninfo) if hosts is None else hosts
        self._breaker = breaker
        self._call_timeout = call_timeout
        self._prepare = prepare
        self._restore = restore
        self._pooled = pooled
        self._begin = begin
        self._limiter = trio.CapacityLimiter(size)
        self._idle: list[psycopg.Connection[Any]] = []
        self._eras: WeakKeyDictionary[psycopg.Connection[Any], int] = WeakKeyDictionary()  # see Hosts
        self._closed = False
        self._pid = os.getpid()

    @property
    def longest_call(self) -> float:
        """Seconds after which a call of ours has ended, whatever happened to it."""
        return self._call_timeout + CANCEL_WAIT

    async def run(self, operation: str, fn: Callable[[Call], T], *, deadline: float | None = None) -> T:
        """Run `fn` in a thread, on one of the connections.

        Cancellation: cancelled while it waits for its turn, or done.

        Raises:
            DatabaseError: translated from psycopg's; `committed` says what is known.
        """
        return await trio.to_thread.run_sync(
            self.call, operation, fn, deadline, limiter=self._limiter, abandon_on_cancel=False
        )

    async def run_on(
        self, conn: psycopg.Connection[Any], operation: str, fn: Callable[[psycopg.Connection[Any]], T]
    ) -> T:
        """Run `fn` in a thread on a connection that was taken out of this line; bounded like every call."""

        def work() -> T:
            try:
                with self._breaker.watch(Call(conn, clock() + self._call_timeout, self._call_timeout)):
                    return fn(conn)
            except psycopg.Error as exc:
                raise translate(exc, operation=operation) from exc

        return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=False)

    async def exchange(
        self,
        operation: str,
        start: Callable[[psycopg.Connection[Any]], Generator[Ready, None, T] | None],
        on_commit: Callable[[T], None] = lambda result: None,
    ) -> T | None:
        """Run a generator of `_sql.exchange` on the loop, without a thread; bounded like every call.

        A thread costs two switches, and on its way back it waits for the interpreter's lock while handlers
        run: a worker that drains lost a third of its rate to that. Nothing here blocks: the connection is at
        hand, and the generator says when it must wait. What must happen together with the commit is done in the
        very step that read the answer.

        Returns None, and has done nothing, when there is no idle connection, or `start` returns None.

        Cancellation: shielded; the breaker ends it.
        """
        if self._pooled or not self._idle:
            return None
        self.check_owner(operation)
        try:
            self._limiter.acquire_on_behalf_of_nowait(place := object())
        except trio.WouldBlock:
            return None
        try:
            conn = self._take_idle()
            if conn is None:
                return None
            try:
                generator = start(conn)
                if generator is None:
                    return None
                with trio.CancelScope(shield=True):
                    result = await self._exchange(operation, conn, generator, on_commit)
                return result
            finally:
                if self._reusable(conn):
                    self._idle.append(conn)
                else:
                    conn.close()
        finally:
            self._limiter.release_on_behalf_of(place)

    async def _exchange(
        self,
        operation: str,
        conn: psycopg.Connection[Any],
        generator: Generator[Ready, None, T],
        on_commit: Callable[[T], None],
    ) -> T:
        call = Call(conn, clock() + self._call_timeout, self._call_timeout, on_loop=True)
        await reached_on_loop(operation, "enter")
        await reached_on_loop(operation, "connected")
        try:
            with self._breaker.watch(call):
                result = await _drive(generator, conn.fileno())
                await reached_on_loop(operation, "executed")
            on_commit(result)
            await reached_on_loop(operation, "committed")
            return result
        except psycopg.Error as exc:
            self._learn_from(exc, conn)
            raise translate(exc, operation=operation) from exc
        finally:
            if call.breaking:  # the cancel that was sent is still on its way
                conn.close()
            await reached_on_loop(operation, "exit")

    async def take_out(
        self, operation: str, fn: Callable[[psycopg.Connection[Any]], None]
    ) -> psycopg.Connection[Any]:
        """Run `fn`, and return its connection, which is no longer this line's; the caller closes it."""

        def work(call: Call) -> psycopg.Connection[Any]:
            fn(call.conn)
            return call.conn

        conn = await self.run(operation, work)
        if conn not in self._idle:  # it was broken off, or broke, in the last moment
            raise DatabaseError("the connection was lost", operation=operation, transient=True)
        self._idle.remove(conn)
        return conn

    async def run_breakable(self, operation: str, fn: Callable[[Call], T]) -> T:
        """Run `fn` once, breaking it off when the caller is cancelled while `call.guarded` is False.

        `fn` makes its transaction itself: settings of ours would bound the user's statements in it.

        A value that comes back in spite of a cancel is returned: its commit has happened. An error that
        comes back may be the cancel's doing: the caller decides.
        """
        calls: list[Call] = []
        cancelled = False
        finished, watched = trio.Event(), trio.Event()

        def in_thread(call: Call) -> T:
            calls.append(call)
            if cancelled:  # set before the list is read, so that one of the two sees the other
                self._breaker.break_off(call)
            return fn(call)

        @trio.lowlevel.enable_ki_protection
        async def watch() -> None:
            nonlocal cancelled
            try:
                await finished.wait()
            except trio.Cancelled:
                # Not swallowed: the caller stands in the same scope and meets it at its next checkpoint.
                cancelled = True
                for call in list(calls):
                    self._breaker.break_off(call)
            finally:
                watched.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            result = await outcome.acapture(self._run_once, operation, in_thread)
            finished.set()
            with trio.CancelScope(shield=True):
                await watched.wait()
        return result.unwrap()

    async def _run_once(self, operation: str, fn: Callable[[Call], T]) -> T:
        return await trio.to_thread.run_sync(
            partial(self.call, operation, fn, retries=0, own_transaction=True),
            limiter=self._limiter,
            abandon_on_cancel=False,
        )

    def call(
        self,
        operation: str,
        fn: Callable[[Call], T],
        deadline: float | None = None,
        *,
        retries: int = RETRIES,
        own_transaction: bool = False,
    ) -> T:
        """Run `fn` in this thread. See `run` and `run_breakable`."""
        reached(operation, "enter")
        self.check_owner(operation)
        now = clock()
        end = min(float("inf") if deadline is None else deadline, self._breaker.end)
        if end <= now:
            raise DatabaseError("there is no time left", operation=operation, transient=True)
        limit = min(now + self._call_timeout, now + _usable(end - now))
        conn = self._take_idle() or self._open(operation, limit, end)
        reached(operation, "connected")
        if self._pooled and not own_transaction:
            fn = partial(self._in_transaction, fn=fn)
        try:
            return self._attempts(operation, fn, conn, limit, end, retries)
        finally:
            if self._reusable(conn):
                self._idle.append(conn)
            else:
                conn.close()
            reached(operation, "exit")

    @property
    def is_owned(self) -> bool:
        """Whether this process opened the connections, and did not inherit them by a fork."""
        return os.getpid() == self._pid

    def check_owner(self, operation: str) -> None:
        """Raise TriojobsError in a forked child."""
        if not self.is_owned:
            raise TriojobsError(
                f"process {os.getpid()} uses connections of its parent {self._pid}",
                operation=operation,
                hint="open a client or group of its own after the fork",
            )

    def close(self) -> None:
        """Close the connections: idle ones now, others after their call."""
        self._closed = True
        while self._idle:
            conn = self._idle.pop()
            if self.is_owned:  # a forked child would say goodbye in its parent's name
                conn.close()

    def _attempts(
        self,
        operation: str,
        fn: Callable[[Call], T],
        conn: psycopg.Connection[Any],
        limit: float,
        end: float,
        retries: int,
    ) -> T:
        for attempt in range(retries + 1):
            call = Call(conn, limit, self._call_timeout, end)
            try:
                with self._breaker.watch(call):
                    result = fn(call)
                    reached(operation, "executed")
                    call.finish()
                    reached(operation, "committed")
                return result
            except psycopg.Error as exc:
                what_helps = self._learn_from(exc, conn)
                pause = random.uniform(0.01, 0.1)
                again = what_helps is Remedy.RETRY and attempt < retries and not call.breaking
                if again and clock() + pause < limit:
                    time.sleep(pause)
                    continue
                error = translate(exc, operation=operation)
                if call.uncommitted:
                    error.committed = False
                raise error from exc
            finally:
                if call.breaking:
                    # The call has ended by itself, and the cancel that was sent for it is still on
                    # its way: it would hit whatever this connection does next.
                    conn.close()
        raise AssertionError  # the last attempt returns or raises

    def _learn_from(self, exc: psycopg.Error, conn: psycopg.Connection[Any]) -> Remedy:
        """Return what may help, and drop what cannot be used any more."""
        what_helps = remedy(exc)
        if what_helps is Remedy.RECONNECT:
            conn.close()
        if exc.sqlstate == READ_ONLY:
            self._hosts.demoted()
        return what_helps

    def _reusable(self, conn: psycopg.Connection[Any]) -> bool:
        """Whether the next call may have this connection; restores it for that."""
        at_rest = conn.pgconn.transaction_status == IDLE and not conn.pgconn.pipeline_status
        if self._closed or conn.closed or conn.broken or not at_rest:
            return False
        if self._restore is None or self._pooled:
            return True
        # Somebody waits for the value of the call before: rather lose the connection than be long.
        call = Call(conn, clock() + min(self._call_timeout, RESTORE_TIME), self._call_timeout)
        try:
            with self._breaker.watch(call):
                self._restore(conn)
        except psycopg.Error as exc:
            log.debug("a connection is not used again: %s", exc, extra={"event": "not_restored"})
            return False
        return not call.breaking

    def _in_transaction(self, call: Call, fn: Callable[[Call], T]) -> T:
        with call.conn.transaction():
            self._begin(call.conn)
            return fn(call)

    def _take_idle(self) -> psycopg.Connection[Any] | None:
        while self._idle:
            conn = self._idle.pop()
            # A server that said goodbye while we were idle has left something to read.
            if not conn.closed and self._eras[conn] == self._hosts.era and not _readable(conn.fileno()):
                return conn
            conn.close()
        return None

    def _open(self, operation: str, limit: float, end: float) -> psycopg.Connection[Any]:
        conn = self._connect(operation, limit)
        try:
            with self._breaker.watch(Call(conn, limit, self._call_timeout, end)):
                self._prepare(conn)
        except BaseException as exc:
            conn.close()
            if not isinstance(exc, psycopg.Error):
                raise
            error = translate(exc, operation=operation)
            error.committed = False  # the statement itself was never sent
            raise error from exc
        return conn

    def _connect(self, operation: str, limit: float) -> psycopg.Connection[Any]:
        """Open an autocommit connection pinned to READ COMMITTED, by `limit` or when all must end."""
        era = self._hosts.era
        conn = connect_in_time(
            self._conninfo,
            self._hosts,
            lambda: min(limit, self._breaker.end) - clock(),
            operation=operation,
            defaults={"application_name": f"triojobs {self.role}", **KEEPALIVE},
        )
        self._eras[conn] = era
        conn.prepare_threshold = None if self._pooled else PREPARE_THRESHOLD
        conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return conn


IDLE: Final = psycopg.pq.TransactionStatus.IDLE
PREPARE_THRESHOLD: Final = 2  # uses of a statement before the server keeps its plan
