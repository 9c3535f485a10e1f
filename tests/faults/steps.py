"""A group on a real server, disturbed before a given step of its tasks, and what must be true afterwards.

A cancel is delivered at checkpoints only and every checkpoint ends a step, so the steps of an undisturbed
run name every instant at which somebody outside can interfere. Here twenty of them are tried with the
real clock and real threads; `tests/sweep` tries them all.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

import triojobs
from tests.tools.looking import rows

from .rig import AT_ONCE, PATIENCE, SHORT, exit_bound, running

KINDS: Final = ("nothing", "sleep", "thread", "once", "shield")
INSTANTS: Final = 20  # of one run
plain: triojobs.Queue[str, str] = triojobs.Queue("plain", str)


class Boom(Exception):
    """What the sibling raises."""


class AtSteps(trio.abc.Instrument):
    """Counts steps of all tasks; fires before the chosen ones."""

    def __init__(self, shots: Sequence[int], fire: Callable[[], None]) -> None:
        self.steps = 0
        self._shots = sorted(shots, reverse=True)
        self._fire = fire

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        while self._shots and self.steps >= self._shots[-1]:
            self._shots.pop()
            self._fire()
        self.steps += 1


@dataclass
class Run:
    """One life of a group: five jobs, two slots, left when all are done or as somebody wishes."""

    conninfo: str
    shots: Sequence[int] = ()
    counted: Counter[int] = field(default_factory=Counter)  # attempts that ended by themselves, by job
    returned: set[int] = field(default_factory=set)
    error: BaseException | None = None
    left_in: float = 0.0  # seconds from the first shot to the end
    steps: int = 0
    group: triojobs.WorkerGroup | None = None

    def __post_init__(self) -> None:
        self.scope = trio.CancelScope()
        self.boom = trio.Event()
        self._first_shot: float | None = None

    def go(self, fire: Callable[[Run], None]) -> Run:
        """Live."""

        def shoot() -> None:
            if self._first_shot is None:
                self._first_shot = time.monotonic()
            fire(self)

        instrument = AtSteps(self.shots, shoot)
        try:
            trio.run(self._main, instruments=[instrument])
        except BaseException as exc:
            self.error = exc
        self.steps = instrument.steps
        self.left_in = 0.0 if self._first_shot is None else time.monotonic() - self._first_shot
        return self

    async def _main(self) -> None:
        worker = triojobs.Worker(plain, self._handle, concurrency=2, retry=AT_ONCE)
        with self.scope, trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sibling)
                async with triojobs.open_worker_group(self.conninfo, [worker], **SHORT) as group:
                    self.group = group
                    await group.client.enqueue_many(plain, KINDS)
                    while len(self.returned) < len(KINDS):
                        await trio.sleep(0.005)
                nursery.cancel_scope.cancel()

    async def _sibling(self) -> None:
        await self.boom.wait()
        raise Boom

    async def _handle(self, job: triojobs.Job[str]) -> str:
        match job.payload:
            case "sleep":
                await trio.sleep(0.02)
            case "thread":
                await trio.to_thread.run_sync(time.sleep, 0.02)
            case "once" if job.attempt == 1:
                # What fails while it is being cancelled is given back.
                self.counted[job.id] += trio.current_effective_deadline() != -math.inf
                raise ValueError("the first time")
            case "shield":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep, 0.01)
                    with trio.CancelScope(shield=True):
                        await trio.sleep(0.01)
        self.counted[job.id] += 1
        self.returned.add(job.id)
        return job.payload


def check(run: Run) -> None:
    """Nothing is running, attempts are exact, done is what returned; then make room for the next run."""
    assert running(run.conninfo) == 0
    assert not rows(run.conninfo, "SELECT id FROM triojobs.worker_groups WHERE closed_at IS NULL")
    for job_id, status, attempts in rows(
        run.conninfo, "SELECT id, status, attempts FROM triojobs.job_status ORDER BY id"
    ):
        assert (status == "done") == (job_id in run.returned), (job_id, status)
        assert attempts == run.counted[job_id], (job_id, status)
    if run.shots:
        assert run.left_in <= exit_bound(SHORT) + SHORT["call_timeout"]  # it may have been on its way in
    for table in ("jobs", "ready", "scheduled", "outcomes"):
        rows(run.conninfo, f"DELETE FROM triojobs.{table}")  # type: ignore[arg-type]


def instants(conninfo: str) -> list[int]:
    """Run undisturbed; return steps that are spread over that run."""
    run = Run(conninfo).go(lambda run: None)
    assert run.error is None
    assert len(run.returned) == len(KINDS)
    check(run)
    return [run.steps * n // INSTANTS for n in range(INSTANTS)]


def disturbed(conninfo: str, fire: Callable[[Run], Any], *, twice: bool = False) -> list[Run]:
    """Run once for each instant, disturbed there (and a little later again), check; return the runs."""
    runs = []
    for k in instants(conninfo):
        runs.append(Run(conninfo, (k, k + 7 + k % 40) if twice else (k,)).go(fire))
        check(runs[-1])
    return runs
