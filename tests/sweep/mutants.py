"""The runtime with one thing wrong, to see that the sweep notices: what no run kills is a rule that nobody guards.

The first eleven are what a first skeleton of the runtime was measured against; the others are what we fear
most in our own code. Each changes a part of a function's source, and falls over when that part is not
there; each must be killed by an invariant that is meant for it, and not by any side condition. Where to look
is said by mode, fault and program, not by number: numbers of points change with the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

import outcome
import pytest
import trio

from tests.tools.mutants import Patch, all_of, code
from triojobs import _group, _handling
from triojobs._fetcher import Fetcher
from triojobs._group import GroupContext, WorkerGroup
from triojobs._handling import Slots
from triojobs._ledger import Ledger
from triojobs._memory import MemoryStore
from triojobs._memory_tables import Tables
from triojobs._model import Claim, Settlement
from triojobs._registration import LiveRegistration
from triojobs._settler import Settler

from .harness import run
from .invariants import NAMES, names, violations
from .program import FAMILY, Program, program
from .record import Case, Fault

T = TypeVar("T")

LIMIT: Final = 400  # runs in which a mutant must be killed
SPREAD: Final = (
    0.618034  # of the golden section: the first few points lie all over the run, and so do the next
)


@dataclass(frozen=True)
class Mutant:
    """A wrong variant, and where to look for a run that kills it.

    Attributes:
        breaks: the invariants that are meant for it; any of them kills.
        mode: what is injected; None: nothing. fault: a kind, and the call of the store that it befalls.
        kinds: jobs, one of which the program must have. rival: so must another group that wants them.
    """

    name: str
    patch: Patch
    breaks: frozenset[str]
    mode: str | None = None
    fault: tuple[str, str] | None = None
    kinds: frozenset[str] = frozenset()
    rival: bool = False

    def cases(self) -> Iterator[Case]:
        """Yield cases that may kill it, by turns of all the programs that fit."""
        yield from _by_turns([self._of(seed) for seed in range(2 * FAMILY) if self._fits(program(seed))])

    def _fits(self, one: Program) -> bool:
        return (not self.kinds or bool(self.kinds & set(one.kinds))) and one.rival >= self.rival

    def _of(self, seed: int) -> Iterator[Case]:
        for case in self._injected(seed):
            yield from self._broken(case)

    def _injected(self, seed: int) -> Iterator[Case]:
        if self.mode is None:
            yield Case("cancel", seed)
            return
        points = range(run(Case(self.mode, seed)).points)
        for k in sorted(points, key=lambda k: k * SPREAD % 1):
            yield Case(self.mode, seed, k)

    def _broken(self, case: Case) -> Iterator[Case]:
        if self.fault is None:
            yield case
            return
        kind, operation = self.fault
        for j, call in enumerate(run(case).calls):
            if call == operation:
                yield Case(case.mode, case.seed, case.k, None, Fault(j, kind))


def _by_turns(sources: list[Iterator[Case]]) -> Iterator[Case]:
    while sources:
        for source in sources[:]:
            case = next(source, None)
            if case is None:
                sources.remove(source)
            else:
                yield case


@dataclass(frozen=True)
class Death:
    """Which run killed a mutant, by which invariants, and in how many runs it was found."""

    case: Case
    by: frozenset[str]
    runs: int


def kill(mutant: Mutant) -> Death | None:
    """Look for a run that kills the mutant and that is green without it; None: it survives."""
    for n, case in enumerate(islice(mutant.cases(), LIMIT), 1):
        with pytest.MonkeyPatch.context() as patch:
            mutant.patch(patch)
            by = names(violations(run(case))) & mutant.breaks
        if by and not violations(run(case)):
            return Death(case, frozenset(by), n)
    return None


# Wrong variants that take more than a changed line.


def abandon_threads(patch: pytest.MonkeyPatch) -> None:
    """Cross as with `abandon_on_cancel=True`: a cancel leaves the call alone, which goes on."""

    async def abandoned(store: MemoryStore, operation: str, fn: Callable[[], T]) -> T:
        ended = trio.Event()
        results: list[outcome.Outcome[T]] = []

        async def thread() -> None:
            results.append(await outcome.acapture(store._crossing, operation, fn))
            ended.set()

        trio.lowlevel.spawn_system_task(thread)
        await ended.wait()
        return results[0].unwrap()

    patch.setattr(MemoryStore, "_abandoned", abandoned, raising=False)
    code(MemoryStore, "_call", ("await self._crossing(", "await self._abandoned("))(patch)


def pop_before_ack(patch: pytest.MonkeyPatch) -> None:
    """The ledger forgets claims when their settlement is taken out to be written."""
    ended = Ledger.ended

    def popped(ledger: Ledger, limit: int) -> list[Settlement]:
        batch = ended(ledger, limit)
        for settlement in batch:
            del ledger._ended[settlement.job_id], ledger._claims[settlement.job_id]
        return batch

    patch.setattr(Ledger, "ended", popped)


def hand_off_by_channel(patch: pytest.MonkeyPatch) -> None:
    """Claims lie in a channel, owned by nobody, until the fetcher's next step takes them out."""
    book, take = Ledger.book, Ledger.take_booked
    channels: dict[Ledger, list[Claim]] = {}

    def send(ledger: Ledger, claims: Any) -> None:
        channels.setdefault(ledger, []).extend(claims)

    def receive(ledger: Ledger) -> list[Claim]:
        book(ledger, channels.pop(ledger, []))
        return take(ledger)

    patch.setattr(Ledger, "book", send)
    patch.setattr(Ledger, "take_booked", receive)
    CHECKPOINT_AFTER_CLAIM(patch)


CHECKPOINT_AFTER_CLAIM = code(
    Fetcher,
    "_round",
    (
        "reply = await self._claim(wants, starts, sent)",
        "reply = await self._claim(wants, starts, sent)\n        await trio.lowlevel.checkpoint()",
    ),
)
# Without the sweep of all rows under the group's id, as if the ledger alone were enough.
CLOSE_ONLY_WHAT_IS_KNOWN = all_of(
    code(
        WorkerGroup,
        "_settle_and_close",
        ("while live.ledger.unsettled:", "live.ledger.release_rest()\n    while live.ledger.unsettled:"),
    ),
    code(Tables, "close_group", ("if row.group_id == group_id", "if False")),
)


def mutant(
    name: str,
    patch: Patch,
    *breaks: str,
    mode: str | None = None,
    fault: tuple[str, str] | None = None,
    kinds: tuple[str, ...] = (),
    rival: bool = False,
) -> Mutant:
    """Spell a mutant briefly."""
    assert breaks
    assert set(breaks) <= NAMES
    return Mutant(name, patch, frozenset(breaks), mode, fault, frozenset(kinds), rival)


MUTANTS: Final = (
    mutant(
        "register after a checkpoint",
        all_of(
            code(
                Fetcher,
                "_claim",
                (
                    "reply = await self._store.claim(order, self._live.book, under_way=self._wake_slots)",
                    "rows = []\n"
                    "        reply = await self._store.claim(order, rows.extend, under_way=self._wake_slots)\n"
                    "        await trio.lowlevel.checkpoint()\n"
                    "        self._live.book(rows)",
                ),
            ),
            CLOSE_ONLY_WHAT_IS_KNOWN,
        ),
        "no-row-running",
        mode="cancel",
    ),
    mutant(
        "abandon threads",
        all_of(
            abandon_threads,
            code(Tables, "claim", ("if not self.may_claim(order.group_id, order.epoch):", "if False:")),
        ),
        "no-row-running",
        "no-needless-rescue",
        "everything-done",
        mode="cancel",
    ),
    mutant(
        "abandon threads, but sweep what is left",
        abandon_threads,
        "answers-true",
        "commit-is-atomic",
        "done-iff-returned",
        mode="cancel",
    ),
    mutant(
        "the closing is not shielded",
        code(WorkerGroup, "_supervise", ("trio.CancelScope(shield=True)", "trio.CancelScope()")),
        "no-row-running",
        mode="cancel",
    ),
    mutant("pop before the acknowledgement", pop_before_ack, "owned-at-all-times"),
    mutant(
        "no refund",
        code(Tables, "_release", ("row.waiting(row.attempt - 1)", "row.waiting(row.attempt)")),
        "attempts-exact",
        mode="cancel",
    ),
    mutant(
        "drop what finished when a cancel came",
        code(
            Slots,
            "_run",
            (
                "value = await self._call_handler(job)",
                "value = await self._call_handler(job)\n        await trio.lowlevel.checkpoint()",
            ),
        ),
        "done-iff-returned",
        mode="cancel",
    ),
    mutant(
        "release before the handler has ended",
        code(WorkerGroup, "_wait_for_children", ("await live.slots_alive.wait_value(0)", "pass")),
        "leased-while-it-runs",
        "no-overlap",
        mode="cancel",
    ),
    mutant(
        "hand off by a channel",
        all_of(hand_off_by_channel, CLOSE_ONLY_WHAT_IS_KNOWN),
        "no-row-running",
        mode="cancel",
    ),
    mutant(
        "a zombie goes on under a closed registration",
        code(
            MemoryStore,
            "_beat",
            (
                "    if found is None:\n",
                "    if found is None:\n        lease.confirm(sent)\n        return True\n",
            ),
        ),
        "ends",
        "lost-lease-ends-handlers",
        mode="retire",
    ),
    mutant(
        "close in the main task",
        all_of(
            code(WorkerGroup, "_supervise", ("await self._shut_down()", "pass")),
            code(
                GroupContext,
                "__aexit__",
                (
                    "    try:\n        swallowed",
                    "    try:\n"
                    "        with trio.CancelScope(shield=True):\n"
                    "            await group._shut_down()\n"
                    "        swallowed",
                ),
            ),
        ),
        "no-row-running",
        "group-closed",
        mode="sigint",
    ),
    # Our own.
    mutant(
        "forget a claim whose reply was lost",
        code(Fetcher, "_claim", ("self._live.doubt()", "pass")),
        "ends",
        fault=("lost_after", "claim"),
    ),
    mutant(
        "a comparison leaves the epoch as it was",
        code(
            Tables,
            "compare",
            ("epoch=group.epoch + 1)", "epoch=group.epoch)"),
            ("return group.epoch + 1,", "return group.epoch,"),
        ),
        "ends",
        fault=("late", "claim"),
    ),
    mutant(
        "start a job beside its earlier handler",
        code(
            Slots,
            "_prepare",
            ("self._settle(claim, Verdict(Outcome.SNOOZED, delay=RESTING))\n        return None", "pass"),
        ),
        "no-overlap",
        mode="lose",
        kinds=("stubborn",),
    ),
    mutant(
        "a lost lease lets handlers go on",
        code(LiveRegistration, "lose", ("self.interrupt_handlers(reason)", "pass")),
        "lost-lease-ends-handlers",
        mode="lose",
        kinds=("long",),
    ),
    mutant(
        "close without writing what ended",
        code(WorkerGroup, "_settle_and_close", ("while live.ledger.unsettled:", "while False:")),
        "done-iff-returned",
        mode="cancel",
    ),
    mutant(
        "an interrupted handler has failed",
        code(
            _handling,
            "judge",
            (
                "return Verdict(Outcome.RELEASED, log_error=rest, propagate=cancelled)",
                "return Verdict(failed, describe(exc), propagate=cancelled)",
            ),
        ),
        "done-iff-returned",
        mode="cancel",
    ),
    mutant(
        "an unknown commit is not looked up",
        code(MemoryStore, "commit_work", ("await self._resolve(claim, committed, exc)", "raise")),
        "done-iff-returned",
        fault=("lost_after", "commit_work"),
        kinds=("commits",),
    ),
    mutant(
        "the flusher closes before the handlers have ended",
        code(
            WorkerGroup,
            "_shut_down",
            (
                "await self._wait_for_children()",
                "self._flusher.close(deadline=self._store.now() + 5)\n        await self._wait_for_children()",
            ),
        ),
        "handlers-can-enqueue",
        mode="cancel",
        fault=("refused", "enqueue_each"),
        kinds=("says_goodbye",),
    ),
    mutant(
        "a closing whose reply was lost is repeated as if it had done nothing",
        code(WorkerGroup, "_settle_and_close", ("if exc.committed is None:", "if False:")),
        "report-equals-rows",
        mode="cancel",
        fault=("lost_after", "close_group"),
    ),
    mutant(
        "close once only",
        code(
            WorkerGroup,
            "_close",
            ("if self._store.now() + pause >= deadline or isinstance(exc, SchemaError):", "if True:"),
        ),
        "no-row-running",
        mode="cancel",
        fault=("refused", "close_group"),
    ),
    mutant(
        "a registration that nobody enters is closed once only",
        code(
            _group,
            "_close_quietly",
            ("if isinstance(exc, SchemaError) or store.now() + pause >= deadline:", "if True:"),
        ),
        "group-closed",
        mode="sigint",
        fault=("refused", "close_group"),
    ),
    mutant(
        "a stop cancels at once",
        code(
            WorkerGroup, "_stop_gracefully", ("move_on_after(self._options.grace_period)", "move_on_after(0)")
        ),
        "stop-lets-handlers-end",
        mode="stop",
    ),
    mutant(
        "register again without closing what was lost",
        code(WorkerGroup, "_renew", ("if not old.closed:", "if False:")),
        "ends",
        mode="lose",
    ),
    mutant(
        "Ctrl-C in a handler ends the job alone",
        code(
            _handling,
            "judge",
            ("return Verdict(Outcome.RELEASED, propagate=exc)", "return Verdict(Outcome.RELEASED)"),
        ),
        "errors-come-out",
        mode="handler_sigint",
    ),
    mutant(
        "a release whose reply was lost is called stale",
        code(Settler, "_answered_before", ("if not self._live.unanswered:", "if True:")),
        "report-equals-rows",
        fault=("lost_after", "settle"),
        kinds=("snoozes",),
    ),
    mutant(
        "a registration whose reply was lost is forgotten",
        code(WorkerGroup, "_register", ("if exc.committed is False:", "if True:")),
        "group-closed",
        fault=("lost_after", "register"),
    ),
    mutant(
        "no fence",
        code(Tables, "fenced", (" or lease.group_id != group_id or lease.claim_no != claim_no", "")),
        "done-iff-returned",
        mode="retire",
        rival=True,
    ),
)


def survives(n: int) -> bool:
    """Return whether the n-th mutant does, for another process."""
    return kill(MUTANTS[n]) is None
