"""Who owns which claim: plain cases, then every order of bookings, ends, losses and commits."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from triojobs._ledger import Ledger
from triojobs._model import Claim, Outcome, Settled, Settlement

GROUP = uuid.uuid4()


def claim(job_id: int, claim_no: int = 1) -> Claim:
    return Claim(
        job_id=job_id,
        claim_no=claim_no,
        group_id=GROUP,
        queue="q",
        attempt=1,
        max_attempts=5,
        priority=0,
        run_at=0.0,
        enqueued_at=0.0,
        payload=b"\0",
        encoding=b"cbor",
        timeout=None,
        deadline=None,
        claimed_at=0.0,
        key=None,
        metadata=None,
        last_error=None,
    )


def end(claim: Claim, outcome: Outcome = Outcome.DONE) -> Settlement:
    return Settlement(claim.job_id, claim.claim_no, outcome)


def written(settlement: Settlement, outcome: Outcome | None = None) -> Settled:
    return Settled(settlement.job_id, settlement.claim_no, outcome or settlement.outcome)


def test_a_claim_is_owned_from_its_booking_until_its_end_is_written() -> None:
    ledger, one = Ledger(), claim(1)
    ledger.book([one])
    assert ledger.owns(one)
    assert ledger.known() == [(1, 1)]
    assert ledger.take_booked() == [one]
    assert ledger.take_booked() == []
    assert ledger.settle(one, end(one))
    assert not ledger.owns(one)
    assert (ledger.held, ledger.unsettled) == (1, 1)
    [settlement] = ledger.ended(10)
    assert ledger.close_out([settlement], [written(settlement)]) == []
    assert (ledger.held, ledger.unsettled, ledger.settled[Outcome.DONE]) == (0, 0, 1)


def test_a_claim_ends_once() -> None:
    ledger, one = Ledger(), claim(1)
    ledger.book([one])
    assert ledger.settle(one, end(one))
    assert not ledger.settle(one, end(one, Outcome.FAILED))
    assert ledger.ended(1)[0].outcome is Outcome.DONE


def test_a_claim_that_is_not_ours_cannot_be_settled() -> None:
    assert not Ledger().settle(claim(1), end(claim(1)))


def test_every_end_is_announced_once() -> None:
    calls: list[int] = []
    ledger = Ledger(on_ended=lambda: calls.append(1))
    one = claim(1)
    ledger.book([one])
    ledger.settle(one, end(one))
    ledger.settle(one, end(one))
    assert len(calls) == 1


def test_settlements_come_in_id_order_and_at_most_as_many_as_asked() -> None:
    ledger = Ledger()
    claims = [claim(n) for n in (5, 3, 9, 1)]
    ledger.book(claims)
    for one in claims:
        ledger.settle(one, end(one))
    assert [s.job_id for s in ledger.ended(10)] == [1, 3, 5, 9]
    assert [s.job_id for s in ledger.ended(2)] == [3, 5]  # those that ended first
    assert ledger.unsettled == 4


def test_what_was_not_written_is_stale_and_forgotten() -> None:
    ledger, one, two = Ledger(), claim(1), claim(2)
    ledger.book([one, two])
    ends = [end(one), end(two)]
    ledger.settle(one, ends[0])
    ledger.settle(two, ends[1])
    assert ledger.close_out(ends, [written(ends[1])]) == [ends[0]]
    assert (ledger.held, ledger.stale) == (0, 1)


def test_the_outcome_that_was_written_is_counted_not_the_one_asked_for() -> None:
    ledger, one = Ledger(), claim(1)
    ledger.book([one])
    ledger.settle(one, end(one, Outcome.FAILED))
    ledger.close_out([end(one, Outcome.FAILED)], [written(end(one), Outcome.CANCELLED)])
    assert ledger.settled == {Outcome.CANCELLED: 1}


def test_a_commit_wins_over_what_the_handler_does_afterwards() -> None:
    ledger, one = Ledger(), claim(1)
    ledger.book([one])
    ledger.committed(one)
    assert not ledger.owns(one)
    assert not ledger.settle(one, end(one, Outcome.FAILED))
    assert (ledger.held, ledger.settled[Outcome.DONE]) == (0, 1)


def test_a_commit_wins_over_an_end_that_was_not_written_yet() -> None:
    ledger, one = Ledger(), claim(1)
    ledger.book([one])
    ledger.settle(one, end(one, Outcome.CANCELLED))
    ledger.committed(one)
    assert (ledger.held, ledger.unsettled) == (0, 0)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SNOOZED, Outcome.RELEASED])
def test_a_new_claim_of_a_job_shows_that_the_end_of_the_older_one_was_written(outcome: Outcome) -> None:
    ledger, old, new = Ledger(), claim(1, 1), claim(1, 2)
    ledger.book([old])
    ledger.settle(old, end(old, outcome))
    batch = ledger.ended(10)  # committed, and its reply is lost or late
    ledger.book([new])
    assert ledger.released + ledger.settled[outcome] == 1
    assert ledger.stale == 0
    assert ledger.owns(new)
    assert not ledger.owns(old)
    assert ledger.close_out(batch, []) == []  # counted already
    assert ledger.owns(new)


def test_the_closing_counts_what_it_wrote_and_names_what_it_did_not_find() -> None:
    ledger = Ledger()
    claims = [claim(n) for n in (1, 2, 3)]
    ledger.book(claims)
    rows = [
        Settled(1, 1, Outcome.RELEASED),
        Settled(2, 1, Outcome.CANCELLED),
        Settled(7, 9, Outcome.RELEASED),
    ]
    assert ledger.forget_all(rows) == [3]
    assert (ledger.held, ledger.unsettled, ledger.take_booked()) == (0, 0, [])
    assert (ledger.released, ledger.settled[Outcome.CANCELLED], ledger.stale) == (2, 1, 1)


def test_a_claim_that_the_database_lost_is_stale_and_forgotten() -> None:
    ledger, lost, kept = Ledger(), claim(1), claim(2)
    ledger.book([lost, kept])
    assert ledger.lose([(1, 1), (2, 9), (3, 1)]) == [(1, 1)]  # (2, 9) is another claim, 3 is unknown
    assert not ledger.owns(lost)
    assert not ledger.settle(lost, end(lost))
    assert (ledger.held_ids(), ledger.stale) == ([2], 1)


def test_a_lost_claim_that_has_ended_is_left_to_its_settlement() -> None:
    ledger, one = Ledger(), claim(1)
    ledger.book([one])
    ledger.settle(one, end(one))
    assert ledger.lose([(1, 1)]) == []
    assert (ledger.held, ledger.unsettled, ledger.stale) == (1, 1, 0)


class Books(RuleBasedStateMachine):
    """The ledger beside a model: for each job the newest claim, and where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.claim_no = 0
        self.owned: dict[int, Claim] = {}
        self.ended: dict[int, Settlement] = {}
        self.counted = 0  # claims whose fate has been told: settled, released or stale
        self.superseded = 0  # claims replaced while a handler still had them
        self.claims: list[Claim] = []

    @rule(ids=st.sets(st.integers(1, 4), min_size=1))
    def book(self, ids: set[int]) -> None:
        self.claim_no += 1
        batch = [claim(n, self.claim_no) for n in sorted(ids)]
        self.ledger.book(batch)
        for one in batch:
            if one.job_id in self.ended:
                del self.ended[one.job_id]
                self.counted += 1
            elif one.job_id in self.owned:
                self.superseded += 1
            self.owned[one.job_id] = one
        self.claims += batch

    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)))
    def settle(self, data: st.DataObject, outcome: Outcome) -> None:
        if not self.claims:
            return
        one = data.draw(st.sampled_from(self.claims))
        possible = self.owned.get(one.job_id) is one and one.job_id not in self.ended
        assert self.ledger.settle(one, end(one, outcome)) == possible
        if possible:
            self.ended[one.job_id] = end(one, outcome)

    @rule(data=st.data(), limit=st.integers(1, 5))
    def write(self, data: st.DataObject, limit: int) -> None:
        batch = self.ledger.ended(limit)
        assert len(batch) == min(limit, len(self.ended))
        assert all(self.ended[s.job_id] == s for s in batch)
        found = [s for s in batch if data.draw(st.booleans())]
        stale = self.ledger.close_out(batch, [written(s) for s in found])
        assert stale == [s for s in batch if s not in found]
        for settlement in batch:
            del self.ended[settlement.job_id], self.owned[settlement.job_id]
            self.counted += 1

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if not self.claims:
            return
        one = data.draw(st.sampled_from(self.claims))
        self.ledger.committed(one)
        if self.owned.get(one.job_id) is one:
            del self.owned[one.job_id]
            self.ended.pop(one.job_id, None)
            self.counted += 1

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        missing = [one for one in self.claims if data.draw(st.booleans())]
        lost = [o for o in missing if self.owned.get(o.job_id) is o and o.job_id not in self.ended]
        told = self.ledger.lose([(one.job_id, one.claim_no) for one in missing])
        assert told == [(one.job_id, one.claim_no) for one in lost]
        for one in lost:
            del self.owned[one.job_id]
            self.counted += 1

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        found = [n for n in sorted(self.owned) if data.draw(st.booleans())]
        rows = [Settled(n, self.owned[n].claim_no, Outcome.RELEASED) for n in found]
        assert self.ledger.forget_all(rows) == sorted(set(self.owned) - set(found))
        self.counted += len(self.owned)
        self.owned.clear()
        self.ended.clear()

    @invariant()
    def what_is_held_is_what_the_model_holds(self) -> None:
        assert self.ledger.held_ids() == sorted(self.owned)
        assert sorted(self.ledger.known()) == sorted((c.job_id, c.claim_no) for c in self.owned.values())
        assert self.ledger.unsettled == len(self.ended)
        for one in self.claims:
            owned = self.owned.get(one.job_id) is one and one.job_id not in self.ended
            assert self.ledger.owns(one) == owned

    @invariant()
    def every_claim_is_held_counted_or_superseded(self) -> None:
        told = sum(self.ledger.settled.values()) + self.ledger.released + self.ledger.stale
        assert told == self.counted
        assert self.ledger.claimed == self.ledger.held + self.counted + self.superseded


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
