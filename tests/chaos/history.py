"""Both records of a run as plain data: what the processes wrote down, and what the rows say.

The SQL here is of its own: it reads tables, not the view, and shares nothing with the runtime's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cbor2
import psycopg

from .journal import clock

# ---- what was written down ----

Claim = tuple[int, str, int]  # job, group, claim number: what names a claim for ever


@dataclass
class Step:
    """A checkpoint that a handler came through."""

    before: float
    after: float


@dataclass
class Run:
    """One call of a handler.

    `how` is None when it never wrote its end; `raised` and `error` are the type and the first words of
    what it raised. `committing`, `committed` and `transacted` say how far its own transactions came.
    """

    job: int
    group: str
    claim_no: int
    attempt: int
    token: str
    kind: str
    process: str
    began: float
    ended: float | None = None
    how: str | None = None
    raised: str = ""
    error: str = ""
    steps: list[Step] = field(default_factory=list)
    committing: bool = False
    committed: bool = False
    transacted: bool = False

    @property
    def claim(self) -> Claim:
        return (self.job, self.group, self.claim_no)

    def __str__(self) -> str:
        return f"job {self.job} ({self.kind}, {self.token}), claim {self.claim_no} of {self.process}"


@dataclass
class Enqueue:
    """What a producer knows about one token. `fate`: enqueued, undone, or unknown."""

    form: str
    fate: str = "unknown"
    job: int | None = None


@dataclass
class Cancel:
    """One call of `cancel`. `answer` is None when no answer came."""

    job: int
    asked: float
    answer: bool | None = None
    answered: float | None = None


@dataclass
class Stop:
    """A process did not run between `at` and `until`."""

    process: str
    at: float
    until: float


@dataclass
class Outage:
    """The server was away."""

    at: float
    until: float


@dataclass
class Report:
    """What a group said about itself when it had closed."""

    process: str
    settled: dict[str, int]
    released: int
    abandoned: list[int]
    unknown_claims: int
    group_ids: list[str]


# ---- the rows ----


@dataclass
class Outcome:
    """One row of `outcomes`; `group` and `claim_no` are None for a job that was cancelled while it waited."""

    job: int
    group: str | None
    claim_no: int | None
    attempt: int
    status: str
    error: str | None = None
    result: Any = None

    @property
    def claim(self) -> Claim | None:
        return None if self.group is None or self.claim_no is None else (self.job, self.group, self.claim_no)


@dataclass
class JobRow:
    """One row of `jobs`."""

    id: int
    token: str
    max_attempts: int


@dataclass
class Effect:
    """What the transaction of a handler left in the world."""

    job: int
    group: str
    claim_no: int
    kind: str

    @property
    def claim(self) -> Claim:
        return (self.job, self.group, self.claim_no)


@dataclass
class Group:
    """One row of `worker_groups`; `since` is the machine's monotonic clock."""

    process: str
    since: float


@dataclass
class History:
    """Everything about one run.

    `outcomes` are in the order in which they were written; `left` are the jobs that were leased to a
    process after its graceful end.
    """

    runs: list[Run] = field(default_factory=list)
    enqueues: dict[str, Enqueue] = field(default_factory=dict)
    cancels: list[Cancel] = field(default_factory=list)
    kills: dict[str, float] = field(default_factory=dict)
    stops: list[Stop] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left: dict[str, list[int]] = field(default_factory=dict)
    jobs: dict[int, JobRow] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    places: list[tuple[int, str]] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    orders: list[str] = field(default_factory=list)


def add_events(history: History, events: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Add what was written down."""
    runs: dict[Claim, Run] = {}
    cancels: dict[int, Cancel] = {}
    for process, event in events:
        match event:
            case {"event": "begin"}:
                run = Run(
                    job=event["job"],
                    group=event["group"],
                    claim_no=event["claim"],
                    attempt=event["attempt"],
                    token=event["token"],
                    kind=event["kind"],
                    process=process,
                    began=event["at"],
                )
                history.runs.append(run)
                runs[run.claim] = run
            case {"event": "step" | "end" | "committing" | "committed" | "transacted", "job": job}:
                _go_on(runs[job, event["group"], event["claim"]], event)
            case {"event": "intended", "tokens": tokens, "form": form}:
                for token in tokens:
                    history.enqueues.setdefault(token, Enqueue(form))
            case {"event": "enqueued", "tokens": tokens, "ids": ids}:
                for token, job in zip(tokens, ids, strict=True):
                    history.enqueues[token].fate, history.enqueues[token].job = "enqueued", job
            case {"event": "undone", "tokens": tokens}:
                for token in tokens:
                    history.enqueues[token].fate = "undone"
            case {"event": "cancelling", "job": job, "at": at}:
                cancels[job] = Cancel(job, at)
                history.cancels.append(cancels[job])
            case {"event": "cancelled", "job": job, "answer": answer, "at": at}:
                cancels[job].answer, cancels[job].answered = answer, at
            case {"event": "kill", "process": victim, "at": at}:
                history.kills[victim] = at
            case {"event": "stop", "process": victim, "at": at, "until": until}:
                history.stops.append(Stop(victim, at, until))
            case {"event": "crash", "at": at, "until": until}:
                history.outages.append(Outage(at, until))
            case {"event": "ended", "process": ended, "code": code, "expected": False}:
                history.failures.append(f"{ended} ended by itself with {code}")
            case {"event": "left", "process": ended, "jobs": jobs}:
                history.left[ended] = jobs
            case {"event": "closed"}:
                history.reports.append(
                    Report(
                        process, *(event[name] for name in Report.__dataclass_fields__ if name != "process")
                    )
                )


def _go_on(run: Run, event: dict[str, Any]) -> None:
    match event:
        case {"event": "step", "before": before, "at": after}:
            run.steps.append(Step(before, after))
        case {"event": "end", "how": how, "at": at}:
            run.how, run.ended = how, at
            run.raised, run.error = event.get("raised", ""), event.get("error", "")
        case {"event": name}:
            setattr(run, name, True)


def add_tracebacks(history: History, directory: Path) -> None:
    """Add what the processes complained about: whatever the violence, nothing may raise to the surface."""
    for path in sorted(directory.glob("*.stderr")):
        text = path.read_text(errors="replace")
        if "Traceback (most recent call last)" in text:
            history.failures.append(f"{path.stem} shows a traceback: {text[text.index('Traceback') :]}")


JOBS: Final = "SELECT id, coalesce(metadata ->> 'token', 'none'), max_attempts FROM triojobs.jobs"
OUTCOMES: Final = """
SELECT job_id, group_id::text, claim_no, attempt, status, error, result, encoding
FROM triojobs.outcomes ORDER BY no
"""
GROUPS: Final = "SELECT id::text, name, extract(epoch FROM registered_at)::float8 FROM triojobs.worker_groups"
PLACES: Final = """
SELECT id, 'ready' FROM triojobs.ready UNION ALL SELECT id, 'scheduled' FROM triojobs.scheduled
UNION ALL SELECT id, 'leases' FROM triojobs.leases
"""


def add_rows(history: History, conn: psycopg.Connection[Any]) -> None:
    """Add what the rows say."""
    history.jobs = {row[0]: JobRow(*row) for row in conn.execute(JOBS)}
    history.outcomes = [Outcome(*row[:6], result=_plain(*row[6:])) for row in conn.execute(OUTCOMES)]
    history.places = conn.execute(PLACES).fetchall()
    behind = time.time() - clock()  # the server's clock is this machine's wall clock
    groups = conn.execute(GROUPS).fetchall()
    history.groups = {id: Group(name, since - behind) for id, name, since in groups}
    effects = conn.execute("SELECT job_id, group_id::text, claim_no, kind FROM chaos_effects")
    history.effects = [Effect(*row) for row in effects]
    history.orders = [row[0] for row in conn.execute("SELECT token FROM chaos_orders")]


def _plain(result: bytes | None, encoding: str | None) -> Any:
    if result is None:
        return None
    return cbor2.loads(result) if encoding == "cbor" else json.loads(result)
