"""`triojobs prune`."""

from __future__ import annotations

import pytest
from command import Command
from tools import Connection, Group, count, put

from triojobs._model import Outcome

LET_HAVE_ENDED = """
WITH old AS (
    UPDATE triojobs.jobs SET enqueued_at = now() - make_interval(days => %(days)s) WHERE queue = %(queue)s
    RETURNING id
)
UPDATE triojobs.outcomes SET finished_at = now() - make_interval(days => %(days)s)
WHERE job_id IN (SELECT id FROM old)
"""


def ended(db: Connection, group: Group, jobs: int, *, days: int, queue: str = "q") -> None:
    """Let jobs have been enqueued, and have ended, so many days ago."""
    put(db, jobs, queue=queue)
    group.settle(db, group.claim(db, jobs, queue=queue), Outcome.DONE)
    db.execute(LET_HAVE_ENDED, {"days": days, "queue": queue})


def test_old_jobs_go_after_a_yes(triojobs_: Command, db: Connection, group: Group) -> None:
    ended(db, group, 3, days=8)
    done = triojobs_("prune", input="y\n")
    assert (done.exit_code, done.stdout) == (0, "went: 3 job(s), 0 key(s), 0 closed group(s)\n")
    assert "remove 3 job(s)? [y/N]" in done.stderr
    assert count(db, "jobs") == 0


def test_without_a_yes_nothing_goes(triojobs_: Command, db: Connection, group: Group) -> None:
    ended(db, group, 3, days=8)
    done = triojobs_("prune", input="")
    assert done.exit_code == 1
    assert "nothing was changed" in done.stderr
    assert count(db, "jobs") == 3


def test_a_dry_run_says_what_would_go(triojobs_: Command, db: Connection, group: Group) -> None:
    ended(db, group, 3, days=8)
    assert triojobs_.ok("prune", "--dry-run") == "would go: 3 job(s), 0 key(s), 0 closed group(s)\n"
    assert triojobs_.json("prune", "--dry-run") == [
        {"ranges": 0, "moved": 0, "jobs": 3, "groups": 0, "keys": 0, "postponed": 0}
    ]
    assert count(db, "jobs") == 3


def test_a_queue_may_keep_its_jobs_for_longer(triojobs_: Command, db: Connection, group: Group) -> None:
    ended(db, group, 2, days=8, queue="mail")
    ended(db, group, 1, days=8, queue="audit")
    ended(db, group, 1, days=3, queue="young")
    triojobs_.ok("prune", "--keep", "done=5d", "--keep", "audit:done=forever", "--yes")
    left = db.execute("SELECT queue FROM triojobs.jobs ORDER BY queue").fetchall()
    assert left == [("audit",), ("young",)]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("7d", "is not [QUEUE:]STATUS=DURATION"),
        ("running=7d", "is not [QUEUE:]STATUS=DURATION"),
        ("done=a week", "is not a duration such as"),
        ("done=", "is not a duration such as"),
    ],
)
def test_what_is_no_rule_is_wrong_usage(
    triojobs_: Command, db: Connection, group: Group, keep: str, words: str
) -> None:
    ended(db, group, 1, days=8)
    assert words in triojobs_.refused("prune", "--yes", "--keep", keep, code=2)
    assert count(db, "jobs") == 1
