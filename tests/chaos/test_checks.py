"""The checks are sharp: each violation, put into a healthy made-up history, is noticed by the check that is
meant for it and by no other than the ones named here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.chaos.checks import CHECKS, verify
from tests.chaos.history import (
    Cancel,
    Effect,
    Enqueue,
    Group,
    History,
    JobRow,
    Outage,
    Outcome,
    Report,
    Run,
    Step,
    Stop,
)

LEASE_ENDED = "rescued: the lease of worker group g1 ended"
PLAIN, FLAKY, DOOMED, KILLS, SLOW, SNOOZES, COMMITS, FOLLOW_UP, TRANSACTS, WAITED, TAKEN, DIED, CRASHED = (
    range(1, 14)
)
KINDS = {
    PLAIN: "plain",
    FLAKY: "flaky",
    DOOMED: "doomed",
    KILLS: "kills",
    SLOW: "times_out",
    SNOOZES: "snoozes",
    COMMITS: "commits",
    FOLLOW_UP: "plain",
    TRANSACTS: "transacts",
    WAITED: "plain",  # cancelled while it waited for its second attempt
    TAKEN: "long",  # its process was stopped beyond its lease
    DIED: "plain",  # its process was killed
    CRASHED: "plain",  # the server was away for longer than the lease
}


def token(job: int) -> str:
    return "t7.follow" if job == FOLLOW_UP else f"t{job}"


def result(job: int, attempt: int) -> dict[str, object]:
    return {"token": token(job), "attempt": attempt}


class Story:
    """Builds a history: each call adds a run and, unless it was given back, the outcome of its claim."""

    def __init__(self) -> None:
        self.history = History(
            groups={f"g{n}": Group(f"worker-{n}", 0.0) for n in (1, 2, 3)},
            stops=[Stop("worker-1", 100.0, 105.0)],
            kills={"worker-2": 200.0},
            outages=[Outage(300.0, 304.0)],
        )
        self._claims = 0
        for job, kind in KINDS.items():
            self.history.jobs[job] = JobRow(job, token(job), 2 if kind == "doomed" else 40)
            if job != FOLLOW_UP:
                self.history.enqueues[token(job)] = Enqueue("many", "enqueued", job)

    def ran(
        self,
        job: int,
        at: float,
        how: str | None,
        status: str | None,
        *,
        attempt: int = 1,
        group: str = "g3",
        until: float | None = None,
        error: str | None = None,
    ) -> Run:
        """Add a run that ended `how`, and its outcome `status`; None: it was given back."""
        self._claims += 1
        words = f"{token(job)} fails at attempt {attempt}" if how in ("failed", "kill") else ""
        run = Run(
            job=job,
            group=group,
            claim_no=self._claims,
            attempt=attempt,
            token=token(job),
            kind=KINDS[job],
            process=self.history.groups[group].process,
            began=at,
            ended=None if how is None else (at + 1 if until is None else until),
            how=how,
            raised="RuntimeError" if how == "failed" else "",
            error=words,
        )
        self.history.runs.append(run)
        if status is not None:
            made = result(job, attempt) if status == "done" else None
            self.history.outcomes.append(
                Outcome(job, group, run.claim_no, attempt, status, error or words or None, made)
            )
        return run


def healthy() -> History:
    """One job of each kind, and one of each thing that happens to jobs."""
    story = Story()
    history = story.history
    story.ran(PLAIN, 1, "returned", "done")
    story.ran(FLAKY, 1, "failed", "failed")
    story.ran(FLAKY, 3, "returned", "done", attempt=2)
    story.ran(DOOMED, 1, "failed", "failed")
    story.ran(DOOMED, 3, "failed", "killed", attempt=2)
    story.ran(KILLS, 1, "kill", "killed")
    story.ran(SLOW, 1, "interrupted", "failed", error="timed out after 0.2 s")
    story.ran(SLOW, 3, "returned", "done", attempt=2)
    story.ran(SNOOZES, 1, "snooze", None)
    story.ran(SNOOZES, 3, "returned", "done")
    commit = story.ran(COMMITS, 1, "returned", "done")
    commit.committing = commit.committed = True
    story.ran(FOLLOW_UP, 3, "returned", "done")
    transact = story.ran(TRANSACTS, 1, "failed", "failed")
    transact.transacted = True
    story.ran(TRANSACTS, 3, "returned", "done", attempt=2)
    story.ran(WAITED, 1, "failed", "failed")
    history.cancels = [
        Cancel(WAITED, 3.0, answer=True, answered=3.1),
        Cancel(PLAIN, 5.0, answer=False, answered=5.1),
    ]
    history.outcomes.append(Outcome(WAITED, None, None, 1, "cancelled", "chaos"))
    taken = story.ran(TAKEN, 99, "interrupted", "failed", group="g1", until=105.1, error=LEASE_ENDED)
    taken.steps = [Step(99.9, 105.05)]
    story.ran(TAKEN, 103.5, "returned", "done", attempt=2, until=106)
    story.ran(DIED, 199, None, "failed", group="g2", error=LEASE_ENDED)
    story.ran(DIED, 204, "returned", "done", attempt=2)
    story.ran(CRASHED, 299, "interrupted", "failed", until=302, error=LEASE_ENDED)
    story.ran(CRASHED, 306, "returned", "done", attempt=2)
    history.effects = [
        Effect(COMMITS, commit.group, commit.claim_no, "commits"),
        Effect(TRANSACTS, transact.group, transact.claim_no, "transacts"),
    ]
    history.enqueues[token(PLAIN)].form = "outbox"
    history.orders = [token(PLAIN)]
    history.enqueues["rolled back"] = Enqueue("outbox", "undone")
    history.enqueues["no reply"] = Enqueue("single", "unknown")
    done = sum(outcome.group == "g3" and outcome.status == "done" for outcome in history.outcomes)
    history.reports = [
        Report(
            "worker-3",
            {"done": done, "failed": 5, "killed": 2, "cancelled": 0, "snoozed": 1},
            0,
            [],
            0,
            ["g3"],
        )
    ]
    history.left = {"worker-3": []}
    return history


def run_of(history: History, job: int, attempt: int = 1) -> Run:
    return [run for run in history.runs if run.job == job][attempt - 1]


def outcome_of(history: History, job: int, attempt: int = 1) -> Outcome:
    return [outcome for outcome in history.outcomes if outcome.job == job][attempt - 1]


def test_a_healthy_history_has_nothing_wrong() -> None:
    findings = verify(healthy())
    assert findings.wrong == {}
    assert findings.jobs == len(KINDS)
    assert (findings.overlaps_stopped, findings.duplicates) == (1, 3)
    assert findings.statuses == {"done": 10, "killed": 2, "cancelled": 1}


Break = Callable[[History], None]
CASES: list[tuple[str, set[str], Break]] = []


def case(*checks: str) -> Callable[[Break], Break]:
    """Register a violation and the checks that must notice it."""

    def register(break_it: Break) -> Break:
        CASES.append((break_it.__name__, set(checks), break_it))
        return break_it

    return register


@case("lost")
def a_committed_job_has_no_row(history: History) -> None:
    history.enqueues["gone"] = Enqueue("thread", "enqueued", 99)


@case("lost", "ghosts")
def a_committed_job_has_another_id(history: History) -> None:
    history.jobs[99] = JobRow(99, "t1", 40)
    history.outcomes.append(Outcome(99, None, None, 0, "cancelled", "chaos"))
    del history.jobs[PLAIN]


@case("lost")
def a_job_is_nowhere(history: History) -> None:
    history.jobs[99] = JobRow(99, "no reply", 40)


@case("lost")
def a_job_waits_for_ever(history: History) -> None:
    history.jobs[99] = JobRow(99, "no reply", 40)
    history.places.append((99, "ready"))


@case("lost")
def a_job_is_leased_to_the_dead(history: History) -> None:
    history.outcomes.remove(outcome_of(history, DIED, 2))
    history.runs.remove(run_of(history, DIED, 2))
    history.reports.clear()
    history.places.append((DIED, "leases"))


@case("lost")
def a_job_that_is_done_waits_again(history: History) -> None:
    history.places.append((PLAIN, "ready"))


@case("ghosts", "torn")
def a_rolled_back_job_exists(history: History) -> None:
    history.jobs[99] = JobRow(99, "rolled back", 40)
    history.outcomes.append(Outcome(99, None, None, 0, "cancelled", "chaos"))


@case("ghosts")
def a_job_that_nobody_enqueued_exists(history: History) -> None:
    history.jobs[99] = JobRow(99, "from nowhere", 40)
    history.outcomes.append(Outcome(99, None, None, 0, "cancelled", "chaos"))


@case("ghosts")
def an_enqueue_made_two_jobs(history: History) -> None:
    history.jobs[99] = JobRow(99, token(FLAKY), 40)
    history.outcomes.append(Outcome(99, None, None, 0, "cancelled", "chaos"))


@case("ghosts")
def a_handler_ran_for_another_jobs_payload(history: History) -> None:
    run_of(history, PLAIN).token = "t2"
    outcome_of(history, PLAIN).result = {"token": "t2", "attempt": 1}


@case("ghosts")
def an_outcome_has_no_body(history: History) -> None:
    history.outcomes.append(Outcome(99, None, None, 0, "cancelled", "chaos"))


@case("torn")
def an_order_was_committed_without_its_job(history: History) -> None:
    history.orders.append("rolled back")


@case("torn")
def a_job_was_committed_without_its_order(history: History) -> None:
    history.orders.clear()


@case("double_outcomes", "attempts")
def a_claim_has_two_outcomes(history: History) -> None:
    history.outcomes.insert(0, replace(outcome_of(history, DOOMED, 2)))


@case("double_outcomes", "attempts", "reports")
def a_job_is_done_twice(history: History) -> None:
    other = replace(outcome_of(history, PLAIN), group="g2", claim_no=99)
    history.outcomes.append(other)
    history.outcomes.remove(outcome_of(history, FLAKY, 2))
    history.outcomes.append(Outcome(FLAKY, None, None, 1, "cancelled", "chaos"))
    history.runs.remove(run_of(history, FLAKY, 2))


@case("overlaps")
def two_handlers_of_a_healthy_process_overlap(history: History) -> None:
    run_of(history, FLAKY, 1).ended = 3.5


@case("overlaps")
def a_handler_began_before_the_stop_had_ended_the_lease(history: History) -> None:
    run_of(history, TAKEN, 2).began = 100.5


@case("overlaps")
def a_handler_overlaps_though_its_process_was_not_stopped(history: History) -> None:
    history.stops[0].process = "worker-3"
    history.kills["worker-1"] = 106.0  # the rescue itself is excused


@case("overlaps", "unexcused")
def a_handler_overlaps_long_after_the_stop(history: History) -> None:
    history.stops[0] = Stop("worker-1", 90.0, 95.0)


@case("overlaps")
def a_handler_overlaps_whose_group_registered_after_the_stop(history: History) -> None:
    history.groups["g1"].since = 103.0


@case("past_checkpoint")
def a_handler_goes_on_after_the_stop(history: History) -> None:
    run_of(history, TAKEN).steps.append(Step(105.05, 105.06))


@case("contradictions", "reports")
def a_handler_that_returned_was_given_back(history: History) -> None:
    history.outcomes.remove(outcome_of(history, SLOW, 2))
    run_of(history, SLOW, 2).began = 2.5
    outcome = Outcome(SLOW, None, None, 1, "cancelled", "chaos")
    history.outcomes.append(outcome)


@case("contradictions")
def a_handler_that_failed_is_done(history: History) -> None:
    run_of(history, PLAIN).how = "failed"
    run_of(history, PLAIN).raised = "RuntimeError"


@case("contradictions")
def a_snoozed_attempt_was_counted(history: History) -> None:
    run_of(history, FLAKY).how = "snooze"


@case("contradictions")
def an_interrupted_attempt_was_counted(history: History) -> None:
    run_of(history, FLAKY).how = "interrupted"


@case("contradictions")
def a_stale_commit_is_done(history: History) -> None:
    run_of(history, PLAIN).how = "stale"


@case("contradictions", "effects")
def a_committed_job_was_rescued(history: History) -> None:
    run = run_of(history, DIED)
    run.kind, run.committing, run.committed = "commits", True, True


@case("contradictions", "reports")
def a_job_without_a_timeout_timed_out(history: History) -> None:
    outcome_of(history, CRASHED).error = "timed out after 1 s"


@case("contradictions")
def a_result_is_another_attempts(history: History) -> None:
    outcome_of(history, FLAKY, 2).result = result(FLAKY, 1)


@case("contradictions")
def an_error_is_another_attempts(history: History) -> None:
    outcome_of(history, DOOMED, 2).error = outcome_of(history, DOOMED, 1).error


@case("contradictions", "overlaps")
def a_handler_outlives_everything(history: History) -> None:
    del history.kills["worker-2"]
    history.outages.append(Outage(199.5, 200.0))


@case("contradictions", "reports")
def a_running_job_is_cancelled_unasked(history: History) -> None:
    run_of(history, SLOW, 1).how = "interrupted"
    outcome_of(history, SLOW, 1).status = "cancelled"
    outcome_of(history, SLOW, 1).error = "chaos"
    history.outcomes.remove(outcome_of(history, SLOW, 2))
    history.runs.remove(run_of(history, SLOW, 2))


@case("unexcused")
def a_job_of_a_healthy_process_is_rescued(history: History) -> None:
    history.outages.clear()


@case("unexcused")
def a_handler_that_had_ended_long_before_the_kill_is_rescued(history: History) -> None:
    run = run_of(history, DIED)
    run.how, run.began, run.ended = "returned", 150.0, 151.0


@case("unexcused")
def a_handler_that_began_after_the_kill_is_rescued(history: History) -> None:
    run_of(history, DIED).began = 201.0


@case("ran_after_the_end")
def a_job_runs_after_it_was_done(history: History) -> None:
    history.runs.append(replace(run_of(history, FLAKY, 2), claim_no=99, began=50.0, ended=51.0, how="snooze"))


@case("attempts")
def an_attempt_is_missing(history: History) -> None:
    for record in (run_of(history, FLAKY, 2), outcome_of(history, FLAKY, 2)):
        record.attempt = 3
    outcome_of(history, FLAKY, 2).result = result(FLAKY, 3)


@case("attempts", "contradictions")
def an_outcome_counts_another_attempt_than_its_handler(history: History) -> None:
    run_of(history, FLAKY, 2).attempt = 3


@case("attempts")
def a_snooze_costs_an_attempt(history: History) -> None:
    run_of(history, SNOOZES, 1).attempt = 3


@case("attempts")
def a_wait_that_was_cancelled_counts_too_much(history: History) -> None:
    outcome_of(history, WAITED, 2).attempt = 2


@case("attempts", "wrong_ends")
def a_job_is_given_up_early(history: History) -> None:
    run, outcome = run_of(history, SLOW, 2), outcome_of(history, SLOW, 2)
    run.how, run.raised, run.error, outcome.status, outcome.error = (
        "failed",
        "RuntimeError",
        "x",
        "killed",
        "x",
    )
    history.reports.clear()


@case("attempts")
def a_job_gets_more_attempts_than_it_may(history: History) -> None:
    history.jobs[DOOMED].max_attempts = 1


@case("wrong_ends", "contradictions", "reports")
def a_job_that_always_fails_is_done(history: History) -> None:
    outcome_of(history, DOOMED, 2).status = "done"


@case("cancels")
def a_job_runs_again_after_it_was_cancelled(history: History) -> None:
    history.cancels.append(Cancel(FLAKY, 2.5, answer=True, answered=2.6))
    history.runs.append(replace(run_of(history, FLAKY, 1), claim_no=99, began=2.7, ended=2.8, how="snooze"))


@case("cancels")
def a_cancelled_job_is_killed(history: History) -> None:
    history.cancels.append(Cancel(DOOMED, 0.5, answer=True, answered=10.0))


@case("cancels")
def cancel_says_that_a_job_had_ended_which_runs_again(history: History) -> None:
    history.cancels.append(Cancel(FLAKY, 2.5, answer=False, answered=2.6))


@case("effects")
def an_effect_was_lost(history: History) -> None:
    del history.effects[0]


@case("effects")
def an_effect_happened_twice(history: History) -> None:
    history.effects.append(replace(history.effects[0], claim_no=99))


@case("effects", "lost")
def a_follow_up_was_lost(history: History) -> None:
    history.jobs[FOLLOW_UP].token = "no reply"
    history.places.append((FOLLOW_UP, "scheduled"))
    history.runs.remove(run_of(history, FOLLOW_UP))


@case("effects")
def a_transaction_of_a_handler_was_lost(history: History) -> None:
    del history.effects[1]


@case("effects")
def a_transaction_of_a_handler_happened_twice(history: History) -> None:
    history.effects.append(history.effects[1])


@case("reports")
def a_group_counts_what_it_did_not_do(history: History) -> None:
    history.reports[0].settled["done"] += 1


@case("reports")
def a_group_leaves_a_job_behind_without_naming_it(history: History) -> None:
    history.left["worker-3"] = [PLAIN]


@case("failures")
def a_worker_ends_by_itself(history: History) -> None:
    history.failures.append("worker-3 ended by itself with 1")


@case("failures")
def a_handler_raises_what_it_should_not(history: History) -> None:
    run_of(history, FLAKY).raised = "NameError"


@pytest.mark.parametrize(("checks", "break_it"), [pytest.param(c, b, id=name) for name, c, b in CASES])
def test_each_violation_is_noticed(checks: set[str], break_it: Break) -> None:
    history = healthy()
    break_it(history)
    assert set(verify(history).wrong) == checks


def test_each_check_has_a_violation_of_its_own() -> None:
    alone = {next(iter(checks)) for _, checks, _ in CASES if len(checks) == 1}
    assert {check.__name__ for check in CHECKS} - alone == {"double_outcomes", "wrong_ends"}


def test_a_stop_within_the_lease_excuses_no_overlap() -> None:
    history = healthy()
    history.stops = [Stop("worker-1", 102.5, 103.6)]
    assert "overlaps" in verify(history).wrong


def test_what_was_claimed_before_a_stop_and_begins_after_it_is_excused() -> None:
    history = healthy()
    late = run_of(history, TAKEN)
    late.began, late.steps = 105.05, []
    findings = verify(history)
    assert findings.wrong == {}
    assert findings.overlaps_stopped == 1
