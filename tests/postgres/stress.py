"""Random actors on one schema, and a checker of what must hold whatever they do.

Each fetcher owns a group, as a process does: it alone claims, sweeps and beats for it. Everybody settles
for every group, sometimes twice, rescues, cancels, retries, replaces and enqueues. The checker reads
under REPEATABLE READ while they run; `check_at_rest` reads when nobody runs any more.
"""

from __future__ import annotations

import itertools
import random
import threading
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg
from psycopg.errors import DeadlockDetected, LockNotAvailable, SerializationFailure
from tools import SCHEMA, Connection, Group, ended, new_row, open_session

from triojobs._errors import DatabaseError, DuplicateJobError
from triojobs._model import Claim, Enqueued, Outcome, Settled
from triojobs._sql import claim as claim_sql
from triojobs._sql import enqueue as enqueue_sql
from triojobs._sql import groups as groups_sql
from triojobs._sql import operate
from triojobs._sql import settle as settle_sql

QUEUES = ("a", "b", "c")
KEYS = 12
BACKLOG = 400  # about so many jobs wait at once, so that all actors meet at the same rows

IN_TWO_PLACES = """
SELECT id, count(*) FROM (
    SELECT id FROM triojobs.ready UNION ALL SELECT id FROM triojobs.scheduled
    UNION ALL SELECT id FROM triojobs.leases
) p GROUP BY id HAVING count(*) > 1
"""
LOST = """
SELECT j.id, o.status FROM triojobs.jobs j LEFT JOIN LATERAL (
    SELECT status FROM triojobs.outcomes x WHERE x.job_id = j.id ORDER BY no DESC LIMIT 1
) o ON true
WHERE coalesce(o.status, 'none') NOT IN ('done', 'killed', 'cancelled')
  AND NOT EXISTS (SELECT FROM triojobs.ready r WHERE r.id = j.id)
  AND NOT EXISTS (SELECT FROM triojobs.scheduled s WHERE s.id = j.id)
  AND NOT EXISTS (SELECT FROM triojobs.leases l WHERE l.id = j.id)
"""
UNDER_CLOSED = "SELECT id FROM triojobs.leases WHERE group_id = ANY (%(closed)s)"
TWO_OUTCOMES = """
SELECT job_id, group_id, claim_no FROM triojobs.outcomes WHERE claim_no IS NOT NULL
GROUP BY 1, 2, 3 HAVING count(*) > 1
"""
# A key that is held until its job has ended has one job that has not.
SHARED_KEY = """
SELECT j.queue, j.key, array_agg(j.id) FROM triojobs.jobs j
WHERE j.key IS NOT NULL AND j.id IN (
    SELECT id FROM triojobs.ready UNION ALL SELECT id FROM triojobs.scheduled
    UNION ALL SELECT id FROM triojobs.leases)
GROUP BY 1, 2 HAVING count(*) > 1
"""


class Ledger(Group):
    """A group and the claims that its process knows."""

    def __init__(self, conn: Connection) -> None:
        super().__init__(conn)
        self.lock = threading.Lock()
        self.held: list[Claim] = []
        self.mine: set[tuple[int, int]] = set()  # its own fetcher's alone
        self.past: deque[Claim] = deque(maxlen=50)

    def take(self, rng: random.Random, most: int) -> list[Claim]:
        """Take some claims out of the hands of the others."""
        with self.lock:
            rng.shuffle(self.held)
            taken = [self.held.pop() for _ in range(min(most, len(self.held)))]
            self.past.extend(taken)
        return taken

    def give_back(self, claims: list[Claim]) -> None:
        with self.lock:
            self.held += claims


class Stress:
    """One run: its actors, what they counted, and the checks."""

    def __init__(self, conninfo: str, *, seed: int) -> None:
        self.conninfo = conninfo
        self.seed = seed
        self.stop = threading.Event()
        self.registered = threading.Event()
        self.failures: list[str] = []
        self.lock = threading.Lock()
        self.ledgers: list[Ledger] = []
        self.closed: list[uuid.UUID] = []  # by close_group, which leaves nothing
        self.claims: dict[tuple[int, uuid.UUID, int], bytes | None] = {}
        self.refunds: Counter[tuple[int, uuid.UUID, int]] = Counter()
        self.swept = 0
        self.retried: set[int] = set()
        self.ids: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.version = itertools.count()

    # Actors.

    def run(self, *, seconds: float, fetchers: int = 4, others: int = 4) -> None:
        """Let them all act for so long, then check at rest."""
        actors: list[Callable[[], None]] = [self._checker]
        actors += [self._actor(n, self._fetcher_steps) for n in range(fetchers)]
        actors += [self._actor(100 + n, self._other_steps) for n in range(others)]
        threads = [threading.Thread(target=self._guarded, args=[actor], daemon=True) for actor in actors]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "an actor hangs"
        assert not self.failures, "\n".join(self.failures)
        with open_session(self.conninfo) as conn:
            self.check_at_rest(conn)

    def _guarded(self, actor: Callable[[], None]) -> None:
        try:
            actor()
        except BaseException:
            self.failures.append(traceback.format_exc())
            self.stop.set()

    def _actor(
        self, number: int, steps: Callable[[Connection, random.Random], Iterator[Callable[[], None]]]
    ) -> Callable[[], None]:
        def act() -> None:
            rng = random.Random(self.seed * 1000 + number)
            with open_session(self.conninfo) as conn:
                for step in steps(conn, rng):
                    if self.stop.is_set():
                        return
                    with self._counted(step.__name__):
                        step()

        return act

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        try:
            yield
        except DeadlockDetected:
            name = "deadlock"
        except LockNotAvailable:
            name = "lock timeout"
        except SerializationFailure:
            name = "serialization failure"
        except DuplicateJobError:
            name = "key taken"
        except DatabaseError as exc:
            if not exc.transient:
                raise
            name = "deadlock" if exc.sqlstate == DeadlockDetected.sqlstate else "busy"
        with self.lock:
            self.counts[name] += 1

    def _fetcher_steps(self, conn: Connection, rng: random.Random) -> Iterator[Callable[[], None]]:
        ledger = self._register(conn)

        def claim() -> None:
            wants = {queue: rng.randrange(1, 12) for queue in rng.sample(QUEUES, rng.randrange(1, 4))}
            claims = ledger.claim(conn, wants=wants)
            with self.lock:
                self.claims |= {(c.job_id, c.group_id, c.claim_no): c.payload for c in claims}
            ledger.mine |= {(c.job_id, c.claim_no) for c in claims}
            ledger.give_back(claims)

        def claim_that_fails() -> None:
            with conn.transaction(force_rollback=True):
                ledger.claim(conn, wants=dict.fromkeys(QUEUES, 5))

        def promote() -> None:
            claim_sql.promote(conn, SCHEMA, queues=QUEUES, limit=rng.choice([3, 1000]))

        def beat() -> None:
            nonlocal ledger
            if groups_sql.beat(conn, SCHEMA, ledger.id) is None:
                ledger = self._register(conn)

        def sweep() -> None:
            forgotten = ledger.take(rng, 3)
            # What others are settling now is in nobody's hands, but known all the same.
            known = ledger.mine - {(c.job_id, c.claim_no) for c in forgotten}
            found = groups_sql.compare(conn, SCHEMA, ledger.id, lambda: sorted(known))
            if found is None:
                return
            ledger.epoch = found.epoch
            with self.lock:
                self.swept += found.released

        def close() -> None:
            nonlocal ledger
            written, _ = groups_sql.close_group(conn, SCHEMA, ledger.id)
            self._note(ledger.id, written)
            with self.lock:
                self.closed.append(ledger.id)
            ledger = self._register(conn)

        def lapse() -> None:
            ledger.lapse(conn)

        while True:
            steps = [claim, claim_that_fails, promote, beat, sweep, close, lapse]
            yield rng.choices(steps, [30, 3, 12, 8, 2, 1, 2])[0]

    def _other_steps(self, conn: Connection, rng: random.Random) -> Iterator[Callable[[], None]]:
        self.registered.wait(30)

        def some_job() -> int | None:
            with self.lock:
                newest = max(self.ids, default=0)
            return rng.randrange(max(1, newest - 2 * BACKLOG), newest + 1) if newest else None

        def settle() -> None:
            ledger = rng.choice(self.ledgers)
            claims = ledger.take(rng, rng.randrange(1, 15))
            self._settle(conn, rng, ledger, claims)

        def settle_again() -> None:
            ledger = rng.choice(self.ledgers)
            with ledger.lock:
                claims = rng.sample(list(ledger.past), min(10, len(ledger.past)))
            self._settle(conn, rng, ledger, claims)

        def commit() -> None:
            ledger = rng.choice(self.ledgers)
            for c in ledger.take(rng, 1):
                with conn.transaction(force_rollback=rng.random() < 0.3):
                    settle_sql.settle_one_done(
                        conn, SCHEMA, job_id=c.job_id, group_id=c.group_id, claim_no=c.claim_no,
                        result=b"", encoding="cbor",
                    )  # fmt: skip

        def rescue() -> None:
            groups_sql.rescue(conn, SCHEMA)

        def cancel() -> None:
            if job_id := some_job():
                with self._missing_is_fine():
                    operate.cancel(conn, SCHEMA, job_id, "stress")

        def retry() -> None:
            if job_id := some_job():
                with self.lock:
                    self.retried.add(job_id)
                with self._missing_is_fine():
                    operate.retry(conn, SCHEMA, job_id)

        def enqueue() -> None:
            rows = [self._row(rng, key=None) for _ in range(rng.randrange(1, 20))]
            self._note_enqueued(enqueue_sql.enqueue(conn, SCHEMA, rows, notify_inside=False))

        def enqueue_keyed() -> None:
            rows = [self._row(rng, key=f"k{rng.randrange(KEYS)}") for _ in range(rng.randrange(1, 4))]
            with conn.transaction(force_rollback=rng.random() < 0.1) as tx:
                answers = enqueue_sql.enqueue(conn, SCHEMA, rows, notify_inside=True)
            if not tx.force_rollback:
                self._note_enqueued(answers)

        while True:
            steps = [settle, settle_again, commit, rescue, cancel, retry, enqueue, enqueue_keyed]
            yield rng.choices(steps, [30, 6, 6, 3, 6, 6, 8, 14])[0]

    @contextmanager
    def _missing_is_fine(self) -> Iterator[None]:
        """Some ids were drawn and rolled back."""
        with suppress(operate.JobNotFoundError):
            yield

    def _register(self, conn: Connection) -> Ledger:
        ledger = Ledger(conn)
        with self.lock:
            self.ledgers.append(ledger)
            del self.ledgers[:-12]  # the last ones, dead or alive
        self.registered.set()
        return ledger

    def _settle(self, conn: Connection, rng: random.Random, ledger: Ledger, claims: list[Claim]) -> None:
        batch = [
            ended(c, self._outcome(rng, c), error="stress", delay=rng.choice([0, 0.005, 0.05]))
            for c in claims
        ]
        try:
            written, _ = settle_sql.settle(conn, SCHEMA, ledger.id, batch)
        except psycopg.Error:
            ledger.give_back(claims)
            raise
        self._note(ledger.id, written)

    def _outcome(self, rng: random.Random, claimed: Claim) -> Outcome:
        outcome = rng.choice(list(Outcome))
        used_up = claimed.attempt >= claimed.max_attempts
        return Outcome.KILLED if outcome is Outcome.FAILED and used_up else outcome

    def _note(self, group_id: uuid.UUID, written: list[Settled]) -> None:
        with self.lock:
            for each in written:
                if each.outcome in (Outcome.RELEASED, Outcome.SNOOZED):
                    self.refunds[each.job_id, group_id, each.claim_no] += 1

    def _note_enqueued(self, answers: list[Enqueued | DuplicateJobError]) -> None:
        with self.lock:
            self.ids |= {a.id for a in answers if isinstance(a, Enqueued)}

    def _row(self, rng: random.Random, *, key: str | None) -> enqueue_sql.NewRow:
        return new_row(
            rng.choice(QUEUES),
            b"%d" % next(self.version),
            key=key,
            hold="ended",
            on_conflict=rng.choice(["raise", "return", "replace", "replace"]),
            priority=rng.randrange(3),
            max_attempts=rng.randrange(1, 4),
            delay=rng.choice([None, None, 0.01]),
        )

    # Checks.

    def _checker(self) -> None:
        with open_session(self.conninfo) as conn:
            conn.execute("SET default_transaction_isolation = 'repeatable read'")
            while not self.stop.is_set():
                self.check_snapshot(conn)
                self.stop.wait(0.1)

    def check_snapshot(self, conn: Connection) -> None:
        """What holds at any instant."""
        with self.lock:
            closed = list(self.closed)
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        try:
            for name, query in (
                ("in two places", IN_TWO_PLACES),
                ("lost", LOST),
                ("leased to a closed group", UNDER_CLOSED),
                ("two outcomes of one claim", TWO_OUTCOMES),
                ("two living jobs of one key", SHARED_KEY),
            ):
                found = conn.execute(query, {"closed": closed}).fetchall()
                assert not found, f"{name}: {found[:5]} and {len(found)} in all"
        finally:
            conn.execute("ROLLBACK")
        with self.lock:
            self.counts["snapshot"] += 1

    def check_at_rest(self, conn: Connection) -> None:
        """What holds when nobody acts: the books of the actors equal the rows."""
        groups_sql.rescue(conn, SCHEMA)
        self.check_snapshot(conn)
        assert not self.counts["deadlock"], f"{self.counts['deadlock']} deadlocks"
        stored = {row[0] for row in conn.execute("SELECT id FROM triojobs.jobs")}
        assert self.ids - stored == self.deleted(conn), f"bodies missing: {sorted(self.ids - stored)[:5]}"
        outcomes = set(
            conn.execute(
                "SELECT job_id, group_id, claim_no FROM triojobs.outcomes WHERE claim_no IS NOT NULL"
            )
        )
        outcomes |= self.deleted_outcomes(conn)
        leases = set(conn.execute("SELECT id, group_id, claim_no FROM triojobs.leases"))
        assert outcomes | leases <= set(self.claims), "a claim that nobody made"
        assert not outcomes & leases, "a claim that ended and goes on"
        assert not outcomes & set(self.refunds), "a claim that ended twice"
        assert not leases & set(self.refunds), "a claim that was given back and goes on"
        assert max(self.refunds.values(), default=1) == 1, "an attempt refunded twice"
        vanished = set(self.claims) - outcomes - leases - set(self.refunds)
        assert len(vanished) == self.swept, f"{len(vanished)} claims without an end, {self.swept} were swept"
        closed = conn.execute(
            "SELECT count(*) FROM triojobs.leases l JOIN triojobs.worker_groups g ON g.id = l.group_id"
            " WHERE g.closed_at IS NOT NULL"
        ).fetchone()
        assert closed == (0,), "leases of closed groups after a rescue"
        self._check_attempts(conn, outcomes, leases)
        self._check_bodies(conn, outcomes | leases)

    def deleted(self, conn: Connection) -> set[int]:
        """The jobs that somebody deleted: none of these actors does."""
        return set()

    def deleted_outcomes(self, conn: Connection) -> set[tuple[int, uuid.UUID, int]]:
        """The claims whose outcomes were deleted with their jobs."""
        return set()

    def _check_attempts(self, conn: Connection, outcomes: set, leases: set) -> None:  # type: ignore[type-arg]
        """Attempts are the claims that were not refunded, for jobs that no operator started anew."""
        expected = Counter(job_id for job_id, _, _ in itertools.chain(outcomes, leases))
        rows = conn.execute("SELECT id, attempts, status FROM triojobs.job_status").fetchall()
        wrong = [r for r in rows if r[0] not in self.retried and r[1] != expected[r[0]]]
        assert not wrong, f"attempts: {[(r, expected[r[0]]) for r in wrong[:5]]}"
        self.counts.update(f"jobs {status}" for _, _, status in rows)

    def _check_bodies(self, conn: Connection, started: set) -> None:  # type: ignore[type-arg]
        """A job that has started keeps its body: what its claims read is what is stored."""
        bodies = dict(conn.execute("SELECT id, payload FROM triojobs.jobs").fetchall())
        wrong = [c for c in started if c[0] in bodies and self.claims[c] != bodies[c[0]]]
        assert not wrong, f"claims that read another body: {wrong[:5]}"
