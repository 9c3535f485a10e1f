"""The checks of steering are sharp: each fence is broken once, and a named test must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import test_acts as acts
import test_bulk as bulk
import test_pausing as pausing_tests
import test_steering as steering_tests
import test_steering_races as races
import trio
from faces import Face
from test_mutants import Check, Connect, Patch, race, template, transition
from tools import Connection, Group

import triojobs
from triojobs import _admin_steering as admin_steering
from triojobs._errors import TriojobsError
from triojobs._model import JobStatus, Outcome
from triojobs._sql import cancelling, deleting, editing, pausing, rescheduling, retrying, selecting, steering
from triojobs._sql import claim as claim_sql


def by_face(test: Callable[..., Any], *values: Any) -> Check:
    """A test of one of the admin's faces."""

    def check(connect: Connect, db: Connection) -> None:
        face = Face(triojobs.admin_on(connect()))
        trio.run(test, db, Group(db), face, *values)

    return check


def by_admin(test: Callable[..., None], *values: Any) -> Check:
    """A test of the synchronous admin."""
    return lambda connect, db: test(db, Group(db), triojobs.admin_on(connect()), *values)


def act_test(act: str, status: JobStatus | None = None) -> Check:
    return transition(
        acts.test_an_act_changes_what_is_where_it_can_be_changed_and_has_a_status_that_is_meant,
        act,
        status,
        False,
    )


def operators(first: str, second: str) -> Check:
    test = races.test_of_two_operators_at_an_ended_job_the_second_sees_what_the_first_did
    answer, where = {"retry": (True, "nowhere"), "delete": (triojobs.JobNotFoundError, "nowhere")}[first]
    return race(test, first, second, answer, where, Outcome.KILLED)


def attribute(module: Any, name: str, value: Any) -> Patch:
    return lambda patch, db: patch.setattr(module, name, value)


def every_status_is_meant(patch: pytest.MonkeyPatch, db: Connection) -> None:
    plain = admin_steering._change
    every = frozenset(JobStatus)

    def change(ids: Any, statuses: Any, act: Any, operation: str, before: Any) -> Any:
        return plain(ids, every, cancelling.cancelling("no", every), operation, before)

    patch.setattr(admin_steering, "_change", change)


def edit_reports_without_touching_the_waiting_row(patch: pytest.MonkeyPatch, db: Connection) -> None:
    patch.setattr(editing, "EDIT_WAITING", "SELECT")


NO_LEASE = "  AND NOT EXISTS (SELECT FROM {schema}.leases l WHERE l.id = i OFFSET 0)\n"
NO_READY = "  AND NOT EXISTS (SELECT FROM {schema}.ready r WHERE r.id = i OFFSET 0)\n"
NO_SCHEDULED = "  AND NOT EXISTS (SELECT FROM {schema}.scheduled s WHERE s.id = i OFFSET 0)\n"
STARTED = "AND NOT EXISTS (SELECT FROM {schema}.outcomes o WHERE o.job_id = j.id OFFSET 0)"


def held(connect: Connect, db: Connection) -> None:
    """The test of a job that is locked while its batch is changed."""
    bulk.test_a_job_that_somebody_holds_is_done_after_its_batch(db, connect, triojobs.admin_on(connect()))


PASSES = race(races.test_a_bulk_act_passes_over_what_others_hold_and_waits_for_it_holding_nothing)


def passing_over(module: Any, name: str) -> Patch:
    """The statement waits for what others hold, while it holds rows itself."""
    return lambda patch, db: patch.setattr(
        module, name, getattr(module, name).replace("FOR UPDATE SKIP LOCKED", "FOR UPDATE")
    )


MUTANTS: dict[str, tuple[Patch, Check]] = {
    "an edit leaves the waiting row as it is": (
        edit_reports_without_touching_the_waiting_row,
        race(races.test_a_claim_that_began_before_an_act_does_not_undo_it, "edit"),
    ),
    "an edit does not lock the waiting row": (
        template(editing, "LOCK_READY", ("FOR UPDATE SKIP LOCKED", "")),
        race(races.test_an_act_that_waits_for_a_claim_leaves_a_job_that_runs, "edit", True),
    ),
    "an edit does not ask whether the job has started": (
        template(editing, "EDIT_BODY", (STARTED, "")),
        act_test("edit"),
    ),
    "a bulk retry does not lock the bodies": (
        template(retrying, "LOCK_BODIES", (" FOR NO KEY UPDATE SKIP LOCKED", "")),
        race(races.test_of_two_operators_who_retry_in_bulk_one_does),
    ),
    "a bulk retry does not look among the leases": (
        template(retrying, "RETRY", (NO_LEASE, "")),
        act_test("retry"),
    ),
    "a bulk retry does not look into ready": (
        template(retrying, "RETRY", (NO_READY, "")),
        act_test("retry"),
    ),
    "a bulk retry does not look into scheduled": (
        template(retrying, "RETRY", (NO_SCHEDULED, "")),
        act_test("retry"),
    ),
    "a bulk retry takes any end": (
        template(
            retrying,
            "RETRY",
            ("o.status = ANY (%(statuses)s::text[])", "cardinality(%(statuses)s::text[]) > 0"),
        ),
        act_test("retry", JobStatus.KILLED),
    ),
    "a bulk retry does not keep the order": (
        template(retrying, "RETRY", ("ORDER BY i\n", "ORDER BY i DESC\n")),
        transition(acts.test_retried_jobs_keep_their_order),
    ),
    "a deletion does not lock the body": (
        template(deleting, "LOCK_BODIES", (" FOR UPDATE SKIP LOCKED", "")),
        operators("retry", "delete"),
    ),
    "a deletion does not look among the leases": (
        template(deleting, "GONE", (NO_LEASE, "")),
        act_test("delete"),
    ),
    "a deletion does not look into ready again": (
        template(deleting, "GONE", (NO_READY.replace("  AND", "WHERE"), "WHERE true\n")),
        operators("retry", "delete"),
    ),
    "a deletion takes any end": (
        template(deleting, "GONE", (") = ANY (%(statuses)s::text[]))", ") <> 'failed')")),
        act_test("delete", JobStatus.DONE),
    ),
    "a deletion waits for a key": (
        passing_over(deleting, "LOCK_KEYS"),
        race(races.test_a_job_deleted_beside_a_taker_of_its_key_leaves_the_key_to_him),
    ),
    "a deletion takes a key that has passed on": (
        template(deleting, "LOCK_KEYS", (" AND x.job_id = i", "")),
        by_face(steering_tests.test_a_key_that_has_passed_on_is_left_to_its_new_job),
    ),
    "a deletion leaves the attempts": (
        attribute(deleting, "DELETE_OUTCOMES", "SELECT"),
        by_admin(steering_tests.test_of_a_deleted_job_nothing_is_left, "killed"),
    ),
    "a cancel in bulk waits while it holds rows": (passing_over(cancelling, "CANCEL_WAITING"), held),
    "a cancel in bulk forgets the first reason": (
        template(cancelling, "CANCEL_RUNNING", ("coalesce(cancel_reason, %(reason)s)", "%(reason)s")),
        transition(acts.test_the_first_reason_of_a_cancel_stays),
    ),
    "a cancel in bulk locks leases against handlers": (
        template(cancelling, "CANCEL_RUNNING", ("FOR NO KEY UPDATE", "FOR UPDATE")),
        race(races.test_a_cancel_in_bulk_does_not_wait_for_a_transaction_of_the_handler),
    ),
    "a cancel in bulk takes waiting jobs of any kind": (
        template(
            cancelling,
            "CANCEL_WAITING",
            (
                "SELECT x.id FROM {schema}.ready x\n"
                "        WHERE x.id = ANY (%(ids)s::bigint[]) AND (x.attempts > 0) = ANY (%(tried)s::bool[])",
                "SELECT x.id FROM {schema}.ready x\n        WHERE x.id = ANY (%(ids)s::bigint[])",
            ),
        ),
        act_test("cancel", JobStatus.FAILED),
    ),
    "a rescheduling in bulk waits while it holds rows": (passing_over(rescheduling, "TO_SCHEDULED"), PASSES),
    "a rescheduling changes the body of a job that has started": (
        template(rescheduling, "BODY_RUN_AT", (STARTED, "")),
        by_admin(
            steering_tests.test_a_rescheduled_job_waits_where_its_time_says,
            "failed",
            {"delay": 600.0},
            "scheduled",
            600,
        ),
    ),
    "an act looks once": (
        attribute(steering, "ROUNDS", 1),
        race(races.test_an_act_that_waits_for_a_promotion_follows_the_job, "put off"),
    ),
    "what a filter found is not looked at again": (
        every_status_is_meant,
        lambda connect, db: bulk.test_a_job_that_moved_out_of_the_filter_meanwhile_is_left(db, connect),
    ),
    "what comes meanwhile is worked through too": (
        attribute(selecting, "LAST_GIVEN", "SELECT 9000000000"),
        lambda connect, db: trio.run(
            bulk.test_jobs_that_come_meanwhile_are_left, db, Face(triojobs.admin_on(connect()))
        ),
    ),
    "a claim does not look for a pause": (
        template(
            claim_sql,
            "CLAIM",
            ("AND w.queue <> ALL (ARRAY(SELECT p.queue FROM {schema}.paused_queues p))", ""),
        ),
        lambda connect, db: pausing_tests.test_a_claim_that_begins_after_the_pause_takes_nothing(db),
    ),
    "a pause does not see the claims before it": (
        template(pausing, "IN_FLIGHT", ("l.granted AND", "NOT l.granted AND")),
        race(pausing_tests.test_a_claim_with_an_older_snapshot_is_named_until_it_has_ended),
    ),
    "a pause waits for claims of other schemas": (
        template(pausing, "IN_FLIGHT", ("n.nspname = {channel} AND ", "")),
        race(pausing_tests.test_claims_of_another_schema_are_not_looked_at),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(
    mutant: str, connect: Connect, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, check = MUTANTS[mutant]
    patch(monkeypatch, db)
    # A test of a face runs an event loop, whose nursery wraps what failed in it.
    with pytest.raises((AssertionError, psycopg.Error, TriojobsError, ExceptionGroup)) as caught:
        check(connect, db)
    # A mutant must fail for what it does, not for being no SQL at all.
    cause = caught.value.__cause__ or caught.value
    assert not isinstance(cause, psycopg.errors.SyntaxErrorOrAccessRuleViolation)
