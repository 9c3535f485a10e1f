"""Which status follows which event, and what a handler's end means for its job.

The tables are data; an event that a status does not allow raises and changes nothing. Nothing here
waits, reads a clock or talks to a database.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from ._model import JobStatus, Outcome

__all__ = ["TRANSITIONS", "Event", "IllegalTransitionError", "after", "outcome_of_failure"]


class Event(StrEnum):
    """What happens to a job."""

    CLAIM = "claim"
    SETTLE_DONE = "settle done"
    SETTLE_FAILED = "settle failed"
    SETTLE_KILLED = "settle killed"
    SETTLE_CANCELLED = "settle cancelled"
    SNOOZE = "snooze"
    RELEASE = "release"
    RESCUE = "rescue"  # with attempts left; without, it is SETTLE_KILLED
    CANCEL = "cancel"  # of a waiting job; a running one is asked, and settles
    REPLACE = "replace"
    RETRY = "retry"  # by an operator


class IllegalTransitionError(Exception):
    """The event is not possible in this status."""


S, E = JobStatus, Event
WAITING = (S.PENDING, S.FAILED)

TRANSITIONS: Final[dict[tuple[JobStatus, Event], JobStatus]] = {
    **{(s, E.CLAIM): S.RUNNING for s in WAITING},
    **{(s, E.CANCEL): S.CANCELLED for s in WAITING},
    (S.PENDING, E.REPLACE): S.PENDING,
    (S.RUNNING, E.SETTLE_DONE): S.DONE,
    (S.RUNNING, E.SETTLE_FAILED): S.FAILED,
    (S.RUNNING, E.SETTLE_KILLED): S.KILLED,
    (S.RUNNING, E.SETTLE_CANCELLED): S.CANCELLED,
    (S.RUNNING, E.SNOOZE): S.PENDING,
    (S.RUNNING, E.RELEASE): S.PENDING,
    (S.RUNNING, E.RESCUE): S.FAILED,
    **{(s, E.RETRY): S.PENDING for s in (S.DONE, S.KILLED, S.CANCELLED)},
}
"""Status × event. `PENDING` after a release or a snooze reads `FAILED` when an earlier attempt failed."""


def after(status: JobStatus, event: Event) -> JobStatus:
    """Return the status that `event` leads to, or raise IllegalTransitionError."""
    try:
        return TRANSITIONS[status, event]
    except KeyError:
        raise IllegalTransitionError(f"{event} is not possible for a job that is {status}") from None


def outcome_of_failure(attempt: int, max_attempts: int) -> Outcome:
    """Return FAILED while attempts are left, KILLED once `attempt` (from 1) was the last."""
    return Outcome.FAILED if attempt < max_attempts else Outcome.KILLED
