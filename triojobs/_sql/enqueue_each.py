"""Shared commits: rows that have nothing to do with each other travel together and are answered one by one.

One transaction takes all rows of a kind while nothing is wrong. When the server refuses something, that
transaction is rolled back and tried again without the row at fault. A row with a key or a job_id is
sent by itself, so it is known; the others travel in one statement, so their halves are tried apart.

A key may be locked by a transaction of somebody else that stays open. Rows that met such a lock, or
lost a race, go last and in a transaction of their own: the others wait for them once at most.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import psycopg

from .._errors import DatabaseError, DuplicateJobError, OptionError, SchemaError, TriojobsError
from .._model import Enqueued, NewRow
from .enqueue import SpecialRows, chunks, enqueue_plain, split
from .failures import RETRY_SQLSTATES, Remedy, remedy, translate

__all__ = ["Answer", "SharedEnqueue"]

Answer: TypeAlias = Enqueued | TriojobsError
OPERATION: Final = "enqueueing"
LOCKED: Final = "55P03"
TRIES: Final = 6  # of a transaction that lost a race
TRIES_LOCKED: Final = 2  # each waits for lock_timeout, and others of its kind wait behind it
IDLE: Final = psycopg.pq.TransactionStatus.IDLE


@dataclass
class Part:
    """Rows that are tried in one transaction, all plain or all special."""

    indexes: list[int]
    tries: int = 0


class SharedEnqueue:
    """Enqueues `rows`, each of which gets an answer.

    Attributes:
        queues: where jobs were enqueued so far.
    """

    def __init__(self, schema: str, rows: Sequence[NewRow]) -> None:
        self.queues: set[str] = set()
        self._schema = schema
        self._rows = rows
        self._answers: dict[int, Answer] = {}
        plain, special = split(rows)
        self._parts = deque(Part(indexes) for indexes in (*chunks(rows, plain), special) if indexes)
        self._in_doubt: Sequence[int] = ()  # their COMMIT was sent, and its reply has not come
        self._at: int | None = None  # the special row that is being sent
        self._nested = False  # one transaction around all: a pooler's

    def run(self, conn: psycopg.Connection[Any], pause: Callable[[], None]) -> None:
        """Find an answer for each row; `pause` is called before each transaction.

        Raises:
            psycopg.Error: the connection, the server or the schema is at fault, and no row: `give_up`.
        """
        self._nested = conn.pgconn.transaction_status != IDLE
        while self._parts:
            pause()
            part = self._parts[0]
            try:
                self._try(conn, part.indexes)
            except psycopg.Error as exc:
                error = translate(exc, operation=OPERATION)
                if not _is_about_rows(exc, error):
                    raise
                error.__cause__ = exc
                self._in_doubt = ()
                self._parts.popleft()
                self._divide(part, exc.sqlstate, error)
            else:
                self._parts.popleft()

    def give_up(self, error: DatabaseError) -> None:
        """Answer the rest with this error; `committed` is None for those whose COMMIT was sent."""
        if self._nested:
            self._in_doubt = [i for i, answer in self._answers.items() if isinstance(answer, Enqueued)]
            for i in self._in_doubt:
                del self._answers[i]
        certain, doubtful = copy.copy(error), copy.copy(error)
        certain.committed = False
        certain.__cause__ = doubtful.__cause__ = error.__cause__
        for i in range(len(self._rows)):
            self._answers.setdefault(i, doubtful if i in self._in_doubt else certain)

    def answers(self) -> list[Answer]:
        """Return the answers in the order of the rows."""
        return [self._answers[i] for i in range(len(self._rows))]

    def _try(self, conn: psycopg.Connection[Any], indexes: list[int]) -> None:
        """Send some rows in one transaction, and take their answers when it is committed."""
        self._at = None
        first = self._rows[indexes[0]]
        if first.is_plain:
            found = self._try_plain(conn, indexes)
        else:
            with conn.transaction():
                found = self._send_special(conn, indexes)
                self._in_doubt = indexes
        self._in_doubt = ()
        self._answers |= found
        self.queues.update(self._rows[i].queue for i, answer in found.items() if isinstance(answer, Enqueued))

    def _try_plain(self, conn: psycopg.Connection[Any], indexes: list[int]) -> dict[int, Answer]:
        # The one statement commits by itself; inside a transaction it needs a savepoint.
        with conn.transaction() if self._nested else nullcontext():
            self._in_doubt = indexes
            rows = [self._rows[i] for i in indexes]
            ids = enqueue_plain(conn, self._schema, rows, notify_inside=False)
        return {i: Enqueued(job_id, created=True) for i, job_id in zip(indexes, ids, strict=True)}

    def _send_special(self, conn: psycopg.Connection[Any], indexes: list[int]) -> dict[int, Answer]:
        found: dict[int, Answer] = {}
        sending = SpecialRows(conn, self._schema, [self._rows[i] for i in indexes])
        for i in indexes:
            self._at = i
            try:
                sending.check_job_id(self._rows[i])
                found[i] = sending.enqueue(self._rows[i])
            except (DuplicateJobError, OptionError) as exc:
                found[i] = exc
        self._at = None
        return found

    def _divide(self, part: Part, sqlstate: str | None, error: DatabaseError) -> None:
        """Decide how to go on after the server has refused something in this part."""
        if sqlstate in RETRY_SQLSTATES:
            suspects = self._alike(part.indexes)
            rest = [i for i in part.indexes if i not in suspects]
            if suspects and rest:
                self._parts.appendleft(Part(rest))
                self._parts.append(Part(suspects, tries=1))
            elif part.tries + 1 < (TRIES_LOCKED if sqlstate == LOCKED else TRIES):
                self._parts.append(Part(part.indexes, part.tries + 1))
            else:
                self._answer(part.indexes, error)
        elif self._at is not None:
            self._answer([self._at], error)
            rest = [i for i in part.indexes if i != self._at]
            if rest:
                self._parts.appendleft(Part(rest))
        elif len(part.indexes) == 1:
            self._answer(part.indexes, error)
        else:
            middle = len(part.indexes) // 2
            self._parts.extendleft([Part(part.indexes[middle:]), Part(part.indexes[:middle])])

    def _alike(self, indexes: Iterable[int]) -> list[int]:
        """Return the rows that would wait for the same lock as the one that was being sent."""
        if self._at is None:
            return []
        row = self._rows[self._at]
        if row.key is None:
            return [self._at]
        return [i for i in indexes if (self._rows[i].queue, self._rows[i].key) == (row.queue, row.key)]

    def _answer(self, indexes: Iterable[int], error: DatabaseError) -> None:
        self._answers.update(dict.fromkeys(indexes, error))


def _is_about_rows(exc: psycopg.Error, error: DatabaseError) -> bool:
    """Tell whether other rows may fare better with the same connection, server and schema."""
    if exc.sqlstate is None or remedy(exc) is Remedy.RECONNECT or isinstance(error, SchemaError):
        return False
    # Class 42: a statement that is wrong or not permitted is so for each row.
    return remedy(exc) is Remedy.RETRY or not (error.transient or exc.sqlstate.startswith("42"))
