"""Delays: between attempts of a job, and between attempts to reach the database.

Pure: time and randomness come in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from ._errors import OptionError, checked_seconds

__all__ = ["Backoff", "reconnect_delay"]

RECONNECT_FIRST: Final = 0.2  # seconds; a restart of PostgreSQL takes about half of it at best
RECONNECT_LIMIT: Final = 5.0  # seconds; nobody wants to wait longer once the server is back


@final
@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a failed job waits before its next attempt.

    The n-th failure waits `first * factor**(n-1)` seconds, at most `limit`, then moved by up to
    `jitter` of itself in either direction, so that jobs that failed together do not return together.
    A handler that knows better raises `RetryAfter`.

    Args:
        first: seconds after the first failure (>= 0).
        factor: growth per failure (>= 1).
        limit: longest delay in seconds (>= first).
        jitter: share of the delay, 0 to 1.

    Raises:
        OptionError: a value is out of its range.
    """

    first: float = 1.0
    factor: float = 2.0
    limit: float = 3600.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        checked_seconds("Backoff.first", self.first)
        checked_seconds("Backoff.limit", self.limit, least=self.first)
        for field, least, most in (("factor", 1, 1000), ("jitter", 0, 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise OptionError(f"Backoff.{field}", value, f"{least} to {most}")

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """Return the seconds to wait after failed attempt number `attempt` (from 1).

        `random` returns a float in [0, 1).
        """
        # Beyond 64 doublings every limit is reached; an unbounded exponent would overflow.
        grown = self.first * self.factor ** min(attempt - 1, 64)
        base = min(grown, self.limit)
        return min(self.limit, max(0.0, base * (1.0 + self.jitter * (2.0 * random() - 1.0))))


def reconnect_delay(failures: int, random: Callable[[], float]) -> float:
    """Return seconds to wait after `failures` (from 1) failed calls in a row: jittered by half, capped.

    With the first try these are at most four tries in any second: a server without disk, memory or
    connections is not helped by haste.
    """
    ceiling = min(RECONNECT_LIMIT, RECONNECT_FIRST * 2.0 ** min(failures - 1, 16))
    return ceiling * (0.5 + 0.5 * random())
