"""The tests of `job.commit` are sharp: each rule is broken once, and a named test must notice."""

from __future__ import annotations

from typing import Final

import pytest
import test_commit as basics
import test_commit_connections as connections
import test_commit_lost_replies as lost
import test_commit_races as races
import test_commit_shutdown as shutdown

from tests.tools import committing
from tests.tools.commit_proxy import CommitProxy
from tests.tools.looking import rows
from tests.tools.mutants import Mutant, code, noticed, sql
from tests.tools.running import NOTES
from triojobs import _commit, _handling, _postgres
from triojobs._bridge import Breaker, Call, Line
from triojobs._commit import CommitAttempt
from triojobs._ledger import Ledger
from triojobs._sql import session, settle

DROPPED = code(
    Line,
    "run_breakable",
    ("return result.unwrap()", "await trio.lowlevel.checkpoint()\n    return result.unwrap()"),
)

MUTANTS: dict[str, Mutant] = {
    "a stale commit passes": (
        code(
            CommitAttempt,
            "run",
            ("if not self._fence(call.conn, data):", "if self._fence(call.conn, data) is None:"),
        ),
        races.test_work_that_is_overtaken_by_a_rescue_writes_nothing,
        {},
    ),
    "a transact does not hold its claim": (
        sql(settle, "HOLD_LEASE", "FOR KEY SHARE", ""),
        races.test_a_rescue_passes_over_a_commit_under_way,
        {"method": "transact"},
    ),
    "the claim is locked while work runs": (
        code(
            CommitAttempt,
            "run",
            (
                "data = self._do_work(call)\n",
                "self._fence(call.conn, None)\n        data = self._do_work(call)\n",
            ),
        ),
        races.test_work_that_is_overtaken_by_a_rescue_writes_nothing,
        {},
    ),
    "the ledger does not hear of a commit": (
        code(Ledger, "committed", ("if self._claims.get(claim.job_id) is claim:", "if False:")),
        basics.test_a_second_commit_is_stale_and_writes_nothing,
        {},
    ),
    "a settlement does not recognise what a commit has done": (
        sql(settle, "WRITTEN_BEFORE", "o.status = 'done'\n   OR ", ""),
        lost.test_when_nobody_answers_the_handler_is_told_that_it_is_not_known,
        {"happened": True},
    ),
    "a value that comes back in spite of a cancel is dropped": (
        DROPPED,
        shutdown.test_a_group_cancelled_between_commit_and_return_keeps_what_was_committed,
        {"method": "commit"},
    ),
    "a timeout drops the value that comes back": (
        DROPPED,
        races.test_a_timeout_between_commit_and_return_loses,
        {"what": "timeout"},
    ),
    "a commit is abandoned when it is cancelled": (
        code(Line, "_run_once", ("abandon_on_cancel=False", "abandon_on_cancel=True")),
        shutdown.test_a_group_cancelled_before_the_server_sees_commit_waits_for_it,
        {},
    ),
    "a cancel does not break work off": (
        code(Breaker, "break_off", ("if not call.done and not call.guarded:", "if False:")),
        shutdown.test_a_group_cancelled_while_work_runs_cancels_its_statement_on_the_server,
        {},
    ),
    "work that was cancelled between two statements commits": (
        code(Call, "unguarded", ("if unwanted:", "if False:")),
        races.test_a_cancel_while_work_is_between_two_statements_undoes_it,
        {"how": "cancel", "method": "commit"},
    ),
    "nobody looks after a COMMIT without reply": (
        code(_commit, "_outcome_of", ("while clock() + pause + SHORTEST_LOOK < deadline:", "while False:")),
        lost.test_a_commit_without_reply_that_happened_is_found,
        {},
    ),
    "a look does not wait for a commit that is under way": (
        sql(settle, "LOCK_LEASE", "FOR UPDATE", ""),
        lost.test_a_look_for_the_outcome_waits_for_a_commit_that_is_still_under_way,
        {},
    ),
    "a COMMIT without reply counts as failed": (
        code(_postgres, "commit", ('if status == "done":', "if False:")),
        lost.test_a_commit_without_reply_that_happened_is_found,
        {},
    ),
    "a COMMIT that did not happen counts as done": (
        code(_postgres, "commit", ('if status == "done":', 'if status in ("done", None):')),
        lost.test_a_commit_without_reply_that_did_not_happen_says_so,
        {"how": "cut"},
    ),
    "a commit without reply and without outcome is not told apart": (
        code(_postgres, "commit", ("if status is None:", "if False:")),
        lost.test_a_commit_without_reply_that_did_not_happen_says_so,
        {"how": "cut"},
    ),
    "who is cancelled looks as long as anybody": (
        code(
            _commit,
            "_outcome_of",
            ("deadline = min(deadline, attempt.fence_began + line.longest_call)", "pass"),
        ),
        lost.test_a_cancelled_commit_in_a_black_hole_does_not_look_when_its_time_is_used_up,
        {},
    ),
    "work is repeated": (
        code(Line, "_run_once", ("retries=0", "retries=3")),
        races.test_work_is_never_repeated_by_us,
        {"code": "40001"},
    ),
    "call_timeout bounds work": (
        code(Call, "unguarded", ("self.guarded = False", "pass")),
        connections.test_call_timeout_does_not_bound_work,
        {"where": "in the server", "pooled": False},
    ),
    "settings of ours bound work behind a pooler": (
        code(Line, "call", ("if self._pooled and not own_transaction:", "if self._pooled:")),
        connections.test_call_timeout_does_not_bound_work,
        {"where": "in the server", "pooled": True},
    ),
    "a connection is used again while a cancel is on its way": (
        code(Line, "_attempts", ("if call.breaking:", "if False:")),
        connections.test_a_cancel_that_comes_late_does_not_hit_the_next_work,
        {},
    ),
    "a connection is not restored": (
        code(Line, "_reusable", ("self._restore(conn)", "pass")),
        connections.test_the_next_work_finds_the_connection_as_it_was_opened,
        {
            "change": connections.change_session,
            "look": connections.look_at_session,
            "ends": "returns",
        },
    ),
    "a session keeps its locks": (
        sql(session, "RESTORE_JOB", "SELECT pg_advisory_unlock_all();\n", ""),
        connections.test_the_next_work_finds_the_connection_as_it_was_opened,
        {
            "change": connections.change_session,
            "look": connections.look_at_session,
            "ends": "raises",
        },
    ),
    "a row factory stays": (
        code(
            CommitAttempt,
            "_do_work",
            ("conn.row_factory, conn.cursor_factory, conn.prepare_threshold = as_opened", "pass"),
        ),
        connections.test_the_next_work_finds_the_connection_as_it_was_opened,
        {
            "change": connections.change_factories,
            "look": connections.look_at_factories,
            "ends": "raises",
        },
    ),
    "a rollback passes for a commit": (
        code(CommitAttempt, "run", ("if self.failure is not None:", "if False:")),
        basics.test_work_that_asks_for_a_rollback_has_not_committed,
        {},
    ),
    "work may end the transaction": (
        code(CommitAttempt, "_do_work", ("self._check_transaction(conn)", "pass")),
        basics.test_work_that_ends_the_transaction_itself_is_told_so,
        {"method": "transact", "statement": "COMMIT"},
    ),
    "the value is encoded after the commit": (
        code(
            CommitAttempt,
            "_do_work",
            (
                "data = None if self._encode is None else self._encode(self.value)",
                "call.on_commit(lambda: self._encode and self._encode(self.value))\n"
                "        data = None if self._encode is None else (b'\\xf6', 'cbor')",
            ),
        ),
        basics.test_a_value_that_is_no_result_of_the_queue_undoes_everything,
        {},
    ),
    "a commit for a claim that has ended runs its work": (
        code(_handling.Slots, "commit_work", ("if not self._ledger.owns(claim):", "if False:")),
        basics.test_after_its_handler_has_ended_a_job_can_write_nothing,
        {},
    ),
}


@pytest.fixture
def conninfo(database: str) -> str:
    rows(database, NOTES)
    return database


# Whether a cancel that was sent meets the next statement is up to the server: mostly it does.
UNCERTAIN: Final = frozenset({"a connection is used again while a cancel is on its way"})


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(name, marks=[pytest.mark.long] if name in UNCERTAIN else []) for name in MUTANTS],
)
async def test_a_mutant_is_noticed(
    mutant: str,
    conninfo: str,
    proxied: tuple[CommitProxy, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patch, test, values = MUTANTS[mutant]
    monkeypatch.setattr(committing, "HANG", 12.0)
    monkeypatch.setattr(committing, "LONG", 3)
    patch(monkeypatch)
    fixtures = {"conninfo": conninfo, "proxied": proxied, "monkeypatch": monkeypatch, "caplog": caplog}
    await noticed(test, **(fixtures | values))
