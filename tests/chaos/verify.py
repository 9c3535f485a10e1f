"""What must hold after a run: each check has a name and says what is wrong, from made-up histories too.

Terms. A claim is (job, group, claim number). Its end in the rows is `done`, `failed`, `killed` or
`cancelled` (its outcome), `timed out` (a failed outcome whose words say so), `rescued` (the outcome
that was written when its lease ended), or nothing (released or snoozed: the attempt is refunded).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from .history import Claim, History, JobRow, Outcome, Run, Stop
from .plan import BEAT_LATENESS, LEASE_DURATION
from .workload import DONE_IN_THE_END

ENDED: Final = frozenset({"done", "killed", "cancelled"})

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
# A handler that ended is settled within milliseconds, or once the server is back. For so long after
# its end it still counts as in flight when something happens to its process.
SETTLED_WITHIN: Final = 3.0
BEGUN_AFTER_STOP: Final = 0.5  # seconds in which a woken process begins what it had claimed


@dataclass
class Overlap:
    """Two handlers of one job at once; `first` began first."""

    first: Run
    second: Run


@dataclass
class Findings:
    """The result: counters for people, and everything that is wrong, by the name of the check."""

    wrong: dict[str, list[str]] = field(default_factory=dict)
    jobs: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    overlaps_stopped: int = 0
    duplicates: int = 0

    def count(self, name: str) -> int:
        """Return how often a check found something."""
        return len(self.wrong.get(name, ()))


class Verifier:
    """Looks at one history from several sides."""

    def __init__(self, history: History) -> None:
        self.history = history

    # Indexes.

    @cached_property
    def outcomes_of_job(self) -> dict[int, list[Outcome]]:
        found: dict[int, list[Outcome]] = defaultdict(list)
        for outcome in self.history.outcomes:
            found[outcome.job].append(outcome)
        return found

    @cached_property
    def outcome_of_claim(self) -> dict[Claim, Outcome]:
        return {outcome.claim: outcome for outcome in self.history.outcomes if outcome.claim is not None}

    @cached_property
    def runs_of_job(self) -> dict[int, list[Run]]:
        """The runs of each job in the order of their beginnings."""
        found: dict[int, list[Run]] = defaultdict(list)
        for run in sorted(self.history.runs, key=lambda run: run.began):
            found[run.job].append(run)
        return found

    @cached_property
    def jobs_of_token(self) -> dict[str | None, list[JobRow]]:
        found: dict[str | None, list[JobRow]] = defaultdict(list)
        for job in self.history.jobs.values():
            found[job.token].append(job)
        return found

    @cached_property
    def stops_of_process(self) -> dict[str, list[Stop]]:
        found: dict[str, list[Stop]] = defaultdict(list)
        for stop in self.history.stops:
            found[stop.process].append(stop)
        return found

    @cached_property
    def cancelled_jobs(self) -> set[int]:
        """The jobs for which somebody asked."""
        return {cancel.job for cancel in self.history.cancels}

    def last_outcome(self, job: int) -> Outcome | None:
        history = self.outcomes_of_job.get(job)
        return history[-1] if history else None

    def fate(self, claim: Claim) -> str:
        """How a claim ended in the rows."""
        outcome = self.outcome_of_claim.get(claim)
        if outcome is None:
            return "nothing"
        if outcome.rescued:
            return "rescued"
        if outcome.status in ("failed", "killed") and (outcome.error or "").startswith("timed out"):
            return "timed out"
        return outcome.status

    def ended(self, run: Run) -> float:
        """When a run was over at the latest that can be proven."""
        if run.ended is not None:
            return run.ended
        return max(run.began, self.history.kills.get(run.process, float("inf")))

    # Checks. Each yields what is wrong.

    def lost(self) -> Iterator[str]:
        """Every committed enqueue has its job, and every job has ended and is nowhere any more."""
        for token, enqueue in self.history.enqueues.items():
            if enqueue.fate == "enqueued":
                ids = [job.id for job in self.jobs_of_token.get(token, ())]
                if not ids:
                    yield f"{token} ({enqueue.form}) was enqueued as job {enqueue.job}, which does not exist"
                elif enqueue.job not in ids:
                    yield f"{token} ({enqueue.form}) was enqueued as job {enqueue.job}, but is {ids}"
        places = dict(self.history.places)
        for job in self.history.jobs.values():
            last = self.last_outcome(job.id)
            if last is None or last.status not in ENDED:
                where = places.get(job.id, "nowhere")
                yield f"job {job.id} ({job.token}) is in {where} with {last and last.status} as last outcome"
            elif job.id in places:
                yield f"job {job.id} ({job.token}) is {last.status} and in {places[job.id]}"

    def ghosts(self) -> Iterator[str]:
        """Nothing exists that was rolled back, that nobody enqueued, or twice."""
        for token, jobs in self.jobs_of_token.items():
            ids = [job.id for job in jobs]
            if len(jobs) > 1:
                yield f"{token} is {len(jobs)} jobs: {ids}"
            if token is not None and token.endswith(".follow"):
                continue  # its fate is its parent's effect's
            enqueue = self.history.enqueues.get(token or "")
            if enqueue is None:
                yield f"nobody enqueued {token}, job {ids}"
            elif enqueue.fate == "undone":
                yield f"{token} ({enqueue.form}) was not committed, but is job {ids}"
        for outcome in self.history.outcomes:
            if outcome.job not in self.history.jobs:
                yield f"job {outcome.job} has an outcome and no body"
        for run in self.history.runs:
            job = self.history.jobs.get(run.job)
            if job is None or job.token != run.token:
                yield f"{run} ran, but the row says {job}"

    def torn(self) -> Iterator[str]:
        """An outbox' own rows exist exactly when its jobs do."""
        orders = Counter(self.history.orders)
        for token, enqueue in self.history.enqueues.items():
            if enqueue.form == "outbox" and orders[token] != len(self.jobs_of_token.get(token, ())):
                yield f"{token}: {orders[token]} orders, {len(self.jobs_of_token.get(token, ()))} jobs"

    def double_outcomes(self) -> Iterator[str]:
        """One outcome for each claim, and no outcome after the job has ended."""
        twice = Counter(outcome.claim for outcome in self.history.outcomes if outcome.claim is not None)
        yield from (f"claim {claim} has {n} outcomes" for claim, n in twice.items() if n > 1)
        for job, outcomes in self.outcomes_of_job.items():
            ends = [outcome.status for outcome in outcomes[:-1] if outcome.status in ENDED]
            if ends:
                yield f"job {job} was {ends} before its last outcome {outcomes[-1].status}"

    def overlapping(self) -> Iterator[Overlap]:
        """Pairs of handlers of one job that were at work at once."""
        for runs in self.runs_of_job.values():
            for first, second in itertools.combinations(runs, 2):
                if second.began < self.ended(first):
                    yield Overlap(first, second)

    def stop_that_excuses(self, overlap: Overlap) -> Stop | None:
        """The last stop that can have ended the first handler's lease before the second began."""
        first, second = overlap.first, overlap.second
        if self.fate(first.claim) != "rescued":
            return None
        for stop in reversed(self.stops_of_process.get(first.process, [])):
            ended_lease = min(stop.until, second.began) - stop.at >= LEASE_DURATION - BEAT_LATENESS
            # What was claimed just before the stop begins when the process goes on.
            if ended_lease and first.began <= stop.until + BEGUN_AFTER_STOP:
                return stop
        return None

    def overlaps(self) -> Iterator[str]:
        """No two handlers of a job at once, unless the first one's process was stopped beyond its lease."""
        for overlap in self.overlapping():
            # Both may be the one of the stopped process: a claim that it had taken before the stop.
            swapped = Overlap(overlap.second, overlap.first)
            if self.stop_that_excuses(overlap) is None and self.stop_that_excuses(swapped) is None:
                yield f"{overlap.first} and {overlap.second}"

    def past_checkpoint(self) -> Iterator[str]:
        """After a stop beyond its lease, no handler comes through a checkpoint while another has its job."""
        for overlap in self.overlapping():
            for run, other in ((overlap.first, overlap.second), (overlap.second, overlap.first)):
                stop = self.stop_that_excuses(Overlap(run, other))
                passed = [step for step in run.steps if stop is not None and step.before > stop.until]
                if passed:
                    yield f"{run} came through {len(passed)} checkpoint(s) after its process went on"

    def contradictions(self) -> Iterator[str]:
        """What a handler says about its end and what the rows say about its claim agree."""
        for run in self.history.runs:
            fate, outcome = self.fate(run.claim), self.outcome_of_claim.get(run.claim)
            allowed = ALLOWED[run.how]
            if run.committed:
                allowed = frozenset({"done"})
            elif run.committing and run.how != "returned":
                allowed |= {"done"}  # the reply to its commit was lost, or its writer died
            if fate not in allowed:
                yield f"{run} says {run.how}, the rows say {fate}"
            elif fate == "cancelled" and run.job not in self.cancelled_jobs:
                yield f"{run} is cancelled, and nobody asked for it"
            elif fate == "done" and outcome is not None:
                made = {"token": run.token, "attempt": run.attempt}
                if outcome.result != made:
                    yield f"{run} has the result {outcome.result}"
            elif fate in ("failed", "killed") and run.error not in _words(outcome):
                yield f"{run} raised {run.error!r}, and its outcome says {_words(outcome)!r}"
            if run.ended is None and run.process not in self.history.kills:
                yield f"{run} never ended, and its process was not killed"

    def unexcused(self) -> Iterator[str]:
        """Only what was in flight at a kill, a stop or a crash is rescued, and so may run twice."""
        runs = {run.claim: run for run in self.history.runs}
        for outcome in self.history.outcomes:
            if outcome.rescued and outcome.claim is not None:
                process = self.history.groups.get(outcome.claim[1], "")
                if not self._excused(process, runs.get(outcome.claim)):
                    yield f"claim {outcome.claim} of {process} was rescued, and nothing had happened to it"

    def _excused(self, process: str, run: Run | None) -> bool:
        began = float("-inf") if run is None else run.began
        over = float("inf") if run is None or run.ended is None else run.ended + SETTLED_WITHIN
        killed = self.history.kills.get(process)
        happened = [(stop.at, stop.until) for stop in self.stops_of_process.get(process, ())]
        happened += [(outage.at, outage.until) for outage in self.history.outages]
        if killed is not None:
            happened.append((killed, killed))
        return any(began <= until and at <= over for at, until in happened)

    def duplicated(self) -> set[int]:
        """Jobs that began again because an earlier handler's claim had been taken away from it."""
        again = set()
        for job, runs in self.runs_of_job.items():
            if any(self.fate(run.claim) == "rescued" for run in runs[:-1]):
                again.add(job)
        return again

    def ran_after_the_end(self) -> Iterator[str]:
        """No handler begins after the one that ended its job, unless its own claim had been rescued."""
        for job, runs in self.runs_of_job.items():
            last = self.last_outcome(job)
            if last is None or last.status not in ENDED:
                continue
            final = next((run for run in runs if run.claim == last.claim), None)
            for run in runs:
                if final is not None and run.began > self.ended(final) and self.fate(run.claim) != "rescued":
                    yield f"{run} began after the job was {last.status}"

    def attempts(self) -> Iterator[str]:
        """Attempts count 1, 2, 3 …: each ended claim is one, what is given back is none."""
        for job, outcomes in self.outcomes_of_job.items():
            counted = [outcome.attempt for outcome in outcomes if outcome.claim is not None]
            if counted != list(range(1, len(counted) + 1)):
                yield f"job {job} has outcomes of the attempts {counted}"
            waiting = [outcome.attempt for outcome in outcomes if outcome.claim is None]
            if waiting not in ([], [len(counted)]):
                yield f"job {job} was cancelled after {waiting} attempts, and made {len(counted)}"
            limit = self.history.jobs[job].max_attempts if job in self.history.jobs else 0
            if len(counted) > limit:
                yield f"job {job} made {len(counted)} attempts of at most {limit}"
            used_up = outcomes[-1].status == "killed" and not self._killed_by_handler(outcomes[-1])
            if used_up and len(counted) != limit:
                yield f"job {job} was given up after {len(counted)} attempts of {limit}"
        for run in self.history.runs:
            outcome = self.outcome_of_claim.get(run.claim)
            made = {each.attempt for each in self.outcomes_of_job.get(run.job, ())}
            if outcome is not None and outcome.attempt != run.attempt:
                yield f"{run} was attempt {run.attempt}, its outcome says {outcome.attempt}"
            # Given back: the same number comes again, unless the job is cancelled while it waits.
            if outcome is None and not made & {run.attempt, run.attempt - 1}:
                yield f"{run} was attempt {run.attempt}, the job's outcomes are of {sorted(made)}"

    def _killed_by_handler(self, outcome: Outcome) -> bool:
        return any(
            run.claim == outcome.claim and run.how == "kill" for run in self.runs_of_job.get(outcome.job, ())
        )

    def wrong_ends(self) -> Iterator[str]:
        """Jobs that can be done are done, unless they were cancelled or used up their attempts."""
        kinds = {run.job: run.kind for run in self.history.runs}
        for job, kind in kinds.items():
            last = self.last_outcome(job)
            if last is None or last.status == "cancelled":
                continue
            can_be_done = kind in DONE_IN_THE_END
            used_up = last.status == "killed" and last.attempt == self.history.jobs[job].max_attempts
            if (last.status == "done") != can_be_done and not (can_be_done and used_up):
                yield f"job {job} ({kind}) is {last.status} after attempt {last.attempt}"

    def cancels(self) -> Iterator[str]:
        """After True the job does not run again; after False it had ended."""
        for cancel in self.history.cancels:
            last = self.last_outcome(cancel.job)
            if cancel.answered is None or last is None:
                continue
            later = [run for run in self.runs_of_job.get(cancel.job, ()) if run.began > cancel.answered]
            later = [run for run in later if self.fate(run.claim) != "rescued"]
            if cancel.answer and last.status not in ("cancelled", "done"):
                yield f"job {cancel.job} was cancelled and is {last.status}"
            # A claim that was committed before the cancel may begin after it.
            allowed = [last.claim] if cancel.answer else []
            for run in later:
                if run.claim not in allowed:
                    yield f"{run} began after cancel had answered {cancel.answer}"

    def effects(self) -> Iterator[str]:
        """A commit's writes exist once, under the claim that is done, with the follow-up; never without."""
        by_job: dict[int, list[Claim]] = defaultdict(list)
        transacted: Counter[Claim] = Counter()
        for effect in self.history.effects:
            if effect.kind == "commits":
                by_job[effect.job].append(effect.claim)
            else:
                transacted[effect.claim] += 1
        for job, runs in self.runs_of_job.items():
            kind, token, last = runs[0].kind, runs[0].token, self.last_outcome(job)
            if kind == "commits":
                done = [last.claim] if last is not None and last.status == "done" else []
                if by_job[job] != done:
                    yield f"job {job} has effects of {by_job[job]}, and was done by {done}"
                follow_ups = len(self.jobs_of_token.get(f"{token}.follow", ()))
                if follow_ups != len(by_job[job]):
                    yield f"job {job} has {len(by_job[job])} effects and {follow_ups} follow-ups"
            for run in runs if kind == "transacts" else ():
                if transacted[run.claim] > 1 or (run.transacted and not transacted[run.claim]):
                    yield f"{run} has {transacted[run.claim]} effects"

    def reports(self) -> Iterator[str]:
        """What a group says about itself equals what the rows say, and nothing runs after its end."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for outcome in self.history.outcomes:
            if outcome.group is not None and not outcome.rescued:
                counts[outcome.group][outcome.status] += 1
        for report in self.history.reports:
            rows: Counter[str] = Counter()
            for group in report.group_ids:
                rows += counts[group]
            said = Counter({name: report.settled[name] for name in ("done", "failed", "killed", "cancelled")})
            if +said != rows:
                yield f"{report.process} says {dict(+said)}, the rows say {dict(rows)}"

    def failures(self) -> Iterator[str]:
        """No worker process ends by itself."""
        yield from self.history.failures


def _words(outcome: Outcome | None) -> str:
    return "" if outcome is None or outcome.error is None else outcome.error


CHECKS: Final[tuple[Callable[[Verifier], Iterator[str]], ...]] = (
    Verifier.lost,
    Verifier.ghosts,
    Verifier.torn,
    Verifier.double_outcomes,
    Verifier.overlaps,
    Verifier.past_checkpoint,
    Verifier.contradictions,
    Verifier.unexcused,
    Verifier.ran_after_the_end,
    Verifier.attempts,
    Verifier.wrong_ends,
    Verifier.cancels,
    Verifier.effects,
    Verifier.reports,
    Verifier.failures,
)


def verify(history: History) -> Findings:
    """Run every check."""
    verifier = Verifier(history)
    findings = Findings()
    for check in CHECKS:
        if found := list(check(verifier)):
            findings.wrong[check.__name__] = found
    findings.jobs = len(history.jobs)
    for job in history.jobs:
        last = verifier.last_outcome(job)
        findings.statuses[last.status if last else "none"] += 1
    findings.overlaps_stopped = sum(1 for _ in verifier.overlapping()) - findings.count("overlaps")
    findings.duplicates = len(verifier.duplicated())
    return findings
