"""Shared commits: single enqueues of tasks and threads travel together.

Whoever enqueues leaves a row here and waits. The flusher takes what gathered while its last
statement was in flight, commits it at once, and answers each row on its own.

An entry is `waiting` until the flusher takes it (the hand-off); a waiting entry can be withdrawn, so
a cancelled or timed-out caller knows that nothing was written. After the hand-off the answer is
awaited, whatever happens. Once closing, every waiting and later caller is answered: committed, or
ClosedResourceError.

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
    """Entries of one kind that wait for their hand-off, in the order in which they came."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.wake = Wake()

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
                while batch := self._take(lane):
                    _refuse(batch)
            self.ended.set()

    @trio.lowlevel.enable_ki_protection
    async def _run_lane(self, lane: Lane) -> None:
        while True:
            batch = self._take(lane)
            if batch:
                await self._commit(batch)
            elif self._closing:
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

    async def enqueue(self, row: NewRow) -> Enqueued:
        """Leave a row and wait for its answer.

        Cancellation: until the hand-off nothing has been written; after it, done.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        answered = trio.Event()
        entry = Entry(row, answered.set)
        with self._room:
            self._leave(entry)
        self._lane(row).wake.set()
        try:
            await answered.wait()
        except BaseException as exc:
            if self._withdraw(entry):
                raise
            with trio.CancelScope(shield=True):  # bounded by the call's own deadline
                await answered.wait()
            if not isinstance(exc, trio.Cancelled):
                raise
        return entry.result()

    def enqueue_from_thread(
        self, row: NewRow, timeout: float | None, check_cancelled: Callable[[], None]
    ) -> Enqueued:
        """Leave a row from any thread and block until its answer."""
        answered = threading.Event()
        entry = Entry(row, answered.set)
        patience = Patience(timeout, check_cancelled)
        self._leave_from_thread(entry, patience)
        try:
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
        return self._plain if row.key is None and row.job_id is None else self._special

    def _leave(self, entry: Entry) -> None:
        if self._closing:
            raise trio.ClosedResourceError("this triojobs client or group is closed")
        self._lane(entry.row).entries.append(entry)

    def _leave_from_thread(self, entry: Entry, patience: Patience) -> None:
        while True:
            with self._room:
                if self._closing or len(self._lane(entry.row).entries) < PENDING_LIMIT:
                    self._leave(entry)
                    return
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
        """Take over what one commit may carry: the hand-off."""
        with self._room:
            batch = lane.take(BATCH)
            self._room.notify_all()
        return batch

    async def _commit(self, batch: Sequence[Entry]) -> None:
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
