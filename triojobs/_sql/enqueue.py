"""Enqueue: bodies and waiting rows, in the transaction of whoever owns the connection.

Rows without key and job_id go in bulk, one statement a chunk. A row with either needs several looks
and goes through the functions of migration 0002, sorted by key, so that two calls meet taken keys
in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

import psycopg
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.pq import Format
from psycopg.rows import tuple_row

from .._errors import DuplicateJobError
from .._model import Enqueued, NewRow
from .._queue import job_of_another_queue, unknown_job_id
from .statements import statement

__all__ = [
    "CHUNK",
    "SpecialRows",
    "chunks",
    "due_alike",
    "enqueue",
    "enqueue_plain",
    "is_one_statement",
    "new_job_ids",
    "split",
]

CHUNK: Final = 10_000  # rows per statement: past the knee of the rate, and a pause to be cancelled in
CHUNK_BYTES: Final = 16 * 1024 * 1024  # of payload: bounds a statement's time and memory
KEYED_CHUNK: Final = 500  # rows between two pauses when each is a round trip

# For rows that are due at once and differ in their payload alone, outside of transactions of the caller's: what
# most calls send. Half as long for one row as the other form, whose parts the server must set up all the
# same, and one array instead of ten. `clock_timestamp()` per row keeps the order of the call.
ENQUEUE_NOW: Final = """
WITH given AS MATERIALIZED (
    SELECT nextval({job_ids}) AS id, clock_timestamp() AS run_at, a.payload
    FROM unnest(%(payloads)b::bytea[]) AS a(payload)
), body AS (
    INSERT INTO {schema}.jobs
        (id, queue, payload, encoding, metadata, priority, max_attempts, timeout, deadline, run_at)
    SELECT id, %(queue)s::text, payload, %(encoding)s::text, %(metadata)s::text::jsonb, %(priority)s::int,
           %(max_attempts)s::int, %(timeout)s::float8, %(deadline)s::timestamptz, run_at
    FROM given
)
INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT id, %(queue)s::text, %(priority)s::int, run_at, 0, %(max_attempts)s::int FROM given
RETURNING id
"""

# With `notify` the hint goes inside the transaction: for callers whose commit we do not own.
ENQUEUE_PLAIN: Final = """
WITH given AS MATERIALIZED (
    SELECT nextval({job_ids}) AS id, a.queue, a.payload, a.encoding, a.metadata::jsonb AS metadata,
           a.priority, a.max_attempts, a.timeout, a.deadline, a.no,
           coalesce(a.run_at, clock_timestamp() + coalesce(a.delay, 0) * interval '1 second') AS run_at
    FROM unnest(
        %(queues)s::text[], %(payloads)b::bytea[], %(encodings)s::text[], %(metadata)s::text[],
        %(priorities)s::int[], %(max_attempts)s::int[], %(timeouts)s::float8[],
        %(deadlines)s::timestamptz[], %(run_ats)s::timestamptz[], %(delays)s::float8[]
    ) WITH ORDINALITY
      AS a(queue, payload, encoding, metadata, priority, max_attempts, timeout, deadline, run_at, delay, no)
), asked AS MATERIALIZED (
    SELECT *, run_at <= clock_timestamp() AS is_due FROM given
), body AS (
    INSERT INTO {schema}.jobs
        (id, queue, payload, encoding, metadata, priority, max_attempts, timeout, deadline, run_at)
    SELECT id, queue, payload, encoding, metadata, priority, max_attempts, timeout, deadline, run_at
    FROM asked
), due AS (
    INSERT INTO {schema}.ready (id, queue, priority, run_at, attempts, max_attempts)
    SELECT id, queue, priority, run_at, 0, max_attempts FROM asked WHERE is_due
), later AS (
    INSERT INTO {schema}.scheduled (id, queue, priority, run_at, attempts, max_attempts)
    SELECT id, queue, priority, run_at, 0, max_attempts FROM asked WHERE NOT is_due
)
SELECT a.id
FROM asked a, (SELECT count(pg_notify({channel}, q)) FROM unnest(%(notify)s::text[]) q) n
ORDER BY a.no
"""

# Payloads are sent in binary (%b): as text, psycopg doubles their backslashes in a session with
# standard_conforming_strings = off, and other bytes arrive.
ENQUEUE_KEYED: Final = """
SELECT (f.e).id, (f.e).created, (f.e).replaced FROM (
    SELECT {schema}.enqueue_keyed(
        %(job_id)s::bigint, %(queue)s::text, %(key)s::text, %(hold)s::text, %(hold_seconds)s::float8,
        %(on_conflict)s::text, %(payload)b::bytea, %(encoding)s::text, %(metadata)s::text::jsonb,
        %(priority)s::int, %(max_attempts)s::int, %(timeout)s::float8, %(deadline)s::timestamptz,
        coalesce(%(run_at)s::timestamptz, clock_timestamp() + %(delay)s::float8 * interval '1 second')
    ) AS e OFFSET 0
) f
"""

ENQUEUE_BY_ID: Final = """
SELECT %(job_id)s::bigint, {schema}.insert_job(
    %(job_id)s::bigint, %(queue)s::text, %(payload)b::bytea, %(encoding)s::text, NULL,
    %(metadata)s::text::jsonb, %(priority)s::int, %(max_attempts)s::int, %(timeout)s::float8,
    %(deadline)s::timestamptz,
    coalesce(%(run_at)s::timestamptz, clock_timestamp() + %(delay)s::float8 * interval '1 second')
), false
"""

QUEUE_OF: Final = "SELECT queue FROM {schema}.jobs WHERE id = %(job_id)s"
NEW_IDS: Final = "SELECT nextval({job_ids}) FROM generate_series(1, %(count)s)"
HANDED_OUT: Final = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.job_ids"
NOTIFY_INSIDE: Final = "SELECT pg_notify({channel}, q) FROM unnest(%(queues)s::text[]) q"


# All but the payload that the bulk statements send.
OPTION_NAMES: Final = (
    "queue", "encoding", "delay", "run_at", "priority", "max_attempts", "timeout", "deadline", "metadata",
)  # fmt: skip
OPTIONS: Final = attrgetter(*OPTION_NAMES)


class Packed(bytes):
    """An array of bytea in PostgreSQL's binary form; psycopg would take ten times as long to make it."""

    @classmethod
    def of(cls, values: Sequence[bytes]) -> Packed:
        """Pack these values: one dimension, no NULLs, the elements' type, and each with its length."""
        size = struct.Struct("!i").pack
        parts = [struct.pack("!iiIii", 1, 0, BYTEA, len(values), 1)]
        for value in values:
            parts += (size(len(value)), value)
        return cls(b"".join(parts))


class PackedDumper(Dumper):
    """Sends `Packed` as it is."""

    format = Format.BINARY
    oid = psycopg.adapters.types["bytea"].array_oid

    def dump(self, obj: Packed) -> bytes:
        return obj


BYTEA: Final = psycopg.adapters.types["bytea"].oid
ADAPTERS: Final = AdaptersMap(psycopg.adapters)
ADAPTERS.register_dumper(Packed, PackedDumper)


class Cursor(psycopg.Cursor[tuple[Any, ...]]):
    """A cursor on the caller's connection that knows nothing of its row factory and its adapters."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        super().__init__(conn, row_factory=tuple_row)

    @property
    def adapters(self) -> AdaptersMap:
        return ADAPTERS


def new_job_ids(conn: psycopg.Connection[Any], schema: str, count: int) -> list[int]:
    """Reserve ids for `job_id=`."""
    rows = Cursor(conn).execute(statement(NEW_IDS, schema), {"count": count}).fetchall()
    return [row[0] for row in rows]


def enqueue(
    conn: psycopg.Connection[Any],
    schema: str,
    rows: Sequence[NewRow],
    *,
    notify_inside: bool,
    between_chunks: Callable[[], None] = lambda: None,
) -> list[Enqueued]:
    """Insert `rows` into the open transaction, or in autocommit if `is_one_statement(rows)`.

    `between_chunks` may raise to give up; the caller rolls back after any error.

    Raises:
        DuplicateJobError: a key with on_conflict "raise" is taken; `index` names the row.
        OptionError: a job_id was not handed out by `new_job_ids`.
    """
    plain, special = split(rows)
    answers: dict[int, Enqueued] = {}
    for n, chunk in enumerate(chunks(rows, plain)):
        if n:
            between_chunks()
        ids = enqueue_plain(conn, schema, [rows[i] for i in chunk], notify_inside=notify_inside)
        answers.update(zip(chunk, map(_created, ids), strict=True))
    if special:
        _enqueue_special(conn, schema, rows, special, answers, between_chunks)
        if notify_inside:
            queues = sorted({rows[i].queue for i in special})
            Cursor(conn).execute(statement(NOTIFY_INSIDE, schema), {"queues": queues})
    return [answers[i] for i in range(len(rows))]


def split(rows: Sequence[NewRow]) -> tuple[list[int], list[int]]:
    """Return the indexes of the rows that go in bulk, and of those that go one by one, sorted by key."""
    plain = [i for i, row in enumerate(rows) if row.key is None and row.job_id is None]
    if len(plain) == len(rows):
        return plain, []
    special = [i for i, row in enumerate(rows) if not row.is_plain]
    special.sort(key=lambda i: (rows[i].queue, rows[i].key or "", rows[i].job_id or 0, i))
    return plain, special


def is_one_statement(rows: Sequence[NewRow]) -> bool:
    """Tell whether `enqueue` sends a single statement, which is a transaction by itself."""
    plain, special = split(rows)
    return not special and sum(1 for _ in chunks(rows, plain)) <= 1


def chunks(rows: Sequence[NewRow], indexes: Sequence[int]) -> Iterator[list[int]]:
    """Divide the rows with these indexes into what one statement may carry."""
    chunk: list[int] = []
    size = 0
    for i in indexes:
        if chunk and (len(chunk) == CHUNK or size + len(rows[i].payload) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += len(rows[i].payload)
    if chunk:
        yield chunk


def _created(job_id: int) -> Enqueued:
    return Enqueued(job_id, created=True)


def enqueue_plain(
    conn: psycopg.Connection[Any], schema: str, rows: Sequence[NewRow], *, notify_inside: bool
) -> list[int]:
    """Insert rows without key and job_id by one statement; return their ids."""
    if not notify_inside and due_alike(rows):
        template, parameters = ENQUEUE_NOW, _options(rows[0])
    else:
        template, parameters = ENQUEUE_PLAIN, _columns(rows)
        parameters["notify"] = sorted({r.queue for r in rows}) if notify_inside else []
    parameters["payloads"] = Packed.of([row.payload for row in rows])
    found = Cursor(conn).execute(statement(template, schema), parameters, binary=True)
    # The ids are drawn in the order of the rows.
    return sorted(row[0] for row in found.fetchall())


def due_alike(rows: Sequence[NewRow]) -> bool:
    """Tell whether the rows are due at once and differ in nothing but their payload."""
    options = OPTIONS(rows[0])
    return rows[0].delay is None and rows[0].run_at is None and all(OPTIONS(row) == options for row in rows)


def _options(row: NewRow) -> dict[str, Any]:
    return dict(zip(OPTION_NAMES, OPTIONS(row), strict=True))


def _columns(rows: Sequence[NewRow]) -> dict[str, Any]:
    return {
        "queues": [r.queue for r in rows],
        "encodings": [r.encoding for r in rows],
        "metadata": [r.metadata for r in rows],
        "priorities": [r.priority for r in rows],
        "max_attempts": [r.max_attempts for r in rows],
        "timeouts": [r.timeout for r in rows],
        "deadlines": [r.deadline for r in rows],
        "run_ats": [r.run_at for r in rows],
        "delays": [r.delay for r in rows],
    }


def _enqueue_special(
    conn: psycopg.Connection[Any],
    schema: str,
    rows: Sequence[NewRow],
    order: Collection[int],
    answers: dict[int, Enqueued],
    between_chunks: Callable[[], None],
) -> None:
    sending = SpecialRows(conn, schema, [rows[i] for i in order])
    for row in rows:
        sending.check_job_id(row)
    for done, i in enumerate(order):
        if done and done % KEYED_CHUNK == 0:
            between_chunks()
        answers[i] = sending.enqueue(rows[i], index=i if len(rows) > 1 else None)


class SpecialRows:
    """Sends rows with a key or a job_id one by one, inside the open transaction.

    Args:
        rows: all that will be sent, so that what they need is asked for once.
    """

    def __init__(self, conn: psycopg.Connection[Any], schema: str, rows: Sequence[NewRow]) -> None:
        self._cursor = Cursor(conn)
        self._schema = schema
        self._handed_out = 0
        if any(row.job_id is not None for row in rows):
            found = self._cursor.execute(statement(HANDED_OUT, schema)).fetchone()
            assert found is not None
            self._handed_out = found[0]
        self._drawn = iter(new_job_ids(conn, schema, sum(row.job_id is None for row in rows)))

    def check_job_id(self, row: NewRow) -> None:
        """Raise OptionError unless the row's job_id was handed out, or left out."""
        if row.job_id is not None and not 1 <= row.job_id <= self._handed_out:
            raise unknown_job_id(row)

    def _check_queue(self, row: NewRow) -> None:
        """Raise OptionError when the job with the row's job_id is of another queue: then it is no repetition."""
        found = self._cursor.execute(statement(QUEUE_OF, self._schema), {"job_id": row.job_id}).fetchone()
        if found is not None and found[0] != row.queue:
            raise job_of_another_queue(row, found[0])

    def enqueue(self, row: NewRow, *, index: int | None = None) -> Enqueued:
        """Send one row; a taken key raises DuplicateJobError with this index."""
        job_id = next(self._drawn) if row.job_id is None else row.job_id
        parameters = row._asdict() | {"job_id": job_id, "delay": row.delay or 0.0}
        template = ENQUEUE_BY_ID if row.key is None else ENQUEUE_KEYED
        found = self._cursor.execute(statement(template, self._schema), parameters).fetchone()
        assert found is not None
        answer = Enqueued(found[0], created=found[1], replaced=found[2])
        if answer.id == row.job_id and not answer.created:
            self._check_queue(row)
        if not answer.created and row.key is not None and row.on_conflict == "raise" and answer.id != job_id:
            raise DuplicateJobError(queue=row.queue, key=row.key, job_id=answer.id, index=index)
        return answer
