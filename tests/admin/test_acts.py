"""The acts by themselves: each looks where a job is, whatever the filter that named it has seen."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
from faces import every_status
from tools import SCHEMA, Connection, Group, history, place, put_one, read

from triojobs._model import JobStatus, Outcome
from triojobs._sql import operate
from triojobs._sql.cancelling import cancelling
from triojobs._sql.deleting import deleting
from triojobs._sql.editing import Changes, editing
from triojobs._sql.rescheduling import rescheduling
from triojobs._sql.retrying import retrying
from triojobs._sql.steering import Act

S = JobStatus
EVERY = frozenset(S)
ENDED = {"done", "killed", "cancelled running", "cancelled waiting"}
STATUS_OF = {
    "done": S.DONE,
    "killed": S.KILLED,
    "failed": S.FAILED,
    "cancelled running": S.CANCELLED,
    "cancelled waiting": S.CANCELLED,
    "running": S.RUNNING,
    "running again": S.RUNNING,
    "scheduled": S.PENDING,
    "scheduled again": S.PENDING,
    "ready": S.PENDING,
    "ready again": S.PENDING,
}
ACTS: dict[str, tuple[Callable[[Collection[JobStatus]], Act], set[str]]] = {
    "cancel": (
        lambda statuses: cancelling("no", statuses),
        {w for w in STATUS_OF if STATUS_OF[w] in (S.PENDING, S.FAILED, S.RUNNING)},
    ),
    "retry": (retrying, ENDED),
    "reschedule": (
        lambda statuses: rescheduling(None, 60.0, statuses),
        {w for w in STATUS_OF if STATUS_OF[w] in (S.PENDING, S.FAILED)},
    ),
    "edit": (lambda statuses: editing(Changes(priority=7)), {"scheduled", "ready"}),
    "delete": (deleting, {w for w in STATUS_OF if STATUS_OF[w] is not S.RUNNING}),
}


def jobs_everywhere(db: Connection, group: Group) -> dict[str, int]:
    """Jobs in each place, also ones that ended before and were retried."""
    jobs = every_status(db, group)
    for word in ("running again", "scheduled again", "ready again"):
        jobs[word] = put_one(db, priority=9)
        group.settle(db, group.claim(db, 1), Outcome.KILLED)
        assert operate.retry(db, SCHEMA, jobs[word])
        if word != "ready again":
            db.execute("UPDATE triojobs.ready SET priority = 9 WHERE id = %s", [jobs[word]])
            claims = group.claim(db, 1)
            assert [c.job_id for c in claims] == [jobs[word]]
            if word == "scheduled again":
                group.settle(db, claims, Outcome.SNOOZED, delay=3600.0)
    return jobs


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("status", [None, *JobStatus])
@pytest.mark.parametrize("act", ACTS)
def test_an_act_changes_what_is_where_it_can_be_changed_and_has_a_status_that_is_meant(
    db: Connection, group: Group, act: str, status: JobStatus | None, wait: bool
) -> None:
    jobs = jobs_everywhere(db, group)
    make, possible = ACTS[act]
    statuses = EVERY if status is None else {status}
    before = {word: (place(db, i), history(db, i)) for word, i in jobs.items()}
    changed = make(statuses)(db, SCHEMA, list(jobs.values()), wait=wait)
    # An edit is of jobs that have not started: there is one status of them.
    meant = possible if act == "edit" else {w for w in possible if STATUS_OF[w] in statuses}
    assert changed.ids == {jobs[word] for word in meant}
    for word, job_id in jobs.items():
        if word not in meant:
            assert (place(db, job_id), history(db, job_id)) == before[word], word


def test_the_first_reason_of_a_cancel_stays(db: Connection, group: Group) -> None:
    job_id = put_one(db)
    group.claim_one(db)
    for reason in ("first", "second"):
        changed = cancelling(reason, {S.RUNNING})(db, SCHEMA, [job_id], wait=False)
        assert changed.groups == {group.id}
    assert read(db, job_id).cancel_reason == "first"


def test_retried_jobs_keep_their_order(db: Connection, group: Group) -> None:
    ids = [put_one(db) for _ in range(20)]
    group.settle(db, group.claim(db), Outcome.KILLED)
    retrying({S.KILLED})(db, SCHEMA, ids[::-1], wait=False)
    assert [c.job_id for c in group.claim(db)] == ids
