"""What must hold after each run. Each has a name, so that a mutant is killed by one that is meant for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import triojobs
from triojobs._group import WorkerGroup
from triojobs._memory_tables import OutcomeRow
from triojobs._model import SETTLED

from .injections import ENDING
from .jobs import COMMITTED, DISOBEYS, ENDS, ClaimName, Run
from .program import JOBS, parent_of
from .record import Record
from .world import Boom

PROMPT: Final = 1.5  # virtual seconds from the last handler's end to the group's, while the store is well
OBEDIENT: Final = 0.5  # seconds that handlers of the mix take to end after a cancel, but for DISOBEYS
OPENING: Final = frozenset({"open", "register"})


def violations(record: Record) -> list[str]:
    """Return "name: what" for everything that does not hold."""
    found = list(record.noticed)
    for name, check in CHECKS.items():
        found += [f"{name}: {what}" for what in check(record)]
    return found


def names(found: list[str]) -> set[str]:
    """Return the names of the invariants that do not hold."""
    return {what.partition(":")[0] for what in found}


# How the group was left.


def _ends(record: Record) -> Iterator[str]:
    if record.stuck is not None:
        yield record.stuck


def _no_row_running(record: Record) -> Iterator[str]:
    if record.exit is not None and record.exit.leases:
        yield f"jobs {record.exit.leases}"
    leases = record.database.tables.leases.values()
    if late := [row.id for row in leases if row.group_id in record.ours]:
        yield f"jobs {late} in the end"


def _group_closed(record: Record) -> Iterator[str]:
    if record.exit is not None:
        # A registration that arrives when nobody waits for it any more is closed by whoever rescues it.
        late = record.failed_call == "register" and record.case.fault and record.case.fault.kind == "late"
        yield from (str(group_id) for group_id in record.exit.open_groups if not late)


def _no_handler_left(record: Record) -> Iterator[str]:
    if record.exit is not None:
        yield from record.exit.handlers


def _ledger_empty(record: Record) -> Iterator[str]:
    if record.exit is not None and record.exit.held:
        yield f"jobs {record.exit.held}"


def _no_token_leaked(record: Record) -> Iterator[str]:
    if record.exit is not None:
        yield from record.exit.borrowed


def _only_permitted_errors(record: Record) -> Iterator[str]:
    permitted: tuple[type[BaseException], ...] = ()
    if "sibling" in record.injected:
        permitted += (Boom,)
    if record.injected & {"sigint", "handler_sigint"}:
        permitted += (KeyboardInterrupt,)
    if record.failed_call in OPENING:
        permitted += (triojobs.DatabaseError,)
    yield from (repr(leaf) for leaf in _leaves(record.error) if not isinstance(leaf, permitted))


def _errors_come_out(record: Record) -> Iterator[str]:
    """What ends a program must not be lost on the way out of the group."""
    due: set[type[BaseException]] = {Boom} if record.raised_boom else set()
    struck = any(run.struck and run.fence[0] in record.ours for run in record.journal.runs)
    if struck or [mode for mode, _ in record.injections] == ["sigint"]:
        due.add(KeyboardInterrupt)
    # One that is interrupted by the other takes it along, or it is the other's context.
    if due and not due & {type(leaf) for leaf in _leaves(record.error)}:
        yield f"{' and '.join(sorted(kind.__name__ for kind in due))} did not: {record.error!r}"


def _exit_in_time(record: Record) -> Iterator[str]:
    """Within the bound, and at once when the store is well: after the last handler's end."""
    ending = [at for mode, at in record.injections if mode in ENDING]
    if record.exit is None or not ending:
        return
    began = ending[0]
    mine = [run.ended_at for run in record.journal.runs if run.fence[0] in record.ours]
    last = max([began, *mine])
    if record.exit.at - last > PROMPT and record.failed_call is None:
        yield f"{record.exit.at - last:g} s after the last handler's end"
    stubborn = any(kind in DISOBEYS for kind in record.program.kinds)
    if record.exit.at - began > record.options.exit_bound + 2 * stubborn:
        yield f"{record.exit.at - began:g} s"


# What the rows say.


def _tables_consistent(record: Record) -> Iterator[str]:
    try:
        record.database.check_invariants()
    except AssertionError as exc:
        yield str(exc)


def _done_iff_returned(record: Record) -> Iterator[str]:
    """Every run that counts has its outcome under its own fence, and no other run has one."""
    outcomes = {(o.job_id, o.group_id, o.claim_no): o for o in _outcomes(record) if o.claim_no is not None}
    for run in record.journal.runs:
        outcome = outcomes.pop(run.claim, None)
        status = None if outcome is None else outcome.status
        if status not in _allowed(record, run, outcome):
            yield f"{run.name} {_fate(run)}, the row says {status}"
    for (job_id, _, claim_no), outcome in outcomes.items():
        if not (_rescued(record, outcome) or (outcome.status == "cancelled" and job_id in record.cancels)):
            yield f"job {job_id}: {outcome.status} by claim {claim_no}, which no handler ran"


def _allowed(record: Record, run: Run, outcome: OutcomeRow | None) -> set[str | None]:
    """Return the statuses that this run may leave behind; None: the claim is given back."""
    if outcome is not None and _rescued(record, outcome):
        return {outcome.status}
    if run.committed or run.ended == "returned":
        return {"done"} | _too_late(record, run)
    if run.ended in ("failed", "killed"):
        allowed: set[str | None] = {run.ended}
    elif run.ended == "interrupted" and run.limit <= run.ended_at:
        # Which came first? Without anything else it was the timeout.
        others = record.injected - {"timeout", "own_scope"} or record.case.fault
        allowed = {"failed", None} if others else {"failed"}
    else:
        allowed = {None}
    if run.job_id in record.cancels:
        allowed |= {"cancelled"}
    return allowed


def _too_late(record: Record, run: Run) -> set[str | None]:
    """A handler that does not obey for longer than the margin finds its claim given back."""
    lost = run.kind in DISOBEYS and record.injected & {"lose", "retire"}
    return {None} if lost else set()


def _attempts_exact(record: Record) -> Iterator[str]:
    tables = record.database.tables
    for job_id in tables.jobs:
        job = tables.read(job_id)
        assert job is not None
        counted = sum(o.claim_no is not None for o in tables.outcomes.get(job_id, ()))
        running = job_id in tables.leases
        if job.attempts != counted + running:
            yield f"job {job_id}: {job.attempts} in the row, {counted} ended and {running:d} running"


def _runs_once(record: Record) -> Iterator[str]:
    """Nobody runs twice to the end, but for those whose first end came too late to be written."""
    ends = Counter(
        run.job_id
        for run in record.journal.runs
        if (run.committed or run.ended == "returned")
        and not _was_rescued(record, run)
        and not (_too_late(record, run) and _outcome_of(record, run) is None)
    )
    yield from (f"job {job_id} ran {n} times to its end" for job_id, n in ends.items() if n > 1)


def _no_overlap(record: Record) -> Iterator[str]:
    for first, second in record.journal.overlaps:
        elsewhere = (first.fence[0] in record.ours) != (second.fence[0] in record.ours)
        # A handler that does not obey is run elsewhere when the lease is over, and a group whose lease was
        # taken away cannot know before the next beat.
        if not (elsewhere and (first.kind in DISOBEYS or "retire" in record.injected)):
            yield f"{first.name} and {second.name} at once"


def _no_needless_rescue(record: Record) -> Iterator[str]:
    if "retire" not in record.injected:
        yield from (f"job {o.job_id}, claim {o.claim_no}" for o in _outcomes(record) if _rescued(record, o))


def _lease_kept(record: Record) -> Iterator[str]:
    """Nobody registers anew without a reason."""
    for group, reasons in ((record.group, record.injected & {"lose", "retire"}), (record.rival, set())):
        if group is not None and not reasons and len(group._registrations) > 1:
            yield f"{len(group._registrations)} registrations"


def _lost_lease_ends_handlers(record: Record) -> Iterator[str]:
    """When the lease is gone, handlers that obey end before anybody else may rely on it."""
    lost = [at for mode, at in record.injections if mode in ("lose", "retire")]
    if record.group is None or not lost:
        return
    # A retired group learns it by its next beat.
    bound = record.options.beat_interval + OBEDIENT if "retire" in record.injected else OBEDIENT
    for run in record.journal.runs:
        mine = run.fence[0] in record.ours and run.fence[0] != record.group.group_id
        if mine and run.kind not in DISOBEYS and run.started_at < lost[0] < run.ended_at - bound:
            yield f"{run.name} went on for {run.ended_at - lost[0]:g} s"


def _stop_lets_handlers_end(record: Record) -> Iterator[str]:
    if record.injected and record.injected <= {"stop"}:
        for run in record.journal.runs:
            graceful = run.started_at + record.options.grace_period > run.ended_at
            ours = run.limit > run.ended_at and run.fence[0] in record.ours
            if run.ended == "interrupted" and graceful and run.job_id not in record.cancels and ours:
                yield f"{run.name} was interrupted"


def _interrupted_for_a_reason(record: Record) -> Iterator[str]:
    """What happens to one job does not cut another one's handler off."""
    if record.case.fault is not None or not record.injected <= {"job_cancel", "timeout", "own_scope"}:
        return
    for run in record.journal.runs:
        reason = run.job_id in record.cancels or run.limit <= run.ended_at
        if run.ended == "interrupted" and not reason and run.fence[0] in record.ours:
            yield f"{run.name} was interrupted"


def _everything_done(record: Record) -> Iterator[str]:
    """What does not end the group must not keep jobs from their end; and a rival does what ours leaves."""
    tables, ended = record.database.tables, record.error is not None or record.injected & ENDING
    for job_id, body in tables.jobs.items():
        status = tables.status(job_id)
        if not status.ended:
            if record.program.rival or not ended:
                yield f"job {job_id} is {status}"
            continue
        kind = JOBS.decode_payload(body.row.payload, body.row.encoding)
        allowed = {ENDS.get(kind, "done")} | ({"cancelled"} if job_id in record.cancels else set())
        if any(run.cut for run in record.journal.runs if run.job_id == job_id):
            allowed.add("done")  # a scope of its own, cancelled, is its business; it went on and returned
        if status not in allowed:
            yield f"job {job_id} ({kind}) is {status}"


def _cancelled_is_final(record: Record) -> Iterator[str]:
    """After `cancel` said True a job is not claimed again."""
    for run in record.journal.runs:
        claimed_at = _claimed_at(record, run)
        if claimed_at is not None and claimed_at > record.cancels.get(run.job_id, float("inf")):
            yield f"{run.name} was claimed after its cancel"


def _answers_true(record: Record) -> Iterator[str]:
    """What an enqueue told its handler is what the rows say."""
    children = _children(record)
    for run in record.journal.runs:
        found = children.pop(run.claim, 0)
        if run.kind != "commits" and not run.sure <= found <= run.sure + run.unsure:
            yield f"{run.name} enqueued {run.sure} (and perhaps {run.unsure}), but there are {found}"
    yield from (f"job {job_id} enqueued by claim {claim_no}" for job_id, _, claim_no in children)


def _commit_is_atomic(record: Record) -> Iterator[str]:
    """The follow-up job is there if and only if the job was completed by its commit."""
    children = _children(record)
    for run in record.journal.runs:
        if run.kind != "commits":
            continue
        outcome = _outcome_of(record, run)
        result = None if outcome is None else outcome.result
        committed = result is not None and JOBS.decode_result(result, "cbor") == COMMITTED
        found = children[run.claim]
        if found != committed:
            yield f"{run.name}: {found} follow-up jobs, committed: {committed}"


def _handlers_can_enqueue(record: Record) -> Iterator[str]:
    """As long as a handler runs, its group's client is open."""
    yield from (f"{run.name} found it closed" for run in record.journal.runs if run.refused)


def _report_equals_rows(record: Record) -> Iterator[str]:
    for group in (record.group, record.rival):
        if group is not None:
            yield from _report_of(record, group)


def _report_of(record: Record, group: WorkerGroup) -> Iterator[str]:
    report, tables = group.report, record.database.tables
    claims = {fence for fence in tables._fences if fence[1] in report.group_ids} - record.swept
    outcomes = {(o.job_id, o.group_id, o.claim_no): o for o in _outcomes(record) if o.claim_no is not None}
    snoozed = {r.claim for r in record.journal.runs if r.ended == "snoozed"} - outcomes.keys()
    # A job whose earlier handler still runs here is put off: only the report tells it from a release.
    put_off = report.settled["snoozed"] - len(snoozed & claims) if record.injected & {"lose", "retire"} else 0
    rows = Counter(dict.fromkeys((str(o) for o in SETTLED), 0))
    released = 0
    for claim in claims:
        outcome = outcomes.get(claim)
        if outcome is None and claim in snoozed:
            rows["snoozed"] += 1
        elif outcome is None:
            released += 1
        elif not _rescued(record, outcome):
            rows[outcome.status] += 1
    rows["snoozed"] += put_off
    # A group cannot tell its own cancellation from the rescuer's of the same claim.
    rescued = sum(_rescued(record, o) and o.status == "cancelled" for c, o in outcomes.items() if c in claims)
    rows["cancelled"] += min(rescued, max(0, report.settled["cancelled"] - rows["cancelled"]))
    if report.settled != dict(rows):
        yield f"settled {_short(report.settled)}, but rows {_short(rows)}"
    # Where a release has no reply and the row is gone, it cannot know that a rescuer came first.
    unknowable = "retire" in record.injected and record.case.fault is not None
    if report.released != released - put_off and not unknowable:
        yield f"released {report.released}, but rows {released - put_off}"
    if report.abandoned:
        yield f"abandoned {report.abandoned}"
    if report.unknown_claims:
        yield f"{report.unknown_claims} unknown claims"


CHECKS: Final = {
    check.__name__.lstrip("_").replace("_", "-"): check
    for check in (
        _ends,
        _no_row_running,
        _group_closed,
        _no_handler_left,
        _ledger_empty,
        _no_token_leaked,
        _only_permitted_errors,
        _errors_come_out,
        _exit_in_time,
        _tables_consistent,
        _done_iff_returned,
        _attempts_exact,
        _runs_once,
        _no_overlap,
        _no_needless_rescue,
        _lease_kept,
        _lost_lease_ends_handlers,
        _stop_lets_handlers_end,
        _interrupted_for_a_reason,
        _everything_done,
        _cancelled_is_final,
        _answers_true,
        _commit_is_atomic,
        _handlers_can_enqueue,
        _report_equals_rows,
    )
}
NAMES: Final = {*CHECKS, "owned-at-all-times", "leased-while-it-runs"}


def _outcomes(record: Record) -> Iterator[OutcomeRow]:
    for history in record.database.tables.outcomes.values():
        yield from history


def _outcome_of(record: Record, run: Run) -> OutcomeRow | None:
    for outcome in record.database.tables.outcomes.get(run.job_id, ()):
        if (outcome.group_id, outcome.claim_no) == run.fence:
            return outcome
    return None


def _claimed_at(record: Record, run: Run) -> float | None:
    outcome = _outcome_of(record, run)
    return None if outcome is None else outcome.claimed_at


def _rescued(record: Record, outcome: OutcomeRow) -> bool:
    by_text = outcome.error is not None and outcome.error.startswith("rescued:")
    return by_text or outcome.no in record.rescued


def _was_rescued(record: Record, run: Run) -> bool:
    outcome = _outcome_of(record, run)
    return outcome is not None and _rescued(record, outcome)


def _children(record: Record) -> Counter[ClaimName]:
    parents = (parent_of(body.row) for body in record.database.tables.jobs.values())
    return Counter(parent for parent in parents if parent is not None)


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
