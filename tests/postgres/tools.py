"""What the tests of the SQL share: sessions as the workers have them, groups, jobs, and gates.

A gate is a lock that one session holds and another one waits for. `blocked` starts a call in a thread
and comes back when the server says that its session waits for a lock; that is an observation of the
server's state, so nothing here sleeps to bring two actors into an order.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeAlias, TypeVar

import psycopg

from triojobs._model import Claim, NewRow, Outcome, RawJob, Registration, Settled, Settlement
from triojobs._sql import claim as claim_sql
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import groups as groups_sql
from triojobs._sql import inspect as inspect_sql
from triojobs._sql import settle as settle_sql
from triojobs._sql.session import prepare_session

Connection: TypeAlias = psycopg.Connection[Any]
T = TypeVar("T")

SCHEMA = "triojobs"
PATIENCE = 30.0  # seconds for what takes milliseconds; only a hang needs them


def open_session(conninfo: str, *, prepare_threshold: int | None = 2) -> Connection:
    """Open a connection as the bridge does: autocommit, READ COMMITTED, prepared statements."""
    conn = psycopg.connect(conninfo, autocommit=True, prepare_threshold=prepare_threshold)
    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    prepare_session(conn, call_timeout=PATIENCE)
    return conn


CALLS: list[threading.Thread] = []


def end_all_calls() -> None:
    """Wait for every call that was started; their sessions have been ended."""
    while CALLS:
        CALLS.pop().join(PATIENCE)


class Running(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, fn: Callable[..., T], *args: Any, **options: Any) -> None:
        self._answer: list[T] = []
        self._error: list[BaseException] = []

        def run() -> None:
            try:
                self._answer.append(fn(*args, **options))
            except BaseException as exc:
                self._error.append(exc)

        self._thread = threading.Thread(target=run, daemon=True)
        CALLS.append(self._thread)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the end; return what the call returned or raise what it raised."""
        self._thread.join(PATIENCE)
        assert self.ended, "the call hangs"
        if self._error:
            raise self._error[0]
        return self._answer[0]


def blocked(
    observer: Connection, conn: Connection, fn: Callable[..., T], *args: Any, **options: Any
) -> Running[T]:
    """Start `fn(conn, *args, **options)` in a thread; return once its session waits for a lock."""
    call = Running(fn, conn, *args, **options)
    pid = conn.info.backend_pid
    while not is_blocked(observer, pid):
        if call.ended:
            raise AssertionError(f"the call did not wait for a lock; it gave {call.result()!r}")
    return call


def is_blocked(observer: Connection, pid: int) -> bool:
    """Tell whether this session waits for a lock now."""
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    return observer.execute(query, [pid]).fetchone() is not None


def together(*calls: Callable[[], T]) -> list[T]:
    """Run the calls in threads that set off at a barrier; return their results in order."""
    barrier = threading.Barrier(len(calls))

    def behind_barrier(call: Callable[[], T]) -> T:
        barrier.wait(PATIENCE)
        return call()

    running = [Running(behind_barrier, call) for call in calls]
    return [each.result() for each in running]


class Group:
    """One registration, and what its process would count."""

    def __init__(self, conn: Connection, *, lease_duration: float = 600.0) -> None:
        self.id = uuid.uuid4()
        self.epoch = 1
        self.claim_no = 0
        groups_sql.register(
            conn, SCHEMA, Registration(self.id, "test", "localhost", 1, "0", lease_duration=lease_duration)
        )

    def claim(
        self, conn: Connection, want: int = 100, *, queue: str = "q", wants: dict[str, int] | None = None
    ) -> list[Claim]:
        """Claim with the next number."""
        self.claim_no += 1
        return claim_sql.claim(
            conn,
            SCHEMA,
            group_id=self.id,
            epoch=self.epoch,
            claim_no=self.claim_no,
            wants={queue: want} if wants is None else wants,
        )

    def claim_one(self, conn: Connection, *, queue: str = "q") -> Claim:
        """Claim the one job that there is."""
        (claimed,) = self.claim(conn, queue=queue)
        return claimed

    def settle(
        self, conn: Connection, claims: Claim | Iterable[Claim], outcome: Outcome, **fields: Any
    ) -> list[Settled]:
        """End claims of this group, all in the same way."""
        batch = [claims] if isinstance(claims, Claim) else list(claims)
        written, _ = settle_sql.settle(conn, SCHEMA, self.id, [ended(c, outcome, **fields) for c in batch])
        return written

    def lapse(self, conn: Connection) -> None:
        """Let the lease be over, as if the process had stopped beating."""
        conn.execute(
            "UPDATE triojobs.worker_groups SET lease_until = now() - interval '1 s' WHERE id = %s",
            [self.id],
        )


def ended(claimed: Claim, outcome: Outcome, **fields: Any) -> Settlement:
    """Return the settlement of a claim."""
    return Settlement(claimed.job_id, claimed.claim_no, outcome, **fields)


def new_row(queue: str = "q", payload: bytes = b"x", **options: Any) -> NewRow:
    """Return a row to enqueue."""
    return NewRow(queue, payload, "cbor", **options)


def put(conn: Connection, count: int = 1, **options: Any) -> list[int]:
    """Enqueue jobs of one kind; return their ids."""
    answers = enqueue_sql.enqueue(
        conn, SCHEMA, [new_row(**options) for _ in range(count)], notify_inside=False
    )
    return [answer.id for answer in answers]  # type: ignore[union-attr]


def put_one(conn: Connection, **options: Any) -> int:
    """Enqueue one job; return its id."""
    (job_id,) = put(conn, **options)
    return job_id


def make_due(conn: Connection) -> None:
    """Let everything in `scheduled` be due, and promote it."""
    conn.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    queues = [row[0] for row in conn.execute("SELECT DISTINCT queue FROM triojobs.scheduled")]
    claim_sql.promote(conn, SCHEMA, queues=queues)


PLACES = """
SELECT 'ready', attempts FROM triojobs.ready WHERE id = %(id)s
UNION ALL SELECT 'scheduled', attempts FROM triojobs.scheduled WHERE id = %(id)s
UNION ALL SELECT 'leases', attempt FROM triojobs.leases WHERE id = %(id)s
"""


def place(conn: Connection, job_id: int) -> tuple[str, int]:
    """Return the one place where a job is and its attempts; an ended one is in its last outcome."""
    rows = conn.execute(PLACES, {"id": job_id}).fetchall()
    assert len(rows) <= 1, f"job {job_id} is in {rows}"
    if rows:
        return rows[0]
    last = conn.execute(
        "SELECT status, attempt FROM triojobs.outcomes WHERE job_id = %s ORDER BY no DESC LIMIT 1", [job_id]
    ).fetchone()
    return ("nowhere", 0) if last is None else last


def history(conn: Connection, job_id: int) -> list[tuple[int, str, str | None]]:
    """Return attempt, status and error of each outcome, oldest first."""
    return conn.execute(
        "SELECT attempt, status, error FROM triojobs.outcomes WHERE job_id = %s ORDER BY no", [job_id]
    ).fetchall()


def read(conn: Connection, job_id: int) -> RawJob:
    """Read one job as the client does."""
    (job,) = inspect_sql.read_jobs(conn, SCHEMA, [job_id])
    return job


def count(conn: Connection, table: str) -> int:
    """Return the number of rows of a table of the schema."""
    row = conn.execute(f"SELECT count(*) FROM triojobs.{table}").fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


@contextmanager
def rolled_back(conn: Connection) -> Iterator[None]:
    """Run the block in a transaction that is thrown away."""
    with conn.transaction(force_rollback=True):
        yield


def clean(conninfo: str) -> None:
    """Make a database as good as new: no rows, and sequences from the start."""
    tables = (
        "jobs",
        "outcomes",
        "scheduled",
        "ready",
        "leases",
        "keys",
        "worker_groups",
        "waiting",
        "witnesses",
        "paused_queues",
        "drains",
        "chores",
    )
    with psycopg.connect(conninfo) as conn:
        for table in tables:
            conn.execute(f"DELETE FROM triojobs.{table}")  # type: ignore[call-overload]
        conn.execute("ALTER SEQUENCE triojobs.job_ids RESTART")
        conn.execute("ALTER SEQUENCE triojobs.outcome_nos RESTART")
