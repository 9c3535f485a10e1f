"""What errors say, and that no value makes them say too much."""

from __future__ import annotations

import pytest

import triojobs
from triojobs._errors import MAX_SECONDS, OptionError, checked_seconds, sole_error


def test_an_error_says_while_doing_what_and_what_to_do() -> None:
    exc = triojobs.DatabaseError("it broke", operation="claiming jobs", hint="look at the log")
    assert str(exc) == "while claiming jobs: it broke; look at the log"
    assert (exc.operation, exc.hint) == ("claiming jobs", "look at the log")
    assert str(triojobs.TriojobsError("it broke")) == "it broke"


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("OptionError", ValueError),
        ("DatabaseError", triojobs.TriojobsError),
        ("SchemaError", triojobs.DatabaseError),
        ("CodecError", triojobs.TriojobsError),
        ("DuplicateJobError", triojobs.TriojobsError),
        ("JobNotFoundError", triojobs.TriojobsError),
        ("GroupNotFoundError", triojobs.TriojobsError),
        ("JobFailedError", triojobs.TriojobsError),
        ("JobCancelledError", triojobs.TriojobsError),
        ("StaleClaimError", triojobs.TriojobsError),
        ("LeaseLostError", triojobs.TriojobsError),
    ],
)
def test_the_error_tree(name: str, base: type[Exception]) -> None:
    assert issubclass(getattr(triojobs, name), base)
    assert issubclass(getattr(triojobs, name), triojobs.TriojobsError)


def test_signals_are_no_errors_of_ours() -> None:
    for signal in (triojobs.RetryAfter, triojobs.Snooze, triojobs.Kill):
        assert not issubclass(signal, triojobs.TriojobsError)


def test_an_option_error_names_field_value_and_limit() -> None:
    exc = OptionError("priority", -1, "an int from 0 to 9")
    assert str(exc) == "priority is -1, but must be an int from 0 to 9"
    assert (exc.field, exc.value, exc.limit) == ("priority", -1, "an int from 0 to 9")


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


DEEP: list[object] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("x" * 10_000_000, id="text"),
        pytest.param(b"x" * 10_000_000, id="bytes"),
        pytest.param(["x" * 1000] * 1000, id="list"),
        pytest.param(10**5000, id="digits"),
        pytest.param(Unshowable(), id="unshowable"),
        pytest.param(DEEP, id="deep"),
    ],
)
def test_no_value_makes_the_text_of_an_option_error_long_or_fail(value: object) -> None:
    exc = OptionError("payload", value, "small")
    assert len(str(exc)) < 200
    assert exc.value is value


def test_a_duplicate_names_key_holder_and_index_in_a_bounded_text() -> None:
    exc = triojobs.DuplicateJobError(queue="q" * 255, key="k" * 1024, job_id=7, index=3)
    assert "is held by job 7 (item 3 of the call); nothing was enqueued" in str(exc)
    assert len(str(exc)) < 600
    assert (exc.key, exc.job_id, exc.index) == ("k" * 1024, 7, 3)


def test_database_errors_say_whether_they_were_committed() -> None:
    exc = triojobs.DatabaseError("x", sqlstate="40001", transient=True, committed=None)
    assert (exc.sqlstate, exc.transient, exc.committed) == ("40001", True, None)
    assert triojobs.DatabaseError("x").committed is False


@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf"), MAX_SECONDS + 1, "1", None, True])
def test_seconds_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(OptionError, match="must be finite seconds >= 0 and <="):
        checked_seconds("delay", seconds)
    for signal in (triojobs.RetryAfter, triojobs.Snooze):
        with pytest.raises(OptionError):
            signal(seconds)


@pytest.mark.parametrize("seconds", [0, 0.0, 1, 1.5, MAX_SECONDS])
def test_seconds_in_range_become_floats(seconds: float) -> None:
    checked = checked_seconds("delay", seconds)
    assert checked == seconds
    assert type(checked) is float


def test_positive_seconds_exclude_zero() -> None:
    with pytest.raises(OptionError, match="> 0"):
        checked_seconds("timeout", 0, positive=True)


def test_signals_carry_what_they_ask_for() -> None:
    assert triojobs.RetryAfter(2).seconds == 2.0
    assert str(triojobs.RetryAfter(2, "rate limited")) == "rate limited"
    assert str(triojobs.RetryAfter(2)) == "retry after 2 s"
    assert triojobs.Snooze(0).seconds == 0.0
    assert triojobs.Kill("no such user").reason == "no such user"


def test_the_sole_error_of_a_group_is_found_through_all_layers() -> None:
    leaf = ValueError("x")
    assert sole_error(leaf) is leaf
    assert sole_error(ExceptionGroup("", [ExceptionGroup("", [leaf])])) is leaf
    assert sole_error(ExceptionGroup("", [leaf, KeyError()])) is None
    assert sole_error(None) is None
