"""The demo's own tables, in a schema of their own, and the counts that its report shows.

The demo is a user's program that happens to live here, so this module and its neighbours use psycopg
and threads as a user's program does; nothing else of triojobs imports them.

Every number comes from rows, under one snapshot, so that a job that is on its way from one table to
the next is counted once. A look takes a connection of its own: it costs some milliseconds, and a
server that was restarted in between is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql
from psycopg.rows import class_row, tuple_row

__all__ = ["ACTIVITIES", "EMAILS", "NOTHING", "Books", "Counts", "Run"]

EMAILS: Final = "demo.emails"
ACTIVITIES: Final = "demo.activities"

CONNECT_TIMEOUT: Final = 5  # seconds; a person waits
STATEMENT_TIMEOUT: Final = "-c statement_timeout=30s"  # a count of a million jobs takes some seconds
LOCK: Final = 7_246_011_953_305  # any number that nobody else uses; two demos at once share one run

TABLES: Final = """
CREATE SCHEMA IF NOT EXISTS triojobs_demo;
CREATE TABLE IF NOT EXISTS triojobs_demo.runs (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_schema  text        NOT NULL,
    emails      int         NOT NULL,
    after_id    bigint      NOT NULL,  -- every job of this run has a greater id
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    enqueued_at timestamptz,           -- from here on every enqueue has been confirmed
    finished_at timestamptz
);
CREATE TABLE IF NOT EXISTS triojobs_demo.orders (
    run    bigint NOT NULL,
    number int    NOT NULL,
    job_id bigint NOT NULL,
    PRIMARY KEY (run, number)
);
CREATE TABLE IF NOT EXISTS triojobs_demo.sent (
    run         bigint NOT NULL,
    number      int    NOT NULL,
    job_id      bigint NOT NULL,
    activity_id bigint NOT NULL,
    PRIMARY KEY (run, number)
);
"""

UNFINISHED: Final = """
SELECT id, emails, after_id, started_at::text AS started_at, true AS resumed
FROM triojobs_demo.runs WHERE finished_at IS NULL AND job_schema = %(schema)s ORDER BY id DESC LIMIT 1
"""
NEW_RUN: Final = """
INSERT INTO triojobs_demo.runs (job_schema, emails, after_id)
VALUES (%(schema)s, %(emails)s, nextval(%(sequence)s::regclass))
RETURNING id, emails, after_id, started_at::text AS started_at, false AS resumed
"""
NUMBERS: Final = """
SELECT (metadata ->> 'number')::int FROM {}.job_status
WHERE id > %(after_id)s AND queue = %(emails)s AND (metadata ->> 'run')::bigint = %(run)s
"""

# Lost is: a body that is in no place and has no final outcome; an e-mail that is done without its row
# or whose activity does not exist; a row whose e-mail is not done (both were one transaction); an
# order without its job; an e-mail whose enqueue was confirmed and that has no body.
COUNTS: Final = """
WITH run AS (
    SELECT id, emails, enqueued_at FROM triojobs_demo.runs WHERE id = %(run)s
), job AS (
    SELECT s.id, s.queue, s.status, s.attempts, (s.metadata ->> 'number')::int AS number,
           s.status IS NULL OR (s.status = 'failed' AND s.finished_at IS NOT NULL) AS nowhere
    FROM {schema}.job_status s
    WHERE s.id > %(after_id)s AND s.queue IN (%(emails)s, %(activities)s)
      AND (s.metadata ->> 'run')::bigint = %(run)s
), sent AS (
    SELECT number, job_id, activity_id FROM triojobs_demo.sent WHERE run = %(run)s
)
SELECT count(*) AS enqueued,
       count(*) FILTER (WHERE queue = %(emails)s) AS emails,
       count(*) FILTER (WHERE status = 'running') AS running,
       count(*) FILTER (WHERE status IN ('pending', 'failed') AND NOT nowhere) AS waiting,
       count(*) FILTER (WHERE status = 'done') AS done,
       count(*) FILTER (WHERE status = 'killed') AS killed,
       count(*) FILTER (WHERE status = 'cancelled') AS cancelled,
       coalesce(sum(attempts), 0) AS attempts,
       (SELECT count(*) FROM {schema}.outcomes o JOIN job ON job.id = o.job_id
        WHERE o.status = 'failed') AS failed,
       (SELECT enqueued_at IS NOT NULL FROM run) AS all_enqueued,
       count(*) FILTER (WHERE nowhere)
       + (SELECT count(*) FROM job e LEFT JOIN sent ON sent.job_id = e.id
          WHERE e.queue = %(emails)s AND e.status = 'done'
            AND NOT EXISTS (SELECT FROM job a WHERE a.id = sent.activity_id))
       + (SELECT count(*) FROM sent LEFT JOIN job e ON e.id = sent.job_id
          WHERE e.status IS DISTINCT FROM 'done')
       + (SELECT count(*) FROM triojobs_demo.orders o LEFT JOIN job e ON e.id = o.job_id
          WHERE o.run = %(run)s AND e.id IS NULL)
       + (SELECT count(*) FROM run, generate_series(1, run.emails) AS n (number)
          WHERE run.enqueued_at IS NOT NULL
            AND NOT EXISTS (SELECT FROM job e WHERE e.queue = %(emails)s AND e.number = n.number)
            AND NOT EXISTS (SELECT FROM triojobs_demo.orders o
                            WHERE o.run = run.id AND o.number = n.number)) AS lost
FROM job
"""


@dataclass(frozen=True)
class Run:
    """One set of e-mails. `resumed`: an earlier process began it."""

    id: int
    emails: int
    after_id: int
    started_at: str
    resumed: bool

    @property
    def poison(self) -> int:
        """The number of the e-mail that fails always."""
        return (self.emails + 1) // 2

    @property
    def expected(self) -> int:
        """How many jobs there will be: each e-mail but the poisonous one brings an activity."""
        return 2 * self.emails - 1


@dataclass(frozen=True)
class Counts:
    """The jobs of one run, e-mails and activities together, as their rows stood at one instant.

    enqueued = done + killed + cancelled + waiting + running, and lost if it is not zero. `failed`
    counts attempts, all the others jobs.
    """

    enqueued: int
    emails: int
    running: int
    waiting: int
    done: int
    killed: int
    cancelled: int
    attempts: int
    failed: int
    all_enqueued: bool
    lost: int

    @property
    def ended(self) -> int:
        """Jobs that will not run again."""
        return self.done + self.killed + self.cancelled

    @property
    def finished(self) -> bool:
        """Nothing is left to do."""
        return self.all_enqueued and self.waiting == self.running == 0


NOTHING: Final = Counts(
    enqueued=0,
    emails=0,
    running=0,
    waiting=0,
    done=0,
    killed=0,
    cancelled=0,
    attempts=0,
    failed=0,
    all_enqueued=False,
    lost=0,
)


class Books:
    """Reads and writes the demo's tables. Synchronous; every method is called in a thread.

    Raises: psycopg.Error, from every method.
    """

    def __init__(self, conninfo: str, schema: str) -> None:
        self.conninfo = conninfo
        self.schema = schema

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """Open a connection of the user's own: not in autocommit mode, as psycopg does."""
        return psycopg.connect(
            self.conninfo,
            connect_timeout=CONNECT_TIMEOUT,
            options=STATEMENT_TIMEOUT,
            application_name="triojobs demo",
        )

    def open_run(self, emails: int) -> Run:
        """Make the tables if need be; return the unfinished run of an earlier process, or a new one."""
        with self.connect() as conn, conn.cursor(row_factory=class_row(Run)) as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            cursor.execute(TABLES)
            names = {"schema": self.schema, "sequence": f"{self.schema}.job_ids", "emails": emails}
            run = cursor.execute(UNFINISHED, names).fetchone()
            run = run or cursor.execute(NEW_RUN, names).fetchone()
            assert run is not None  # INSERT … RETURNING
            return run

    def missing(self, run: Run) -> list[int]:
        """Return the numbers of the e-mails that have no job yet."""
        query = sql.SQL(NUMBERS).format(sql.Identifier(self.schema))
        with self.connect() as conn, conn.cursor(row_factory=tuple_row) as cursor:
            rows = cursor.execute(query, {"after_id": run.after_id, "emails": EMAILS, "run": run.id})
            there = {number for (number,) in rows}
        return [number for number in range(1, run.emails + 1) if number not in there]

    def mark_enqueued(self, run: Run) -> None:
        """Write down that every enqueue was confirmed: from now on a missing e-mail is a lost one."""
        with self.connect() as conn:
            conn.execute(
                "UPDATE triojobs_demo.runs SET enqueued_at = clock_timestamp() WHERE id = %s", [run.id]
            )

    def mark_finished(self, run: Run) -> None:
        """Write down that nothing is left to do: the next demo begins a run of its own."""
        with self.connect() as conn:
            conn.execute(
                "UPDATE triojobs_demo.runs SET finished_at = clock_timestamp() WHERE id = %s", [run.id]
            )

    def counts(self, run: Run) -> Counts:
        """Count the run's jobs."""
        query = sql.SQL(COUNTS).format(schema=sql.Identifier(self.schema))
        names = {"run": run.id, "after_id": run.after_id, "emails": EMAILS, "activities": ACTIVITIES}
        with self.connect() as conn, conn.cursor(row_factory=class_row(Counts)) as cursor:
            found = cursor.execute(query, names).fetchone()
            assert found is not None  # an aggregate without GROUP BY
            return found

    def exists(self, job_id: int) -> bool:
        """Tell whether there is a job of this id."""
        query = sql.SQL("SELECT FROM {}.jobs WHERE id = %s").format(sql.Identifier(self.schema))
        with self.connect() as conn:
            return conn.execute(query, [job_id]).fetchone() is not None
