"""What must hold after a run. Each check has a name and yields what is wrong, in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from .evidence import ENDED, Evidence
from .history import Claim, History, Outcome, Run
from .workload import COMMITTING, DONE_IN_THE_END, TIMEOUTS

# How a claim may end in the rows, by how its handler says that it ended (None: it never said so).
ALLOWED: Final[dict[str | None, frozenset[str]]] = {
    "returned": frozenset({"done", "rescued"}),
    "failed": frozenset({"failed", "killed", "cancelled", "rescued"}),
    "kill": frozenset({"killed", "cancelled", "rescued"}),
    "snooze": frozenset({"nothing", "cancelled", "rescued"}),
    "interrupted": frozenset({"nothing", "timed out", "cancelled", "rescued"}),
    "stale": frozenset({"nothing", "cancelled", "rescued"}),
    None: frozenset({"cancelled", "rescued"}),
}
# What handlers raise on purpose, or because a session that they used was terminated.
RAISED: Final = frozenset({"RuntimeError", "RetryAfter", "DatabaseError", "psycopg.Error"})


def lost(evidence: Evidence) -> Iterator[str]:
    """Every committed enqueue has its job; every job has ended, and is nowhere any more."""
    for token, enqueue in evidence.history.enqueues.items():
        ids = [job.id for job in evidence.jobs_of_token.get(token, ())]
        if enqueue.fate == "enqueued" and enqueue.job not in ids:
            yield f"{token} ({enqueue.form}) was enqueued as job {enqueue.job}, the rows have {ids}"
    places = dict(evidence.history.places)
    for job in evidence.history.jobs.values():
        status = evidence.status(job.id)
        if status not in ENDED:
            yield f"job {job.id} ({job.token}) is in {places.get(job.id)}, its last outcome is {status}"
        elif job.id in places:
            yield f"job {job.id} ({job.token}) is {status} and in {places[job.id]}"


def ghosts(evidence: Evidence) -> Iterator[str]:
    """Nothing exists or ran that was not committed, that nobody enqueued, or twice."""
    for token, jobs in evidence.jobs_of_token.items():
        ids = [job.id for job in jobs]
        if len(jobs) > 1:
            yield f"{token} is {len(jobs)} jobs: {ids}"
        if token.endswith(".follow"):
            continue  # its parent's effect decides
        enqueue = evidence.history.enqueues.get(token)
        if enqueue is None:
            yield f"nobody enqueued {token}, jobs {ids}"
        elif enqueue.fate == "undone":
            yield f"{token} ({enqueue.form}) was not committed, and is job {ids}"
    for outcome in evidence.history.outcomes:
        if outcome.job not in evidence.history.jobs:
            yield f"job {outcome.job} has an outcome and no body"
    for run in evidence.history.runs:
        job = evidence.history.jobs.get(run.job)
        if job is None or job.token != run.token:
            yield f"{run} ran, the row says {job}"


def torn(evidence: Evidence) -> Iterator[str]:
    """The outbox' own rows exist exactly when its jobs do."""
    orders = Counter(evidence.history.orders)
    for token, enqueue in evidence.history.enqueues.items():
        if enqueue.form == "outbox" and orders[token] != evidence.count_of_token(token):
            yield f"{token}: {orders[token]} orders and {evidence.count_of_token(token)} jobs"


def double_outcomes(evidence: Evidence) -> Iterator[str]:
    """One outcome for each claim, and none after the job has ended."""
    twice = Counter(outcome.claim for outcome in evidence.history.outcomes if outcome.claim is not None)
    yield from (f"claim {claim} has {n} outcomes" for claim, n in twice.items() if n > 1)
    for job, outcomes in evidence.outcomes_of_job.items():
        ends = [outcome.status for outcome in outcomes[:-1] if outcome.status in ENDED]
        if ends:
            yield f"job {job} was {ends} before its last outcome, {outcomes[-1].status}"


def overlaps(evidence: Evidence) -> Iterator[str]:
    """No two handlers of a job at once, unless the process of one was stopped beyond its lease."""
    for overlap in evidence.overlaps:
        if overlap.stop is None:
            yield f"{overlap.first} and {overlap.second}"


def past_checkpoint(evidence: Evidence) -> Iterator[str]:
    """A handler of a process that was stopped beyond its lease comes through no checkpoint afterwards."""
    for overlap in evidence.overlaps:
        if overlap.stop is not None and overlap.stopped is not None:
            passed = [step for step in overlap.stopped.steps if step.before > overlap.stop.until]
            if passed:
                yield f"{overlap.stopped} came through {len(passed)} checkpoint(s) after its process went on"


def contradictions(evidence: Evidence) -> Iterator[str]:
    """What a handler says about its end, and what the rows say about its claim, agree."""
    for run in evidence.history.runs:
        fate, outcome = evidence.fate(run.claim), evidence.outcome_of_claim.get(run.claim)
        if fate not in _allowed(run):
            yield f"{run} says {run.how}, the rows say {fate}"
        elif outcome is not None and (complaint := _disagreement(run, fate, outcome, evidence)):
            yield f"{run} {complaint}"
        if run.ended is None and run.process not in evidence.history.kills:
            yield f"{run} never ended, and its process was not killed"


def _allowed(run: Run) -> frozenset[str]:
    if run.committed:
        return frozenset({"done"})
    if run.committing and run.how != "returned":
        return ALLOWED[run.how] | {"done"}  # the reply to its commit was lost, or its writer died
    return ALLOWED[run.how]


def _disagreement(run: Run, fate: str, outcome: Outcome, evidence: Evidence) -> str | None:
    if fate == "cancelled" and run.job not in evidence.asked_to_cancel:
        return "is cancelled, and nobody asked for it"
    if fate == "timed out" and run.kind not in TIMEOUTS:
        return "has no timeout, and timed out"
    if fate == "done" and outcome.result != {"token": run.token, "attempt": run.attempt}:
        return f"has the result {outcome.result}"
    if fate in ("failed", "killed") and run.error not in (outcome.error or ""):
        return f"raised {run.error!r}, its outcome says {outcome.error!r}"
    return None


def unexcused(evidence: Evidence) -> Iterator[str]:
    """Only what was in flight at a kill, a stop or a crash is rescued, and so may run twice."""
    for claim in evidence.outcome_of_claim:
        if evidence.fate(claim) == "rescued" and not evidence.rescue_is_excused(claim):
            yield f"claim {claim} of {evidence.history.groups.get(claim[1])} was rescued without a reason"


def ran_after_the_end(evidence: Evidence) -> Iterator[str]:
    """No handler begins after the one that ended its job, unless its own claim had been taken away."""
    for job, runs in evidence.runs_of_job.items():
        last = evidence.last_outcome(job)
        final = None if last is None or last.status not in ENDED else _run_of(last, evidence)
        for run in runs:
            if final is not None and run.began > evidence.over(final) and not evidence.rescued(run):
                yield f"{run} began after {final} had ended the job"


def _run_of(outcome: Outcome, evidence: Evidence) -> Run | None:
    return None if outcome.claim is None else evidence.run_of_claim.get(outcome.claim)


def attempts(evidence: Evidence) -> Iterator[str]:
    """Attempts count 1, 2, 3 …: each claim that ended is one, what was given back is none."""
    for job, outcomes in evidence.outcomes_of_job.items():
        counted = [outcome.attempt for outcome in outcomes if outcome.claim is not None]
        if counted != list(range(1, len(counted) + 1)):
            yield f"job {job} has outcomes of the attempts {counted}"
        waiting = [outcome.attempt for outcome in outcomes if outcome.claim is None]
        if waiting not in ([], [len(counted)]):
            yield f"job {job} was cancelled after {waiting} attempts, and made {len(counted)}"
        body = evidence.history.jobs.get(job)
        if body is not None:
            yield from _limit(job, outcomes[-1], len(counted), body.max_attempts, evidence)
    for run in evidence.history.runs:
        outcome = evidence.outcome_of_claim.get(run.claim)
        made = {each.attempt for each in evidence.outcomes_of_job.get(run.job, ())}
        if outcome is not None and outcome.attempt != run.attempt:
            yield f"{run} was attempt {run.attempt}, its outcome says {outcome.attempt}"
        # Given back: its number comes again, or the job was cancelled while it waited for that.
        if outcome is None and not made & {run.attempt, run.attempt - 1}:
            yield f"{run} was attempt {run.attempt}, the job's outcomes are of {sorted(made)}"


def _limit(job: int, last: Outcome, made: int, most: int, evidence: Evidence) -> Iterator[str]:
    run = _run_of(last, evidence)
    if made > most:
        yield f"job {job} made {made} attempts of at most {most}"
    elif last.status == "killed" and made < most and (run is None or run.how != "kill"):
        yield f"job {job} was given up after {made} attempts of {most}"


def wrong_ends(evidence: Evidence) -> Iterator[str]:
    """Jobs that can be done are done, unless they were cancelled or used up their attempts."""
    for job, runs in evidence.runs_of_job.items():
        last, body, kind = evidence.last_outcome(job), evidence.history.jobs.get(job), runs[0].kind
        if last is None or body is None or last.status not in ("done", "killed"):
            continue
        can_be_done = kind in DONE_IN_THE_END
        used_up = last.status == "killed" and last.attempt == body.max_attempts
        if (last.status == "done") != can_be_done and not used_up:
            yield f"job {job} ({kind}) is {last.status} after attempt {last.attempt}"


def cancels(evidence: Evidence) -> Iterator[str]:
    """After True the job is cancelled, or done by the claim that had it; after False it had ended."""
    for cancel in evidence.history.cancels:
        last = evidence.last_outcome(cancel.job)
        if cancel.answered is None or last is None:
            continue
        if cancel.answer and last.status not in ("cancelled", "done"):
            yield f"job {cancel.job} was cancelled and is {last.status}"
        for run in evidence.runs_of_job.get(cancel.job, ()):
            # A claim that was committed before the cancel may begin after it.
            its_own = cancel.answer and run.claim == last.claim
            if run.began > cancel.answered and not its_own and not evidence.rescued(run):
                yield f"{run} began after cancel had answered {cancel.answer}"


def effects(evidence: Evidence) -> Iterator[str]:
    """A commit's writes exist once, under the claim that is done, with the follow-up; never without."""
    committed: dict[int, list[Claim]] = defaultdict(list)
    transacted: Counter[Claim] = Counter()
    for effect in evidence.history.effects:
        if effect.kind in COMMITTING:
            committed[effect.job].append(effect.claim)
        else:
            transacted[effect.claim] += 1
    for job, runs in evidence.runs_of_job.items():
        last, kind = evidence.last_outcome(job), runs[0].kind
        if kind in COMMITTING:
            done = [last.claim] if last is not None and last.status == "done" else []
            follow_ups = evidence.count_of_token(f"{runs[0].token}.follow")
            if committed[job] != done or follow_ups != len(done):
                yield f"job {job} was done by {done}: effects of {committed[job]}, {follow_ups} follow-ups"
        for run in runs if kind == "transacts" else ():
            if transacted[run.claim] > 1 or (run.transacted and not transacted[run.claim]):
                yield f"{run} has {transacted[run.claim]} effects"


def reports(evidence: Evidence) -> Iterator[str]:
    """What a group says about itself equals what the rows say; what it left behind is named."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for claim, outcome in evidence.outcome_of_claim.items():
        if evidence.fate(claim) != "rescued":
            counts[claim[1]][outcome.status] += 1
    for report in evidence.history.reports:
        rows = sum((counts[group] for group in report.group_ids), Counter[str]())
        said = Counter({status: n for status, n in report.settled.items() if status != "snoozed"})
        if +said != rows:
            yield f"{report.process} says {dict(+said)}, the rows say {dict(rows)}"
        unnamed = set(evidence.history.left.get(report.process, ())) - set(report.abandoned)
        if len(unnamed) > report.unknown_claims:
            yield f"{report.process} has ended and left {sorted(unnamed)} without a word"


def failures(evidence: Evidence) -> Iterator[str]:
    """No worker process ends by itself or shows a traceback; handlers raise only what they should."""
    yield from evidence.history.failures
    for run in evidence.history.runs:
        if run.how == "failed" and run.raised not in RAISED:
            yield f"{run} raised {run.raised}: {run.error}"


CHECKS: Final[tuple[Callable[[Evidence], Iterator[str]], ...]] = (
    lost,
    ghosts,
    torn,
    double_outcomes,
    overlaps,
    past_checkpoint,
    contradictions,
    unexcused,
    ran_after_the_end,
    attempts,
    wrong_ends,
    cancels,
    effects,
    reports,
    failures,
)


@dataclass
class Findings:
    """The result: what is wrong by the name of the check, and figures for people."""

    wrong: dict[str, list[str]] = field(default_factory=dict)
    jobs: int = 0
    statuses: Counter[str | None] = field(default_factory=Counter)
    overlaps_stopped: int = 0
    duplicates: int = 0

    def count(self, name: str) -> int:
        """Return how often a check found something."""
        return len(self.wrong.get(name, ()))


def verify(history: History) -> Findings:
    """Run every check."""
    evidence = Evidence(history)
    found = {check.__name__: list(check(evidence)) for check in CHECKS}
    return Findings(
        wrong={name: complaints for name, complaints in found.items() if complaints},
        jobs=len(history.jobs),
        statuses=Counter(evidence.status(job) for job in history.jobs),
        overlaps_stopped=sum(overlap.stop is not None for overlap in evidence.overlaps),
        duplicates=sum(1 for _ in evidence.begun_again()),
    )
