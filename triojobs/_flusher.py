"""Shared commits: single enqueues of tasks and threads travel together.

Whoever enqueues leaves a row here and waits. The flusher takes what gathered while its last
statement was in flight, commits it at once, and answers each row on its own.

An entry is `waiting` until the flusher takes it (the hand-off); a waiting entry can be withdrawn, so
a cancelled or timed-out caller knows that nothing was written. After the hand-off the answer is
awaited, whatever happens. Once closing, every waiting and later caller is answered: committed, or
ClosedResourceError.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from ._errors import DatabaseError, TriojobsError
from ._model import Enqueued, NewRow
from ._store import Store
from ._wake import Wake

__all__ = ["Flusher"]

log = logging.getLogger("triojobs.client")

BATCH: Final = 1000  # rows per shared commit
PENDING_LIMIT: Final = 10_000  # rows waiting before callers must wait to leave theirs: back-pressure
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


class Flusher:
    """One per client or group; its task runs until `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wake = Wake()
        self._room = threading.Condition()
        self._entries: deque[Entry] = deque()
        self._closing = False
        self._deadline: float | None = None
        self._token = trio.lowlevel.current_trio_token()
        self.ended: trio.Event = trio.Event()

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Commit what is enqueued, until closed and empty. Shielded: `close` ends it."""
        try:
            with trio.CancelScope(shield=True):
                while True:
                    batch = self._take()
                    if batch:
                        await self._commit(batch)
                    elif self._closing:
                        return
                    else:
                        await self._wake.wait()
        finally:
            with self._room:
                self._closing = True
            self._refuse_rest()
            self.ended.set()

    def close(self, *, deadline: float) -> None:
        """Answer everybody by `deadline` (the store's clock) and end. Idempotent."""
        with self._room:
            self._closing = True
            self._deadline = deadline
            self._room.notify_all()
        self._wake.set()

    async def enqueue(self, row: NewRow) -> Enqueued:
        """Leave a row and wait for its answer.

        Cancellation: until the hand-off nothing has been written; after it, done.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        answered = trio.Event()
        entry = Entry(row, answered.set)
        self._leave(entry)
        self._wake.set()
        try:
            await answered.wait()
        except trio.Cancelled:
            if self._withdraw(entry):
                raise
            with trio.CancelScope(shield=True):  # bounded by the call's own deadline
                await answered.wait()
        return entry.result()

    def enqueue_from_thread(
        self, row: NewRow, timeout: float | None, check_cancelled: Callable[[], None]
    ) -> Enqueued:
        """Leave a row from any thread and block until its answer."""
        answered = threading.Event()
        entry = Entry(row, answered.set)
        give_up_at = None if timeout is None else time.monotonic() + timeout
        self._leave_from_thread(entry, give_up_at, check_cancelled)
        try:
            self._token.run_sync_soon(self._wake.set, idempotent=True)
        except trio.RunFinishedError:
            self._withdraw(entry)
            raise trio.ClosedResourceError(
                "the client or group that this thread enqueues through has ended"
            ) from None
        while not answered.wait(CANCEL_POLL):
            try:
                check_cancelled()
                _check_time(give_up_at, timeout)
            except BaseException:
                if self._withdraw(entry):
                    raise
                answered.wait()  # handed off: the answer comes, bounded by the call's own deadline
        return entry.result()

    def _leave(self, entry: Entry) -> None:
        with self._room:
            self._refuse_if_closing()
            self._entries.append(entry)

    def _leave_from_thread(
        self, entry: Entry, give_up_at: float | None, check_cancelled: Callable[[], None]
    ) -> None:
        while True:
            with self._room:
                self._refuse_if_closing()
                if len(self._entries) < PENDING_LIMIT:
                    self._entries.append(entry)
                    return
                self._room.wait(CANCEL_POLL)
            check_cancelled()
            _check_time(give_up_at, None)

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise trio.ClosedResourceError("this triojobs client or group is closed")

    def _withdraw(self, entry: Entry) -> bool:
        """Take a waiting entry back. False: it was handed off (or answered)."""
        with self._room:
            try:
                self._entries.remove(entry)
            except ValueError:
                return False
            self._room.notify_all()
        return True

    def _take(self) -> list[Entry]:
        with self._room:
            batch = [self._entries.popleft() for _ in range(min(BATCH, len(self._entries)))]
            self._room.notify_all()
        return batch

    async def _commit(self, batch: list[Entry]) -> None:
        if self._deadline is not None and self._store.now() >= self._deadline:
            for entry in batch:
                entry.reply(
                    trio.ClosedResourceError("this triojobs client or group closed before the enqueue")
                )
            return
        answers: list[Enqueued | BaseException]
        try:
            answers = await self._store.enqueue_each([e.row for e in batch], deadline=self._deadline)
        except TriojobsError as exc:
            answers = [exc] * len(batch)
        except BaseException as exc:
            for entry in batch:
                entry.reply(
                    DatabaseError(
                        f"{exc!r}", operation="enqueueing", committed=None, hint="report this as a defect"
                    )
                )
            raise
        for entry, answer in zip(batch, answers, strict=True):
            entry.reply(answer)

    def _refuse_rest(self) -> None:
        for entry in self._take_all():
            entry.reply(trio.ClosedResourceError("this triojobs client or group closed before the enqueue"))

    def _take_all(self) -> list[Entry]:
        with self._room:
            rest, self._entries = list(self._entries), deque()
            self._room.notify_all()
        return rest


def _check_time(give_up_at: float | None, timeout: float | None) -> None:
    if give_up_at is not None and time.monotonic() >= give_up_at:
        raise DatabaseError(
            "the enqueue was not begun in time"
            if timeout is None
            else f"the enqueue was not begun within {timeout:g} s",
            operation="enqueueing",
            hint="nothing was written; try again, or enqueue less at once",
            transient=True,
            committed=False,
        )
