"""How long ended jobs are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ._errors import OptionError, checked_seconds
from ._options import checked_name

__all__ = ["DEFAULT_RETENTION", "Pruned", "Retention", "checked_retention"]

DAY: Final = 86400.0
STATUSES: Final = ("done", "killed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long jobs are kept after they ended, with their payloads, results and attempts.

    A job is kept for at least so long. Old ones go in ranges of a million ids, which are dropped whole;
    where a range cannot go as a whole, a day later, job by job.

    Args:
        done: seconds (math.inf: for ever). A week: long enough to look into what happened lately.
        killed, cancelled: seconds. 30 days: somebody may still want to retry them.
        queues: another `Retention` for some queues, by name; its own `queues` and `interval` have to be
            left out.
        interval: seconds between two rounds, of all worker groups together; an hour is often enough for
            ranges that fill in hours.

    Groups that share a schema should be given the same one: each prunes by its own when it has its turn.
    """

    done: float = 7 * DAY
    killed: float = 30 * DAY
    cancelled: float = 30 * DAY
    queues: Mapping[str, Retention] = field(default_factory=dict)
    interval: float = 3600.0

    def __post_init__(self) -> None:
        for status in STATUSES:
            if getattr(self, status) != math.inf:
                checked_seconds(status, getattr(self, status))
        checked_seconds("interval", self.interval, positive=True)
        if not isinstance(self.queues, Mapping):
            raise OptionError("queues", self.queues, "a mapping of names of queues to triojobs.Retention")
        for name, rule in self.queues.items():
            checked_name("queues", name)
            if not isinstance(rule, Retention) or rule.queues or rule.interval != 3600.0:
                raise OptionError(
                    f"queues[{name!r}]", rule, "a triojobs.Retention without queues and interval of its own"
                )

    @property
    def least(self) -> float:
        """The shortest time of all: nothing younger has to be looked at."""
        return min(float(getattr(r, status)) for r in (self, *self.queues.values()) for status in STATUSES)

    def longest(self, status: str | None = None) -> float:
        """Return the longest time of a status, or of all of them."""
        statuses = STATUSES if status is None else (status,)
        return max(float(getattr(r, each)) for r in (self, *self.queues.values()) for each in statuses)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the statements refer to. JSON knows no infinity, a text of it is one for the server."""
        rules = {
            name: {status: str(getattr(rule, status)) for status in STATUSES}
            for name, rule in self.queues.items()
        }
        return {
            **{status: getattr(self, status) for status in STATUSES},
            **{f"longest_{status}": self.longest(status) for status in STATUSES},
            "rules": json.dumps(rules),
            "by_queue": bool(rules),
        }


DEFAULT_RETENTION: Final = Retention()


def checked_retention(value: object) -> Retention | None:
    """Return a retention or None, else raise OptionError."""
    if value is not None and not isinstance(value, Retention):
        raise OptionError("retention", value, "a triojobs.Retention, or None to keep everything")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a round of pruning removed.

    Attributes:
        ranges: ranges of a million ids that were dropped. moved: jobs that were kept out of them.
        jobs: jobs that were removed one by one. groups: registrations of worker groups that had closed.
        keys: keys of jobs that are gone. postponed: ranges that could have gone, but somebody read or
            wrote the tables for too long; the next round tries again.
    """

    ranges: int = 0
    moved: int = 0
    jobs: int = 0
    groups: int = 0
    keys: int = 0
    postponed: int = 0
