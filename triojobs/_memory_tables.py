"""The tables in memory, and what the SQL statements do to them, in Python. Pure: time comes in as an argument.

Each public method of `Tables` is one transaction of triojobs/_sql with the same rules and the same
answers; rows are frozen, so that a transaction is undone by putting the old dictionaries back.
Times are readings of one clock (float seconds); `at` and `seconds` translate to datetimes.
"""

from __future__ import annotations

import datetime as dt
import heapq
import json
import math
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from ._errors import DatabaseError, DuplicateJobError, JobNotFoundError
from ._model import (
    CancelRequest,
    Claim,
    Enqueued,
    JobStatus,
    NewRow,
    Outcome,
    RawJob,
    Registration,
    Settled,
    Settlement,
)
from ._positions import Stretch
from ._queue import job_of_another_queue, unknown_job_id
from ._store import ClaimOrder

__all__ = ["EPOCH", "PROMOTE_LIMIT", "GroupRow", "LeaseRow", "OutcomeRow", "Snapshot", "Tables"]

TABLES: Final = (
    "jobs",
    "ready",
    "scheduled",
    "leases",
    "outcomes",
    "keys",
    "groups",
    "waiting",
    "witnesses",
    "_fences",
)
Snapshot: TypeAlias = dict[str, Any]
PROMOTE_LIMIT: Final = 1000  # as in PostgreSQL, so that a fetcher meets the same full promotions
EPOCH: Final = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)  # what the clock's zero is called as a datetime


@dataclass(frozen=True, slots=True)
class BodyRow:
    """A row of `jobs`."""

    id: int
    row: NewRow
    run_at: float
    enqueued_at: float


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """A row of `ready` or `scheduled`."""

    id: int
    queue: str
    priority: int
    run_at: float
    attempts: int
    max_attempts: int

    @property
    def place(self) -> tuple[int, float, int]:
        """Where it stands in line: highest priority, then oldest."""
        return (-self.priority, self.run_at, self.id)


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A row of `leases`: a running job."""

    id: int
    claim_no: int
    group_id: uuid.UUID
    attempt: int
    max_attempts: int
    queue: str
    priority: int
    run_at: float
    claimed_at: float
    cancel_reason: str | None = None

    def waiting(self, attempts: int, run_at: float | None = None) -> WaitingRow:
        """Return the row with which this job waits again."""
        run_at = self.run_at if run_at is None else run_at
        return WaitingRow(self.id, self.queue, self.priority, run_at, attempts, self.max_attempts)


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """A row of `outcomes`: an ended attempt, or a job cancelled while it waited (no group, no claim)."""

    job_id: int
    no: int
    group_id: uuid.UUID | None
    claim_no: int | None
    attempt: int
    status: str
    error: str | None
    result: bytes | None
    encoding: str | None
    claimed_at: float | None
    finished_at: float


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A row of `keys`."""

    job_id: int
    hold: str
    until: float | None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A row of `worker_groups`."""

    registration: Registration
    epoch: int
    lease_until: float
    closed_at: float | None = None


class Tables:
    """All tables. Every method is atomic and takes the time of its statement."""

    def __init__(self, epoch: dt.datetime = EPOCH) -> None:
        self.epoch = epoch
        self.jobs: dict[int, BodyRow] = {}
        self.ready: dict[int, WaitingRow] = {}
        self.scheduled: dict[int, WaitingRow] = {}
        self.leases: dict[int, LeaseRow] = {}
        self.outcomes: dict[int, tuple[OutcomeRow, ...]] = {}
        self.keys: dict[tuple[str, str], KeyRow] = {}
        self.groups: dict[uuid.UUID, GroupRow] = {}
        self.waiting: set[tuple[str, uuid.UUID]] = set()
        self.paused: set[str] = set()
        self.drains: dict[uuid.UUID, str] = {}
        self.witnesses: set[uuid.UUID] = set()
        self.last_id: int = 0
        self._outcome_no = 0
        self._fences: set[tuple[int, uuid.UUID, int]] = set()

    # Time.

    def at(self, seconds: float) -> dt.datetime:
        """Return a clock reading as a datetime."""
        return self.epoch + dt.timedelta(microseconds=round(seconds * 1_000_000))

    def seconds(self, at: dt.datetime) -> float:
        """Return a datetime as a clock reading."""
        return (at - self.epoch).total_seconds()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo everything (but ids that were handed out) when the block raises."""
        before = self.snapshot()
        try:
            yield
        except BaseException:
            self._restore(before)
            raise

    def snapshot(self) -> Snapshot:
        """Return all rows as they are now."""
        return {name: getattr(self, name).copy() for name in TABLES}

    def crash(self, kept: Snapshot) -> None:
        """Lose what was committed after `kept` was taken; the unlogged tables are empty afterwards."""
        self._restore(kept)
        self.waiting.clear()
        self.witnesses.clear()

    def _restore(self, rows: Snapshot) -> None:
        for name in TABLES:
            setattr(self, name, rows[name].copy())

    # Enqueue.

    def new_job_ids(self, count: int) -> list[int]:
        first = self.last_id + 1
        self.last_id += count
        return list(range(first, self.last_id + 1))

    def enqueue(self, rows: Sequence[NewRow], now: float) -> list[Enqueued]:
        """Insert all rows or none."""
        special = [i for i, row in enumerate(rows) if row.key is not None or row.job_id is not None]
        if not special:
            return [
                self._insert(job_id, row, now)
                for job_id, row in zip(self.new_job_ids(len(rows)), rows, strict=True)
            ]
        with self.transaction():
            return self._enqueue_special(rows, special, now)

    def _enqueue_special(self, rows: Sequence[NewRow], special: list[int], now: float) -> list[Enqueued]:
        for row in rows:
            if row.job_id is not None and not 1 <= row.job_id <= self.last_id:
                raise unknown_job_id(row)
        chosen = set(special)
        plain = [i for i in range(len(rows)) if i not in chosen]
        answers = {
            i: self._insert(job_id, rows[i], now)
            for job_id, i in zip(self.new_job_ids(len(plain)), plain, strict=True)
        }
        for i in sorted(special, key=lambda i: (rows[i].queue, rows[i].key or "", i)):
            row = rows[i]
            job_id = self.new_job_ids(1)[0] if row.job_id is None else row.job_id
            answer = answers[i] = self._enqueue_one(job_id, row, now)
            if (
                not answer.created
                and row.key is not None
                and row.on_conflict == "raise"
                and answer.id != job_id
            ):
                index = i if len(rows) > 1 else None
                raise DuplicateJobError(queue=row.queue, key=row.key, job_id=answer.id, index=index)
        return [answers[i] for i in range(len(rows))]

    def _enqueue_one(self, job_id: int, row: NewRow, now: float) -> Enqueued:
        if job_id in self.jobs:
            if self.jobs[job_id].row.queue != row.queue:
                raise job_of_another_queue(row, self.jobs[job_id].row.queue)
            return Enqueued(job_id, created=False)  # the safe repetition after a lost reply
        if row.key is None:
            return self._insert(job_id, row, now)
        place = (row.queue, row.key)
        held = self.keys.get(place)
        if held is not None and self._holds(held, now):
            if row.on_conflict != "replace":
                return Enqueued(held.job_id, created=False)
            return Enqueued(held.job_id, created=False, replaced=self._replace(held.job_id, row, now))
        until = None if row.hold_seconds is None else now + row.hold_seconds
        self.keys[place] = KeyRow(job_id, row.hold, until)
        return self._insert(job_id, row, now)

    def _holds(self, key: KeyRow, now: float) -> bool:
        if key.hold == "kept":
            return key.job_id in self.jobs
        if key.hold == "ended":
            return self.alive(key.job_id)
        return key.until is not None and key.until > now

    def _insert(self, job_id: int, row: NewRow, now: float) -> Enqueued:
        run_at = self._run_at(row, now)
        self.jobs[job_id] = BodyRow(job_id, row, run_at, now)
        waiting = WaitingRow(job_id, row.queue, row.priority, run_at, 0, row.max_attempts)
        (self.ready if run_at <= now else self.scheduled)[job_id] = waiting
        return Enqueued(job_id, created=True)

    def _replace(self, job_id: int, row: NewRow, now: float) -> bool:
        if job_id in self.leases or job_id in self.outcomes:
            return False
        old = self.jobs.get(job_id)
        waiting = self._take_waiting(job_id)
        if old is None or waiting is None:
            raise DatabaseError(
                f"job {job_id} kept changing hands",
                operation="enqueueing",
                hint="repeat the call",
                transient=True,
            )
        run_at = self._run_at(row, now)
        # What names the job stays; everything else is the new body's.
        kept = row._replace(queue=old.row.queue, key=old.row.key)
        self.jobs[job_id] = BodyRow(job_id, kept, run_at, old.enqueued_at)
        moved = replace(waiting, priority=row.priority, run_at=run_at, max_attempts=row.max_attempts)
        (self.ready if run_at <= now else self.scheduled)[job_id] = moved
        return True

    def _run_at(self, row: NewRow, now: float) -> float:
        return self.seconds(row.run_at) if row.run_at is not None else now + (row.delay or 0.0)

    def _take_waiting(self, job_id: int) -> WaitingRow | None:
        return self.ready.pop(job_id, None) or self.scheduled.pop(job_id, None)

    # Claim.

    def promote(self, queues: Collection[str], now: float) -> tuple[Counter[str], float | None]:
        """Move due rows; return how many of each queue, and seconds until the next is due."""
        mine = [row for row in self.scheduled.values() if row.queue in queues]
        due = [row for row in mine if row.run_at <= now]
        moved = heapq.nsmallest(PROMOTE_LIMIT, due, key=lambda row: (row.run_at, row.id))
        for row in moved:
            self.ready[row.id] = self.scheduled.pop(row.id)
        due_at = self.next_due(queues)
        return Counter(row.queue for row in moved), None if due_at == math.inf else due_at - now

    def claim(self, order: ClaimOrder, now: float) -> list[Claim]:
        if not self.may_claim(order.group_id, order.epoch):
            return []
        taken: list[WaitingRow] = []
        for queue, want in order.wants.items():
            if queue in self.paused:
                continue
            stretches = order.starts.get(queue)
            line = (
                row
                for row in self.ready.values()
                if row.queue == queue and (stretches is None or self._lies_in(row, stretches))
            )
            taken += heapq.nsmallest(want, line, key=lambda row: row.place)
        taken.sort(key=lambda row: row.place)
        return [self.lease(row.id, order.group_id, order.claim_no, now) for row in taken]

    def _lies_in(self, row: WaitingRow, stretches: Sequence[Stretch]) -> bool:
        place = self.epoch.timestamp() + row.run_at, row.id
        return any(
            part.below < row.priority < part.above
            if part.band is None
            else row.priority == part.band and place > (part.run_at, part.job_id)
            for part in stretches
        )

    def may_claim(self, group_id: uuid.UUID, epoch: int) -> bool:
        """Return whether a claim of this group could match rows at all."""
        group = self.groups.get(group_id)
        if group is None or group.epoch != epoch or group.closed_at is not None:
            return False
        return group_id in self.witnesses

    def lease(self, job_id: int, group_id: uuid.UUID, claim_no: int, now: float) -> Claim:
        """Claim this one, which is due."""
        row = self.ready.pop(job_id)
        fence = (row.id, group_id, claim_no)
        assert fence not in self._fences, f"claim {fence} was made before"
        assert row.id not in self.leases, f"job {row.id} runs already"
        self._fences.add(fence)
        self.leases[row.id] = LeaseRow(
            row.id,
            claim_no,
            group_id,
            row.attempts + 1,
            row.max_attempts,
            row.queue,
            row.priority,
            row.run_at,
            now,
        )
        body = self.jobs[row.id]
        job = body.row
        deadline = None if job.deadline is None else self.seconds(job.deadline)
        errors = [o.error for o in self.outcomes.get(row.id, ()) if o.error is not None]
        zero = self.epoch.timestamp()
        return Claim(
            job_id=row.id,
            claim_no=claim_no,
            group_id=group_id,
            queue=row.queue,
            attempt=row.attempts + 1,
            max_attempts=row.max_attempts,
            priority=row.priority,
            run_at=zero + row.run_at,
            enqueued_at=zero + body.enqueued_at,
            payload=job.payload,
            encoding=job.encoding.encode(),
            timeout=job.timeout,
            deadline=None if deadline is None else zero + deadline,
            claimed_at=zero + now,
            key=None if job.key is None else job.key.encode(),
            metadata=None if job.metadata == "{}" else job.metadata.encode(),
            last_error=errors[-1].encode() if errors and row.attempts > 0 else None,
        )

    # The end of claims.

    def fenced(self, group_id: uuid.UUID, job_id: int, claim_no: int) -> LeaseRow | None:
        """Return the lease of exactly this claim."""
        lease = self.leases.get(job_id)
        if lease is None or lease.group_id != group_id or lease.claim_no != claim_no:
            return None
        return lease

    def settle(
        self, group_id: uuid.UUID, batch: Sequence[Settlement], now: float
    ) -> tuple[list[Settled], set[str]]:
        """Write ends of claims; return what stands written, and queues with something claimable (sooner)."""
        written: list[Settled] = []
        queues: set[str] = set()
        for asked in batch:
            lease = self.fenced(group_id, asked.job_id, asked.claim_no)
            if lease is None or group_id not in self.groups:
                before = self._outcome_row(group_id, asked.job_id, asked.claim_no)
                # The repetition of a settlement whose reply was lost finds what that one wrote; so does
                # any settlement after a `Job.commit` whose reply was lost: done is never written by
                # anybody else. A failure may be a rescuer's: only the text tells.
                if before is not None and (
                    before.status == Outcome.DONE
                    or (before.status, before.error) == (asked.outcome, asked.error)
                    or (before.status == Outcome.CANCELLED and asked.outcome is not Outcome.DONE)
                ):
                    written.append(Settled(asked.job_id, asked.claim_no, Outcome(before.status)))
                continue
            outcome, error = asked.outcome, asked.error
            if outcome is not Outcome.DONE and lease.cancel_reason is not None:
                outcome, error = Outcome.CANCELLED, lease.cancel_reason
            del self.leases[lease.id]
            if outcome in (Outcome.DONE, Outcome.FAILED, Outcome.KILLED, Outcome.CANCELLED):
                result = (asked.result, asked.encoding) if outcome is Outcome.DONE else (None, None)
                self._note(lease, outcome, error, now, *result)
            if outcome in (Outcome.FAILED, Outcome.SNOOZED):
                attempts = lease.attempt - (outcome is Outcome.SNOOZED)
                self.scheduled[lease.id] = lease.waiting(attempts, now + asked.delay)
            elif outcome is Outcome.RELEASED:
                self.ready[lease.id] = lease.waiting(lease.attempt - 1)
            if lease.id in self.scheduled or lease.id in self.ready:
                queues.add(lease.queue)
            written.append(Settled(lease.id, lease.claim_no, outcome))
        return written, queues

    def outcome_of_claim(self, group_id: uuid.UUID, job_id: int, claim_no: int) -> str | None:
        row = self._outcome_row(group_id, job_id, claim_no)
        return None if row is None else row.status

    def _outcome_row(self, group_id: uuid.UUID, job_id: int, claim_no: int) -> OutcomeRow | None:
        for row in self.outcomes.get(job_id, ()):
            if row.group_id == group_id and row.claim_no == claim_no:
                return row
        return None

    def _note(
        self,
        lease: LeaseRow,
        status: str,
        error: str | None,
        now: float,
        result: bytes | None = None,
        encoding: str | None = None,
    ) -> None:
        assert self.outcome_of_claim(lease.group_id, lease.id, lease.claim_no) is None, (
            "two outcomes of a claim"
        )
        self._outcome_no += 1
        row = OutcomeRow(
            lease.id,
            self._outcome_no,
            lease.group_id,
            lease.claim_no,
            lease.attempt,
            str(status),
            error,
            result,
            encoding,
            lease.claimed_at,
            now,
        )
        self.outcomes[lease.id] = (*self.outcomes.get(lease.id, ()), row)

    # Groups.

    def register(self, registration: Registration, now: float) -> None:
        if registration.group_id in self.groups:
            raise DatabaseError(
                f"worker group {registration.group_id} is registered already",
                operation="registering the worker group",
                sqlstate="23505",
            )
        self.groups[registration.group_id] = GroupRow(registration, 1, now + registration.lease_duration)
        self.witnesses.add(registration.group_id)

    def beat(self, group_id: uuid.UUID, now: float) -> tuple[list[CancelRequest], bool] | None:
        """Prolong the lease; return open cancel requests, and whether the witness is there.

        None: the group is closed.
        """
        group = self.groups.get(group_id)
        if group is None or group.closed_at is not None:
            return None
        self.groups[group_id] = replace(group, lease_until=now + group.registration.lease_duration)
        requests = [
            CancelRequest(lease.id, lease.claim_no, lease.cancel_reason)
            for lease in self.leases.values()
            if lease.group_id == group_id and lease.cancel_reason is not None
        ]
        return requests, group_id in self.witnesses

    def close_group(self, group_id: uuid.UUID, now: float) -> tuple[list[Settled], set[str]]:
        self._close([group_id], now)
        return self._release([row for row in self.leases.values() if row.group_id == group_id], now)

    def compare(
        self, group_id: uuid.UUID, known: Callable[[], Sequence[tuple[int, int]]], now: float
    ) -> tuple[int, list[tuple[int, int]], int, set[str]] | None:
        """Return the new epoch, what is missing, how many rows went back, and the queues of these.

        None: the group is closed or gone.
        """
        group = self.groups.get(group_id)
        if group is None or group.closed_at is not None:
            return None
        self.groups[group_id] = replace(group, epoch=group.epoch + 1)
        self.witnesses.add(group_id)
        claims = known()
        missing = [
            (job_id, claim_no)
            for job_id, claim_no in claims
            if self.fenced(group_id, job_id, claim_no) is None
            and self.outcome_of_claim(group_id, job_id, claim_no) is None
        ]
        kept = set(claims)
        strays = [
            row
            for row in self.leases.values()
            if row.group_id == group_id and (row.id, row.claim_no) not in kept
        ]
        written, queues = self._release(strays, now)
        released = sum(row.outcome is Outcome.RELEASED for row in written)
        return group.epoch + 1, missing, released, queues

    def lapsed(self, now: float) -> list[uuid.UUID]:
        """Return the groups whose lease has ended and that nobody has closed."""
        return [g for g, row in self.groups.items() if row.closed_at is None and row.lease_until < now]

    def rescue(self, groups: Collection[uuid.UUID], now: float) -> tuple[int, set[str]]:
        """Close `groups`; end all leases under closed or missing groups as failed attempts.

        Returns how many, and the queues in which something became claimable.
        """
        self._close(groups, now)
        orphans = [row for row in self.leases.values() if not self._is_open(row.group_id)]
        queues: set[str] = set()
        for row in orphans:
            del self.leases[row.id]
            text = f"rescued: the lease of worker group {row.group_id} ended"
            if row.cancel_reason is not None:
                self._note(row, Outcome.CANCELLED, row.cancel_reason, now)
            elif row.attempt >= row.max_attempts:
                self._note(row, Outcome.KILLED, text, now)
            else:
                self._note(row, Outcome.FAILED, text, now)
                self.ready[row.id] = row.waiting(row.attempt)
                queues.add(row.queue)
        return len(orphans), queues

    def _is_open(self, group_id: uuid.UUID) -> bool:
        group = self.groups.get(group_id)
        return group is not None and group.closed_at is None

    def _close(self, groups: Collection[uuid.UUID], now: float) -> None:
        for group_id in groups:
            group = self.groups.get(group_id)
            if group is not None and group.closed_at is None:
                self.groups[group_id] = replace(group, closed_at=now)
        self.waiting = {(queue, group_id) for queue, group_id in self.waiting if group_id not in groups}
        self.witnesses -= set(groups)

    def _release(self, leases: Sequence[LeaseRow], now: float) -> tuple[list[Settled], set[str]]:
        written: list[Settled] = []
        queues: set[str] = set()
        for row in leases:
            del self.leases[row.id]
            if row.cancel_reason is None:
                self.ready[row.id] = row.waiting(row.attempt - 1)
                queues.add(row.queue)
                written.append(Settled(row.id, row.claim_no, Outcome.RELEASED))
            else:
                self._note(row, Outcome.CANCELLED, row.cancel_reason, now)
                written.append(Settled(row.id, row.claim_no, Outcome.CANCELLED))
        return written, queues

    def awaited(self, queues: Collection[str], now: float) -> set[str]:
        """Return those of `queues` on which a living group sleeps."""
        return {
            queue
            for queue, group_id in self.waiting
            if queue in queues and self._is_open(group_id) and self.groups[group_id].lease_until > now
        }

    # By id.

    def alive(self, job_id: int) -> bool:
        """Return whether the job waits or runs."""
        return job_id in self.ready or job_id in self.scheduled or job_id in self.leases

    def ended(self, ids: Sequence[int]) -> list[int]:
        """Return those that neither wait nor run: the unknown, then the ended as they ended."""

        def order(job_id: int) -> tuple[int, int]:
            outcomes = self.outcomes.get(job_id)
            return outcomes[-1].no if outcomes else 0, job_id

        return sorted((i for i in ids if not self.alive(i)), key=order)

    def cancel(self, job_id: int, reason: str, now: float) -> tuple[bool, uuid.UUID | None]:
        """Return whether it will not run again because of this call, and the group that runs it."""
        waiting = self._take_waiting(job_id)
        if waiting is not None:
            self._outcome_no += 1
            row = OutcomeRow(
                job_id,
                self._outcome_no,
                None,
                None,
                waiting.attempts,
                Outcome.CANCELLED.value,
                reason,
                None,
                None,
                None,
                now,
            )
            self.outcomes[job_id] = (*self.outcomes.get(job_id, ()), row)
            return True, None
        lease = self.leases.get(job_id)
        if lease is not None:
            if lease.cancel_reason is None:  # the first reason stays
                self.leases[job_id] = replace(lease, cancel_reason=reason)
            return True, lease.group_id
        if job_id not in self.jobs:
            raise JobNotFoundError(job_id, operation="cancelling")
        return False, None

    def status(self, job_id: int) -> JobStatus:
        """Return the status as the view decides it; KeyError: there is no such job."""
        body = self.jobs[job_id]
        if job_id in self.leases:
            return JobStatus.RUNNING
        last = self.outcomes.get(body.id, (None,))[-1]
        if job_id in self.ready or job_id in self.scheduled:
            return JobStatus.FAILED if last is not None and last.status == "failed" else JobStatus.PENDING
        assert last is not None, f"job {job_id} is nowhere"
        return JobStatus(last.status)

    def read(self, job_id: int) -> RawJob | None:
        body = self.jobs.get(job_id)
        if body is None:
            return None
        job = body.row
        lease = self.leases.get(job_id)
        waiting = self.ready.get(job_id) or self.scheduled.get(job_id)
        last = self.outcomes.get(job_id, (None,))[-1]
        ended = last if lease is None and waiting is None else None
        status = self.status(job_id)
        place = lease or ended
        attempts = lease.attempt if lease else waiting.attempts if waiting else last.attempt if last else 0
        done = ended if status is JobStatus.DONE else None
        claimed_at = None if place is None else place.claimed_at
        return RawJob(
            id=job_id,
            queue=job.queue,
            status=status.value,
            attempts=attempts,
            max_attempts=job.max_attempts,
            priority=job.priority,
            run_at=self.at((lease or waiting or body).run_at),
            key=job.key,
            metadata=json.loads(job.metadata),
            group_id=None if place is None else place.group_id,
            enqueued_at=self.at(body.enqueued_at),
            claimed_at=None if claimed_at is None else self.at(claimed_at),
            finished_at=None if ended is None else self.at(ended.finished_at),
            last_error=None if last is None else last.error,
            payload=job.payload,
            encoding=job.encoding,
            deadline=job.deadline,
            result=None if done is None else done.result,
            result_encoding=None if done is None else done.encoding,
            claim_no=None if place is None else place.claim_no,
            cancel_reason=lease.cancel_reason
            if lease
            else ended.error
            if status is JobStatus.CANCELLED and ended
            else None,
        )

    def idle(self, queues: Collection[str], now: float) -> bool:
        """Return whether nothing due or running is left in these queues."""
        return not (
            any(row.queue in queues for row in self.ready.values())
            or any(row.queue in queues and row.run_at <= now for row in self.scheduled.values())
            or any(row.queue in queues for row in self.leases.values())
        )

    def next_due(self, queues: Collection[str]) -> float:
        """Return when the earliest scheduled row of these queues is due; infinity: there is none."""
        return min((row.run_at for row in self.scheduled.values() if row.queue in queues), default=math.inf)

    # What must always hold.

    def check_invariants(self) -> None:
        """Raise AssertionError unless the tables are as only correct transitions leave them."""
        for table in (self.ready, self.scheduled, self.leases, self.outcomes):
            assert table.keys() <= self.jobs.keys(), "a row without its body"
        for job_id in self.jobs:
            self._check_job(job_id)
        for (queue, key), row in self.keys.items():
            holder = self.jobs[row.job_id].row
            assert (holder.queue, holder.key) == (queue, key), f"key {key!r} is held by a job without it"

    def _check_job(self, job_id: int) -> None:
        places = (job_id in self.ready) + (job_id in self.scheduled) + (job_id in self.leases)
        history = self.outcomes.get(job_id, ())
        claims = [(row.group_id, row.claim_no) for row in history if row.claim_no is not None]
        assert len(claims) == len(set(claims)), f"job {job_id} has two outcomes of one claim"
        assert all((job_id, *claim) in self._fences for claim in claims), f"job {job_id} ended unclaimed"
        assert [row.status for row in history[:-1]] == ["failed"] * len(history[:-1]), (
            f"job {job_id} went on after its end"
        )
        if places:
            assert places == 1, f"job {job_id} is in {places} places"
            assert not history or history[-1].status == "failed", f"job {job_id} is alive after its end"
        else:
            assert history, f"job {job_id} is nowhere"
            assert JobStatus(history[-1].status).ended, f"job {job_id} failed and is nowhere"
        self._check_attempts(job_id, len(claims))

    def _check_attempts(self, job_id: int, made: int) -> None:
        lease = self.leases.get(job_id)
        waiting = self.ready.get(job_id) or self.scheduled.get(job_id)
        history = self.outcomes.get(job_id, ())
        numbers = [row.attempt for row in history if row.claim_no is not None]
        assert numbers == list(range(1, made + 1)), f"job {job_id}: attempts {numbers}"
        if lease is not None:
            assert lease.attempt == made + 1, f"job {job_id}: attempt {lease.attempt} after {made}"
            assert self._is_open(lease.group_id), f"job {job_id} runs under a closed group"
            ended = self.outcome_of_claim(lease.group_id, job_id, lease.claim_no)
            assert ended is None, f"job {job_id} runs although its claim ended as {ended}"
        elif waiting is not None:
            assert waiting.attempts == made, f"job {job_id}: {waiting.attempts} attempts, but {made} ended"
        else:
            assert history[-1].attempt == made, f"job {job_id}: {history[-1].attempt} attempts, {made} ended"
