"""PostgresStore: the Store protocol over the bridge and the SQL modules."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import psycopg
import trio
from psycopg.rows import tuple_row

from ._backoff import reconnect_delay
from ._beacon import Beacon
from ._bridge import IDLE, Breaker, BrokenOff, Call, Line, check_cancelled, clock, run_in_thread
from ._errors import DatabaseError, SchemaError, StaleClaimError, TriojobsError
from ._lease import Lease
from ._listener import listen
from ._model import Claim, Enqueued, NewRow, RawJob, Registration, Settled, Settlement
from ._sql import claim as claim_sql
from ._sql import enqueue as enqueue_sql
from ._sql import groups, inspect, notify, operate, settle
from ._sql.failures import translate
from ._sql.schema import check_schema
from ._sql.session import prepare_job_session, prepare_session, refuse_undeclared_pooler
from ._store import BeatEvents, ClaimOrder, ClaimReply, Compared, ListenEvents

__all__ = ["PostgresStore"]

T = TypeVar("T")
log = logging.getLogger("triojobs.postgres")

PARTITION_INTERVAL: Final = 60.0  # seconds between looks whether new id ranges are needed
LOOK_TIME: Final = 3.0  # seconds to find out whether a COMMIT without a reply has happened
UNKNOWN: Final = "unknown"  # the answer when that could not be found out
CLIENT_CONNECTIONS: Final = 2  # one for the flusher's shared commits, one for reads and bulk


class PostgresStore:
    """Jobs in PostgreSQL.

    Args:
        conninfo: libpq connection string or URI. schema: where the tables are.
        call_timeout: seconds per blocking call.
        listen_conninfo: a direct conninfo for LISTEN when `conninfo` is pooled.
        pooled: conninfo leads to PgBouncer in transaction mode.
        notify: whether to send notifications.
        job_connections: connections for `commit_work`.
    """

    def __init__(
        self,
        conninfo: str,
        *,
        schema: str,
        call_timeout: float,
        listen_conninfo: str | None = None,
        pooled: bool = False,
        notify: bool = True,
        job_connections: int = 1,
    ) -> None:
        self.schema = schema
        self._call_timeout = call_timeout
        self._conninfo = conninfo
        self._pooled = pooled
        self._notify = notify
        self._pid = os.getpid()
        self._breaker = Breaker()
        self._beats: dict[uuid.UUID, BeatControl] = {}
        self._can_listen = notify and (not pooled or listen_conninfo is not None)
        self._claim_line = self._line("claim")
        self._settle_line = self._line("settle")
        self._client_line = self._line("client", size=CLIENT_CONNECTIONS)
        self._job_line = self._line("job", size=job_connections, prepare=prepare_job_session)
        self._listen_line = self._line("listen", conninfo=listen_conninfo or conninfo, pooled=False)

    def _line(
        self,
        role: str,
        *,
        size: int = 1,
        conninfo: str | None = None,
        pooled: bool | None = None,
        prepare: Callable[..., None] = prepare_session,
    ) -> Line:
        pooled = self._pooled if pooled is None else pooled

        def prepare_connection(conn: psycopg.Connection[Any]) -> None:
            refuse_undeclared_pooler(conn, declared=pooled)
            if not pooled:
                prepare(conn, call_timeout=self._call_timeout)

        return Line(
            role,
            conninfo or self._conninfo,
            self._breaker,
            call_timeout=self._call_timeout,
            prepare=prepare_connection,
            size=size,
            pooled=pooled,
        )

    def now(self) -> float:
        return clock()

    def check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise TriojobsError(
                f"process {os.getpid()} uses a client or group of its parent {self._pid}",
                operation="calling triojobs",
                hint="open one of its own after the fork",
            )

    async def open(self) -> None:
        await self._client_line.run("connecting", lambda call: check_schema(call.conn, self.schema))

    async def aclose(self) -> None:
        for line in (
            self._claim_line,
            self._settle_line,
            self._client_line,
            self._job_line,
            self._listen_line,
        ):
            line.close()
        self._breaker.close()

    def hurry(self, deadline: float) -> None:
        self._breaker.hurry(deadline)

    # The worker group.

    async def register(self, registration: Registration, lease: Lease) -> None:
        def work(call: Call) -> None:
            sent = clock()
            groups.register(call.conn, self.schema, registration)
            call.on_commit(lambda: lease.confirm(sent))

        await self._claim_line.run("registering the worker group", work)

    async def hold_lease(
        self, registration: Registration, lease: Lease, beacon: Beacon, events: BeatEvents
    ) -> None:
        control = self._beats.setdefault(registration.group_id, BeatControl())
        line = self._line("heartbeat")
        loop = BeatLoop(line, self, registration, lease, beacon, events, control)
        try:
            await run_in_thread(loop.run, trio.CapacityLimiter(1))
        finally:
            del self._beats[registration.group_id]
            line.close()

    def beat_now(self, group_id: uuid.UUID) -> None:
        if control := self._beats.get(group_id):
            control.poke()

    def release_lease(self, group_id: uuid.UUID) -> None:
        self._beats.setdefault(group_id, BeatControl()).stop()

    async def listen(self, group_id: uuid.UUID, queues: Collection[str], events: ListenEvents) -> None:
        if not self._can_listen:
            await trio.sleep_forever()
        await listen(
            schema=self.schema,
            group_id=group_id,
            queues=queues,
            events=events,
            connect=self._connect_listener,
            probe=self._probe,
        )

    async def _connect_listener(self) -> psycopg.Connection[Any]:
        # From now on the listener owns it, closes it, and nobody else uses it.
        return await self._listen_line.take_out("connecting to listen")

    async def _probe(self, conn: psycopg.Connection[Any]) -> None:
        await self._listen_line.run_on(conn, "probing the listener", lambda c: c.execute("SELECT 1"))

    async def claim(self, order: ClaimOrder, book: Callable[[Sequence[Claim]], None]) -> ClaimReply:
        def work(call: Call) -> ClaimReply:
            promoted: Mapping[str, int] = {}
            due: float | None = None
            if order.promote:
                promoted, due = claim_sql.promote(call.conn, self.schema, queues=order.promote)
            claims = claim_sql.claim(
                call.conn,
                self.schema,
                group_id=order.group_id,
                epoch=order.epoch,
                claim_no=order.claim_no,
                wants=order.wants,
            )
            call.on_commit(lambda: book(claims))
            got = dict.fromkeys(order.wants, 0)
            for claimed in claims:
                got[claimed.queue] += 1
            self.notify_later(call, {q for q, n in promoted.items() if n > got.get(q, 0)})
            refused = not claims and not claim_sql.may_claim(
                call.conn, self.schema, group_id=order.group_id, epoch=order.epoch
            )
            return ClaimReply(got, promoted, due, refused=refused)

        return await self._claim_line.run("claiming jobs", work)

    async def compare(
        self,
        group_id: uuid.UUID,
        known: Callable[[], Sequence[tuple[int, int]]],
        missing: Callable[[Sequence[tuple[int, int]]], None],
    ) -> Compared | None:
        def work(call: Call) -> Compared | None:
            found = groups.compare(call.conn, self.schema, group_id, known)
            if found is None:
                return None
            call.on_commit(lambda: missing(found.missing))
            self.notify_later(call, found.queues)
            return Compared(found.epoch, found.released)

        return await self._claim_line.run("comparing the leases of the worker group", work)

    async def mark_waiting(self, group_id: uuid.UUID, queues: Collection[str], waiting: bool) -> None:
        mark = notify.mark_waiting if waiting else notify.unmark_waiting
        await self._claim_line.run(
            "marking who waits", lambda call: mark(call.conn, self.schema, group_id, queues)
        )

    async def settle(
        self,
        group_id: uuid.UUID,
        batch: Sequence[Settlement],
        written: Callable[[Sequence[Settled]], None],
        *,
        deadline: float | None = None,
    ) -> None:
        def work(call: Call) -> None:
            rows, queues = settle.settle(call.conn, self.schema, group_id, batch)
            call.on_commit(lambda: written(rows))
            self.notify_later(call, queues)

        await self._settle_line.run(f"settling {len(batch)} job(s)", work, deadline=deadline)

    async def close_group(
        self,
        group_id: uuid.UUID,
        written: Callable[[Sequence[Settled]], None],
        *,
        deadline: float | None = None,
    ) -> None:
        def work(call: Call) -> None:
            rows, queues = groups.close_group(call.conn, self.schema, group_id)
            call.on_commit(lambda: written(rows))
            self.notify_later(call, queues)

        await self._settle_line.run("closing the worker group", work, deadline=deadline)

    async def commit_work(
        self,
        claim: Claim,
        work: Callable[[Any], T],
        encode: Callable[[T], tuple[bytes, str]] | None,
        committed: Callable[[], None],
    ) -> T:
        attempt = CommitAttempt(self.schema, claim, work, encode, committed)
        try:
            return cast(T, await self._job_line.run_breakable(f"committing job {claim.job_id}", attempt.run))
        except BrokenOff:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        except DatabaseError as exc:
            if not attempt.fenced:
                exc.committed = False  # COMMIT was never sent
            if exc.committed is None and encode is not None:
                # The reply to COMMIT is lost: look for this claim's outcome before anybody is told.
                status = await self._outcome_of(attempt)
                if status == "done":
                    return cast(T, attempt.value)
                if status not in (None, UNKNOWN):
                    raise StaleClaimError(claim.job_id, operation="committing") from exc
                if status is None:
                    exc.committed = False
            await trio.lowlevel.checkpoint_if_cancelled()  # it failed because it was broken off
            if attempt.failure is None:
                raise
        raise attempt.failure  # what `work` raised, as it was raised

    async def _outcome_of(self, attempt: CommitAttempt) -> str | None:
        """Find out how this claim ended: a status, None for not at all, UNKNOWN when nobody answers."""
        deadline = clock() + LOOK_TIME
        failures = 0
        with trio.CancelScope(shield=True):
            while True:
                try:
                    return await self._settle_line.run(
                        f"looking for the outcome of job {attempt.claim.job_id}",
                        attempt.look,
                        deadline=deadline,
                    )
                except DatabaseError as exc:
                    log.warning("%s", exc, extra={"event": "look_failed"})
                    failures += 1
                    pause = reconnect_delay(failures, random.random)
                    if not exc.transient or clock() + pause >= deadline:
                        return UNKNOWN
                    await trio.sleep(pause)
        raise AssertionError  # a shield swallows nothing

    async def idle(self, queues: Collection[str], *, scheduled: bool = False) -> bool:
        return await self._client_line.run(
            "looking whether the queues are idle",
            lambda call: inspect.idle(call.conn, self.schema, queues, scheduled=scheduled),
        )

    # The client.

    async def enqueue(self, rows: Sequence[NewRow], *, deadline: float | None = None) -> list[Enqueued]:
        def work(call: Call) -> list[Enqueued]:
            def between_chunks() -> None:
                check_cancelled()
                call.extend()

            with call.conn.transaction():
                answers = enqueue_sql.enqueue(
                    call.conn, self.schema, rows, notify_inside=False, between_chunks=between_chunks
                )
                call.extend()
            self.notify_later(call, {row.queue for row in rows})
            return [a for a in answers if isinstance(a, Enqueued)]  # a taken key has raised

        return await self._client_line.run(f"enqueueing {len(rows)} job(s)", work, deadline=deadline)

    async def enqueue_each(
        self, rows: Sequence[NewRow], *, deadline: float | None = None
    ) -> list[Enqueued | BaseException]:
        def work(call: Call) -> list[Enqueued | BaseException]:
            with call.conn.transaction():
                answers = enqueue_sql.enqueue(
                    call.conn,
                    self.schema,
                    rows,
                    notify_inside=False,
                    between_chunks=call.extend,
                    answer_each=True,
                )
            self.notify_later(call, {row.queue for row in rows})
            return list(answers)

        async def alone(row: NewRow) -> Enqueued | BaseException:
            if deadline is not None and clock() >= deadline:
                return DatabaseError("it was not begun in time", operation="enqueueing", transient=True)
            try:
                return (await self.enqueue([row], deadline=deadline))[0]
            except TriojobsError as exc:
                return exc

        if len(rows) == 1:
            return [await alone(rows[0])]
        try:
            return await self._client_line.run(f"enqueueing {len(rows)} job(s)", work, deadline=deadline)
        except TriojobsError as exc:
            if isinstance(exc, SchemaError) or (
                isinstance(exc, DatabaseError) and (exc.committed is None or exc.transient)
            ):
                return [exc] * len(rows)
            return [await alone(row) for row in rows]  # one row's content is refused: which one?

    async def new_job_ids(self, count: int) -> list[int]:
        return await self._client_line.run(
            "reserving job ids", lambda call: enqueue_sql.new_job_ids(call.conn, self.schema, count)
        )

    async def read_jobs(self, ids: Sequence[int]) -> list[RawJob]:
        return await self._client_line.run(
            "reading jobs", lambda call: inspect.read_jobs(call.conn, self.schema, ids)
        )

    async def ended(self, ids: Sequence[int]) -> list[int]:
        return await self._client_line.run(
            "waiting for jobs", lambda call: inspect.ended(call.conn, self.schema, ids)
        )

    async def cancel_job(self, job_id: int, reason: str) -> bool:
        return await self._client_line.run(
            f"cancelling job {job_id}", lambda call: _cancel(call, self.schema, job_id, reason)
        )

    def notify_later(self, call: Call, queues: Collection[str]) -> None:
        """Wake who waits for these queues, after the commit of this call."""
        if queues and self._notify:
            call.afterwards(lambda conn: notify.notify_waiting(conn, self.schema, queues))


class CommitAttempt:
    """The thread's side of `Job.commit`: the user's work, then the fence, then COMMIT."""

    def __init__(
        self,
        schema: str,
        claim: Claim,
        work: Callable[[Any], Any],
        encode: Callable[[Any], tuple[bytes, str]] | None,
        committed: Callable[[], None],
    ) -> None:
        self.claim = claim
        self.value: Any = None
        self.fenced = False
        self.failure: BaseException | None = None
        self._schema = schema
        self._work = work
        self._encode = encode
        self._committed = committed

    def run(self, call: Call) -> Any:
        claim = self.claim
        job_id, group_id, claim_no = claim.job_id, claim.group_id, claim.claim_no
        with call.conn.transaction():
            data = self._do_work(call)
            if data is None:
                held = settle.hold_lease(
                    call.conn, self._schema, job_id=job_id, group_id=group_id, claim_no=claim_no
                )
            else:
                held = settle.settle_one_done(
                    call.conn,
                    self._schema,
                    job_id=job_id,
                    group_id=group_id,
                    claim_no=claim_no,
                    result=data[0],
                    encoding=data[1],
                )
            if not held:
                raise StaleClaimError(
                    claim.job_id, operation="transacting" if self._encode is None else "committing"
                )
            self.fenced = True
            if data is not None:
                call.on_commit(self._committed)
        return self.value

    def _do_work(self, call: Call) -> tuple[bytes, str] | None:
        conn = call.conn
        with call.unguarded():
            try:
                self.value = self._work(conn)
            except BaseException as exc:
                self.failure = exc
                raise
            finally:
                # The next job finds the connection as we opened it.
                conn.row_factory, conn.cursor_factory = tuple_row, psycopg.Cursor
            if conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE:
                raise TriojobsError(
                    f"the work of job {self.claim.job_id} ended the transaction itself",
                    operation="committing",
                    hint="leave COMMIT and ROLLBACK to Job.commit and Job.transact",
                )
            return None if self._encode is None else self._encode(self.value)

    def look(self, call: Call) -> str | None:
        claim = self.claim
        status = settle.outcome_of_claim(
            call.conn, self._schema, job_id=claim.job_id, group_id=claim.group_id, claim_no=claim.claim_no
        )
        if status == "done":
            self._committed()
        return status


class BeatControl:
    """How the event loop talks to a beat thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._poked = False
        self._nudged = False
        self.stopped = False

    def poke(self) -> None:
        """Have a beat at once."""
        with self._changed:
            self._poked = True
            self._changed.notify()

    def nudge(self) -> None:
        """Have the loop think again about how long to wait."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    def stop(self) -> None:
        """End the loop after the call in flight."""
        with self._changed:
            self.stopped = True
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Wait until poked, nudged or stopped, or until `seconds` have passed; return whether poked."""
        with self._changed:
            if not self._poked and not self._nudged and not self.stopped:
                self._changed.wait(max(0.0, seconds))
            poked, self._poked, self._nudged = self._poked, False, False
            return poked


class BeatLoop:
    """Beats, hands over cancel requests, watches the event loop, rescues dead groups; in a thread of its own.

    A thread, because a beat that runs on the event loop dies with it: with the loop blocked for
    10 s the gap was 10.2 s as a Trio task and 2.0 s as a thread. But a thread that beats for a loop
    that never turns again would keep its jobs for ever: then it gives the lease up.
    """

    def __init__(
        self,
        line: Line,
        store: PostgresStore,
        registration: Registration,
        lease: Lease,
        beacon: Beacon,
        events: BeatEvents,
        control: BeatControl,
    ) -> None:
        self._line = line
        self._store = store
        self._group_id = registration.group_id
        self._lease = lease
        self._beacon = beacon
        self._events = events
        self._control = control
        self._beat_at = lease.next_beat(clock())
        self._look_at = math.inf
        self._rescue_interval = min(5.0, registration.lease_duration / 6)
        self._next_rescue = clock()  # the first round is at once: a restart after a crash wants its jobs
        self._next_partitions = clock() + PARTITION_INTERVAL * random.random()

    def run(self) -> None:
        self._beacon.watched(self._control.nudge)
        while True:
            due = min(self._beat_at, self._next_rescue, self._look_at)
            poked = self._control.wait(due - clock())
            if self._control.stopped or not self._look():
                return
            if not poked and clock() < min(self._beat_at, self._next_rescue):
                continue
            # The beat always goes first: it keeps our own jobs, a rescue can wait.
            if not self._beat():
                return
            self._beat_at = self._lease.next_beat(clock())
            if clock() >= self._next_rescue:
                self._next_rescue = clock() + self._rescue_interval * random.uniform(0.5, 1.0)
                self._quietly("rescuing dead worker groups", self._rescue)
            if clock() >= self._next_partitions:
                self._next_partitions = clock() + PARTITION_INTERVAL * random.uniform(0.5, 1.5)
                self._quietly("adding partitions", self._add_partitions)

    def _look(self) -> bool:
        """Look at the event loop when it is time to. False: it is dead, and its lease given up."""
        now = clock()
        if now >= self._look_at:
            self._look_at = math.inf
            if (seconds := self._beacon.look(now)) is not None:
                self._events.loop_blocked(seconds)
            if (seconds := self._beacon.dead_for) is not None:
                self._lease.lose()
                self._events.loop_dead(seconds)
                return False
        if self._look_at == math.inf:
            self._look_at = self._beacon.next_look(now)
        return True

    def _beat(self) -> bool:
        sent = clock()
        try:
            found = self._line.call(
                "beating", lambda call: groups.beat(call.conn, self._store.schema, self._group_id)
            )
        except DatabaseError as exc:
            self._lease.fail()
            log.warning("%s", exc, extra={"event": "beat_failed"})
            return True
        if found is None:
            if not self._control.stopped:  # once closing has begun, a closed row is no news
                self._lease.lose()
                self._events.lease_lost()
            return False
        self._lease.confirm(sent)
        if not found.witnessed:
            self._events.must_compare()
        if found.requests:
            self._events.cancel_requests(found.requests)
        if found.drain is not None:
            self._events.drain_requested(found.drain)
        return True

    def _rescue(self, call: Call) -> None:
        found = groups.rescue(call.conn, self._store.schema)
        if found.jobs:
            log.warning(
                "rescued %d job(s) of %d dead worker group(s)",
                found.jobs,
                len(found.groups),
                extra={"event": "rescued", "groups": [str(g) for g in found.groups], "jobs": found.jobs},
            )
            call.on_commit(lambda: self._events.rescued(found.jobs))
        self._store.notify_later(call, found.queues)

    def _add_partitions(self, call: Call) -> None:
        groups.add_partitions(call.conn, self._store.schema)

    def _quietly(self, operation: str, fn: Callable[[Call], None]) -> None:
        """Do a service to all groups; its failure is logged, and the next round comes."""
        try:
            self._line.call(operation, fn)
        except DatabaseError as exc:
            log.warning("%s", exc, extra={"event": "service_failed"})


def enqueue_on_connection(
    conn: psycopg.Connection[Any], schema: str, rows: Sequence[NewRow]
) -> list[Enqueued]:
    """Enqueue in the caller's transaction. What fails undoes this call alone.

    A connection without autocommit that is idle begins its transaction here, as its first statement
    would; with autocommit the call is a transaction of its own.
    """
    if conn.pgconn.pipeline_status and not conn.closed:
        with conn.pipeline():
            pass  # a synchronization point, so that the status below is the present one
    begun = not conn.autocommit or conn.pgconn.transaction_status != IDLE
    sent = not conn.closed
    try:
        if not conn.autocommit and conn.pgconn.transaction_status == IDLE:
            conn.execute("SELECT")
        with conn.transaction():  # a savepoint inside the caller's transaction
            answers = enqueue_sql.enqueue(conn, schema, rows, notify_inside=True)
    except psycopg.Error as exc:
        error = translate(exc, operation=f"enqueueing {len(rows)} job(s)")
        if begun or not sent:
            error.committed = False  # the COMMIT is the caller's
        raise error from exc
    return [a for a in answers if isinstance(a, Enqueued)]


def is_connection(value: object) -> bool:
    """Return whether `value` is a synchronous psycopg connection."""
    return isinstance(value, psycopg.Connection)


class SyncStore:
    """What a program without Trio needs: one connection, opened on demand, used by one thread at a time."""

    def __init__(self, conninfo: str, *, schema: str, call_timeout: float, pooled: bool) -> None:
        self._schema = schema
        self._breaker = Breaker()
        self._lock = threading.Lock()

        def prepare(conn: psycopg.Connection[Any]) -> None:
            refuse_undeclared_pooler(conn, declared=pooled)
            if not pooled:
                prepare_session(conn, call_timeout=call_timeout)

        self._line = Line(
            "sync client", conninfo, self._breaker, call_timeout=call_timeout, prepare=prepare, pooled=pooled
        )

    def run(self, operation: str, fn: Callable[[Call], T]) -> T:
        """Run `fn` on the connection, bounded like every call."""
        with self._lock:
            return self._line.call(operation, fn)

    def check(self) -> None:
        """Connect and verify the schema."""
        self.run("connecting", lambda call: check_schema(call.conn, self._schema))

    def enqueue(self, rows: Sequence[NewRow]) -> list[Enqueued]:
        """Insert jobs in one transaction, then notify who waits."""

        def work(call: Call) -> list[Enqueued]:
            with call.conn.transaction():
                answers = enqueue_sql.enqueue(
                    call.conn, self._schema, rows, notify_inside=False, between_chunks=call.extend
                )
            queues = {row.queue for row in rows}
            call.afterwards(lambda conn: notify.notify_waiting(conn, self._schema, queues))
            return [a for a in answers if isinstance(a, Enqueued)]

        return self.run(f"enqueueing {len(rows)} job(s)", work)

    def new_job_ids(self, count: int) -> list[int]:
        """Reserve ids."""
        return self.run(
            "reserving job ids", lambda call: enqueue_sql.new_job_ids(call.conn, self._schema, count)
        )

    def read_jobs(self, ids: Sequence[int]) -> list[RawJob]:
        """Return the jobs that exist."""
        return self.run("reading jobs", lambda call: inspect.read_jobs(call.conn, self._schema, ids))

    def ended(self, ids: Sequence[int]) -> list[int]:
        """Return those ids whose job has ended or does not exist."""
        return self.run("waiting for jobs", lambda call: inspect.ended(call.conn, self._schema, ids))

    def cancel_job(self, job_id: int, reason: str) -> bool:
        """Cancel a waiting job, or ask for the cancellation of a running one."""
        return self.run(f"cancelling job {job_id}", lambda call: _cancel(call, self._schema, job_id, reason))

    def close(self) -> None:
        """Close the connection and end the breaker's thread."""
        with self._lock:
            self._line.close()
            self._breaker.close()


def _cancel(call: Call, schema: str, job_id: int, reason: str) -> bool:
    answer = operate.cancel(call.conn, schema, job_id, reason)
    if isinstance(answer, uuid.UUID):
        group_id = answer
        call.afterwards(lambda conn: notify.notify_group(conn, group_id))
    return answer is not operate.ENDED_BEFORE
