"""A settle that is repeated because its reply was lost."""

from __future__ import annotations

import pytest
from tools import SCHEMA, Connection, Group, ended, put_one

from triojobs._model import Outcome, Settled
from triojobs._sql import groups, operate
from triojobs._sql.settle import settle


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED, Outcome.KILLED])
def test_finds_what_the_first_has_written(db: Connection, outcome: Outcome) -> None:
    put_one(db)
    group = Group(db)
    batch = [ended(group.claim_one(db), outcome, error=None if outcome is Outcome.DONE else "why")]
    settle(db, SCHEMA, group.id, batch)

    written, queues = settle(db, SCHEMA, group.id, batch)

    assert written == [Settled(batch[0].job_id, batch[0].claim_no, outcome)]
    assert queues == set()


def test_finds_the_cancellation_that_the_first_has_written(db: Connection) -> None:
    job_id = put_one(db)
    group = Group(db)
    batch = [ended(group.claim_one(db), Outcome.RELEASED)]
    operate.cancel(db, SCHEMA, job_id, "enough")
    settle(db, SCHEMA, group.id, batch)

    written, _ = settle(db, SCHEMA, group.id, batch)

    assert written == [Settled(job_id, batch[0].claim_no, Outcome.CANCELLED)]


def test_does_not_take_a_rescuers_failure_for_its_own(db: Connection) -> None:
    put_one(db)
    group = Group(db)
    batch = [ended(group.claim_one(db), Outcome.FAILED, error="why")]
    group.lapse(db)
    groups.rescue(db, SCHEMA)

    assert settle(db, SCHEMA, group.id, batch) == ([], set())
