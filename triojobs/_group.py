"""The worker group: a scope around fetcher, heartbeat, handlers and settler, and its way out.

All tasks are children of one nursery; what a cancel does to each:
    fetcher, slots     cancelled at once (a claim in flight is waited for)
    settler, beats,    shielded: they serve handlers that wind down, and are ended by the closing
    flusher
    supervisor         its clean-up is shielded and does the closing

The closing, whoever asked for it: wait for fetcher and handlers; stop beating; write what ended; in
one transaction lock the group's row, close it, release every row under it. After the children are
gone nobody else changes the ledger, a thread in flight is waited for and bounded, an ambiguous
settlement is decided by the fence and an ambiguous claim by the lock on the group's row: so there is
no race. What cannot be done in time is left to rescue, counted and named.

The group is a class with protected entry and exit, like `trio.open_nursery`: with
`@asynccontextmanager` 1 of 100 double Ctrl-C hit contextlib's frame and left rows behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal

import trio
from trio_util import AsyncBool

from ._backoff import reconnect_delay
from ._client import IN_TRIO, Client, async_side, entered_twice, on_loop, wrong_side
from ._comparison import compare_when_in_doubt
from ._errors import DatabaseError, LeaseLostError, OptionError, SchemaError, TriojobsError, sole_error
from ._events import EventFeed, GroupEvent, GroupStarted, GroupStopped
from ._fetcher import Fetcher
from ._flusher import Flusher
from ._handling import Slots
from ._heartbeat import hold_lease, watch_lease
from ._instruments import group_closed, group_opened
from ._keeper import keep_house
from ._lease import Lease
from ._logs import Log
from ._model import (
    SETTLED,
    CancelRequest,
    GroupStatistics,
    Outcome,
    Registration,
    Settled,
    ShutdownReport,
)
from ._options import GroupOptions, checked_count
from ._queue import Worker
from ._registration import LiveRegistration
from ._settler import Settler
from ._store import Store
from ._stubborn import watch_handlers
from ._version import VERSION

__all__ = ["GroupContext", "WorkerGroup"]

log = Log("triojobs.group")

IDLE_FIRST, IDLE_LAST = 0.05, 1.0  # seconds between looks of wait_idle


class WorkerGroup:
    """An open worker group. Made by `open_worker_group`.

    Attributes:
        client: enqueue and look after jobs through this group's connections, while it is open.
        name: as given.
    """

    def __init__(self, store: Store, workers: Sequence[Worker[Any, Any]], options: GroupOptions) -> None:
        self.name: str = options.name
        self._report: ShutdownReport | None = None
        self._store = store
        self._workers = list(workers)
        self._options = options
        self._stop = AsyncBool(False)
        self._stopped = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._flusher = Flusher(store)
        self.client: Client = Client(store, self._flusher)
        self._registrations: list[LiveRegistration] = []
        self._slots: dict[LiveRegistration, dict[str, Slots]] = {}
        self._busy_ids: set[int] = set()
        self._abandoned: list[int] = []
        self._unknown_claims = 0
        self._stopping_since = math.inf
        self._feed = EventFeed()
        self._nursery: trio.Nursery

    # For users.

    @property
    def group_id(self) -> uuid.UUID:
        """The id of the present registration; a lost lease brings a new one."""
        return self._registrations[-1].group_id

    @property
    def state(self) -> Literal["running", "without lease", "stopping", "stopped"]:
        """How it stands. "without lease": it cannot prove its lease, runs nothing, and will register again."""
        if self._stopped.is_set():
            return "stopped"
        if self._stopping_since != math.inf:
            return "stopping"
        live = self._registrations[-1]
        provable = not live.lost.value and live.lease.provable(self._store.now())
        return "running" if provable else "without lease"

    @property
    def report(self) -> ShutdownReport:
        """What was done; complete once `wait_stopped` returned or the block was left, until then as it stands."""
        return self._as_it_stands() if self._report is None else self._report

    def stop(self) -> None:
        """Begin a graceful stop: claim nothing more, let handlers end. Does not cancel the body. Idempotent."""
        if not on_loop():
            raise wrong_side("stop", "from a thread or a signal handler use stop_from_thread")
        self._stopping_since = min(self._stopping_since, trio.current_time())
        self._stop.value = True
        self._start_nothing_more()

    def _start_nothing_more(self) -> None:
        """Claim nothing more, and take back what no handler has started.

        At once and not by the supervisor, whose turn may come after that of a fetcher with a claim, or of
        slots that were handed jobs.
        """
        for live, per_queue in self._slots.items():
            live.fetch_scope.cancel(reason="the worker group stops")
            for slots in per_queue.values():
                slots.withdraw()

    def stop_from_thread(self) -> None:
        """Do `stop` from any thread or signal handler. After the end of the program's loop: nothing."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.stop, idempotent=True)

    def _drain(self, reason: str) -> None:
        """Obey an operator; each beat repeats the request."""
        if not self._stop.value:
            log.warning(
                "worker group %s drains, as somebody asked: %s",
                self.group_id,
                reason,
                extra={"event": "drain", "group_id": str(self.group_id)},
            )
            self.stop()

    async def _wait_stop_asked(self) -> None:
        await self._stop.wait_value(True)

    @async_side(IN_TRIO)
    async def wait_stopped(self) -> None:
        """Wait until the group has stopped and closed, and `report` is complete."""
        await self._stopped.wait()

    @async_side(IN_TRIO)
    async def wait_idle(self) -> None:
        """Wait until nothing due or running is left in this group's queues, anywhere.

        Jobs that are scheduled for later, retries among them, do not count. Errors of the database
        that may heal are waited out.

        Raises:
            trio.ClosedResourceError: the group has stopped.
        """
        queues = [worker.queue.name for worker in self._workers]
        pause = IDLE_FIRST
        while True:
            if self._stopped.is_set():
                raise trio.ClosedResourceError("this worker group has stopped")
            try:
                if not self._held() and await self._store.idle(queues) and not self._held():
                    return
            except DatabaseError as exc:
                if not exc.transient:
                    raise
            await trio.sleep(pause)
            pause = min(IDLE_LAST, pause * 1.5) if not self._held() else IDLE_FIRST

    def events(self, *, buffer: int = 1000) -> trio.MemoryReceiveChannel[GroupEvent]:
        """Return a channel of what happens in this group from now on: `async for event in group.events(): …`.

        The first event is `GroupStarted`, for the present registration; the last is `GroupStopped`, after
        which the channel ends. The group never waits for a reader: what finds its buffer full is dropped
        and counted in `statistics().events_dropped`. Close the channel to stop reading early. Any number
        of readers may be open, each with all events; a group that nobody reads spends nothing on them.

        Args:
            buffer: events that wait for this reader at most (1 to 1,000,000).
        """
        if not on_loop():
            raise wrong_side("events", "call it from a Trio task")
        receiver = self._feed.open(checked_count("buffer", buffer, most=1_000_000) + 1)
        if self._registrations and not self._stopped.is_set():
            self._feed.send_to_last(GroupStarted(self.group_id, again=len(self._registrations) > 1))
        return receiver

    def statistics(self) -> GroupStatistics:
        """Return a snapshot; no I/O. Threads: any, for a group on PostgreSQL."""
        registrations = list(self._registrations)
        slots = [s for per_queue in list(self._slots.values()) for s in list(per_queue.values())]
        live = registrations[-1] if registrations else None
        current = list(self._slots.get(live, {}).values()) if live is not None else ()
        ledgers = [r.ledger for r in registrations]
        return GroupStatistics(
            running=sum(len(s.running) for s in slots),
            free=0 if self._stop.value else sum(s.free for s in current),
            unsettled=sum(ledger.unsettled for ledger in ledgers),
            claimed=sum(ledger.claimed for ledger in ledgers),
            settled=sum(sum(list(ledger.settled.values())) for ledger in ledgers),
            released=sum(ledger.released for ledger in ledgers),
            stale=sum(ledger.stale for ledger in ledgers),
            rescued=sum(r.rescued_jobs for r in registrations),
            lease_until=-math.inf if live is None or live.closed else live.lease.until,
            registrations=len(registrations),
            loop_blocked=sum(r.beacon.blocks for r in registrations),
            events_dropped=self._feed.dropped,
            lease_age=math.inf if live is None or live.closed else live.lease.age(self._store.now()),
        )

    def __repr__(self) -> str:
        return f"<WorkerGroup {self.name!r}>"

    def _held(self) -> int:
        return sum(r.ledger.held for r in self._registrations)

    # Life.

    async def _register(self) -> LiveRegistration:
        record = Registration(
            group_id=uuid.uuid4(),
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=VERSION,
            lease_duration=self._options.lease_duration,
            queues={worker.queue.name: worker.concurrency for worker in self._workers},
            concurrency=self._options.concurrency,
        )
        lease = Lease(
            duration=self._options.lease_duration,
            margin=self._options.lease_margin,
            interval=self._options.beat_interval,
        )
        live = LiveRegistration(
            record,
            lease,
            loop_dead_after=self._options.loop_death,
            hard_stop=self._options.hard_stop,
            feed=self._feed,
        )
        # Appended before the call: if its reply is lost, the closing closes this one too.
        self._registrations.append(live)
        try:
            await self._store.register(record, lease)
        except DatabaseError as exc:
            if exc.committed is False:
                self._registrations.remove(live)
            raise
        except trio.Cancelled:
            self._registrations.remove(live)
            raise
        return live

    def _begin(self, live: LiveRegistration) -> None:
        """Start the tasks of a registration. No await: all of them, or none."""
        slots: dict[str, Slots] = {}
        fetcher = Fetcher(live, self._store, slots, self._options)
        for worker in self._workers:
            slots[worker.queue.name] = Slots(
                worker,
                live,
                self._store,
                busy_ids=self._busy_ids,
                on_free=fetcher.wake.set,
                middleware=self._options.middleware,
            )
        fetcher.slots_ready()
        self._slots[live] = slots
        live.on_cancel_request = partial(_cancel_handler, live, slots)
        live.on_drain_request = self._drain
        # Set here and not by the tasks: a closing that comes before their first step waits for them.
        live.fetching.value = live.beating.value = live.settling.value = True
        live.slots_alive.value = 1
        start = self._nursery.start_soon
        start(hold_lease, live, self._store, name="triojobs heartbeat")
        start(Settler(live, self._store).run, name="triojobs settler")
        start(self._run_services, live, list(slots), fetcher, name="triojobs services")
        start(self._run_slots, live, slots, name="triojobs slots")
        start(watch_handlers, live, slots, self._options, name="triojobs handlers' watch")
        start(fetcher.run, name="triojobs fetcher")
        if self._stop.value:  # meanwhile
            self._start_nothing_more()

    @trio.lowlevel.enable_ki_protection
    async def _run_slots(self, live: LiveRegistration, slots: dict[str, Slots]) -> None:
        try:
            with live.handler_scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_note_interruption, live)
                    for per_queue in slots.values():
                        if self._options.isolation == "task":
                            nursery.start_soon(per_queue.dispatch, nursery)
                        else:
                            for _ in range(per_queue.worker.concurrency):
                                nursery.start_soon(per_queue.slot)
        finally:
            live.note_interruption()
            live.slots_alive.value = 0
            live.watch_scope.cancel()

    @trio.lowlevel.enable_ki_protection
    async def _run_services(self, live: LiveRegistration, queues: Sequence[str], fetcher: Fetcher) -> None:
        """Watch the lease, compare and listen, until the registration is closed or the group is cancelled."""
        with live.service_scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_lease, live, self._store)
                nursery.start_soon(compare_when_in_doubt, live, self._store, fetcher.look_anew)
                if self._options.retention is not None:
                    nursery.start_soon(keep_house, live, self._store, self._options.retention)
                if self._options.notify:
                    nursery.start_soon(self._store.listen, live.group_id, queues, fetcher)

    @trio.lowlevel.enable_ki_protection
    async def _supervise(self) -> None:
        try:
            await self._serve()
        finally:
            self._stopping_since = min(self._stopping_since, trio.current_time())
            with trio.CancelScope(shield=True):
                await self._shut_down()

    async def _serve(self) -> None:
        """Return after a graceful stop; lose and renew registrations until then."""
        while True:
            live = self._registrations[-1]
            await _any_true(self._stop, live.lost)
            if self._stop.value:
                await self._stop_gracefully(live)
                return
            if not await self._renew(live):
                return

    async def _stop_gracefully(self, live: LiveRegistration) -> None:
        with trio.move_on_after(self._options.grace_period) as grace:
            await live.fetching.wait_value(False)
            await live.wait_no_handler()
        if grace.cancelled_caught and live.running:
            log.warning(
                "%d handler(s) did not end within grace_period (%g s) and are cancelled",
                live.running,
                self._options.grace_period,
                extra={"event": "grace_over", "running": live.running},
            )

    async def _renew(self, old: LiveRegistration) -> bool:
        """After the loss of a lease: close what is left, register anew. False: stop was asked for."""
        # Handlers that obey end at once; nobody else may claim before the margin is over.
        with trio.move_on_after(self._options.lease_margin):
            await old.slots_alive.wait_value(0)
        failures = 0
        while not self._stop.value:
            try:
                await old.fetching.wait_value(False)
                if not old.closed:
                    await self._settle_and_close(old, self._store.now() + self._options.close_timeout)
                live = await self._register()
            except SchemaError as exc:
                raise LeaseLostError(
                    f"group {old.group_id} cannot register again: {exc}",
                    operation="registering",
                    hint=exc.hint,
                ) from exc
            except DatabaseError as exc:
                failures += 1
                log.warning("%s", exc, extra={"event": "register_failed"})
                with trio.move_on_after(reconnect_delay(failures, random.random)):
                    await self._stop.wait_value(True)
            else:
                log.warning(
                    "registered again as %s after the lease of %s was lost",
                    live.group_id,
                    old.group_id,
                    extra={"event": "registered_again", "group_id": str(live.group_id)},
                )
                self._feed.send(GroupStarted(live.group_id, again=True))
                self._begin(live)
                return True
        return False

    # Closing. Everything below runs shielded.

    async def _shut_down(self) -> None:
        try:
            await self._wait_for_children()
            deadline = self._store.now() + self._options.close_timeout
            self._store.hurry(deadline)
            self._flusher.close(deadline=deadline)
            for live in self._registrations:
                if not live.closed:
                    await self._close(live, deadline)
            await self._flusher.ended.wait()
        finally:
            self._store.hurry(math.inf)  # the body may go on, and use the client
            for live in self._registrations:
                self._store.release_lease(live.group_id)
                live.service_scope.cancel()
                live.settle_scope.cancel()
            duration = max(0.0, trio.current_time() - self._stopping_since)
            self._report = replace(self._as_it_stands(), duration=duration)
            log.info(
                "worker group %s stopped in %.3f s: %d settled, %d given back, %d left",
                self.name,
                duration,
                sum(self._report.settled.values()),
                self._report.released,
                len(self._report.abandoned),
                extra={
                    "event": "group_stopped",
                    "group": self.name,
                    "group_id": str(self.group_id),
                    "settled": dict(self._report.settled),
                    "released": self._report.released,
                },
            )
            self._feed.send(GroupStopped(self.group_id, self._report))
            self._feed.close()
            group_closed(self)
            self._stopped.set()

    async def _wait_for_children(self) -> None:
        """Wait until no fetcher and no handler is left; a handler that never ends is waited for."""
        for live in self._registrations:
            live.fetch_scope.cancel(reason="the worker group closes")
            live.interrupt_handlers("the worker group closes")
        for live in self._registrations:
            await live.fetching.wait_value(False)
            await live.slots_alive.wait_value(0)

    async def _close(self, live: LiveRegistration, deadline: float) -> None:
        failures = 0
        while True:
            try:
                await self._settle_and_close(live, deadline)
                return
            except TriojobsError as exc:
                failures += 1
                pause = reconnect_delay(failures, random.random)
                if self._store.now() + pause >= deadline or isinstance(exc, SchemaError):
                    break
                log.warning("%s", exc, extra={"event": "close_failed"})
                await trio.sleep(pause)
        self._abandoned += live.ledger.held_ids()
        self._unknown_claims += live.unknown_claim
        log.error(
            "%d job(s) of worker group %s are left to be rescued when its lease ends: the database could "
            "not be reached in time",
            live.ledger.held,
            live.group_id,
            extra={"event": "abandoned", "job_ids": live.ledger.held_ids()},
        )
        await self._end_beats(live)

    async def _settle_and_close(self, live: LiveRegistration, deadline: float) -> None:
        """Write what ended and give the rest back. Safe to repeat."""
        live.settle_scope.cancel()
        await live.settling.wait_value(False)
        await self._end_beats(live)
        settler = Settler(live, self._store)
        while live.ledger.unsettled:
            await settler.flush(deadline=deadline)

        claims = live.ledger.claims() if self._feed.is_heard else {}
        ended: list[Settled] = []

        def written(rows: Sequence[Settled]) -> None:
            ended.extend(rows)
            stale = live.ledger.forget_all(rows)
            if stale:
                log.warning(
                    "%d job(s) had moved on before they could be given back",
                    len(stale),
                    extra={"event": "stale", "job_ids": stale},
                )

        try:
            await self._store.close_group(live.group_id, written, deadline=deadline)
        except DatabaseError as exc:
            if exc.committed is None:
                # It may have given them all back: the repetition would find nothing and call it stale.
                # So each is given back by name, as settlements whose reply was lost.
                live.unanswered.update((s.job_id, s.claim_no) for s in live.ledger.release_rest())
            raise
        live.closed = True
        live.unknown_claim = False
        self._feed.ended(claims, ended)

    async def _end_beats(self, live: LiveRegistration) -> None:
        """End the beat thread; from here on a beat without a row is no news."""
        live.service_scope.cancel()
        self._store.release_lease(live.group_id)
        await live.beating.wait_value(False)

    def _as_it_stands(self) -> ShutdownReport:
        settled: Counter[Outcome] = Counter()
        for live in self._registrations:
            settled.update(live.ledger.settled)
        return ShutdownReport(
            settled={str(outcome): settled[outcome] for outcome in SETTLED},
            released=sum(live.ledger.released for live in self._registrations),
            abandoned=tuple(sorted(set(self._abandoned))),
            unknown_claims=self._unknown_claims,
            group_ids=tuple(live.group_id for live in self._registrations),
        )


class GroupContext:
    """The async context manager that `open_worker_group` returns."""

    def __init__(
        self,
        make_store: Callable[[], Store],
        workers: Sequence[Worker[Any, Any]],
        options: GroupOptions,
    ) -> None:
        self._make_store = make_store
        self._workers = checked_workers(workers)
        self._options = options
        self._entered = False
        self._group: WorkerGroup
        self._nursery_manager: Any
        self._store: Store

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> WorkerGroup:
        if self._entered:
            raise entered_twice("open_worker_group")
        self._entered = True
        self._store = store = self._make_store()
        group = WorkerGroup(store, self._workers, self._options)
        try:
            await store.open()
            live = await group._register()
        except BaseException:
            # In a task of its own: Trio raises Ctrl-C in the main task, whatever shields it.
            try:
                with trio.CancelScope(shield=True):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._give_up, group)
            except BaseExceptionGroup as errors:
                raise sole_error(errors) or errors  # noqa: B904 - the first error is its context
            raise
        # From here to the return there is no checkpoint.
        self._nursery_manager = trio.open_nursery()
        group._nursery = await self._nursery_manager.__aenter__()
        group._nursery.start_soon(group._flusher.run, name="triojobs flusher")
        group._nursery.start_soon(group._supervise, name="triojobs supervisor")
        group._begin(live)
        group_opened(group)
        log.info(
            "worker group %s started as %s",
            group.name,
            group.group_id,
            extra={
                "event": "group_started",
                "group": group.name,
                "group_id": str(group.group_id),
                "queues": [worker.queue.name for worker in self._workers],
            },
        )
        self._group = group
        return group

    @trio.lowlevel.enable_ki_protection
    async def _give_up(self, group: WorkerGroup) -> None:
        """Close what nobody enters."""
        with trio.CancelScope(shield=True):
            for lost in group._registrations:  # the reply was lost: it may exist
                with trio.move_on_after(self._options.close_timeout):
                    await _close_quietly(self._store, lost)
            await self._store.aclose()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        group = self._group
        if exc is None:
            group.stop()
        try:
            swallowed: bool = await self._nursery_manager.__aexit__(kind, exc, tb)
        except BaseExceptionGroup as errors:
            # The nursery is ours, not the user's: an error that is alone comes bare, whoever raised it.
            alone = sole_error(errors)
            if alone is None:
                raise
            if alone is exc:
                return False
            raise alone from alone.__cause__
        finally:
            group.client._closed = True
            with trio.CancelScope(shield=True):
                await self._store.aclose()
        return swallowed


def checked_workers(workers: Sequence[Worker[Any, Any]]) -> list[Worker[Any, Any]]:
    """Return the workers as a list: at least one, each for another queue."""
    found = list(workers) if isinstance(workers, Sequence) else []
    if not found or not all(isinstance(worker, Worker) for worker in found):
        raise OptionError("workers", workers, "a list of at least one triojobs.Worker")
    twice = [name for name, n in Counter(w.queue.name for w in found).items() if n > 1]
    if twice:
        raise OptionError("workers", twice[0], "at most one worker per queue in a group")
    return found


def default_name() -> str:
    """Return a name that tells an operator where the group runs."""
    return f"{socket.gethostname()}:{os.getpid()}"[:200]


def with_workers(options: GroupOptions, workers: Sequence[Worker[Any, Any]]) -> GroupOptions:
    """Fill in the option whose default depends on the workers."""
    if options.job_connections is not None:
        return options
    total = sum(worker.concurrency for worker in workers)
    if options.concurrency is not None:
        total = min(total, options.concurrency)
    return replace(options, job_connections=min(total, 4))


async def _close_quietly(store: Store, live: LiveRegistration) -> None:
    """Close a registration under which nothing ever ran; what fails for a second is left to its lease."""
    deadline = store.now() + 1.0
    failures = 0
    while True:
        try:
            await store.close_group(live.group_id, lambda rows: None, deadline=deadline)
            return
        except TriojobsError as exc:
            log.warning("%s", exc, extra={"event": "close_failed"})
            failures += 1
            pause = reconnect_delay(failures, random.random)
            if isinstance(exc, SchemaError) or store.now() + pause >= deadline:
                return
            await trio.sleep(pause)


async def _note_interruption(live: LiveRegistration) -> None:
    """Notice a cancel from outside as soon as handlers do: a timeout that fires after it does not count."""
    try:
        await trio.sleep_forever()
    finally:
        live.note_interruption()


def _cancel_handler(live: LiveRegistration, slots: dict[str, Slots], request: CancelRequest) -> None:
    for per_queue in slots.values():
        if per_queue.cancel(request):
            return
    # Not started yet, or ended already: whoever ends the claim finds the reason on its lease.


async def _any_true(first: AsyncBool, second: AsyncBool) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(value: AsyncBool) -> None:
            await value.wait_value(True)
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait, first)
        nursery.start_soon(wait, second)
