"""Durations, times and JSON as they are written on a command line."""

from __future__ import annotations

import datetime as dt
import math
import uuid

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triojobs.cli.output import plain, shown_seconds
from triojobs.cli.values import parsed_duration, parsed_instant, parsed_json


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("90", 90.0),
        ("1.5", 1.5),
        ("90s", 90.0),
        ("250ms", 0.25),
        ("1h30m", 5400.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
        ("1d2h3m4s", 93784.0),
        ("1m500ms", 60.5),
        (" 5s ", 5.0),
        ("520w", 520 * 604800.0),
    ],
)
def test_a_duration_is_numbers_with_units(text: str, seconds: float) -> None:
    assert parsed_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "5x",
        "1h 30m",
        "-5s",
        "+5s",
        "1h1h",
        "5S",
        "5 minutes",
        "nan",
        "inf",
        "1e3",
        "٣s",
        "forever",
        "600w",
        "9" * 400,
    ],
)
def test_what_is_no_duration_is_repeated_with_what_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as 90s, 1h30m or 7d"):
        parsed_duration(text)


def test_only_where_it_makes_sense_a_duration_is_forever() -> None:
    assert parsed_duration("forever", forever=True) == math.inf


@given(st.text(max_size=20))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    try:
        assert 0 <= parsed_duration(text) <= 10 * 366 * 86400
    except ValueError:
        with pytest.raises(ValueError, match="is not a duration"):
            parsed_duration(text)


@pytest.mark.parametrize(
    "text", ["2030-01-31T09:00Z", "2030-01-31T10:00+01:00", "2030-01-31 09:00:00.0+00:00"]
)
def test_a_time_has_a_zone(text: str) -> None:
    assert parsed_instant(text) == dt.datetime(2030, 1, 31, 9, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    "text", ["", "now", "2030-01-31", "2030-01-31T09:00", "2030-02-30T09:00Z", "0001-01-01T00:00+23:00"]
)
def test_what_is_no_time_is_repeated_with_what_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time with its zone such as"):
        parsed_instant(text)


@pytest.mark.parametrize(
    "text", ["{", "NaN", "-Infinity", "[1,]", "'x'", '{"a":1,"a":2}', "[" * 100_000, "\ud800"]
)
def test_what_is_no_json_is_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="this is no JSON"):
        parsed_json(text, "JSON")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1.0, "0s"),
        (0.0, "0ms"),
        (0.0426, "43ms"),
        (0.9999, "1.0s"),
        (59.9, "59.9s"),
        (59.96, "1m00s"),
        (3599.6, "1h00m"),
        (5400.0, "1h30m"),
        (172_800.0, "2d00h"),
    ],
)
def test_seconds_are_shown_in_two_units_at_most(seconds: float | None, text: str) -> None:
    assert shown_seconds(seconds) == text


def test_whatever_a_payload_holds_has_a_form_in_json() -> None:
    value = {
        1: {b"k": math.nan},
        "at": dt.datetime(2030, 1, 1, tzinfo=dt.UTC),
        "id": uuid.UUID(int=1),
        "bytes": b"\x00\xff",
        "set": frozenset({1}),
        (1, 2): object,
    }
    assert plain(value) == {
        "1": {"b'k'": None},
        "at": "2030-01-01T00:00:00Z",
        "id": "00000000-0000-0000-0000-000000000001",
        "bytes": "AP8=",
        "set": [1],
        "(1, 2)": "<class 'object'>",
    }
