"""What must hold after each run. Each has a name, so that a mutant is killed by one that is meant for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import trio

import triojobs
from triojobs._memory_tables import OutcomeRow, Tables
from triojobs._model import SETTLED

from .harness import OPEN_CALLS, Boom, Record
from .jobs import KINDS, Run

SLACK = 0.5  # virtual seconds: handlers of the mix clean up for 0.2


def violations(record: Record) -> list[str]:
    """Return "name: what" for everything that does not hold."""
    found: list[str] = []
    for check in CHECKS:
        name = check.__name__.lstrip("_").replace("_", "-")
        found += [f"{name}: {what}" for what in check(record)]
    return found


def _ends(record: Record) -> Iterator[str]:
    if record.stuck is not None:
        yield record.stuck


def _no_row_running(record: Record) -> Iterator[str]:
    if record.database.tables.leases:
        yield f"jobs {sorted(record.database.tables.leases)}"


def _group_closed(record: Record) -> Iterator[str]:
    for group_id, row in record.database.tables.groups.items():
        if row.closed_at is None:
            yield str(group_id)


def _tables_consistent(record: Record) -> Iterator[str]:
    try:
        record.database.check_invariants()
    except AssertionError as exc:
        yield str(exc)


def _done_iff_returned(record: Record) -> Iterator[str]:
    """Every run that counts has its outcome under its own fence, and no other run has one."""
    outcomes = {(o.job_id, o.group_id, o.claim_no): o for o in _outcomes(record.database.tables)}
    for run in record.journal.runs:
        outcome = outcomes.pop((run.job_id, *run.fence), None)
        if outcome is not None and _rescued(outcome):
            continue
        status = None if outcome is None else outcome.status
        if status != run.counts:
            yield f"job {run.job_id} ({run.kind}): the handler {_fate(run)}, the row says {status}"
    for (job_id, _, claim_no), outcome in outcomes.items():
        if not _rescued(outcome):
            yield f"job {job_id}: {outcome.status} by claim {claim_no}, which no handler ran"


def _attempts_exact(record: Record) -> Iterator[str]:
    tables = record.database.tables
    counted = Counter(
        run.job_id for run in record.journal.runs if run.counts and not _was_rescued(tables, run)
    )
    counted.update(o.job_id for o in _outcomes(tables) if _rescued(o))
    for job_id in tables.jobs:
        job = tables.read(job_id)
        assert job is not None
        if job.attempts != counted[job_id]:
            yield f"job {job_id}: {job.attempts} in the row, {counted[job_id]} made"


def _runs_once(record: Record) -> Iterator[str]:
    tables = record.database.tables
    ends = Counter(
        run.job_id for run in record.journal.runs if run.counts == "done" and not _was_rescued(tables, run)
    )
    yield from (f"job {job_id} ran {n} times to its end" for job_id, n in ends.items() if n > 1)


def _no_overlap(record: Record) -> Iterator[str]:
    yield from (f"two handlers of job {job_id} at once" for job_id in record.journal.overlaps)


def _no_handler_left(record: Record) -> Iterator[str]:
    yield from (f"job {run.job_id} still runs" for run in record.journal.runs if run.ended == "running")


def _ledger_empty(record: Record) -> Iterator[str]:
    for group in record.groups:
        for live in group._registrations:
            if live.ledger.held or live.ledger.unsettled:
                yield f"holds {live.ledger.held_ids()}"


def _no_token_leaked(record: Record) -> Iterator[str]:
    for store in record.stores:
        for name, line in vars(store).items():
            if isinstance(line, trio.CapacityLimiter) and line.borrowed_tokens:
                yield name


def _only_permitted_errors(record: Record) -> Iterator[str]:
    permitted: tuple[type[BaseException], ...] = ()
    if record.case.mode == "sibling":
        permitted = (Boom,)
    if record.case.mode in ("sigint", "handler_sigint"):
        permitted = (KeyboardInterrupt,)
    if record.failed_operation in OPEN_CALLS:
        permitted += (triojobs.DatabaseError,)
    for leaf in _leaves(record.error):
        if not isinstance(leaf, permitted):
            yield repr(leaf)


def _exit_in_time(record: Record) -> Iterator[str]:
    interrupting = record.case.mode in ("cancel", "sibling", "sigint", "stop")
    if record.injected_at and interrupting and record.stuck is None:
        took = record.ended_at - record.injected_at[0]
        if record.case.mode == "stop" and not record.groups:
            return
        if took > record.exit_bound + SLACK:
            yield f"{took:g} s after the injection"
        fast = 1.0 + 2 * SLACK if record.case.mode == "stop" else 2 * SLACK
        if record.failed_operation is None and took > fast:
            yield f"{took:g} s although the store is well"


def _everything_done(record: Record) -> Iterator[str]:
    """What does not end the group must not keep jobs from being done."""
    interrupting = record.case.mode not in ("lose", "retire") and record.injected_at
    if interrupting or record.failed_operation in OPEN_CALLS or record.error is not None:
        return
    missing = len(KINDS) + 1 - len(record.journal.completed)
    if missing:
        yield f"{missing} jobs are not"


def _report_equals_rows(record: Record) -> Iterator[str]:
    tables = record.database.tables
    for group in record.groups:
        report = group.report
        mine = [o for o in _outcomes(tables) if o.group_id in report.group_ids]
        rescued = [o for o in mine if _rescued(o)]
        rows = Counter(dict.fromkeys((str(o) for o in SETTLED), 0))
        rows.update(o.status for o in mine if not _rescued(o))
        if report.settled != dict(rows):
            yield f"settled {_short(report.settled)}, but rows {_short(rows)}"
        claims = [fence for fence in tables._fences if fence[1] in report.group_ids]
        released = len(claims) - sum(rows.values()) - len(rescued) - record.swept
        if report.released != released:
            yield f"released {report.released}, but rows {released}"
        if report.abandoned:
            yield f"abandoned {report.abandoned}"
        if report.unknown_claims:
            yield f"{report.unknown_claims} unknown claims"
        if not set(tables.groups) <= set(report.group_ids):
            yield "group ids"


CHECKS = (
    _ends,
    _no_row_running,
    _group_closed,
    _tables_consistent,
    _done_iff_returned,
    _attempts_exact,
    _runs_once,
    _no_overlap,
    _no_handler_left,
    _ledger_empty,
    _no_token_leaked,
    _only_permitted_errors,
    _exit_in_time,
    _everything_done,
    _report_equals_rows,
)


def _outcomes(tables: Tables) -> Iterator[OutcomeRow]:
    for history in tables.outcomes.values():
        yield from history


def _rescued(outcome: OutcomeRow) -> bool:
    return outcome.error is not None and outcome.error.startswith("rescued:")


def _was_rescued(tables: Tables, run: Run) -> bool:
    return any(
        _rescued(o) and (o.group_id, o.claim_no) == run.fence for o in tables.outcomes.get(run.job_id, ())
    )


def _fate(run: Run) -> str:
    return "committed" if run.committed else {"returned": "returned"}.get(run.ended, f"ended as {run.ended}")


def _leaves(exc: BaseException | None) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    elif exc is not None:
        yield exc


def _short(counts: object) -> dict[str, int]:
    return {str(name): n for name, n in dict(counts).items() if n}  # type: ignore[call-overload]
