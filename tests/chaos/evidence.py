"""A history seen from several sides, and what the two records say together about a claim or a run.

Terms. A claim is (job, group, claim number). Its fate in the rows is `done`, `failed`, `killed` or
`cancelled` (its outcome), `timed out` (a failed outcome whose words say so), `rescued` (the outcome
that was written when its lease ended), or `nothing` (released or snoozed: the attempt is refunded).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from .history import Claim, History, JobRow, Outcome, Run, Stop
from .plan import BEAT_LATENESS, LEASE_DURATION

ENDED: Final = frozenset({"done", "killed", "cancelled"})
# A handler that ended is settled within milliseconds, or once the server is back. For so long after
# its end it still counts as in flight when something happens to its process.
SETTLED_WITHIN: Final = 3.0
BEGUN_AFTER_STOP: Final = 0.5  # seconds in which a woken process begins, if at all, what it had claimed


@dataclass
class Overlap:
    """Two handlers of one job at once. `stopped` is the one whose process was stopped beyond its lease."""

    first: Run
    second: Run
    stopped: Run | None = None
    stop: Stop | None = None


class Evidence:
    """Indexes over one history, and what follows from it."""

    def __init__(self, history: History) -> None:
        self.history = history

    @cached_property
    def outcomes_of_job(self) -> dict[int, list[Outcome]]:
        """Oldest first."""
        found: dict[int, list[Outcome]] = defaultdict(list)
        for outcome in self.history.outcomes:
            found[outcome.job].append(outcome)
        return found

    @cached_property
    def outcome_of_claim(self) -> dict[Claim, Outcome]:
        return {outcome.claim: outcome for outcome in self.history.outcomes if outcome.claim is not None}

    @cached_property
    def runs_of_job(self) -> dict[int, list[Run]]:
        """In the order of their beginnings."""
        found: dict[int, list[Run]] = defaultdict(list)
        for run in sorted(self.history.runs, key=lambda run: run.began):
            found[run.job].append(run)
        return found

    @cached_property
    def run_of_claim(self) -> dict[Claim, Run]:
        return {run.claim: run for run in self.history.runs}

    @cached_property
    def jobs_of_token(self) -> dict[str, list[JobRow]]:
        found: dict[str, list[JobRow]] = defaultdict(list)
        for job in self.history.jobs.values():
            found[job.token].append(job)
        return found

    @cached_property
    def stops_of_process(self) -> dict[str, list[Stop]]:
        found: dict[str, list[Stop]] = defaultdict(list)
        for stop in sorted(self.history.stops, key=lambda stop: stop.at):
            found[stop.process].append(stop)
        return found

    @cached_property
    def asked_to_cancel(self) -> set[int]:
        return {cancel.job for cancel in self.history.cancels}

    def count_of_token(self, token: str) -> int:
        """How many jobs carry this token."""
        return len(self.jobs_of_token.get(token, ()))

    def last_outcome(self, job: int) -> Outcome | None:
        history = self.outcomes_of_job.get(job)
        return history[-1] if history else None

    def status(self, job: int) -> str | None:
        """The last outcome's status."""
        last = self.last_outcome(job)
        return None if last is None else last.status

    def fate(self, claim: Claim) -> str:
        """How a claim ended in the rows."""
        outcome = self.outcome_of_claim.get(claim)
        if outcome is None:
            return "nothing"
        words = outcome.error or ""
        if words.startswith("rescued: "):
            return "rescued"
        if outcome.status in ("failed", "killed") and words.startswith("timed out"):
            return "timed out"
        return outcome.status

    def rescued(self, run: Run) -> bool:
        """Whether the run's claim was taken away when its lease ended."""
        return self.fate(run.claim) == "rescued"

    def over(self, run: Run) -> float:
        """Until when a run was surely at work; a killed process cannot say when it ended."""
        if run.ended is not None:
            return run.ended
        return max(run.began, self.history.kills.get(run.process, math.inf))

    @cached_property
    def overlaps(self) -> list[Overlap]:
        """All pairs of handlers of one job that were at work at once."""
        return [
            self._overlap(first, second)
            for runs in self.runs_of_job.values()
            for first, second in itertools.combinations(runs, 2)
            if second.began < self.over(first)
        ]

    def _overlap(self, first: Run, second: Run) -> Overlap:
        # The one that began later may be the stopped process' too: it had claimed before the stop.
        for stopped, other in ((first, second), (second, first)):
            stop = self._lease_ending_stop(stopped, other)
            if stop is not None:
                return Overlap(first, second, stopped, stop)
        return Overlap(first, second)

    def _lease_ending_stop(self, run: Run, other: Run) -> Stop | None:
        """The last stop that can have ended the lease of `run` before the other one began."""
        if not self.rescued(run):
            return None
        for stop in reversed(self.stops_of_process.get(run.process, [])):
            long_enough = min(stop.until, other.began) - stop.at >= LEASE_DURATION - BEAT_LATENESS
            if long_enough and self._in_flight_at(stop, run):
                return stop
        return None

    def _in_flight_at(self, stop: Stop, run: Run) -> bool:
        """Whether a process had this run in hand when it was stopped, perhaps without having begun it."""
        group = self.history.groups.get(run.group)
        return group is not None and group.since <= stop.at and run.began <= stop.until + BEGUN_AFTER_STOP

    def rescue_is_excused(self, claim: Claim) -> bool:
        """Whether something had happened to the claim's process, or the server, while it was in flight."""
        group, run = self.history.groups.get(claim[1]), self.run_of_claim.get(claim)
        process = "" if group is None else group.process
        began = -math.inf if run is None else run.began
        over = math.inf if run is None else self.over(run) + SETTLED_WITHIN
        happened = [
            (stop.at, stop.until + BEGUN_AFTER_STOP) for stop in self.stops_of_process.get(process, ())
        ]
        happened += [(outage.at, outage.until) for outage in self.history.outages]
        if killed := self.history.kills.get(process):
            happened.append((killed, killed))
        return any(began <= until and at <= over for at, until in happened)

    def begun_again(self) -> Iterator[int]:
        """The jobs that began again because the claim of an earlier handler had been taken away."""
        for job, runs in self.runs_of_job.items():
            if any(self.rescued(run) for run in runs[:-1]):
                yield job
