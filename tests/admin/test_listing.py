"""Lists of jobs: what a line says, and how pages follow each other."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from faces import Face, every_status
from tools import SCHEMA, Connection, Group, put, put_one

import triojobs
from triojobs import JobFilter, JobStatus
from triojobs._model import Outcome
from triojobs._sql import inspect, selecting

STATUS_OF = {
    "done": "done",
    "killed": "killed",
    "failed": "failed",
    "cancelled running": "cancelled",
    "running": "running",
    "cancelled waiting": "cancelled",
    "scheduled": "pending",
    "ready": "pending",
}


def ids(page: triojobs.Page[triojobs.JobSummary]) -> list[int]:
    return [each.id for each in page.items]


async def test_each_status_finds_its_jobs_newest_first(db: Connection, group: Group, face: Face) -> None:
    jobs = every_status(db, group)
    for status in JobStatus:
        expected = sorted((i for word, i in jobs.items() if STATUS_OF[word] == status), reverse=True)
        page = await face("jobs", JobFilter(status=status))
        assert (ids(page), page.next) == (expected, None)
        assert {each.status for each in page.items} == {status}


async def test_a_line_says_what_the_tables_say(db: Connection, group: Group, face: Face) -> None:
    deadline = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
    jobs = every_status(db, group, priority=7, max_attempts=3, metadata='{"tenant": 7}', deadline=deadline)
    page = await face("jobs")
    raw = {job.id: job for job in inspect.read_jobs(db, SCHEMA, list(jobs.values()))}
    assert set(ids(page)) == set(raw)
    for line in page.items:
        job = raw[line.id]
        assert (line.queue, line.status, line.attempts, line.max_attempts) == (
            "q",
            job.status,
            job.attempts,
            3,
        )
        assert (line.priority, line.metadata, line.key, line.deadline) == (7, {"tenant": 7}, None, deadline)
        assert (line.group, line.error, line.cancel_reason) == (job.group_id, job.last_error, None)
        assert (line.enqueued_at, line.run_at) == (job.enqueued_at, job.run_at)
        assert (line.claimed_at, line.finished_at) == (job.claimed_at, job.finished_at)


def test_a_line_shows_the_reason_for_which_a_running_job_shall_end(
    db: Connection, group: Group, admin: triojobs.SyncAdmin
) -> None:
    job_id = put_one(db)
    group.claim_one(db)
    with triojobs.SyncClient(db.info.dsn) as client:
        client.cancel(job_id, reason="too slow")
    (line,) = admin.jobs(JobFilter(status="running")).items
    assert (line.id, line.cancel_reason) == (job_id, "too slow")


def test_a_line_shows_the_beginning_of_a_long_error(
    db: Connection, group: Group, admin: triojobs.SyncAdmin
) -> None:
    put_one(db)
    group.settle(db, group.claim_one(db), Outcome.KILLED, error="ä" * 4000)
    (line,) = admin.jobs().items
    assert line.error == "ä" * 500


# Pages.


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("limit", [1, 3, 7, 100])
async def test_pages_hold_every_job_once_and_in_order(
    db: Connection, face: Face, limit: int, newest_first: bool
) -> None:
    expected = sorted(put(db, 21), reverse=newest_first)
    found: list[int] = []
    after: str | None = None
    while True:
        page = await face("jobs", limit=limit, after=after, newest_first=newest_first)
        assert len(page.items) <= limit
        found += ids(page)
        if page.next is None:
            break
        after = page.next
    assert found == expected


def test_jobs_enqueued_meanwhile_do_not_disturb_a_list(db: Connection, admin: triojobs.SyncAdmin) -> None:
    before = put(db, 6)
    first = admin.jobs(limit=3)
    put(db, 4)
    second = admin.jobs(limit=10, after=first.next)
    assert ids(first) + ids(second) == sorted(before, reverse=True)


def test_a_list_of_nothing_is_an_empty_page(admin: triojobs.SyncAdmin) -> None:
    assert admin.jobs() == triojobs.Page((), None)
    assert admin.jobs(JobFilter(ids=[1, 2, 3])) == triojobs.Page((), None)
    assert admin.jobs(JobFilter(ids=[])) == triojobs.Page((), None)


def test_a_search_that_takes_long_hands_over_what_it_has(
    db: Connection, admin: triojobs.SyncAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(db, 10)
    put_one(db, queue="rare")
    put(db, 10)
    monkeypatch.setattr(selecting, "CHEAP_SLICE", 4)
    monkeypatch.setattr("triojobs._admin_steps.SEARCH_TIME", 0.0)
    pages = []
    after: str | None = None
    while not pages or after is not None:
        pages.append(admin.jobs(JobFilter(queue="rare"), after=after))
        after = pages[-1].next
    assert [len(page.items) for page in pages] == [0, 0, 1, 0, 0, 0]


def test_what_was_found_late_in_one_slice_is_handed_over_with_the_rest(
    db: Connection, admin: triojobs.SyncAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = [put_one(db, queue="rare") for _ in range(4) if put(db, 5)]
    monkeypatch.setattr(selecting, "CHEAP_SLICE", 4)
    page = admin.jobs(JobFilter(queue="rare"))
    assert (ids(page), page.next) == (rare[::-1], None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("which", {"queue": "q"}),
        ("limit", 0),
        ("limit", 1001),
        ("after", 7),
        ("after", "seven"),
        ("after", "-"),
        ("after", "٣"),
        ("after", "9" * 19),
    ],
)
async def test_what_no_list_can_mean_is_refused(face: Face, field: str, value: Any) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        await face("jobs", **{field: value})
    assert caught.value.field == field


def test_what_ended_lately_is_found_however_old_its_job_is(
    admin: triojobs.SyncAdmin, db: Connection, group: Group
) -> None:
    jobs = put(db, 5)
    group.settle(db, group.claim(db), Outcome.DONE)
    db.execute("UPDATE triojobs.outcomes SET finished_at = finished_at - interval '2 days'")
    since = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    assert admin.jobs(JobFilter(finished_since=since)).items == ()
    for job in (jobs[1], jobs[3]):
        admin.retry(job)
    group.settle(db, group.claim(db), Outcome.DONE)
    waiting = put(db, 2)
    for newest_first in (True, False):
        found = [
            job.id for job in admin.jobs(JobFilter(finished_since=since), newest_first=newest_first).items
        ]
        assert found == sorted([jobs[1], jobs[3]], reverse=newest_first)
    ended_before = JobFilter(finished_until=since, finished_since=since - dt.timedelta(days=9))
    assert {job.id for job in admin.jobs(ended_before).items} == {*jobs} - {jobs[1], jobs[3], *waiting}
