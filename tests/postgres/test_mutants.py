"""The checks are sharp: each rule of the SQL is broken once, and a named test must notice.

A mutant is a changed template or function; the test is the one of the other files, called here and
expected to fail. A mutant that survives means a rule that nobody guards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
import pytest
import test_races as races
import test_transitions as transitions
from tools import Connection, Group

from triojobs._errors import TriojobsError
from triojobs._model import Outcome
from triojobs._sql import claim as claim_sql
from triojobs._sql import groups as groups_sql
from triojobs._sql import operate, session
from triojobs._sql import settle as settle_sql

Connect = Callable[[], Connection]
Patch = Callable[[pytest.MonkeyPatch, Connection], None]
Check = Callable[[Connect, Connection], None]


def changed(text: str, *changes: tuple[str, str]) -> str:
    """Replace parts of a text; each must be there, or the mutant would be the original."""
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def template(module: Any, name: str, *changes: tuple[LiteralString, LiteralString]) -> Patch:
    """A mutant of one statement."""
    return lambda patch, db: patch.setattr(module, name, changed(getattr(module, name), *changes))


def function(name: str, *changes: tuple[str, str]) -> Patch:
    """A mutant of one function of the schema."""

    def apply(patch: pytest.MonkeyPatch, db: Connection) -> None:
        row = db.execute("SELECT pg_get_functiondef(%s::regproc)", [f"triojobs.{name}"]).fetchone()
        assert row is not None
        db.execute(changed(row[0], *changes))  # type: ignore[call-overload]

    return apply


def with_settings(mutate: Patch, **settings: str) -> Patch:
    """A mutant on sessions that plan otherwise than ours, whose plans happen to hide a missing order."""

    def apply(patch: pytest.MonkeyPatch, db: Connection) -> None:
        values = "".join(f", ('{name}', '{value}')" for name, value in settings.items())
        ours = "('enable_seqscan', 'off')"
        more = values.removeprefix(", ") if "enable_seqscan" in settings else ours + values
        patch.setattr(session, "PREPARE", changed(session.PREPARE, (ours, more)))
        mutate(patch, db)

    return apply


def race(test: Callable[..., None], *values: Any) -> Check:
    """A test of two actors."""
    return lambda connect, db: test(connect, db, *values)


def transition(test: Callable[..., None], *values: Any) -> Check:
    """A test of one transition."""
    return lambda connect, db: test(db, Group(db), *values)


def close_in_one_statement(patch: pytest.MonkeyPatch, db: Connection) -> None:
    patch.setattr(groups_sql, "LOCK_GROUP", "SELECT 1")
    patch.setattr(groups_sql, "CLOSE_GROUP", "SELECT 1")
    lock = "SELECT id FROM {schema}.worker_groups WHERE id = %(id)s FOR UPDATE"
    close = "UPDATE {schema}.worker_groups SET closed_at = clock_timestamp() WHERE id IN (SELECT id FROM me)"
    one = changed(
        groups_sql.RELEASE_ALL,
        ("WITH ended", f"WITH me AS MATERIALIZED ({lock}), closing AS ({close}), ended"),
        ("WHERE group_id = %(id)s", "WHERE group_id = %(id)s AND EXISTS (SELECT FROM me)"),
    )
    patch.setattr(groups_sql, "RELEASE_ALL", one)


def retry_in_one_statement(patch: pytest.MonkeyPatch, db: Connection) -> None:
    patch.setattr(operate, "LOCK_BODY", changed(operate.LOCK_BODY, (" FOR NO KEY UPDATE", "")))
    body = "SELECT * FROM {schema}.jobs WHERE id = %(id)s FOR NO KEY UPDATE"
    one = "WITH body AS MATERIALIZED (" + body + ")" + operate.RETRY
    patch.setattr(operate, "RETRY", changed(one, ("FROM {schema}.jobs j", "FROM body j")))


def batches_as_they_come(patch: pytest.MonkeyPatch, db: Connection) -> None:
    patch.setattr(settle_sql, "sorted", lambda batch, key: list(batch), raising=False)


SET_READY = (
    "SET priority = replace_job.priority, run_at = replace_job.run_at,"
    " max_attempts = replace_job.max_attempts\n"
)
READY_IS_UPDATED = f"""        UPDATE triojobs.ready r
        {SET_READY}        WHERE r.id = replace_job.job_id;
"""
CLAIM_WAITS = race(races.test_a_comparison_waits_for_a_late_claim_and_releases_its_rows)
CLOSE_WAITS = race(races.test_close_waits_for_an_open_claim_and_sweeps_what_it_took)
SETTLE_AND_CLOSE = races.test_settle_and_close_do_not_lock_leases_in_different_orders
TWO_SETTLES = races.test_two_settles_of_the_same_claims_lock_them_in_one_order


def of_a_settlement(name: str, outcome: Outcome) -> dict[str, tuple[Patch, Check]]:
    """The mutants of one of the two statements: of the one for `done` alone, and of the other, which is tried next."""

    def settle(old: str) -> Patch:
        return template(settle_sql, name, (old, ""))

    matches = transitions.test_a_settle_matches_job_group_and_claim
    mutants: dict[str, tuple[Patch, Check]] = {
        "does not lock its group": (
            with_settings(settle(" FOR KEY SHARE"), enable_seqscan="on"),
            race(SETTLE_AND_CLOSE, outcome),
        ),
        "does not refer to the lock on its group": (
            with_settings(settle("      AND EXISTS (SELECT FROM me)\n"), enable_seqscan="on"),
            race(SETTLE_AND_CLOSE, outcome),
        ),
        "locks leases as its batch comes": (
            with_settings(batches_as_they_come, enable_mergejoin="off", enable_hashjoin="off"),
            race(TWO_SETTLES, outcome),
        ),
        "does not look at the claim": (
            settle("l.claim_no = a.claim_no AND"),
            transition(matches, "claim_no"),
        ),
        "does not look at the group": (
            settle("AND l.group_id = %(group_id)s"),
            transition(matches, "group"),
        ),
    }
    return {f"a settle ({name}) {what}": mutant for what, mutant in mutants.items()}


MUTANTS: dict[str, tuple[Patch, Check]] = {
    **of_a_settlement("SETTLE", Outcome.KILLED),
    **of_a_settlement("SETTLE_DONE", Outcome.DONE),
    "close in one statement": (close_in_one_statement, CLOSE_WAITS),
    "close locks by a plain UPDATE": (
        template(
            groups_sql,
            "LOCK_GROUP",
            ("SELECT epoch FROM {schema}.worker_groups", "UPDATE {schema}.worker_groups SET epoch = epoch"),
            ("FOR UPDATE", ""),
        ),
        CLOSE_WAITS,
    ),
    "a claim deletes without asking for its group": (
        template(
            claim_sql,
            "CLAIM",
            ("        WHERE EXISTS (SELECT FROM me)\n          AND EXISTS (", "        WHERE EXISTS ("),
            ("    FROM taken t\n)", "    FROM taken t WHERE EXISTS (SELECT FROM me)\n)"),
        ),
        transition(transitions.test_a_claim_that_is_not_entitled_takes_nothing_and_deletes_nothing, "epoch"),
    ),
    "a claim does not ask for its witness": (
        template(
            claim_sql,
            "CLAIM",
            ("AND EXISTS (SELECT FROM {schema}.witnesses s WHERE s.group_id = %(group_id)s)", ""),
        ),
        transition(
            transitions.test_a_claim_that_is_not_entitled_takes_nothing_and_deletes_nothing, "witness"
        ),
    ),
    "a claim does not lock its group": (
        template(claim_sql, "CLAIM", ("    FOR KEY SHARE\n", "")),
        CLAIM_WAITS,
    ),
    "a claim does not look at the epoch": (
        template(claim_sql, "CLAIM", ("epoch = %(epoch)s", "%(epoch)s::int IS NOT NULL")),
        race(races.test_a_claim_that_waits_for_a_comparison_takes_nothing),
    ),
    "a claim does not look whether the group is closed": (
        template(claim_sql, "CLAIM", ("AND closed_at IS NULL", "")),
        race(races.test_a_claim_that_waits_for_a_close_takes_nothing),
    ),
    "a claim waits for rows of others": (
        template(claim_sql, "CLAIM", ("FOR UPDATE SKIP LOCKED", "FOR UPDATE")),
        race(races.test_a_claim_passes_over_rows_of_an_open_claim_and_finds_them_when_it_is_rolled_back),
    ),
    "a claim joins the body": (
        template(claim_sql, "CLAIM", ("LEFT JOIN LATERAL", "JOIN LATERAL")),
        transition(transitions.test_a_missing_body_comes_out_as_a_row_without_payload),
    ),
    "a comparison does not raise the epoch": (
        template(groups_sql, "RAISE_EPOCH", ("epoch + 1", "epoch")),
        race(races.test_a_comparison_waits_for_a_late_claim_and_releases_its_rows),
    ),
    "a comparison knows claims by their job alone": (
        template(groups_sql, "RELEASE_STRAYS", (" AND k.claim_no = l.claim_no", "")),
        transition(transitions.test_a_comparison_tells_claims_of_one_job_apart),
    ),
    "a comparison does not look for outcomes": (
        template(groups_sql, "MISSING", ("AND o.group_id = %(id)s", "AND false")),
        transition(transitions.test_a_comparison_misses_known_claims_without_lease_and_outcome),
    ),
    "a comparison does not look for leases": (
        template(groups_sql, "MISSING", ("AND l.group_id = %(id)s", "AND false")),
        transition(transitions.test_a_comparison_misses_known_claims_without_lease_and_outcome),
    ),
    "a comparison leaves the group without its witness": (
        template(groups_sql, "TESTIFY", (" VALUES (%(id)s)", " SELECT %(id)s WHERE false")),
        transition(transitions.test_a_comparison_misses_known_claims_without_lease_and_outcome),
    ),
    "a rescue waits for groups": (
        template(groups_sql, "LOCK_LAPSED", ("FOR UPDATE SKIP LOCKED", "FOR UPDATE")),
        race(races.test_rescue_passes_over_a_group_with_an_open_claim_and_takes_it_next_time),
    ),
    "a rescue locks groups as a beat does": (
        template(groups_sql, "LOCK_LAPSED", ("FOR UPDATE SKIP", "FOR NO KEY UPDATE SKIP")),
        race(races.test_rescue_passes_over_a_group_with_an_open_claim_and_takes_it_next_time),
    ),
    "a rescue waits for a running commit": (
        template(groups_sql, "RESCUE", ("FOR UPDATE OF x SKIP LOCKED", "FOR UPDATE OF x")),
        race(races.test_rescue_passes_over_a_running_commit_and_finds_the_job_if_it_is_rolled_back, True),
    ),
    "a rescue takes from the lapsed only": (
        template(
            groups_sql, "RESCUE", ("WHERE g.id IS NULL OR g.closed_at IS NOT NULL", "WHERE g.id IS NULL")
        ),
        transition(transitions.test_rescue_finds_leases_under_a_closed_or_missing_group, "closed"),
    ),
    "a settle does not look for a cancel": (
        template(
            settle_sql, "SETTLE", ("THEN a.outcome ELSE 'cancelled' END", "THEN a.outcome ELSE a.outcome END")
        ),
        race(races.test_a_settle_that_waits_for_a_cancel_sees_it, Outcome.FAILED),
    ),
    "a snooze counts": (
        template(settle_sql, "SETTLE", ("WHEN e.outcome = 'snoozed' THEN 1", "WHEN e.outcome = '' THEN 1")),
        transition(transitions.test_snoozed_waits_and_the_attempt_is_not_counted),
    ),
    "a retry in one statement": (
        retry_in_one_statement,
        race(races.test_of_two_operators_who_retry_a_job_one_does, True),
    ),
    "a retry does not count up the generation of its key": (
        template(operate, "HOLD_KEY", ("THEN 1 ELSE 0", "THEN 0 ELSE 0")),
        race(races.test_a_taker_that_looked_before_a_retry_looks_again),
    ),
    "a retry does not look into scheduled": (
        template(operate, "RETRY", ("AND NOT EXISTS (SELECT FROM {schema}.scheduled WHERE id = %(id)s)", "")),
        transition(transitions.test_retry_of_a_job_that_has_not_ended_is_false, "scheduled"),
    ),
    "a cancel looks once": (
        lambda patch, db: patch.setattr(operate, "ROUNDS", 1),
        race(races.test_a_cancel_that_waits_for_a_settle_follows_the_job, Outcome.FAILED, None),
    ),
    "a replacement only locks the waiting row": (
        function("replace_job", (READY_IS_UPDATED, "NULL;\n")),
        race(races.test_a_claim_that_began_before_a_replacement_never_runs_the_old_body),
    ),
    "a replacement does not look for a lease": (
        function(
            "replace_job",
            ("OR EXISTS (SELECT FROM triojobs.leases l WHERE l.id = replace_job.job_id)", ""),
            ("IF place IS NULL THEN\n        RETURN NULL;\n    END IF;", ""),
        ),
        race(races.test_a_replacement_that_waits_for_a_claim_reports_what_became_of_it, True),
    ),
    "a taker of a key does not match its generation": (
        function("enqueue_keyed", ("AND k.generation = seen", "")),
        race(races.test_a_taker_that_looked_before_a_retry_looks_again),
    ),
    "a taker of a key does not match its holder": (
        function("enqueue_keyed", ("AND k.job_id = holder AND k.generation = seen", "")),
        race(races.test_a_taker_that_looked_before_another_one_took_the_key_looks_again, "ended"),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(
    mutant: str, connect: Connect, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, check = MUTANTS[mutant]
    patch(monkeypatch, db)
    with pytest.raises((AssertionError, psycopg.Error, TriojobsError)) as caught:
        check(connect, db)
    # A mutant must fail for what it does, not for being no SQL at all.
    assert not isinstance(caught.value, psycopg.errors.SyntaxErrorOrAccessRuleViolation)
