"""Why a job does not run now: each reason from tables that are as it says."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import replace
from typing import Any

import pytest
from faces import Face, every_status, serve
from tools import SCHEMA, Connection, Group, put, put_one

import triojobs
from triojobs import Reason
from triojobs._explanation import AHEAD_LIMIT, Facts, explained
from triojobs._model import Outcome
from triojobs._sql import groups, operate, pausing


async def test_an_unknown_job_is_named(face: Face) -> None:
    with pytest.raises(triojobs.JobNotFoundError) as caught:
        await face("explain", 4711)
    assert caught.value.job_id == 4711


async def test_an_ended_job_says_how_it_ended(db: Connection, group: Group, face: Face) -> None:
    jobs = every_status(db, group)
    for word, text in (
        ("done", "it ended as done at "),
        ("killed", "(boom)"),
        ("cancelled running", "(enough)"),
        ("cancelled waiting", "(never)"),
    ):
        found = await face("explain", jobs[word])
        assert (found.reason, found.ahead, found.until) == (Reason.ENDED, None, None)
        assert text in found.text
        assert found.remedy == "retry it to run it again"
        assert found.group == (None if word == "cancelled waiting" else group.id)


async def test_an_ended_job_whose_key_has_passed_on_says_that_it_cannot_be_retried(
    db: Connection, group: Group, face: Face
) -> None:
    first = put_one(db, key="k", hold="ended")
    group.settle(db, group.claim(db), Outcome.KILLED)
    assert (await face("explain", first)).remedy == "retry it to run it again"
    second = put_one(db, key="k", hold="ended")
    assert f"its key is held by job {second} now" in (await face("explain", first)).remedy


async def test_a_running_job_says_where_since_when_and_which_attempt(
    db: Connection, group: Group, face: Face
) -> None:
    job_id = put_one(db, max_attempts=3)
    group.claim_one(db)
    found = await face("explain", job_id)
    assert (found.reason, found.status, found.group) == (Reason.RUNNING, "running", group.id)
    assert found.text.startswith("it runs at test (localhost) since ")
    assert found.text.endswith(" UTC, attempt 1 of 3")
    operate.cancel(db, SCHEMA, job_id, "too slow")
    found = await face("explain", job_id)
    assert found.reason is Reason.CANCELLING
    assert "its cancellation was asked for (too slow)" in found.text


async def test_a_job_of_a_dead_group_waits_to_be_rescued(db: Connection, face: Face) -> None:
    lapsed, closed, gone = Group(db), Group(db), Group(db)
    ids = []
    for group in (lapsed, closed, gone):
        ids.append(put_one(db))
        group.claim_one(db)
    lapsed.lapse(db)
    db.execute("UPDATE triojobs.worker_groups SET closed_at = now() WHERE id = %s", [closed.id])
    db.execute("DELETE FROM triojobs.worker_groups WHERE id = %s", [gone.id])
    found = [await face("explain", job_id) for job_id in ids]
    assert {each.reason for each in found} == {Reason.GROUP_LOST}
    assert "whose lease ended at" in found[0].text
    assert "which has closed" in found[1].text
    assert "a group that is gone" in found[2].text


async def test_a_job_that_is_not_due_says_until_when(db: Connection, group: Group, face: Face) -> None:
    jobs = every_status(db, group)
    found = await face("explain", jobs["scheduled"])
    assert (found.reason, found.ahead) == (Reason.NOT_DUE, None)
    assert found.until - dt.datetime.now(dt.UTC) == pytest.approx(
        dt.timedelta(hours=1), abs=dt.timedelta(minutes=5)
    )
    assert f"{found.until:%Y-%m-%d %H:%M:%S} UTC" in found.text
    found = await face("explain", jobs["failed"])
    assert (found.reason, found.status) == (Reason.WAITING_FOR_RETRY, "failed")
    assert found.text.startswith("attempt 1 of 5 failed (oops); the next one is due at ")
    pausing.pause(db, SCHEMA, "q", "x")
    found = await face("explain", jobs["scheduled"])
    assert found.reason is Reason.NOT_DUE
    assert found.text.endswith("; besides, queue 'q' is paused")


async def test_a_paused_queue_is_the_reason(db: Connection, face: Face) -> None:
    serve(db, q=1)
    job_id = put_one(db)
    pausing.pause(db, SCHEMA, "q", "maintenance")
    found = await face("explain", job_id)
    assert found.reason is Reason.QUEUE_PAUSED
    assert found.text.endswith("(maintenance)")
    assert found.remedy == "resume the queue"
    assert str(found) == f"job {job_id}: {found.text}; {found.remedy}"


async def test_no_living_group_serves_the_queue(db: Connection, face: Face) -> None:
    serve(db, other=5)
    serve(db, q=5, lease_duration=1e-6)
    groups.close_group(db, SCHEMA, serve(db, q=5).id)
    pausing.drain(db, SCHEMA, serve(db, q=5).id, "deploy")
    job_id = put_one(db)
    found = await face("explain", job_id)
    assert found.reason is Reason.NO_GROUP
    assert found.text == "no living worker group serves queue 'q' (1 that did drain)"
    serve(db, q=1)
    assert (await face("explain", job_id)).reason is Reason.IN_LINE


async def test_all_slots_are_busy_and_so_many_jobs_come_first(db: Connection, face: Face) -> None:
    group = serve(db, q=2, other=3)
    put(db, 2)
    group.claim(db)
    first = put_one(db)
    urgent = put_one(db, priority=5)
    last = put_one(db)
    put_one(db, priority=9, queue="other")
    found = {job_id: await face("explain", job_id) for job_id in (first, urgent, last)}
    assert {each.reason for each in found.values()} == {Reason.SLOTS_BUSY}
    assert [found[job_id].ahead for job_id in (urgent, first, last)] == [0, 1, 2]
    assert found[last].text == "all 2 slot(s) of 1 group(s) are busy, and 2 job(s) are claimed before it"


@pytest.mark.parametrize(("cap", "reason"), [(3, Reason.SLOTS_BUSY), (4, Reason.IN_LINE)])
async def test_slots_that_the_cap_of_a_group_leaves_unused_are_not_free(
    db: Connection, face: Face, cap: int, reason: Reason
) -> None:
    group = serve(db, concurrency=cap, q=2, other=3)
    put(db, 3, queue="other")
    group.claim(db, queue="other")
    assert (await face("explain", put_one(db))).reason is reason


async def test_slots_of_several_groups_count(db: Connection, face: Face) -> None:
    busy = serve(db, q=1)
    put_one(db)
    busy.claim_one(db)
    job_id = put_one(db)
    assert (await face("explain", job_id)).reason is Reason.SLOTS_BUSY
    serve(db, q=3)
    found = await face("explain", job_id)
    assert (found.reason, found.ahead) == (Reason.IN_LINE, 0)
    assert found.text == "3 of 4 slot(s) are free, and 0 job(s) are claimed before it"


async def test_a_job_that_has_become_due_waits_to_be_moved_into_line(db: Connection, face: Face) -> None:
    serve(db, q=1)
    job_id = put_one(db, delay=60.0)
    db.execute("UPDATE triojobs.scheduled SET run_at = now() - interval '1 s'")
    found = await face("explain", job_id)
    assert (found.reason, found.ahead) == (Reason.IN_LINE, None)
    assert found.text.startswith("it is due since ")


async def test_a_group_that_does_not_say_what_it_serves_may_serve_the_queue(
    db: Connection, group: Group, face: Face
) -> None:
    found = await face("explain", put_one(db))
    assert found.reason is Reason.IN_LINE
    assert found.text.startswith("a group of an older version may serve queue 'q'")


async def test_a_passed_deadline_is_mentioned(db: Connection, face: Face) -> None:
    job_id = put_one(db, deadline=dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.UTC))
    found = await face("explain", job_id)
    assert found.text.endswith("; its deadline passed at 2024-05-06 07:08:09 UTC: whoever claims it kills it")


# Decisions that need no tables.

NOW = dt.datetime(2024, 1, 1, 12, 0, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
CLAIMABLE = Facts(
    job_id=7,
    now=NOW,
    queue="q",
    status="pending",
    attempts=0,
    max_attempts=5,
    run_at=NOW - HOUR,
    last_error=None,
    finished_at=None,
    claimed_at=None,
    deadline=None,
    cancel_reason=None,
    group_id=None,
    group_name=None,
    group_host=None,
    group_lease_until=None,
    group_closed_at=None,
    paused_at=None,
    pause_reason=None,
    key=None,
    key_holder=None,
    in_line=True,
    ahead=0,
    groups=1,
    slots=1,
    free=1,
    draining=0,
    silent=0,
)
OBSTACLES: list[tuple[Reason, dict[str, Any]]] = [
    (Reason.NOWHERE, {"status": None}),
    (Reason.NOT_DUE, {"run_at": NOW + HOUR}),
    (Reason.QUEUE_PAUSED, {"paused_at": NOW - HOUR}),
    (Reason.NO_GROUP, {"groups": 0, "slots": 0, "free": 0}),
    (Reason.SLOTS_BUSY, {"free": 0}),
    (Reason.IN_LINE, {}),
]


@pytest.mark.parametrize("first", range(len(OBSTACLES)))
def test_the_first_obstacle_is_the_reason(first: int) -> None:
    """Whatever stands in the way besides."""
    facts = CLAIMABLE
    for _, changes in reversed(OBSTACLES[first:]):
        facts = replace(facts, **changes)
    assert explained(facts).reason is OBSTACLES[first][0]


def test_a_job_is_due_at_its_time_and_not_before() -> None:
    assert explained(replace(CLAIMABLE, run_at=NOW)).reason is Reason.IN_LINE
    later = NOW + dt.timedelta(microseconds=1)
    assert explained(replace(CLAIMABLE, run_at=later)).reason is Reason.NOT_DUE


def test_a_long_line_is_not_counted_to_its_end() -> None:
    assert "and 10000 or more job(s)" in explained(replace(CLAIMABLE, ahead=AHEAD_LIMIT)).text


def test_of_a_long_error_the_beginning_of_its_first_line_is_shown() -> None:
    facts = replace(CLAIMABLE, status="killed", last_error="x" * 300 + "\nTraceback", finished_at=NOW)
    assert explained(facts).text == "it ended as killed at 2024-01-01 12:00:00 UTC (" + "x" * 200 + "…)"


def test_a_deadline_of_a_job_that_has_ended_does_not_matter() -> None:
    facts = replace(CLAIMABLE, status="done", deadline=NOW - HOUR, finished_at=NOW, group_id=uuid.uuid4())
    assert "deadline" not in explained(facts).text
