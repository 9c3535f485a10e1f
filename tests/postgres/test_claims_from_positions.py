"""Under an old snapshot a claim from a position does not walk over the dead rows at the head; and its races."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from plans import explain, recorded
from tools import SCHEMA, Connection, Group, open_session, put_one

from triojobs import _positions
from triojobs._model import Claim
from triojobs._positions import Positions
from triojobs._sql import claim as claim_sql

FILL = """
WITH n AS (SELECT n FROM generate_series(1, 30000) n), body AS (
    INSERT INTO triojobs.jobs (id, queue, payload, run_at) SELECT n, 'q', 'x', now() FROM n
)
INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
SELECT n, 'q', n % 3, now() - interval '1 h' + n * interval '1 ms', 0, 5 FROM n
"""


@pytest.fixture(autouse=True)
def few_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_positions, "MANY", 1)


class Walker:
    """A session that claims from positions."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.group = Group(conn)
        self.positions = Positions(1000.0)
        self.claim_no = 0

    def options(self, want: int) -> dict[str, Any]:
        self.claim_no += 1
        return {
            "group_id": self.group.id,
            "epoch": self.group.epoch,
            "claim_no": self.claim_no,
            "wants": {"q": want},
            "starts": self.positions.starts(["q"], 0.0),
        }

    def claim(self, want: int, *, head: bool = False) -> list[Claim]:
        if head:
            self.positions.forget_all()
        options = self.options(want)
        claims = claim_sql.claim(self.conn, SCHEMA, **options)
        self.positions.claimed(options["wants"], options["starts"], claims, sent=0.0, now=0.0)
        return claims

    def pages(self, want: int) -> int:
        """How many pages finding the rows of the next claim reads."""
        (statement,) = recorded(self.conn, claim_sql.claim, SCHEMA, **self.options(want))
        plan = explain(self.conn, statement)
        return sum(
            n["Shared Hit Blocks"] + n["Shared Read Blocks"]
            for n in plan.nodes("Index", Index_Name="ready_order")
        )


def test_dead_rows_at_the_head_are_not_walked_over(database: str, db: Connection) -> None:
    db.execute(FILL)
    with psycopg.connect(database) as old, open_session(database, prepare_threshold=None) as mine:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT count(*) FROM triojobs.ready")  # holds every dead row from here on
        walker = Walker(mine)
        for _ in range(12):
            walker.claim(2000)
        db.execute("VACUUM triojobs.ready")
        behind = walker.pages(100)
        walker.positions.forget_all()
        from_the_head = walker.pages(100)
    assert from_the_head > 500  # 24,000 dead rows
    assert behind < 50


def test_a_commit_that_comes_late_is_found_from_the_head(database: str, db: Connection) -> None:
    """Its time is that of its statement; claims have gone past it when it becomes visible."""
    walker = Walker(db)
    with psycopg.connect(database) as slow:
        late = put_one(slow)
        early = [put_one(db) for _ in range(6)]
        assert [c.job_id for c in walker.claim(2)] == early[:2]
        slow.commit()
    assert [c.job_id for c in walker.claim(2)] == early[2:4]
    assert [c.job_id for c in walker.claim(2, head=True)] == [late, early[4]]


def test_a_row_that_somebody_held_locked_is_found_from_the_head(database: str, db: Connection) -> None:
    walker = Walker(db)
    ids = [put_one(db) for _ in range(6)]
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM triojobs.ready WHERE id = %s FOR UPDATE", [ids[0]])
        assert [c.job_id for c in walker.claim(2)] == ids[1:3]
    assert [c.job_id for c in walker.claim(1)] == ids[3:4]
    assert [c.job_id for c in walker.claim(2, head=True)] == [ids[0], ids[4]]


def test_no_row_is_locked_that_is_not_taken(database: str, db: Connection) -> None:
    walker = Walker(db)
    ids = [put_one(db, priority=n % 3) for n in range(30)]
    walker.claim(3)
    with db.transaction():
        taken = {c.job_id for c in walker.claim(5)}
        with psycopg.connect(database) as other:
            free = {
                job_id
                for (job_id,) in other.execute(
                    "SELECT id FROM triojobs.ready FOR UPDATE SKIP LOCKED"
                ).fetchall()
            }
    assert len(taken) == 5
    assert len(free) == len(ids) - 3 - 5
    assert not free & taken
