"""The name of a run, and what it left behind."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import NamedTuple

from triojobs._group import WorkerGroup
from triojobs._memory import MemoryDatabase, MemoryStore
from triojobs._options import GroupOptions

from .jobs import ClaimName, Journal
from .program import Program, program


class Fault(NamedTuple):
    """The j-th call of the store under test fails."""

    j: int
    kind: str


@dataclass(frozen=True)
class Case:
    """The name of a run.

    Attributes:
        mode: what is injected before point `k` (None: nothing). "a+b": a at k, b at k2.
        k2: inject a second time.
    """

    mode: str
    seed: int
    k: int | None = None
    k2: int | None = None
    fault: Fault | None = None

    @property
    def modes(self) -> tuple[str, str]:
        """The injection at k, and the one at k2."""
        first, _, second = self.mode.partition("+")
        return first, second or first

    @property
    def shots(self) -> list[int]:
        return [k for k in (self.k, self.k2) if k is not None]

    @property
    def command(self) -> str:
        """The command that repeats this run."""
        words = ["python -m tests.sweep --mode", self.mode, "--seed", str(self.seed)]
        words += [] if self.k is None else ["--k", str(self.k)]
        words += [] if self.k2 is None else ["--k2", str(self.k2)]
        words += [] if self.fault is None else ["--fault", f"{self.fault.j}:{self.fault.kind}"]
        return " ".join(words)


@dataclass
class Exit:
    """How things stood when the group under test was left."""

    at: float
    leases: list[int]
    open_groups: list[uuid.UUID]
    handlers: list[str]
    held: list[int]
    borrowed: list[str]


@dataclass
class Record:
    """What a run left behind.

    Attributes:
        group: the one under test. ours: the ids of its registrations. calls: of its store.
        injections: what was injected when, but for what found nobody to disturb.
        cancels: job → when `cancel` had said True (inf: it may have). noticed: what did not hold for a
        moment. lost_claims: those that no ledger was told of. swept: those that a comparison gave
        back whose reply was lost. rescued: the `no` of outcomes that an injected rescue wrote.
    """

    case: Case
    database: MemoryDatabase
    journal: Journal = field(default_factory=Journal)
    stores: list[MemoryStore] = field(default_factory=list)
    group: WorkerGroup | None = None
    rival: WorkerGroup | None = None
    ours: set[uuid.UUID] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    failed_call: str | None = None
    shots: int = 0
    raised_boom: bool = False
    injections: list[tuple[str, float]] = field(default_factory=list)
    cancels: dict[int, float] = field(default_factory=dict)
    replaced: set[int] = field(default_factory=set)
    lost_claims: set[ClaimName] = field(default_factory=set)
    swept: set[ClaimName] = field(default_factory=set)
    rescued: set[int] = field(default_factory=set)
    noticed: list[str] = field(default_factory=list)
    points: int = 0
    exit: Exit | None = None
    quiet: bool = False
    error: BaseException | None = None
    stuck: str | None = None

    def failed_with(self, exc: BaseException) -> None:
        """Note what was raised beside, or after, what we know already."""
        self.error = (
            exc if self.error is None else BaseExceptionGroup("all that was raised", [self.error, exc])
        )

    @property
    def program(self) -> Program:
        return program(self.case.seed)

    @property
    def options(self) -> GroupOptions:
        return self.program.options()

    @property
    def injected(self) -> set[str]:
        """The modes that were really injected."""
        return {mode for mode, _ in self.injections}
