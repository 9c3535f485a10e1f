"""What a handler's end means: everything that it may raise, against everything that may go on around it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from triojobs._errors import Kill, RetryAfter, Snooze
from triojobs._model import Claim, Outcome
from triojobs._verdict import Circumstances, Verdict, capped, describe, judge

CUT = "…[truncated]"


def claim(attempt: int = 1, max_attempts: int = 2) -> Claim:
    return Claim(
        job_id=1,
        claim_no=1,
        group_id=uuid.UUID(int=1),
        queue="q",
        attempt=attempt,
        max_attempts=max_attempts,
        priority=0,
        run_at=0.0,
        enqueued_at=0.0,
        payload=b"",
        encoding=b"cbor",
        timeout=None,
        deadline=None,
        claimed_at=0.0,
        key=None,
        metadata=None,
        last_error=None,
    )


def cancelled() -> trio.Cancelled:
    return trio.Cancelled._create(source="explicit")


def mixed(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    """What a nursery of the handler's raises when a child fails while it is being cancelled."""
    return BaseExceptionGroup("mixed", [cancelled(), *errors])


NOTHING = Circumstances()
INTERRUPTED = Circumstances(interrupted=True)
ASKED = Circumstances(cancel_reason="sold out", interrupted=True)
TIMED_OUT = Circumstances(timed_out=1.5, interrupted=True)
PAST_DEADLINE = Circumstances(past_deadline=True, interrupted=True)


@dataclass(frozen=True)
class Case:
    raised: BaseException
    around: Circumstances
    outcome: Outcome
    error: str | None = None  # how it begins; None: there is none
    delay: float | None = None
    logged: type[BaseException] | None = None
    goes_on: bool = False


FAILED, KILLED, RELEASED = Outcome.FAILED, Outcome.KILLED, Outcome.RELEASED
CANCELLED, SNOOZED = Outcome.CANCELLED, Outcome.SNOOZED

CASES: dict[str, Case] = {
    "an error": Case(ValueError("x"), NOTHING, FAILED, "ValueError: x"),
    "a group of errors": Case(
        ExceptionGroup("two", [ValueError("x"), KeyError("y")]), NOTHING, FAILED, "ExceptionGroup: two"
    ),
    "RetryAfter": Case(RetryAfter(9.0, "later"), NOTHING, FAILED, "later", delay=9.0),
    "RetryAfter from a nursery": Case(
        ExceptionGroup("n", [RetryAfter(9.0, "later")]), NOTHING, FAILED, "later", delay=9.0
    ),
    "Snooze": Case(Snooze(9.0), NOTHING, SNOOZED, delay=9.0),
    "Snooze from a nursery": Case(
        ExceptionGroup("n", [ExceptionGroup("n", [Snooze(9.0)])]), NOTHING, SNOOZED, delay=9.0
    ),
    "Kill": Case(Kill("no use"), NOTHING, KILLED, "no use"),
    "Kill from a nursery": Case(ExceptionGroup("n", [Kill("no use")]), NOTHING, KILLED, "no use"),
    "two signals are no signal": Case(
        ExceptionGroup("n", [Kill("a"), Snooze(1.0)]), NOTHING, FAILED, "ExceptionGroup: n"
    ),
    "TooSlowError of its own scope": Case(trio.TooSlowError(), NOTHING, FAILED, "trio.TooSlowError"),
    # The group stops, is cancelled, or has lost its lease.
    "interrupted": Case(cancelled(), INTERRUPTED, RELEASED, goes_on=True),
    "an error while interrupted": Case(ValueError("x"), INTERRUPTED, RELEASED, logged=ValueError),
    "both while interrupted": Case(
        mixed(ValueError("x")), INTERRUPTED, RELEASED, logged=ExceptionGroup, goes_on=True
    ),
    "RetryAfter while interrupted": Case(RetryAfter(9.0), INTERRUPTED, RELEASED, logged=RetryAfter),
    "Kill while interrupted": Case(Kill("no use"), INTERRUPTED, KILLED, "no use"),
    "Kill beside Cancelled": Case(mixed(Kill("no use")), INTERRUPTED, KILLED, "no use", goes_on=True),
    "Snooze while interrupted": Case(Snooze(9.0), INTERRUPTED, SNOOZED, delay=9.0),
    "cancelled by nobody": Case(cancelled(), NOTHING, RELEASED, goes_on=True),
    # Somebody asked to cancel it.
    "asked": Case(cancelled(), ASKED, CANCELLED, "sold out", goes_on=True),
    "an error when asked": Case(ValueError("x"), ASKED, CANCELLED, "sold out", logged=ValueError),
    "both when asked": Case(
        mixed(ValueError("x")), ASKED, CANCELLED, "sold out", logged=ExceptionGroup, goes_on=True
    ),
    "Kill when asked": Case(Kill("no use"), ASKED, KILLED, "no use"),
    # Its time was up.
    "timed out": Case(cancelled(), TIMED_OUT, FAILED, "timed out after 1.5 s", goes_on=True),
    "an error after the timeout": Case(
        ValueError("x"), TIMED_OUT, FAILED, "timed out after 1.5 s; while being cancelled:\nValueError: x"
    ),
    "past its deadline": Case(cancelled(), PAST_DEADLINE, KILLED, "past its deadline", goes_on=True),
    "an error past its deadline": Case(
        ValueError("x"), PAST_DEADLINE, KILLED, "past its deadline", logged=ValueError
    ),
    # What ends the program.
    "KeyboardInterrupt": Case(KeyboardInterrupt(), NOTHING, RELEASED, goes_on=True),
    "KeyboardInterrupt in a group": Case(
        mixed(KeyboardInterrupt(), ValueError()), INTERRUPTED, RELEASED, goes_on=True
    ),
    "SystemExit": Case(SystemExit(3), NOTHING, FAILED, "SystemExit: 3", goes_on=True),
    "SystemExit in a group": Case(
        mixed(SystemExit(3)), INTERRUPTED, FAILED, "BaseExceptionGroup: mixed", goes_on=True
    ),
    "GeneratorExit": Case(GeneratorExit(), NOTHING, FAILED, "GeneratorExit", goes_on=True),
    "SystemExit when asked": Case(SystemExit(3), ASKED, FAILED, "SystemExit: 3", goes_on=True),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_handlers_end_means(name: str) -> None:
    case = CASES[name]
    verdict = judge(case.raised, claim(), case.around)
    assert verdict.outcome is case.outcome
    assert (verdict.error or "").startswith(case.error or "")
    assert (verdict.error is None) is (case.error is None)
    assert verdict.delay == case.delay
    if case.logged is None:
        assert verdict.log_error is None
    else:
        assert isinstance(verdict.log_error, case.logged)
        assert not isinstance(verdict.log_error, trio.Cancelled)
    assert (verdict.propagate is not None) is case.goes_on


@pytest.mark.parametrize(("attempt", "outcome"), [(1, FAILED), (2, FAILED), (3, KILLED), (4, KILLED)])
@pytest.mark.parametrize("raised", [ValueError("x"), RetryAfter(1.0), SystemExit(3)])
def test_a_failure_kills_when_attempts_are_used_up(
    raised: BaseException, attempt: int, outcome: Outcome
) -> None:
    assert judge(raised, claim(attempt, 3), NOTHING).outcome is outcome
    if isinstance(raised, ValueError):
        assert judge(cancelled(), claim(attempt, 3), TIMED_OUT).outcome is outcome


def test_what_goes_on_is_the_cancelled_part_and_what_is_logged_is_the_rest() -> None:
    error = ValueError("x")
    raised = mixed(error)
    verdict = judge(raised, claim(), INTERRUPTED)
    assert isinstance(verdict.propagate, BaseExceptionGroup)
    assert [type(e) for e in verdict.propagate.exceptions] == [trio.Cancelled]
    assert isinstance(verdict.log_error, ExceptionGroup)
    assert verdict.log_error.exceptions == (error,)


def test_what_ends_the_program_goes_on_whole() -> None:
    raised = mixed(SystemExit(3), ValueError())
    assert judge(raised, claim(), INTERRUPTED).propagate is raised


def test_a_verdict_is_a_value() -> None:
    assert judge(Snooze(1.0), claim(), NOTHING) == Verdict(SNOOZED, delay=1.0)


# Texts.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 8192, "x" * 8192),
        ("x" * 8193, "x" * (8192 - len(CUT.encode())) + CUT),
        ("é" * 4096, "é" * 4096),
        ("é" * 4097, "é" * ((8192 - len(CUT.encode())) // 2) + CUT),
        ("a\0b", "a\N{REPLACEMENT CHARACTER}b"),
        ("\ud800", "?"),
        ("", ""),
    ],
    ids=["8192", "8193", "8192 of two bytes", "8194 of two bytes", "NUL", "lone surrogate", "empty"],
)
def test_texts_are_cut_on_a_character_boundary_and_cleaned(text: str, expected: str) -> None:
    found = capped(text)
    assert found == expected
    assert len(found.encode()) <= 8192


def test_a_description_has_type_message_and_the_innermost_frames() -> None:
    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("at the bottom")
        deep(n - 1)

    with pytest.raises(ValueError, match="bottom") as caught:
        deep(100)
    text = describe(caught.value)
    assert text.startswith("ValueError: at the bottom\n")
    assert "test_verdict.py" in text
    assert "test_a_description" not in text  # more than 20 frames above
    assert text.rstrip().endswith('raise ValueError("at the bottom")')


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("error", [Unspeakable(), ExceptionGroup("n", [Unspeakable()])])
def test_an_error_whose_text_fails_is_described_all_the_same(error: Exception) -> None:
    assert "Unspeakable" in describe(error)


def test_a_huge_group_is_described_in_bounded_text() -> None:
    nested: Any = ExceptionGroup("n", [ValueError(i) for i in range(10_000)])
    for _ in range(50):
        nested = ExceptionGroup("n", [nested])
    assert len(describe(nested).encode()) <= 8192
