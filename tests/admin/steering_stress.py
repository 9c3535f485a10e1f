"""The random actors of the SQL, and operators among them, who steer whatever they meet.

What operators delete is kept by triggers, so that the books of the actors are still compared with every
row that ever was.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from stress import BACKLOG, QUEUES, Stress
from tools import Connection, open_session

import triojobs
from triojobs import JobFilter

KEEP_THE_DELETED = """
CREATE TABLE triojobs.deleted_jobs (id bigint);
CREATE TABLE triojobs.deleted_outcomes (job_id bigint, group_id uuid, claim_no bigint);
CREATE FUNCTION triojobs.keep_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO triojobs.deleted_jobs VALUES (OLD.id);
    RETURN NULL;
END $$;
CREATE FUNCTION triojobs.keep_outcome() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO triojobs.deleted_outcomes VALUES (OLD.job_id, OLD.group_id, OLD.claim_no);
    RETURN NULL;
END $$;
CREATE TRIGGER keep AFTER DELETE ON triojobs.jobs FOR EACH ROW EXECUTE FUNCTION triojobs.keep_job();
CREATE TRIGGER keep AFTER DELETE ON triojobs.outcomes FOR EACH ROW EXECUTE FUNCTION triojobs.keep_outcome();
"""
# A claim that began after a pause had returned, and before the queue was resumed.
CLAIMED_WHILE_PAUSED = """
SELECT c.id FROM (
    SELECT id, queue, claimed_at FROM triojobs.leases
    UNION ALL
    SELECT o.job_id, j.queue, o.claimed_at FROM triojobs.outcomes o JOIN triojobs.jobs j ON j.id = o.job_id
) c WHERE c.queue = %s AND c.claimed_at > %s AND c.claimed_at < %s
"""
OUTCOMES_OF_NOBODY = """
SELECT o.job_id FROM triojobs.outcomes o WHERE NOT EXISTS (SELECT FROM triojobs.jobs j WHERE j.id = o.job_id)
"""
WAITING_OF_NOBODY = """
SELECT w.id FROM (SELECT id FROM triojobs.ready UNION ALL SELECT id FROM triojobs.scheduled
                  UNION ALL SELECT id FROM triojobs.leases) w
WHERE NOT EXISTS (SELECT FROM triojobs.jobs j WHERE j.id = w.id)
"""
KEYS_OF_NOBODY = """
SELECT k.queue, k.key FROM triojobs.keys k WHERE NOT EXISTS (SELECT FROM triojobs.jobs j WHERE j.id = k.job_id)
"""
STATUSES = ("pending", "failed", "running", "done", "killed", "cancelled")


class SteeringStress(Stress):
    """Half of the steps of those who do not claim are an operator's."""

    def __init__(self, conninfo: str, *, seed: int) -> None:
        super().__init__(conninfo, seed=seed)
        self.pauses: list[tuple[str, Any, Any]] = []
        with open_session(conninfo) as conn:
            conn.execute(KEEP_THE_DELETED)

    def _other_steps(self, conn: Connection, rng: random.Random) -> Iterator[Callable[[], None]]:
        others, operators = super()._other_steps(conn, rng), self._operator_steps(conn, rng)
        while True:
            yield next(others)
            yield next(operators)

    def _operator_steps(self, conn: Connection, rng: random.Random) -> Iterator[Callable[[], None]]:
        admin = triojobs.admin_on(conn)

        def some_jobs(most: int) -> list[int]:
            with self.lock:
                newest = max(self.ids, default=1)
            return [rng.randrange(max(1, newest - 2 * BACKLOG), newest + 1) for _ in range(most)]

        def one(act: Callable[..., Any], **options: Any) -> None:
            job_id = some_jobs(1)[0]
            if act == admin.retry:
                with self.lock:
                    self.retried.add(job_id)
            with self._missing_is_fine():
                if rng.random() < 0.5:
                    act(job_id, **options)
                else:
                    with conn.transaction(force_rollback=rng.random() < 0.3):
                        act(job_id, **options)

        def some_filter(status: Any = None) -> JobFilter:
            return JobFilter(ids=some_jobs(rng.randrange(1, 40)), status=status)

        def reschedule() -> None:
            one(admin.reschedule, delay=rng.choice([0.0, 0.02]))

        def edit() -> None:
            queue: triojobs.Queue[int, Any] = triojobs.Queue(rng.choice(QUEUES), int)
            with suppress(triojobs.OptionError):  # the job is of another queue
                one(admin.edit, queue=queue, payload=next(self.version), priority=rng.randrange(3))

        def delete() -> None:
            one(admin.delete)

        def retry_one() -> None:
            one(admin.retry)

        def cancel_many() -> None:
            admin.cancel_many(some_filter(), reason="stress", batch=rng.choice([3, 500]))

        def retry_many() -> None:
            which = some_filter(rng.sample(STATUSES[3:], rng.randrange(1, 4)))
            with self.lock:
                self.retried |= set(which.ids or ())
            admin.retry_many(which, batch=rng.choice([3, 500]))

        def reschedule_many() -> None:
            admin.reschedule_many(some_filter(), delay=rng.choice([0.0, 0.02]))

        def edit_many() -> None:
            admin.edit_many(some_filter(), priority=rng.randrange(3), max_attempts=rng.randrange(1, 4))

        def delete_many() -> None:
            admin.delete_many(some_filter(rng.choice([None, "done", ["pending", "failed"]])))

        def pause() -> None:
            self._pause(conn, admin, rng.choice(QUEUES))

        while True:
            steps = [reschedule, edit, delete, retry_one, cancel_many, retry_many, reschedule_many, edit_many]
            steps += [delete_many, pause]
            yield rng.choices(steps, [6, 6, 4, 4, 1, 4, 4, 4, 2, 1])[0]

    def _pause(self, conn: Connection, admin: triojobs.SyncAdmin, queue: str) -> None:
        def now() -> Any:
            row = conn.execute("SELECT clock_timestamp()").fetchone()
            assert row is not None
            return row[0]

        if not admin.pause(queue):
            return  # somebody else resumes it
        since = now()
        self.stop.wait(0.02)
        until = now()
        admin.resume(queue)
        with self.lock:
            self.pauses.append((queue, since, until))

    def check_snapshot(self, conn: Connection) -> None:
        super().check_snapshot(conn)
        for query in (OUTCOMES_OF_NOBODY, WAITING_OF_NOBODY, KEYS_OF_NOBODY):
            found = conn.execute(query).fetchall()
            assert not found, f"left behind by a deletion: {found[:5]} and {len(found)} in all"

    def check_at_rest(self, conn: Connection) -> None:
        super().check_at_rest(conn)
        conn.execute("SET enable_seqscan = on")
        for queue, since, until in self.pauses:
            found = conn.execute(CLAIMED_WHILE_PAUSED, [queue, since, until]).fetchall()
            assert not found, f"claimed from {queue} while it was paused: {found[:5]}"

    def deleted(self, conn: Connection) -> set[int]:
        rows = conn.execute("SELECT id FROM triojobs.deleted_jobs").fetchall()
        assert len(rows) == len(set(rows)), "a job deleted twice"
        return {row[0] for row in rows} & self.ids

    def deleted_outcomes(self, conn: Connection) -> set[tuple[int, uuid.UUID, int]]:
        return set(
            conn.execute(
                "SELECT job_id, group_id, claim_no FROM triojobs.deleted_outcomes WHERE claim_no IS NOT NULL"
            )
        )
