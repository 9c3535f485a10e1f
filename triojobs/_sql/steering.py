"""What the acts of an operator on many jobs have in common; each act has a module of its own.

An act is one look at some jobs: it changes those that are where it can change them, and says which.
"Not changed" proves only that a job was not there at that moment, so `insist` looks again, each time
with new statements, at most three times.

Two ways to lock. With `wait` an act waits for rows that others have locked: for one job at a time.
Without, it passes over them: an act locks many rows in the order of ids, but a close or a sweep locks
leases as they lie in the table, and an enqueue of many keys replaces jobs in the order of their keys.
To wait for them while holding other rows of the same kind would be a deadlock. What was passed over is
for `insist`.

Lock order: waiting row → body, as a replacement has it. A retry has the body alone, and needs the
waiting row's absence. A look that changed nothing gives up what it locked: in a caller's transaction the next
one would wait for a waiting row with the body in hand.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString, Protocol

import psycopg

from .._errors import JobNotFoundError
from .._model import JobStatus
from .operate import ROUNDS
from .statements import plain_cursor, statement

__all__ = ["Act", "Changed", "State", "insist", "locking", "span", "tried"]

STATE: Final = """
SELECT v.status, EXISTS (SELECT FROM {schema}.outcomes o WHERE o.job_id = v.id)
FROM {schema}.job_status v WHERE v.id = %(id)s
"""


@dataclass(frozen=True, slots=True)
class Changed:
    """What one look changed.

    Attributes:
        ids: the jobs. queues: where something became claimable (sooner). groups: that have requests to
            cancel.
    """

    ids: frozenset[int] = frozenset()
    queues: frozenset[str] = frozenset()
    groups: frozenset[uuid.UUID] = frozenset()


class Act(Protocol):
    """One look at some jobs, as a transaction of its own or a savepoint of the caller's."""

    def __call__(
        self, conn: psycopg.Connection[Any], schema: str, ids: Sequence[int], /, *, wait: bool
    ) -> Changed: ...


@dataclass(frozen=True, slots=True)
class State:
    """Where a job stands; `started`: it has an outcome, or runs."""

    status: JobStatus | None
    started: bool


def locking(template: LiteralString, *, wait: bool) -> LiteralString:
    """Return a statement that waits for locked rows, or the one that passes over them."""
    return template.replace(" SKIP LOCKED", "") if wait else template


def span(ids: Collection[int]) -> dict[str, Any]:
    """Return the parameters of a change of bodies or outcomes by their ids: `ids`, `least`, `most`.

    The bounds leave out partitions; an array alone is looked for in each of them. A join would be one
    with whole partitions where the plan was made while they were small.
    """
    return {"ids": sorted(ids), "least": min(ids, default=0), "most": max(ids, default=0)}


def tried(statuses: Collection[JobStatus]) -> list[bool]:
    """Return which waiting jobs are meant: those that have not failed, those that have, or both.

    A waiting job has failed if and only if it has made attempts: what is given back is not counted, and
    a retry by a person starts anew.
    """
    return [
        failed
        for failed, status in ((False, JobStatus.PENDING), (True, JobStatus.FAILED))
        if status in statuses
    ]


def insist(
    conn: psycopg.Connection[Any], schema: str, act: Act, job_id: int, possible: Callable[[State], bool]
) -> Changed | None:
    """Do an act to one job, looking again as long as it is possible.

    Returns what it changed: nothing (no ids) when it is not possible. None: the job changed hands for
    three rounds.

    Raises:
        JobNotFoundError: there is no such job.
    """
    for _ in range(ROUNDS):
        changed = _look(conn, schema, act, job_id)
        if changed.ids:
            return changed
        row = plain_cursor(conn).execute(statement(STATE, schema), {"id": job_id}).fetchone()
        if row is None:
            raise JobNotFoundError(job_id, operation="looking for a job")
        status = None if row[0] is None else JobStatus(row[0])
        if not possible(State(status, started=row[1] or status is JobStatus.RUNNING)):
            return Changed()
    return None


def _look(conn: psycopg.Connection[Any], schema: str, act: Act, job_id: int) -> Changed:
    with conn.transaction() as look:
        changed = act(conn, schema, [job_id], wait=True)
        if changed.ids:
            return changed
        raise psycopg.Rollback(look)
    return Changed()
