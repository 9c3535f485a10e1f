"""Shared commits: single enqueues of tasks and threads travel together.

Whoever enqueues leaves a row here and waits. The flusher takes what gathered while its last
statement was in flight, commits it at once, and answers each row on its own.

An entry is `waiting` until the flusher takes it (the hand-off); a waiting entry can be withdrawn, so
a cancelled or timed-out caller knows that nothing was written. After the hand-off the answer is
awaited, whatever happens. Once closing, every waiting and later caller is answered: committed, or
ClosedResourceError.

A task that finds its lane idle commits its row itself: one that enqueues alone need not wait for the
flusher's turn and then for its own. It does so only while commits carry one row; where many callers
enqueue at once, the first would else go ahead alone each time.

There are two lanes, each with one statement in flight. A row with a key or a job_id may have to wait
for a transaction of somebody else that stays open; rows without must not wait with it.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from ._errors import DatabaseError, TriojobsError
from ._logs import Log
from ._model import Enqueued, NewRow
from ._store import Store
from ._wake import Wake

__all__ = ["Flusher"]

log = Log("triojobs.client")

BATCH: Final = 1000  # rows per shared commit
BATCH_BYTES: Final = 16 * 1024 * 1024  # of payload per shared commit: what one statement carries
PENDING_LIMIT: Final = 10_000  # rows of one lane before threads must wait to leave theirs: back-pressure
CANCEL_POLL: Final = 0.05  # seconds between looks of a waiting thread at its task's cancellation


class Entry:
    """One row and the way back to its caller."""

    __slots__ = ("_tell", "answer", "row")

    def __init__(self, row: NewRow, tell: Callable[[], None]) -> None:
        self.row = row
        self.answer: Enqueued | BaseException | None = None
        self._tell = tell

    def reply(self, answer: Enqueued | BaseException) -> None:
        """Answer the caller."""
        self.answer = answer
        self._tell()

    def result(self) -> Enqueued:
        """Return what was enqueued, or raise."""
        if isinstance(self.answer, BaseException):
            # Rows of one failed commit share an error; each caller raises an instance of its own.
            raise copy.copy(self.answer) from self.answer.__cause__
        assert self.answer is not None
        return self.answer


class Lane:
    """Entries of one kind that wait for their hand-off, in the order in which they came.

    Attributes:
        busy: a commit is in flight; whoever made it looks for entries at its end. shared: the last one
            carried more than one row. defect: what a commit raised in a caller's task.
    """

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.wake = Wake()
        self.busy = False
        self.shared = False
        self.defect: Exception | None = None

    def take(self, most: int) -> list[Entry]:
        """Remove what one commit may carry."""
        batch: list[Entry] = []
        size = 0
        while self.entries and len(batch) < most:
            size += len(self.entries[0].row.payload)
            if batch and size > BATCH_BYTES:
                break
            batch.append(self.entries.popleft())
        return batch


class ThreadEvent:
    """What a thread waits for; like `threading.Event` at a third of its price, for one waiter."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the waiter. Once only."""
        self._lock.release()

    def wait(self, timeout: float = -1) -> bool:
        """Return whether it is set, after at most `timeout` seconds (-1: no limit). True once only."""
        return self._lock.acquire(timeout=timeout)


class Patience:
    """How long a thread waits for its hand-off: until its time is over or its task is cancelled."""

    def __init__(self, timeout: float | None, check_cancelled: Callable[[], None]) -> None:
        self._timeout = timeout
        self._give_up_at = float("inf") if timeout is None else time.monotonic() + timeout
        self._check_cancelled = check_cancelled

    def pause(self) -> float:
        """Return seconds until the next `check`."""
        return min(CANCEL_POLL, max(0.0, self._give_up_at - time.monotonic()))

    def check(self) -> None:
        """Raise `trio.Cancelled`, or DatabaseError when the time is over."""
        self._check_cancelled()
        if time.monotonic() >= self._give_up_at:
            raise DatabaseError(
                f"the enqueue was not begun within {self._timeout:g} s",
                operation="enqueueing",
                hint="nothing was written; try again, or enqueue less at once",
                transient=True,
                committed=False,
            )


class Flusher:
    """One per client or group; its task runs until `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._plain, self._special = self._lanes = (Lane(), Lane())
        self._room = threading.Condition()  # guards all that threads touch
        self._closing = False
        self._deadline = float("inf")
        self._token = trio.lowlevel.current_trio_token()
        self.ended: trio.Event = trio.Event()

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Commit what is enqueued, until closed and empty. Shielded: `close` ends it."""
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for lane in self._lanes:
                        nursery.start_soon(self._run_lane, lane)
        finally:
            with self._room:
                self._closing = True
            for lane in self._lanes:
                with self._room:
                    left = list(lane.entries)
                    lane.entries.clear()
                _refuse(left)
            self.ended.set()

    @trio.lowlevel.enable_ki_protection
    async def _run_lane(self, lane: Lane) -> None:
        while True:
            if lane.defect is not None:
                raise lane.defect
            batch = self._take(lane)
            if batch:
                await self._commit(lane, batch)
            elif self._closing and not lane.busy:
                return
            else:
                await lane.wake.wait()

    def close(self, *, deadline: float) -> None:
        """Answer everybody by `deadline` (the store's clock) and end. Idempotent; the earliest counts."""
        with self._room:
            self._closing = True
            self._deadline = min(self._deadline, deadline)
            self._room.notify_all()
        for lane in self._lanes:
            lane.wake.set()

    @property
    def waiting(self) -> int:
        """Rows that wait for their hand-off."""
        return sum(len(lane.entries) for lane in self._lanes)

    def serves_this_loop(self) -> bool:
        """Tell whether the caller's Trio program is the one that the flusher runs in."""
        return trio.lowlevel.current_trio_token() is self._token

    @trio.lowlevel.enable_ki_protection
    async def enqueue(self, row: NewRow) -> Enqueued:
        """Leave a row and wait for its answer.

        Cancellation: until the hand-off nothing has been written; after it, done.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        answered = trio.Event()
        entry = Entry(row, answered.set)
        lane = self._lane(row)
        with self._room:
            first = self._leave(lane, entry)
        if first and not lane.shared:
            await self._commit_alone(lane)
        elif first:
            lane.wake.set()
        try:
            if entry.answer is None:
                await answered.wait()
        except BaseException as exc:
            if self._withdraw(entry):
                raise
            with trio.CancelScope(shield=True):  # bounded by the call's own deadline
                await answered.wait()
            if not isinstance(exc, trio.Cancelled):
                raise
        return entry.result()

    async def _commit_alone(self, lane: Lane) -> None:
        """Commit in the caller's task. Shielded: a thread may have left a row in the same moment."""
        with trio.CancelScope(shield=True):
            try:
                await self._commit(lane, self._take(lane))
            except Exception as exc:
                # The rows have their answers. A defect ends the flusher, whoever met it.
                lane.defect = exc
                lane.wake.set()

    def enqueue_from_thread(
        self, row: NewRow, timeout: float | None, check_cancelled: Callable[[], None]
    ) -> Enqueued:
        """Leave a row from any thread and block until its answer."""
        # First: a thread whose task was cancelled shall not go on enqueueing, however quick the answers are.
        check_cancelled()
        answered = ThreadEvent()
        entry = Entry(row, answered.set)
        patience = Patience(timeout, check_cancelled)
        first = self._leave_from_thread(entry, patience)
        try:
            if first:
                self._wake_from_thread(row)
            while not answered.wait(patience.pause()):
                patience.check()
        except BaseException as exc:
            if self._withdraw(entry):
                raise
            answered.wait()  # handed off: the answer comes, bounded by the call's own deadline
            if not isinstance(exc, (trio.Cancelled, trio.ClosedResourceError, DatabaseError)):
                raise
        return entry.result()

    def _lane(self, row: NewRow) -> Lane:
        return self._plain if row.is_plain else self._special

    def _leave(self, lane: Lane, entry: Entry) -> bool:
        """Leave an entry; return whether nobody has been woken for this lane, nor looks at it by himself."""
        if self._closing:
            raise trio.ClosedResourceError("this triojobs client or group is closed")
        lane.entries.append(entry)
        return not lane.busy and len(lane.entries) == 1

    def _leave_from_thread(self, entry: Entry, patience: Patience) -> bool:
        """Leave an entry as soon as there is room."""
        lane = self._lane(entry.row)
        while True:
            with self._room:
                if self._closing or len(lane.entries) < PENDING_LIMIT:
                    return self._leave(lane, entry)
                self._room.wait(patience.pause())
            patience.check()

    def _wake_from_thread(self, row: NewRow) -> None:
        try:
            self._token.run_sync_soon(self._lane(row).wake.set, idempotent=True)
        except trio.RunFinishedError:
            raise trio.ClosedResourceError(
                "the client or group that this thread enqueues through has ended"
            ) from None

    def _withdraw(self, entry: Entry) -> bool:
        """Take a waiting entry back. False: it was handed off (or answered)."""
        with self._room:
            try:
                self._lane(entry.row).entries.remove(entry)
            except ValueError:
                return False
            self._room.notify_all()
        return True

    def _take(self, lane: Lane) -> list[Entry]:
        """Take over what one commit may carry: the hand-off. Nothing while another is in flight."""
        with self._room:
            if lane.busy:
                return []
            batch = lane.take(BATCH)
            lane.busy = bool(batch)
            if len(lane.entries) + len(batch) >= PENDING_LIMIT:
                self._room.notify_all()
        return batch

    async def _commit(self, lane: Lane, batch: Sequence[Entry]) -> None:
        """Commit what was taken from a lane, answer it, and have the lane looked at again."""
        try:
            await self._commit_batch(batch)
        finally:
            with self._room:
                lane.busy = False
                lane.shared = len(batch) > 1
                left = bool(lane.entries)
            if left or self._closing:
                lane.wake.set()

    async def _commit_batch(self, batch: Sequence[Entry]) -> None:
        if self._store.now() >= self._deadline:
            _refuse(batch)
            return
        deadline = None if self._deadline == float("inf") else self._deadline
        answers: Sequence[Enqueued | BaseException]
        try:
            answers = await self._store.enqueue_each([entry.row for entry in batch], deadline=deadline)
        except TriojobsError as exc:
            answers = [exc] * len(batch)
        except BaseException as exc:
            unknown = DatabaseError(
                f"{exc!r}", operation="enqueueing", committed=None, hint="report this as a defect"
            )
            for entry in batch:
                entry.reply(unknown)
            raise
        for entry, answer in zip(batch, answers, strict=True):
            entry.reply(answer)
        if self._closing and all(isinstance(a, DatabaseError) and a.transient for a in answers):
            # The time that is left is not spent on a broken database: whoever still waits is refused.
            self._deadline = float("-inf")


def _refuse(batch: Sequence[Entry]) -> None:
    for entry in batch:
        entry.reply(trio.ClosedResourceError("this triojobs client or group closed before the enqueue"))
