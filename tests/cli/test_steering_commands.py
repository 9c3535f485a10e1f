"""`triojobs jobs cancel`, `retry`, `reschedule`, `edit` and `delete`."""

from __future__ import annotations

from typing import Any

import pytest
from command import Command
from tools import Connection, Group, count, place, put, put_one, read

from triojobs import DatabaseError, SyncAdmin
from triojobs._admin_store import SyncAdminStore
from triojobs._model import Outcome


def test_a_job_is_cancelled_by_its_id(triojobs_: Command, db: Connection) -> None:
    job = put_one(db)
    assert triojobs_.ok("jobs", "cancel", str(job), "--reason", "a mistake") == f"cancelled job {job}\n"
    assert (read(db, job).status, read(db, job).last_error) == ("cancelled", "a mistake")


def test_a_job_that_has_ended_is_not_cancelled(triojobs_: Command, db: Connection, group: Group) -> None:
    job = put_one(db)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    line = triojobs_.refused("jobs", "cancel", str(job))
    assert line == (
        f"error: job {job} was not cancelled: only jobs that wait or run can be; "
        f"see `triojobs jobs explain {job}`"
    )


def test_one_unknown_id_stops_the_command_before_anything_is_changed(
    triojobs_: Command, db: Connection
) -> None:
    job = put_one(db)
    line = triojobs_.refused("jobs", "cancel", str(job), "998", "999")
    assert line == "error: there is no job 998, 999; nothing was changed; check the ids and the schema"
    assert read(db, job).status == "pending"


def test_what_a_filter_names_is_counted_and_asked_for(triojobs_: Command, db: Connection) -> None:
    put(db, 3)
    other = put_one(db, queue="other")
    done = triojobs_("jobs", "cancel", "--queue", "q", input="y\n")
    assert (done.exit_code, done.stdout) == (0, "cancelled 3 job(s)\n")
    assert "cancel 3 job(s)? [y/N]" in done.stderr
    assert read(db, other).status == "pending"


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "perhaps\n"])
def test_without_a_yes_nothing_is_changed(triojobs_: Command, db: Connection, answer: str) -> None:
    put(db, 3)
    done = triojobs_("jobs", "delete", "--queue", "q", input=answer)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nothing was changed" in done.stderr.splitlines()[-1]
    assert count(db, "jobs") == 3


def test_with_yes_nobody_is_asked(triojobs_: Command, db: Connection) -> None:
    put(db, 3)
    done = triojobs_("jobs", "delete", "--queue", "q", "--yes", input="")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "deleted 3 job(s)\n", "")
    assert count(db, "jobs") == 0


def test_ids_and_a_filter_hold_together(triojobs_: Command, db: Connection) -> None:
    mine, other = put_one(db), put_one(db, queue="other")
    assert (
        triojobs_.ok("jobs", "cancel", str(mine), str(other), "--queue", "q", "--yes")
        == "cancelled 1 job(s)\n"
    )
    assert (read(db, mine).status, read(db, other).status) == ("cancelled", "pending")


@pytest.mark.parametrize("act", ["cancel", "retry", "reschedule", "delete"])
def test_without_ids_and_filter_no_job_is_meant(triojobs_: Command, db: Connection, act: str) -> None:
    job = put_one(db)
    assert "name jobs" in triojobs_.refused("jobs", act, "--yes", code=2)
    assert read(db, job).status == "pending"


def test_a_filter_of_retry_says_which_statuses(triojobs_: Command, db: Connection, group: Group) -> None:
    done, killed = put(db, 2)
    first, second = sorted(group.claim(db), key=lambda claim: claim.job_id)
    group.settle(db, first, Outcome.DONE)
    group.settle(db, second, Outcome.KILLED, error="no")
    assert "--status killed" in triojobs_.refused("jobs", "retry", "--queue", "q", "--yes", code=2)
    assert triojobs_.ok("jobs", "retry", "--status", "killed", "--yes") == "retried 1 job(s)\n"
    assert (read(db, done).status, read(db, killed).status) == ("done", "pending")
    assert triojobs_.ok("jobs", "retry", str(done)) == f"retried job {done}\n"


def test_reschedule_puts_off_and_hurries(triojobs_: Command, db: Connection) -> None:
    job = put_one(db)
    assert triojobs_.ok("jobs", "reschedule", str(job), "--delay", "1h30m") == f"rescheduled job {job}\n"
    assert place(db, job)[0] == "scheduled"
    triojobs_.ok("jobs", "reschedule", str(job))
    assert place(db, job)[0] == "ready"
    triojobs_.ok("jobs", "reschedule", str(job), "--run-at", "2100-01-01T00:00Z")
    assert read(db, job).run_at.year == 2100


def test_edit_changes_what_has_not_started(triojobs_: Command, db: Connection, group: Group) -> None:
    job = put_one(db)
    triojobs_.ok("jobs", "edit", str(job), "--priority", "7", "--max-attempts", "2")
    assert (read(db, job).priority, read(db, job).max_attempts) == (7, 2)
    group.claim_one(db)
    assert "only jobs that have not started" in triojobs_.refused("jobs", "edit", str(job), "--priority", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "1"], "say what to change"),
        (["edit", "1", "--priority", "-1"], "--priority"),
        (["reschedule", "1", "--delay", "1h", "--run-at", "2100-01-01T00:00Z"], "give one of them"),
        (["reschedule", "1", "--delay", "1 fortnight"], "is not a duration"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(triojobs_: Command, arguments: list[str], words: str) -> None:
    assert words in triojobs_.refused("jobs", *arguments, code=2)


def test_a_filter_that_matches_nothing_is_no_failure(triojobs_: Command, db: Connection) -> None:
    put_one(db)
    text = triojobs_.ok("jobs", "cancel", "--queue", "q", "--status", "failed")
    assert text == "no job matches that can be cancelled; nothing was changed\n"


def test_an_unknown_queue_is_told_before_anybody_is_asked(triojobs_: Command) -> None:
    assert "there is no queue 'nowhere'" in triojobs_.refused("jobs", "cancel", "--queue", "nowhere")


def test_some_of_several_ids_that_cannot_be_changed_fail_the_command(
    triojobs_: Command, db: Connection, group: Group
) -> None:
    ended = put_one(db)
    group.settle(db, group.claim_one(db), Outcome.DONE)
    waiting = put_one(db)
    line = triojobs_.refused("jobs", "cancel", str(ended), str(waiting))
    assert line.startswith("error: cancelled 1 of 2 jobs; the others were left")
    assert read(db, waiting).status == "cancelled"


def test_an_interrupted_bulk_act_says_how_far_it_came(
    triojobs_: Command, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(db, 1200)
    real = SyncAdmin.cancel_many

    def interrupted(self: SyncAdmin, *arguments: Any, progress: Any, **options: Any) -> Any:
        def told(result: Any) -> None:
            progress(result)
            if not options.get("dry_run") and result.touched >= 500:
                raise KeyboardInterrupt

        return real(self, *arguments, progress=told, **options)

    monkeypatch.setattr(SyncAdmin, "cancel_many", interrupted)
    done = triojobs_("jobs", "cancel", "--queue", "q", "--yes")
    assert done.exit_code == 130
    assert "interrupted: cancelled 500 job(s)" in done.stderr
    assert count(db, "ready") == 700


def test_an_error_in_the_middle_says_how_much_had_been_changed(
    triojobs_: Command, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(db, 1200)
    real = SyncAdminStore.run
    batches = 0

    def failing(self: SyncAdminStore, step: Any) -> Any:
        nonlocal batches
        batches += step.operation.startswith("cancelling")
        if batches == 2:
            raise DatabaseError("the server has gone", operation="cancelling")
        return real(self, step)

    monkeypatch.setattr(SyncAdminStore, "run", failing)
    line = triojobs_.refused("jobs", "cancel", "--queue", "q", "--yes")
    assert line == "error: while cancelling: the server has gone; 500 job(s) had been changed before"
    assert count(db, "ready") == 700
