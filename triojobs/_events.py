"""What happens in a worker group, for those who want to hear it; they never make it wait.

Each reader has a buffer of its own. When it is full, news is dropped for this reader and counted.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TypeAlias

import trio

from ._instruments import claims_ended, is_watched
from ._model import Claim, Outcome, Settled, ShutdownReport

__all__ = [
    "EventFeed",
    "GroupEvent",
    "GroupIdle",
    "GroupStarted",
    "GroupStopped",
    "JobClaimed",
    "JobReleased",
    "JobSettled",
    "LeaseLost",
]


@dataclass(frozen=True, slots=True)
class GroupStarted:
    """The group has registered. `again`: after it had lost its lease."""

    group_id: uuid.UUID
    again: bool


@dataclass(frozen=True, slots=True)
class GroupIdle:
    """No job is in hand, and none is due; said once each time that it becomes true."""

    group_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class JobClaimed:
    """A job is ours; its handler starts in a moment. `attempt` from 1."""

    group_id: uuid.UUID
    job_id: int
    queue: str
    attempt: int


@dataclass(frozen=True, slots=True)
class JobSettled:
    """How an attempt ended was written: "done", "failed", "killed", "cancelled" or "snoozed"."""

    group_id: uuid.UUID
    job_id: int
    queue: str
    attempt: int
    outcome: str


@dataclass(frozen=True, slots=True)
class JobReleased:
    """A job was given back, and its attempt is not counted."""

    group_id: uuid.UUID
    job_id: int
    queue: str
    attempt: int


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease cannot be proven any more: handlers are cancelled, the group will register anew."""

    group_id: uuid.UUID
    reason: str


@dataclass(frozen=True, slots=True)
class GroupStopped:
    """The group has stopped and closed; the last event."""

    group_id: uuid.UUID
    report: ShutdownReport


GroupEvent: TypeAlias = (
    GroupStarted | GroupIdle | JobClaimed | JobSettled | JobReleased | LeaseLost | GroupStopped
)


class EventFeed:
    """Passes events on to any number of readers. All methods but `soon` are for the event loop.

    Attributes:
        dropped: events that a reader had no room for, over all readers.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._token = trio.lowlevel.current_trio_token()
        self._senders: list[trio.MemorySendChannel[GroupEvent]] = []
        self._closed = False

    @property
    def is_heard(self) -> bool:
        """Whether anybody wants to know; else nothing shall be spent on news."""
        return bool(self._senders) or is_watched()

    def open(self, buffer: int) -> trio.MemoryReceiveChannel[GroupEvent]:
        """Return a new reader's end."""
        sender, receiver = trio.open_memory_channel[GroupEvent](buffer)
        if self._closed:
            sender.close()
        else:
            self._senders.append(sender)
        return receiver

    def send_to_last(self, event: GroupEvent) -> None:
        """Pass an event on to the newest reader alone."""
        self._senders[-1].send_nowait(event)

    def send(self, event: GroupEvent) -> None:
        """Pass an event on, to whoever has room."""
        for sender in list(self._senders):
            try:
                sender.send_nowait(event)
            except trio.WouldBlock:
                self.dropped += 1
            except trio.BrokenResourceError:  # it was closed by its reader
                self._senders.remove(sender)
                sender.close()

    def close(self) -> None:
        """End every reader's iteration, after what it has not read yet."""
        self._closed = True
        while self._senders:
            self._senders.pop().close()

    def claimed(self, claims: list[Claim]) -> None:
        """Tell of jobs that were claimed."""
        for claim in claims if self._senders else ():
            self.send(JobClaimed(claim.group_id, claim.job_id, claim.queue, claim.attempt))

    def ended(self, claims: dict[int, Claim], rows: list[Settled]) -> None:
        """Tell how claims ended, by what was written; `claims` by the job's id."""
        ended = [
            (claim, row)
            for row in rows
            if (claim := claims.get(row.job_id)) is not None and claim.claim_no == row.claim_no
        ]
        claims_ended(ended)
        for claim, row in ended if self._senders else ():
            place = claim.group_id, claim.job_id, claim.queue, claim.attempt
            released = row.outcome is Outcome.RELEASED
            self.send(JobReleased(*place) if released else JobSettled(*place, outcome=str(row.outcome)))

    def committed_soon(self, claim: Claim) -> None:
        """Tell, from the thread, that a job completed itself together with its writes."""
        if self.is_heard:
            row = Settled(claim.job_id, claim.claim_no, Outcome.DONE)
            self._token.run_sync_soon(self.ended, {claim.job_id: claim}, [row])
