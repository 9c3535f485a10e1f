"""What must hold in the rows after a run behind the gate."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import psycopg

import triojobs

from .gate_program import OPTIONS, PATIENCE, Boom, Program

SLACK: Final = 10.0  # seconds beyond the bound, for a machine that does other things as well


def violations(program: Program, db: psycopg.Connection[Any]) -> list[str]:
    """Return "name: what" for everything that does not hold after a run."""
    return [
        f"{check.__name__.strip('_').replace('_', '-')}: {what}"
        for check in CHECKS
        for what in check(program, db)
    ]


def _no_row_running(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    yield from (f"job {job_id}" for (job_id,) in db.execute("SELECT id FROM triojobs.leases"))


def _group_closed(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rows = db.execute("SELECT id FROM triojobs.worker_groups WHERE closed_at IS NULL")
    yield from (str(group_id) for (group_id,) in rows)


def _done_iff_returned(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rows = {
        (job_id, group_id, claim_no): status
        for job_id, group_id, claim_no, status in db.execute(
            "SELECT job_id, group_id, claim_no, status FROM triojobs.outcomes"
        )
    }
    rescued = _rescued(program, db)
    for run in program.runs:
        found = rows.pop((run.job_id, *run.fence), None)
        expected = "failed" if (run.job_id, *run.fence) in rescued else run.status
        if found != expected:
            yield f"job {run.job_id}: the handler {run.ended} (committed {run.committed}), the row says {found}"
    yield from (f"{key} {status}, which no handler ran" for key, status in rows.items() if key not in rescued)


def _rescued(program: Program, db: psycopg.Connection[Any]) -> set[Any]:
    """Return job and fence of each claim that a rival took from the group; only one mode has one."""
    if program.mode != "retire":
        return set()
    query = "SELECT job_id, group_id, claim_no FROM triojobs.outcomes WHERE error LIKE 'rescued:%'"
    return set(db.execute(query).fetchall())


def _attempts_exact(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rows = db.execute(
        "SELECT s.id, s.attempts, count(o.no) FROM triojobs.job_status s"
        " LEFT JOIN triojobs.outcomes o ON o.job_id = s.id GROUP BY s.id, s.attempts"
    )
    yield from (f"job {job_id}: {said} said, {made} made" for job_id, said, made in rows if said != made)


def _commits_exact(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    row = db.execute(
        "SELECT (SELECT count(*) FROM public.gate_sent),"
        " (SELECT count(*) FROM triojobs.jobs WHERE queue = 'gate_children'),"
        " (SELECT count(*) FROM triojobs.outcomes o JOIN triojobs.jobs j ON j.id = o.job_id"
        "  WHERE o.status = 'done' AND convert_from(j.payload, 'UTF8') LIKE '%commits')"
    ).fetchone()
    if row is not None and len(set(row)) > 1:
        yield f"{row[0]} writes, {row[1]} follow-ups, {row[2]} completions"


def _transacts_exact(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    written = Counter(
        (job_id, group_id, claim_no)
        for job_id, group_id, claim_no in db.execute(
            "SELECT job_id, group_id, claim_no FROM public.gate_transacted"
        )
    )
    for run in program.runs:
        found = written[(run.job_id, *run.fence)]
        if run.transacted is not None and found != run.transacted:
            yield f"job {run.job_id}: {found} rows, transacted: {run.transacted}"


def _unwanted_work_undone(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    """A cancel that came while work ran has undone it (that the rows agree is asked above)."""
    for run in program.runs:
        if run.unwanted and (run.committed or run.transacted):
            yield f"job {run.job_id} was cancelled before its work had ended, and committed it"


def _runs_once(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rescued = _rescued(program, db)
    ends = Counter(
        run.job_id for run in program.runs if run.status == "done" and (run.job_id, *run.fence) not in rescued
    )
    yield from (f"job {job_id} ran {n} times to its end" for job_id, n in ends.items() if n > 1)


def _no_overlap(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    yield from (f"two handlers of job {job_id} at once" for job_id in program.overlaps)


def _no_handler_left(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    yield from (f"job {run.job_id}" for run in program.runs if run.ended == "running")


def _ledger_empty(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    for live in program.group._registrations if program.group is not None else ():
        if live.ledger.held or live.ledger.unsettled:
            yield f"holds {live.ledger.held_ids()}"


def _report_equals_rows(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    if program.group is None:
        return
    report = program.group.report
    rows = Counter(status for (status,) in db.execute("SELECT status FROM triojobs.outcomes"))
    settled = {status: n for status, n in report.settled.items() if n}
    by_us = rows - Counter(failed=len(_rescued(program, db)))
    if settled != dict(by_us):
        yield f"settled {settled}, but rows {dict(by_us)}"
    claims = db.execute("SELECT count(*) FROM public.gate_claims").fetchone()
    if claims is not None and report.released != claims[0] - rows.total():
        yield f"released {report.released}, but {claims[0]} claims and {rows.total()} outcomes"
    if report.abandoned or report.unknown_claims:
        yield f"abandoned {report.abandoned}, {report.unknown_claims} unknown claims"


def _only_permitted_errors(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    permitted: type[BaseException] | None = {"sibling": Boom, "sigint": KeyboardInterrupt}.get(program.mode)
    if program.mode in ("terminate", "lost") and program.group is None:
        permitted = triojobs.DatabaseError  # a group that cannot begin says so
    for leaf in _leaves(program.error):
        if permitted is None or not isinstance(leaf, permitted):
            yield repr(leaf)


def _exit_in_time(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    bound = OPTIONS["grace_period"] + OPTIONS["close_timeout"] + OPTIONS["call_timeout"] + 1.0 + SLACK
    if program.injected_at is not None and program.ended_at - program.injected_at > bound:
        yield f"{program.ended_at - program.injected_at:.1f} s"


def _nothing_left_open(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    # A backend ends a moment after its client has said goodbye, a thread that asks for a cancel within a second.
    query = (
        "SELECT application_name FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'triojobs %'"
    )
    give_up_at = time.monotonic() + PATIENCE
    while True:
        threads = [t.name for t in threading.enumerate() if t.name.startswith("triojobs")]
        sessions = db.execute(query).fetchall()
        if not threads and not sessions:
            return
        if time.monotonic() > give_up_at:
            yield f"threads {threads}, sessions {sessions}"
            return


CHECKS = (
    _nothing_left_open,  # waits for sessions that end late; what they wrote is seen by the others
    _no_row_running,
    _group_closed,
    _done_iff_returned,
    _attempts_exact,
    _commits_exact,
    _transacts_exact,
    _unwanted_work_undone,
    _runs_once,
    _no_overlap,
    _no_handler_left,
    _ledger_empty,
    _report_equals_rows,
    _only_permitted_errors,
    _exit_in_time,
)


def _leaves(exc: BaseException | None) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    elif exc is not None:
        yield exc
