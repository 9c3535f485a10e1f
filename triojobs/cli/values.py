"""Values on the command line: durations, points in time, JSON. What is refused is named, before anything runs."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    FloatType = click.ParamType[float]
    TimeType = click.ParamType[dt.datetime]
else:
    FloatType = TimeType = click.ParamType  # generic in new versions of click only

__all__ = ["DURATION", "INSTANT", "JOB_ID", "SINCE", "Duration", "Instant", "parsed_duration", "parsed_json"]

UNITS: Final = {"w": 7 * 86400.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
PART: Final = r"\d+(?:\.\d+)?"
DURATION_SHAPE: Final = re.compile(rf"(?:{PART}(?:w|d|h|ms|m|s))+", re.ASCII)
LONGEST: Final = 10 * 366 * 86400.0  # seconds; as much as triojobs takes anywhere
DURATION_WORDS: Final = "a duration such as 90s, 1h30m or 7d (units w, d, h, m, s, ms)"
INSTANT_WORDS: Final = "a time with its zone such as 2030-01-31T09:00Z or 2030-01-31T10:00+01:00"


def parsed_duration(text: str, *, forever: bool = False) -> float:
    """Return seconds; a number without a unit is seconds.

    Raises:
        ValueError: says what was given, and what is wanted.
    """
    text = text.strip()
    if forever and text == "forever":
        return math.inf
    seconds = math.nan
    if re.fullmatch(PART, text, re.ASCII):
        seconds = float(text)
    elif DURATION_SHAPE.fullmatch(text):
        parts = re.findall(rf"({PART})(ms|[wdhms])", text)
        units = [unit for _, unit in parts]
        if len(set(units)) == len(units):
            seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not 0 <= seconds <= LONGEST:
        words = DURATION_WORDS + (", or forever" if forever else "") + ", at most ten years"
        raise ValueError(f"{text!r} is not {words}")
    return seconds


def parsed_instant(text: str) -> dt.datetime:
    """Return an aware time in UTC.

    Raises:
        ValueError: says what was given, and what is wanted.
    """
    try:
        found = dt.datetime.fromisoformat(text.strip())
        if found.tzinfo is not None:
            return found.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} is not {INSTANT_WORDS}")


def parsed_json(text: str, what: str) -> Any:
    """Return what a JSON text says, strictly: neither NaN nor the same name twice in an object.

    Raises:
        click.BadParameter: says what is wrong, and where.
    """

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object has a name twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except json.JSONDecodeError as exc:
        why = f"{exc.msg} at line {exc.lineno}, column {exc.colno}"
    except ValueError as exc:
        why = str(exc)
    except RecursionError:
        why = "it is nested too deeply"
    raise click.BadParameter(
        f"this is no JSON: {why}; a text needs its quotes, as in '\"text\"'", param_hint=f"'{what}'"
    )


class Duration(FloatType):
    """A duration as float seconds."""

    name = "duration"

    def __init__(self, *, positive: bool = False) -> None:
        self._positive = positive

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds, or end with what is wanted."""
        if isinstance(value, float):
            return value
        try:
            seconds = parsed_duration(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        if self._positive and seconds <= 0:
            self.fail(f"{value!r} is not more than nothing", param, ctx)
        return seconds


class Instant(TimeType):
    """A point in time; with `ago` a duration is understood as well: so long before now."""

    name = "time"

    def __init__(self, *, ago: bool = False) -> None:
        self._ago = ago

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dt.datetime:
        """Return an aware time, or end with what is wanted."""
        if isinstance(value, dt.datetime):
            return value
        try:
            return parsed_instant(value)
        except ValueError as exc:
            refused = str(exc)
        if self._ago:
            try:
                return dt.datetime.now(dt.UTC) - dt.timedelta(seconds=parsed_duration(value))
            except ValueError:
                refused += f", nor {DURATION_WORDS}: so long ago"
        self.fail(refused, param, ctx)


DURATION: Final = Duration()
INSTANT: Final = Instant()
SINCE: Final = Instant(ago=True)
JOB_ID: Final = click.IntRange(1, 2**63 - 1)
