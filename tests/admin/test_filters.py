"""What a filter finds is compared with what its words say of the rows."""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from faces import all_pages, every_status
from tools import SCHEMA, Connection, Group, put, put_one

import triojobs
from triojobs import JobFilter, JobStatus
from triojobs._model import Outcome, RawJob
from triojobs._sql import enqueue, inspect, operate, selecting


class Population:
    """Jobs of every kind, in two queues, with keys, metadata and times spread over days."""

    def __init__(self, db: Connection, seed: int) -> None:
        self.rng = random.Random(seed)
        group = Group(db)
        for n in range(6):
            options: dict[str, Any] = {"metadata": json.dumps({"n": n % 3, "deep": {"a": [1, 2]}})}
            every_status(db, group, queue=self.rng.choice("ab"), **options)
        for queue in "ab":
            for key in ("k1", "k2"):
                put_one(db, queue=queue, key=key, hold="ended", priority=50)
                group.settle(db, group.claim(db, 1, queue=queue), Outcome.DONE)
        # One that was killed twice, and one that was retried and waits.
        for times in (2, 1):
            job_id = put_one(db, queue="a", priority=100)
            for _ in range(times):
                group.settle(db, group.claim(db, 1, queue="a"), Outcome.KILLED, error="boom")
                assert operate.retry(db, SCHEMA, job_id)
            if times == 2:
                group.settle(db, group.claim(db, 1, queue="a"), Outcome.KILLED, error="boom")
        self._spread(db)
        stored = [row[0] for row in db.execute("SELECT id FROM triojobs.jobs ORDER BY id")]
        self.jobs: list[RawJob] = sorted(inspect.read_jobs(db, SCHEMA, stored), key=lambda job: job.id)
        self.start = min(job.enqueued_at for job in self.jobs)

    def _spread(self, db: Connection) -> None:
        """Let each job be enqueued an hour after the one before it, and ended 90 minutes later."""
        db.execute(
            "UPDATE triojobs.jobs SET enqueued_at = enqueued_at - interval '10 days' + id * interval '1 h'"
        )
        db.execute(
            "UPDATE triojobs.outcomes o SET finished_at = j.enqueued_at + interval '90 min'"
            " FROM triojobs.jobs j WHERE j.id = o.job_id"
        )

    def some_time(self) -> dt.datetime:
        return self.start + dt.timedelta(hours=self.rng.randrange(-2, len(self.jobs) + 4))

    def some_filter(self) -> JobFilter:
        rng = self.rng
        wishes: dict[str, Callable[[], Any]] = {
            "ids": lambda: rng.sample(range(1, len(self.jobs) + 10), 8),
            "queue": lambda: rng.choice("abc"),
            "key": lambda: rng.choice(["k1", "k2", "k3"]),
            "status": lambda: rng.sample(list(JobStatus), rng.randrange(1, 7)),
            "metadata": lambda: rng.choice(
                [{"n": 1}, {"deep": {"a": [2]}}, {"n": 1, "deep": {}}, {"x": 0}, {}]
            ),
            "enqueued_since": self.some_time,
            "enqueued_until": self.some_time,
            "finished_since": self.some_time,
            "finished_until": self.some_time,
        }
        chosen = rng.sample(list(wishes), rng.choice([1, 1, 1, 2, 2, 3]))
        return JobFilter(**{name: wishes[name]() for name in chosen})


def contains(whole: Any, part: Any) -> bool:
    """Tell what `@>` tells for the values that are used here."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contains(w, p) for w in whole) for p in part)
    return bool(whole == part)


def matches(job: RawJob, which: JobFilter) -> bool:
    """Tell whether everything that the filter says holds of the job."""
    finished = job.finished_at
    return (
        (which.ids is None or job.id in which.ids)
        and (which.queue is None or job.queue == which.queue)
        and (which.key is None or job.key == which.key)
        and job.status in which.statuses
        and (which.metadata is None or contains(job.metadata, which.metadata))
        and (which.enqueued_since is None or job.enqueued_at >= which.enqueued_since)
        and (which.enqueued_until is None or job.enqueued_at < which.enqueued_until)
        and (which.finished_since is None or (finished is not None and finished >= which.finished_since))
        and (which.finished_until is None or (finished is not None and finished < which.finished_until))
    )


@pytest.mark.parametrize(("slice_size", "seed"), [(3, 0), (3, 1), (10_000, 2), (10_000, 3), (10_000, 4)])
def test_a_filter_finds_what_its_words_say(
    db: Connection,
    admin: triojobs.SyncAdmin,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    slice_size: int,
) -> None:
    monkeypatch.setattr(selecting, "SLICE", slice_size)
    monkeypatch.setattr(selecting, "CHEAP_SLICE", slice_size)
    population = Population(db, seed)
    hits = 0
    for _ in range(80):
        which = population.some_filter()
        expected = [job.id for job in population.jobs if matches(job, which)]
        hits += bool(expected)
        newest_first = population.rng.random() < 0.5
        found = all_pages(admin, which, limit=population.rng.choice([1, 4, 1000]), newest_first=newest_first)
        assert found == (expected[::-1] if newest_first else expected), which
    assert hits > 20


def test_a_job_whose_id_was_reserved_before_its_neighbours_came_is_found_by_its_time(
    db: Connection, admin: triojobs.SyncAdmin
) -> None:
    early = put_one(db)
    db.execute("UPDATE triojobs.jobs SET enqueued_at = now() - interval '3 h'")
    (reserved,) = enqueue.new_job_ids(db, SCHEMA, 1)
    others = put(db, 40)
    db.execute("UPDATE triojobs.jobs SET enqueued_at = now() - interval '50 min' WHERE id > %s", [reserved])
    put_one(db, job_id=reserved)
    now = dt.datetime.now(dt.UTC)
    assert all_pages(admin, JobFilter(enqueued_since=now - dt.timedelta(minutes=5))) == [reserved]
    assert all_pages(admin, JobFilter(enqueued_until=now - dt.timedelta(minutes=5))) == [*others[::-1], early]


BAD_FILTERS: list[tuple[str, Any]] = [
    ("queue", ""),
    ("queue", "x" * 256),
    ("queue", 7),
    ("key", "x" * 1025),
    ("status", "lost"),
    ("status", ["done", 3]),
    ("status", []),
    ("status", 7),
    ("metadata", [1]),
    ("metadata", {"x": object()}),
    ("metadata", {"x": "\0"}),
    ("ids", 7),
    ("ids", "seven"),
    ("ids", ["7"]),
    ("ids", [True]),
    ("ids", [2**63]),
    ("ids", range(10_001)),
    ("enqueued_since", dt.datetime(2024, 1, 1)),
    ("enqueued_until", "2024-01-01"),
    ("finished_since", 0),
    ("finished_until", dt.datetime(9500, 1, 1, tzinfo=dt.UTC)),
]


@pytest.mark.parametrize(("field", "value"), BAD_FILTERS)
def test_a_filter_that_cannot_be_meant_is_refused_by_field_value_and_limit(field: str, value: Any) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        JobFilter(**{field: value})
    assert caught.value.field == field
    assert caught.value.limit
