"""Every option's range, and combinations that contradict each other."""

from __future__ import annotations

import math
from typing import Any

import pytest

import triojobs
from triojobs._errors import OptionError
from triojobs._options import GroupOptions, checked_count, checked_name, checked_schema, checked_text


def options(**changes: Any) -> GroupOptions:
    return GroupOptions(**{"name": "web-1", **changes})


def test_the_defaults_are_consistent() -> None:
    assert options().exit_bound == 20.0


DURATIONS = [
    "close_timeout",
    "call_timeout",
    "lease_duration",
    "lease_margin",
    "beat_interval",
    "poll_interval",
    "listening_poll_interval",
    "rescan_interval",
]


@pytest.mark.parametrize("field", DURATIONS)
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", None, True, 1e12])
def test_durations_are_finite_and_positive(field: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        options(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is {value!r}, but must be finite seconds > 0")


@pytest.mark.parametrize("field", ["grace_period", "claim_linger"])
@pytest.mark.parametrize("value", [-0.1, math.nan, -math.inf, "0", None, False])
def test_these_durations_may_be_zero_but_not_less(field: str, value: object) -> None:
    assert getattr(options(**{field: 0}), field) == 0
    with pytest.raises(OptionError, match=f"{field} is .*, but must be finite seconds >= 0"):
        options(**{field: value})


def test_only_the_grace_period_may_be_infinite() -> None:
    assert options(grace_period=math.inf).exit_bound == math.inf
    with pytest.raises(OptionError, match="claim_linger is inf"):
        options(claim_linger=math.inf)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"lease_duration": 5.0}, "lease_margin", r"less than lease_duration \(5\)"),
        ({"lease_margin": 30.0}, "lease_margin", r"less than lease_duration \(30\)"),
        ({"beat_interval": 12.6}, "beat_interval", r"at most half of lease_duration - lease_margin \(12.5\)"),
        (
            {"lease_duration": 10.0},
            "beat_interval",
            r"\(2.5\), so that one lost beat does not cost the lease",
        ),
    ],
)
def test_leases_that_cannot_be_kept_cannot_be_constructed(changes: Any, field: str, text: str) -> None:
    with pytest.raises(OptionError, match=text) as caught:
        options(**changes)
    assert caught.value.field == field


def test_the_longest_beat_interval_is_allowed() -> None:
    assert options(beat_interval=12.5).beat_interval == 12.5


def test_a_hard_stop_comes_a_minute_after_the_cancel_or_when_it_was_said() -> None:
    assert options().hard_stop_patience == math.inf
    assert options(hard_stop=print).hard_stop_patience == 60.0
    assert options(hard_stop=print, hard_stop_after=0.5).hard_stop_patience == 0.5


async def asynchronous(why: triojobs.HardStop) -> None: ...


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hard_stop": 5}, "hard_stop"),
        ({"hard_stop": asynchronous}, "hard_stop"),
        ({"hard_stop": print, "hard_stop_after": 0}, "hard_stop_after"),
        ({"hard_stop": print, "hard_stop_after": math.inf}, "hard_stop_after"),
        ({"hard_stop_after": 5.0}, "hard_stop_after"),
    ],
)
def test_a_hard_stop_that_could_not_be_called_is_refused(changes: Any, field: str) -> None:
    with pytest.raises(OptionError) as caught:
        options(**changes)
    assert caught.value.field == field


def test_a_loop_is_given_up_after_ten_leases_or_when_it_was_said() -> None:
    assert options(lease_duration=20.0, beat_interval=5.0).loop_death == 200.0
    assert options(loop_dead_after=31.0).loop_death == 31.0
    assert options(loop_dead_after=math.inf).loop_death == math.inf


@pytest.mark.parametrize("value", [29.0, 0, -math.inf, math.nan, "60", True])
def test_a_loop_is_not_given_up_within_one_lease(value: object) -> None:
    with pytest.raises(OptionError, match=r"loop_dead_after is .*, but must be finite seconds >= 30"):
        options(loop_dead_after=value)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("name", "", "a str of 1 to 255 bytes"),
        ("name", "x" * 256, r"\(it has 256\)"),
        ("name", "ü" * 128, r"\(it has 256\)"),
        ("name", "a\0b", "without NUL"),
        ("name", "\ud800", "a str of 1 to 255 bytes"),
        ("name", None, "a str of 1 to 255 bytes"),
        ("schema", "", "1 to 40 of a-z, 0-9 and _"),
        ("schema", "Jobs", "1 to 40 of a-z"),
        ("schema", "1jobs", "not starting with a digit"),
        ("schema", "x" * 41, "1 to 40"),
        ("schema", "jobs\n", "1 to 40"),
        ("schema", None, "1 to 40"),
        ("job_connections", 0, "an int from 1 to 1000"),
        ("job_connections", 1001, "an int from 1 to 1000"),
        ("job_connections", True, "an int from 1 to 1000"),
        ("concurrency", 0, "an int from 1 to 1000000"),
        ("concurrency", 1.0, "an int from 1 to 1000000"),
        ("isolation", "process", "'slot' or 'task'"),
        ("notify", 1, "True or False"),
        ("pooled", None, "True or False"),
    ],
)
def test_values_out_of_range_are_refused_with_field_value_and_limit(
    field: str, value: object, limit: str
) -> None:
    with pytest.raises(OptionError, match=limit) as caught:
        options(**{field: value})
    assert caught.value.field == field
    assert caught.value.value == value


@pytest.mark.parametrize("value", [["slot"], {}])
def test_a_value_that_cannot_be_hashed_is_refused_like_any_other(value: object) -> None:
    with pytest.raises(OptionError, match="'slot' or 'task'"):
        options(isolation=value)


def test_texts_are_measured_in_bytes() -> None:
    assert checked_text("key", "ü" * 512, least=0, most=1024) == "ü" * 512
    assert checked_text("key", "", least=0, most=1024) == ""
    assert checked_name("queue", "x" * 255) == "x" * 255


@pytest.mark.parametrize("value", [0, 2**31, "1", 1.0, True, None, -1])
def test_counts_are_ints_in_range(value: object) -> None:
    with pytest.raises(OptionError, match=f"an int from 1 to {2**31 - 1}"):
        checked_count("max_attempts", value)


def test_schemas_that_need_no_quoting_pass() -> None:
    assert checked_schema("_jobs_2") == "_jobs_2"
