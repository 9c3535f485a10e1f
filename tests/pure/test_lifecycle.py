"""The status table, and the tables in memory held against it, event by event."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triojobs._lifecycle import TRANSITIONS, Event, IllegalTransitionError, after, outcome_of_failure
from triojobs._memory_tables import Tables
from triojobs._model import Claim, JobStatus, NewRow, Outcome, Registration, Settlement
from triojobs._store import ClaimOrder

EXPECTED = {
    JobStatus.PENDING: {
        Event.CLAIM: JobStatus.RUNNING,
        Event.CANCEL: JobStatus.CANCELLED,
        Event.REPLACE: JobStatus.PENDING,
    },
    JobStatus.FAILED: {Event.CLAIM: JobStatus.RUNNING, Event.CANCEL: JobStatus.CANCELLED},
    JobStatus.RUNNING: {
        Event.SETTLE_DONE: JobStatus.DONE,
        Event.SETTLE_FAILED: JobStatus.FAILED,
        Event.SETTLE_KILLED: JobStatus.KILLED,
        Event.SETTLE_CANCELLED: JobStatus.CANCELLED,
        Event.SNOOZE: JobStatus.PENDING,
        Event.RELEASE: JobStatus.PENDING,
        Event.RESCUE: JobStatus.FAILED,
    },
    JobStatus.DONE: {Event.RETRY: JobStatus.PENDING},
    JobStatus.KILLED: {Event.RETRY: JobStatus.PENDING},
    JobStatus.CANCELLED: {Event.RETRY: JobStatus.PENDING},
}


@pytest.mark.parametrize("status", list(JobStatus))
@pytest.mark.parametrize("event", list(Event))
def test_the_whole_table(status: JobStatus, event: Event) -> None:
    expected = EXPECTED[status].get(event)
    if expected is not None:
        assert after(status, event) is expected
    else:
        with pytest.raises(
            IllegalTransitionError, match=f"{event} is not possible for a job that is {status}"
        ):
            after(status, event)


def test_there_is_nothing_in_the_table_beyond_it() -> None:
    assert len(TRANSITIONS) == sum(len(events) for events in EXPECTED.values())


@pytest.mark.parametrize("status", list(JobStatus))
def test_an_ended_job_is_left_by_a_retry_alone(status: JobStatus) -> None:
    possible = {event for (s, event) in TRANSITIONS if s is status}
    assert status.ended == (possible == {Event.RETRY})


@pytest.mark.parametrize(
    ("attempt", "most", "outcome"),
    [(1, 1, Outcome.KILLED), (1, 2, Outcome.FAILED), (2, 2, Outcome.KILLED), (3, 2, Outcome.KILLED)],
)
def test_a_failure_kills_when_attempts_are_used_up(attempt: int, most: int, outcome: Outcome) -> None:
    assert outcome_of_failure(attempt, most) is outcome


ENDS = {
    Event.SETTLE_DONE: Outcome.DONE,
    Event.SETTLE_FAILED: Outcome.FAILED,
    Event.SETTLE_KILLED: Outcome.KILLED,
    Event.SETTLE_CANCELLED: Outcome.CANCELLED,
    Event.SNOOZE: Outcome.SNOOZED,
    Event.RELEASE: Outcome.RELEASED,
}


class OneJob(RuleBasedStateMachine):
    """One job under random events; the status follows the table, stale writes change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables()
        self.now = 0.0
        self.claim_no = 0
        self.group_id = self.new_group()
        self.row = NewRow("q", b"\0", "cbor", key="k", max_attempts=3)
        self.job_id = self.tables.enqueue([self.row], self.now)[0].id
        self.status = JobStatus.PENDING
        self.failed_before = False
        self.asked_to_cancel = False
        self.claim: Claim | None = None
        self.old_claims: list[Claim] = []

    def new_group(self) -> uuid.UUID:
        group_id = uuid.uuid4()
        self.tables.register(Registration(group_id, "g", "h", 1, "0", 30.0), self.now)
        return group_id

    def happened(self, event: Event) -> None:
        self.status = after(self.status, event)
        if self.status is JobStatus.PENDING and self.failed_before:
            self.status = JobStatus.FAILED  # see the note at the table
        self.failed_before |= self.status is JobStatus.FAILED
        if self.status is not JobStatus.RUNNING and self.claim is not None:
            self.old_claims.append(self.claim)
            self.claim, self.asked_to_cancel = None, False

    @property
    def waits(self) -> bool:
        return self.status in (JobStatus.PENDING, JobStatus.FAILED)

    @precondition(lambda self: self.waits)
    @rule()
    def claimed(self) -> None:
        self.now += 10.0
        self.claim_no += 1
        self.tables.promote(["q"], self.now)
        order = ClaimOrder(self.group_id, 1, self.claim_no, {"q": 5})
        [self.claim] = self.tables.claim(order, self.now)
        self.happened(Event.CLAIM)

    @precondition(lambda self: self.status is JobStatus.RUNNING)
    @rule(event=st.sampled_from(list(ENDS)))
    def settled(self, event: Event) -> None:
        assert self.claim is not None
        written, _ = self.tables.settle(self.group_id, [self.settlement(self.claim, ENDS[event])], self.now)
        if self.asked_to_cancel and event is not Event.SETTLE_DONE:
            event = Event.SETTLE_CANCELLED
        assert [row.outcome for row in written] == [ENDS[event]]
        self.happened(event)

    def settlement(self, claim: Claim, outcome: Outcome) -> Settlement:
        return Settlement(claim.job_id, claim.claim_no, outcome, delay=5.0)

    @precondition(lambda self: self.old_claims)
    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)))
    def settled_late(self, data: st.DataObject, outcome: Outcome) -> None:
        claim = data.draw(st.sampled_from(self.old_claims))
        before = self.tables.read(self.job_id)
        self.tables.settle(claim.group_id, [self.settlement(claim, outcome)], self.now)
        assert self.tables.read(self.job_id) == before

    @precondition(lambda self: self.status is JobStatus.RUNNING)
    @rule(closing=st.booleans())
    def group_ended(self, closing: bool) -> None:
        assert self.claim is not None
        if closing:
            self.tables.close_group(self.group_id, self.now)
            event = Event.RELEASE
        else:
            self.tables.rescue([self.group_id], self.now)
            killed = self.claim.attempt >= self.claim.max_attempts  # a settlement may overrule the policy
            event = Event.SETTLE_KILLED if killed else Event.RESCUE
        self.happened(Event.SETTLE_CANCELLED if self.asked_to_cancel else event)
        self.group_id = self.new_group()

    @rule()
    def cancelled(self) -> None:
        cancelled, _ = self.tables.cancel(self.job_id, "why", self.now)
        assert cancelled == (not self.status.ended)
        if self.status is JobStatus.RUNNING:
            self.asked_to_cancel = True
        elif self.waits:
            self.happened(Event.CANCEL)

    @rule(delay=st.sampled_from([0.0, 5.0]))
    def replaced(self, delay: float) -> None:
        new = NewRow("q", b"\1", "cbor", key="k", max_attempts=3, delay=delay, on_conflict="replace")
        [answer] = self.tables.enqueue([new], self.now)
        assert answer.id == self.job_id
        possible = self.status is JobStatus.PENDING and not self.failed_before
        assert answer.replaced == possible

    @invariant()
    def status_is_the_tables(self) -> None:
        assert self.tables.status(self.job_id) is self.status

    @invariant()
    def tables_are_sound(self) -> None:
        self.tables.check_invariants()


TestOneJob = OneJob.TestCase
TestOneJob.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
