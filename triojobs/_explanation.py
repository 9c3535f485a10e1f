"""From what the tables say of one job to the one reason for which it does not run now. Pure."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Final

from ._admin_model import Explanation, Reason
from ._errors import cut
from ._model import JobStatus

__all__ = ["AHEAD_LIMIT", "Facts", "explained"]

AHEAD_LIMIT: Final = 10_000  # jobs in line that are counted: 2 ms
SHOWN_ERROR: Final = 200  # characters of a failure's text


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the reason depends on, as of one instant.

    Attributes:
        now: the server's clock. status .. cancel_reason: of the job, as in `RawJob`.
        group_*: of the group that runs or ended it. paused_*: of its queue. key_holder: who has its key.
        in_line: it is in `ready`. ahead: how many are claimed before it, at most AHEAD_LIMIT.
        groups, slots, free: living groups that serve the queue and do not drain; their slots for it;
            those that are free. draining: living groups that serve it, but drain. silent: living groups of
            an older version, which do not say what they serve.
    """

    job_id: int
    now: dt.datetime
    queue: str
    status: str | None
    attempts: int
    max_attempts: int
    run_at: dt.datetime
    last_error: str | None
    finished_at: dt.datetime | None
    claimed_at: dt.datetime | None
    deadline: dt.datetime | None
    cancel_reason: str | None
    group_id: uuid.UUID | None
    group_name: str | None
    group_host: str | None
    group_lease_until: dt.datetime | None
    group_closed_at: dt.datetime | None
    paused_at: dt.datetime | None
    pause_reason: str | None
    key: str | None
    key_holder: int | None
    in_line: bool
    ahead: int
    groups: int
    slots: int
    free: int
    draining: int
    silent: int


def explained(facts: Facts) -> Explanation:
    """Return the first obstacle, in the order in which they would have to be overcome."""
    if facts.status is None:
        return _nowhere(facts)
    status = JobStatus(facts.status)
    if status.ended:
        return _ended(facts, status)
    if status is JobStatus.RUNNING:
        return _running(facts)
    if facts.run_at > facts.now:
        return _not_due(facts)
    if facts.paused_at is not None:
        return _paused(facts, facts.paused_at)
    if facts.groups == 0 and facts.silent == 0:
        return _no_group(facts)
    if facts.free == 0 and facts.groups > 0:
        return _slots_busy(facts)
    return _in_line(facts)


def _nowhere(facts: Facts) -> Explanation:
    text = "it neither waits nor runs nor has it ended, which cannot happen"
    return _explanation(facts, Reason.NOWHERE, text, "retry it, or delete it, and report this as a bug")


def _ended(facts: Facts, status: JobStatus) -> Explanation:
    text = f"it ended as {status} at {_time(facts.finished_at)}{_because(facts.last_error)}"
    remedy = "retry it to run it again"
    if facts.key is not None and facts.key_holder not in (None, facts.job_id):
        remedy = f"its key is held by job {facts.key_holder} now, so that a retry is refused"
    return _explanation(facts, Reason.ENDED, text, remedy)


def _running(facts: Facts) -> Explanation:
    where = "a group that is gone" if facts.group_name is None else f"{facts.group_name} ({facts.group_host})"
    if facts.group_closed_at is not None or facts.group_lease_until is None:
        text, until = f"it ran at {where}, which has closed", None
    elif facts.group_lease_until <= facts.now:
        text, until = f"it ran at {where}, whose lease ended at {_time(facts.group_lease_until)}", None
    else:
        text = f"it runs at {where} since {_time(facts.claimed_at)}, attempt {facts.attempts} of {facts.max_attempts}"
        if facts.cancel_reason is not None:
            text += f"; its cancellation was asked for{_because(facts.cancel_reason)}"
            remedy = "its handler has to end; if it does not, end its process"
            return _explanation(facts, Reason.CANCELLING, text, remedy)
        return _explanation(facts, Reason.RUNNING, text, "cancel it to stop it")
    remedy = "any living group takes it back within seconds; if there is none, start one"
    return _explanation(facts, Reason.GROUP_LOST, text, remedy, until=until)


def _not_due(facts: Facts) -> Explanation:
    also = f"; besides, queue {facts.queue!r} is paused" if facts.paused_at is not None else ""
    remedy = "reschedule it to have it run earlier"
    if facts.attempts > 0:
        text = (
            f"attempt {facts.attempts} of {facts.max_attempts} failed{_because(facts.last_error)}; "
            f"the next one is due at {_time(facts.run_at)}{also}"
        )
        return _explanation(facts, Reason.WAITING_FOR_RETRY, text, remedy, until=facts.run_at)
    text = f"it is not due until {_time(facts.run_at)}{also}"
    return _explanation(facts, Reason.NOT_DUE, text, remedy, until=facts.run_at)


def _paused(facts: Facts, since: dt.datetime) -> Explanation:
    text = f"queue {facts.queue!r} is paused since {_time(since)}{_because(facts.pause_reason)}"
    return _explanation(facts, Reason.QUEUE_PAUSED, text, "resume the queue")


def _no_group(facts: Facts) -> Explanation:
    draining = f" ({facts.draining} that did drain)" if facts.draining else ""
    text = f"no living worker group serves queue {facts.queue!r}{draining}"
    return _explanation(facts, Reason.NO_GROUP, text, "start a group with a worker for this queue")


def _slots_busy(facts: Facts) -> Explanation:
    text = f"all {facts.slots} slot(s) of {facts.groups} group(s) are busy, {_line(facts)}"
    return _explanation(facts, Reason.SLOTS_BUSY, text, "raise its priority, or give the queue more slots")


def _in_line(facts: Facts) -> Explanation:
    if not facts.in_line:
        text = f"it is due since {_time(facts.run_at)}; the next look of a group moves it into line"
    elif facts.groups == 0:
        text = f"a group of an older version may serve queue {facts.queue!r}; {_line(facts)}"
    else:
        text = f"{facts.free} of {facts.slots} slot(s) are free, {_line(facts)}"
    remedy = "it is claimed within seconds; if it is not, the log of a group says why"
    return _explanation(facts, Reason.IN_LINE, text, remedy)


def _line(facts: Facts) -> str:
    more = " or more" if facts.ahead >= AHEAD_LIMIT else ""
    return f"and {facts.ahead}{more} job(s) are claimed before it"


def _explanation(
    facts: Facts, reason: Reason, text: str, remedy: str, *, until: dt.datetime | None = None
) -> Explanation:
    waits = reason not in (Reason.ENDED, Reason.RUNNING, Reason.CANCELLING, Reason.GROUP_LOST, Reason.NOWHERE)
    if waits and facts.deadline is not None and facts.deadline <= facts.now:
        text += f"; its deadline passed at {_time(facts.deadline)}: whoever claims it kills it"
    return Explanation(
        job_id=facts.job_id,
        status=None if facts.status is None else JobStatus(facts.status),
        reason=reason,
        text=text,
        remedy=remedy,
        until=until,
        ahead=facts.ahead if waits and facts.in_line else None,
        group=facts.group_id,
    )


def _time(at: dt.datetime | None) -> str:
    return "an unknown time" if at is None else f"{at.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _because(why: str | None) -> str:
    """Return the first line of a reason or an error in brackets; nothing when there is none."""
    line = (why or "").strip().partition("\n")[0]
    return f" ({cut(line, SHOWN_ERROR)})" if line else ""
