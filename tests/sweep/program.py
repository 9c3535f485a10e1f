"""What runs, drawn from the seed alone, so that seeds differ in more than their interleaving."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import triojobs
from triojobs._model import NewRow
from triojobs._options import GroupOptions
from triojobs._queue import new_row

from .jobs import CHILD, KINDS, TIMEOUT, UNIT, ClaimName

JOBS: Final[triojobs.Queue[str, Any]] = triojobs.Queue("jobs", str)
CHILDREN: Final[triojobs.Queue[str, Any]] = triojobs.Queue("children", str)
RETRY: Final = triojobs.Backoff(first=0.05, limit=0.1)
FAMILY: Final = 6  # seeds that belong together
MAX_ATTEMPTS: Final = 9  # retired twice, and failed by itself


@dataclass(frozen=True)
class Program:
    """The job mix, and what is beside it.

    Attributes:
        kinds: one job of each. slots: of the worker for them. cap: of the group.
        rival: another group on the same database, which does what ours gives back. outsider: a client
            that enqueues, replaces and cancels meanwhile.
    """

    kinds: tuple[str, ...]
    isolation: Literal["slot", "task"]
    slots: int
    cap: int | None
    notify: bool
    rival: bool
    outsider: bool

    def options(self) -> GroupOptions:
        """Everything is scaled so that leases, beats and polls matter within seconds."""
        return GroupOptions(
            name="sweep",
            grace_period=1.0,
            close_timeout=5.0,
            call_timeout=4.0,
            lease_duration=2.0,
            lease_margin=0.5,
            beat_interval=0.4,
            isolation=self.isolation,
            concurrency=self.cap,
            notify=self.notify,
        )


@cache
def program(seed: int) -> Program:
    """Six seeds in a row have every kind of job once and every neighbour, in another division than others."""
    family, nth = random.Random(f"{seed // FAMILY} family"), seed % FAMILY
    kinds = family.sample(KINDS, len(KINDS))[nth::FAMILY]
    rival, *outsider = family.sample(range(FAMILY), 3)
    polls, tasks, capped = (family.randrange(FAMILY) for _ in range(3))
    return Program(
        kinds=tuple(kinds),
        isolation="task" if nth == tasks else "slot",
        slots=family.choice((2, 3)),
        cap=2 if nth == capped else None,
        notify=nth != polls,
        rival=nth == rival,
        outsider=nth in outsider,
    )


def rows(kinds: Sequence[str]) -> list[NewRow]:
    """Return one row to enqueue for each kind."""
    return [_row(kind) for kind in kinds]


@cache
def _row(kind: str) -> NewRow:
    timeout = TIMEOUT * UNIT if kind == "times_out" else None
    return new_row(JOBS, triojobs.NewJob(kind, timeout=timeout, max_attempts=MAX_ATTEMPTS))


def parent_of(row: NewRow) -> ClaimName | None:
    """Return the claim whose handler enqueued this row."""
    if row.queue != CHILDREN.name:
        return None
    word, job_id, group_id, claim_no = CHILDREN.decode_payload(row.payload, row.encoding).split(":")
    assert word == CHILD
    return int(job_id), uuid.UUID(group_id), int(claim_no)
