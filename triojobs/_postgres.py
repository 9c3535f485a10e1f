"""PostgresStore: the Store protocol over the bridge and the SQL modules."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar, cast

import psycopg
import trio

from ._admin_store import Step, drive, perform
from ._beacon import Beacon
from ._beats import BeatControl, BeatLoop
from ._bridge import Breaker, Call, Line, check_cancelled, clock, run_in_thread
from ._commit import CommitAttempt, commit
from ._errors import DatabaseError, TriojobsError
from ._lease import Lease
from ._listener import listen
from ._logs import Log
from ._model import Claim, Enqueued, NewRow, RawJob, Registration, Settled, Settlement
from ._pruning import LATER, prune, take_turn
from ._retention import Pruned, Retention
from ._sql import claim as claim_sql
from ._sql import enqueue as enqueue_sql
from ._sql import exchange, groups, inspect, notify, operate, server, settle
from ._sql.enqueue_each import SharedEnqueue
from ._sql.hosts import Hosts
from ._sql.schema import check_schema
from ._sql.session import (
    begin_transaction,
    prepare_job_session,
    prepare_session,
    refuse_deaf_conninfo,
    refuse_undeclared_pooler,
    restore_job_session,
)
from ._store import BeatEvents, ClaimOrder, ClaimReply, Compared, ListenEvents, nothing

__all__ = ["PostgresStore", "cancel_job", "enqueue_in_transaction"]

T = TypeVar("T")
log = Log("triojobs.postgres")

CLIENT_CONNECTIONS: Final = 2  # for reads and bulk: a large call leaves one for the others
# Refusals after which nothing was written and the same rows may fare better one by one, or again: their data,
# a lock, a race.
WORTH_ANOTHER_TRY: Final = ("22", "23", "40", "54", "55")
ENQUEUE_CONNECTIONS: Final = 2  # for shared commits: one that may meet locked keys, one that cannot


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
        self._hosts = Hosts(conninfo)
        self._pooled = pooled
        self._notify = notify
        self._pid = os.getpid()
        self._breaker = Breaker()
        self._beats: dict[uuid.UUID, BeatControl] = {}
        self._listen_conninfo = listen_conninfo
        self._deafness_told = False
        self._can_listen = notify and (not pooled or listen_conninfo is not None)
        self._claim_line = self._line("claim")
        self._settle_line = self._line("settle")
        self._client_line = self._line("client", size=CLIENT_CONNECTIONS)
        self._enqueue_line = self._line("enqueue", size=ENQUEUE_CONNECTIONS)
        self._job_line = self._line("job", size=job_connections, users=True)
        self._listen_line = self._line("listen", conninfo=listen_conninfo, pooled=False)

    def _line(
        self,
        role: str,
        *,
        size: int = 1,
        conninfo: str | None = None,
        pooled: bool | None = None,
        users: bool = False,
    ) -> Line:
        """Make a line; `users`: it carries the user's own statements."""
        pooled = self._pooled if pooled is None else pooled

        def prepare(conn: psycopg.Connection[Any]) -> None:
            if pooled:
                return
            if conninfo is None:
                refuse_undeclared_pooler(conn)
            else:
                refuse_deaf_conninfo(conn)
            if users:
                prepare_job_session(conn)
            else:
                prepare_session(conn, call_timeout=self._call_timeout)

        return Line(
            role,
            conninfo or self._conninfo,
            self._breaker,
            call_timeout=self._call_timeout,
            prepare=prepare,
            restore=restore_job_session if users else None,
            size=size,
            pooled=pooled,
            begin=partial(begin_transaction, call_timeout=self._call_timeout),
            hosts=None if conninfo else self._hosts,
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
        if self._listen_conninfo is not None and self._can_listen:
            try:  # the listener will take this connection
                await self._listen_line.run("connecting to listen", lambda call: None)
            except DatabaseError as exc:
                if not exc.transient:
                    raise

    async def aclose(self) -> None:
        for line in (
            self._claim_line,
            self._settle_line,
            self._client_line,
            self._enqueue_line,
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
        loop = BeatLoop(line, self.schema, self.notify_later, registration, lease, beacon, events, control)
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
            if self._notify and not self._deafness_told:
                self._deafness_told = True
                log.warning(
                    "LISTEN does not work through a pooler in transaction mode, so this group polls; pass "
                    "listen_conninfo=, a direct one, or notify=False",
                    extra={"event": "cannot_listen"},
                )
            await trio.sleep_forever()
        await listen(
            schema=self.schema,
            group_id=group_id,
            queues=queues,
            events=events,
            connect=self._connect_listener,
            probe=self._probe,
        )

    async def _connect_listener(
        self, begin: Callable[[psycopg.Connection[Any]], None]
    ) -> psycopg.Connection[Any]:
        # From now on the listener owns it, closes it, and nobody else uses it.
        return await self._listen_line.take_out("connecting to listen", begin)

    async def _probe(self, conn: psycopg.Connection[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            if server.is_read_only(conn):  # nobody can notify there; among several hosts is the right one
                raise DatabaseError(
                    "the server has become read-only",
                    operation="probing the listener",
                    sqlstate="25006",
                    transient=True,
                )

        await self._listen_line.run_on(conn, "probing the listener", work)

    async def claim(
        self,
        order: ClaimOrder,
        book: Callable[[Sequence[Claim]], None],
        *,
        under_way: Callable[[], None] = nothing,
    ) -> ClaimReply:
        asked = claim_sql.Asked(order.group_id, order.epoch, order.claim_no, order.wants, order.starts)
        if not order.promote and (claims := await self._claim_now(asked, book, under_way)) is not None:
            refused = not claims and not await self._claim_line.run(
                "looking whether we may claim", lambda call: self._may_claim(call, asked)
            )
            return ClaimReply(claims_by_queue(order.wants, claims), {}, refused=refused)
        token = trio.lowlevel.current_trio_token()

        def work(call: Call) -> ClaimReply:
            # The loop gets to it when this thread waits for the server: before, it would take the
            # interpreter's lock for milliseconds.
            token.run_sync_soon(under_way)
            promoted: Mapping[str, int] = {}
            due: float | None = None
            if order.promote:
                promoted, due = claim_sql.promote(call.conn, self.schema, queues=order.promote)
            if not order.wants:
                self.notify_later(call, promoted.keys())
                return ClaimReply({}, promoted, due)
            claims = asked.claim(call.conn, self.schema)
            call.on_commit(lambda: book(claims))
            got = claims_by_queue(order.wants, claims)
            self.notify_later(call, {q for q, n in promoted.items() if n > got.get(q, 0)})
            return ClaimReply(got, promoted, due, refused=not claims and not self._may_claim(call, asked))

        return await self._claim_line.run("claiming jobs", work)

    async def _claim_now(
        self, asked: claim_sql.Asked, book: Callable[[Sequence[Claim]], None], sent: Callable[[], None]
    ) -> list[Claim] | None:
        """Claim in one round trip, without a thread; None: nothing was done."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            return await self._claim_line.exchange(
                "claiming jobs", lambda conn: asked.now(conn, self.schema, sent), book
            )
        except DatabaseError as exc:
            if exc.sqlstate is None or not exc.sqlstate.startswith(WORTH_ANOTHER_TRY):
                raise
            return None  # nothing was claimed; a thread has the patience to repeat it

    def _may_claim(self, call: Call, asked: claim_sql.Asked) -> bool:
        return claim_sql.may_claim(call.conn, self.schema, group_id=asked.group_id, epoch=asked.epoch)

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
        if (
            deadline is None
            and batch
            and settle.is_done(batch)
            and await self._settle_now(group_id, batch, written)
        ):
            return

        def work(call: Call) -> None:
            rows, queues = settle.settle(call.conn, self.schema, group_id, batch)
            call.on_commit(lambda: written(rows))
            self.notify_later(call, queues)

        await self._settle_line.run(settling(batch), work, deadline=deadline)

    async def _settle_now(
        self,
        group_id: uuid.UUID,
        batch: Sequence[Settlement],
        written: Callable[[Sequence[Settled]], None],
    ) -> bool:
        """Settle what is done in one round trip, without a thread; False: this must go the other way.

        So must a batch of which some were not found; that these are not written yet is not said by it.
        """

        def written_if_all(found: bool) -> None:
            if found:
                written(settle.as_asked(batch))

        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            found = await self._settle_line.exchange(
                settling(batch),
                lambda conn: settle.settle_done(conn, self.schema, group_id, batch),
                written_if_all,
            )
        except DatabaseError as exc:
            if exc.sqlstate is None or not exc.sqlstate.startswith(WORTH_ANOTHER_TRY):
                raise
            return False
        return bool(found)

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
        return cast(T, await commit(attempt, on=self._job_line, look_on=self._settle_line))

    async def prune(self, retention: Retention) -> Pruned | None:
        line = self._line("retention")  # of its own, and no longer than it is needed

        async def run(step: Step[T]) -> T:
            return await line.run(step.operation, lambda call: perform(call, self.schema, step))

        try:
            if not await run(take_turn(retention.interval)):
                return None
            return await drive(prune(retention, slack=LATER, dry_run=False), run)
        finally:
            line.close()

    async def idle(self, queues: Collection[str], *, scheduled: bool = False) -> bool:
        return await self._client_line.run(
            "looking whether the queues are idle",
            lambda call: inspect.idle(call.conn, self.schema, queues, scheduled=scheduled),
        )

    # The client.

    async def enqueue(self, rows: Sequence[NewRow], *, deadline: float | None = None) -> list[Enqueued]:
        def work(call: Call) -> list[Enqueued]:
            answers = enqueue_in_transaction(call, self.schema, rows, check_cancelled)
            self.notify_later(call, {row.queue for row in rows})
            return answers

        return await self._client_line.run(f"enqueueing {len(rows)} job(s)", work, deadline=deadline)

    async def enqueue_each(
        self, rows: Sequence[NewRow], *, deadline: float | None = None
    ) -> list[Enqueued | TriojobsError]:
        if self._notify and deadline is None:
            begun = clock()
            try:
                if ids := await self._enqueue_at_once(rows):
                    return [Enqueued(job_id, created=True) for job_id in ids]
            except DatabaseError as exc:
                if exc.sqlstate is None or not exc.sqlstate.startswith(WORTH_ANOTHER_TRY):
                    return [exc for _ in rows]
                # Nothing was written: the other way finds out which row is at fault, or wins the next race.
                deadline = begun + self._call_timeout
        shared = SharedEnqueue(self.schema, rows)

        def work(call: Call) -> None:
            shared.run(call.conn, call.extend)
            self.notify_later(call, shared.queues)

        try:
            await self._enqueue_line.run(f"enqueueing {len(rows)} job(s)", work, deadline=deadline)
        except DatabaseError as exc:
            shared.give_up(exc)
        return shared.answers()

    async def _enqueue_at_once(self, rows: Sequence[NewRow]) -> list[int]:
        """Enqueue a few plain rows in one round trip, without a thread; [] when they cannot go this way."""

        def start(conn: psycopg.Connection[Any]) -> Any:
            return exchange.enqueue_now(conn, self.schema, rows) if exchange.fits(conn, rows) else None

        found = await self._enqueue_line.exchange(f"enqueueing {len(rows)} job(s)", start)
        ids: list[int]
        ids, error = ([], None) if found is None else found
        if error is not None:
            log.warning("a notification was not sent: %s", error, extra={"event": "notify_failed"})
        return ids

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
            f"cancelling job {job_id}", lambda call: cancel_job(call, self.schema, job_id, reason)
        )

    def notify_later(self, call: Call, queues: Collection[str]) -> None:
        """Wake who waits for these queues, after the commit of this call."""
        if queues and self._notify:
            call.afterwards(lambda conn: notify.notify_waiting(conn, self.schema, queues))


def enqueue_in_transaction(
    call: Call, schema: str, rows: Sequence[NewRow], check: Callable[[], None] = lambda: None
) -> list[Enqueued]:
    """Enqueue all rows or none; `check` may raise between chunks."""

    def between_chunks() -> None:
        check()
        call.extend()

    # One statement commits by itself, in one round trip instead of three.
    with contextlib.nullcontext() if enqueue_sql.is_one_statement(rows) else call.transaction():
        answers = enqueue_sql.enqueue(
            call.conn, schema, rows, notify_inside=False, between_chunks=between_chunks
        )
        call.extend()
    return answers


def claims_by_queue(queues: Iterable[str], claims: Sequence[Claim]) -> dict[str, int]:
    """Count the claims of each of these queues."""
    return dict.fromkeys(queues, 0) | Counter(claim.queue for claim in claims)


def settling(batch: Sequence[Settlement]) -> str:
    """Name the operation."""
    return f"settling {len(batch)} job(s)"


def cancel_job(call: Call, schema: str, job_id: int, reason: str) -> bool:
    """Cancel a waiting job, or ask for the cancellation of a running one and wake its group."""
    answer = operate.cancel(call.conn, schema, job_id, reason)
    if isinstance(answer, uuid.UUID):
        group_id = answer
        call.afterwards(lambda conn: notify.notify_group(conn, group_id))
    return answer is not operate.ENDED_BEFORE
