"""Cancel at every point of every call, with real threads and a real PostgreSQL.

A call of the bridge passes named points in its thread (`triojobs._bridge.reached`). A gate stops the
thread at one of them; the injection is delivered on the event loop, Trio takes a few steps, the thread
goes on. (mode, operation, occurrence, point) names a run:

    python -m tests.sweep.gate --mode cancel --operation "claiming jobs" --occurrence 0 --point committed

Real threads are not repeatable to the step, so the same name may meet another interleaving next time.
The journal is written by the handlers; what must hold is read from the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import psycopg
import trio

import triojobs
from triojobs import _bridge

MODES: Final = ("cancel", "sibling", "stop", "sigint")
POINTS: Final = ("enter", "connected", "executed", "committed", "exit")
STEPS: Final = 5  # of the loop between the injection and the release of the thread
NUMBER: Final = re.compile(r"\d+")
PATIENCE: Final = 30.0  # seconds for what takes a tenth of one; only a hang needs them
KINDS: Final = ("instant", "sleeps", "thread", "fails_once", "nursery", "commits")
OPTIONS: Final[dict[str, Any]] = {
    "name": "gate",
    "grace_period": 1.0,
    "close_timeout": 5.0,
    "call_timeout": 4.0,
    "lease_duration": 20.0,
    "lease_margin": 5.0,
    "beat_interval": 2.0,
    "job_connections": 1,
}
SLACK: Final = 10.0  # seconds beyond the bound, for a machine that does other things as well
UNIT: Final = 0.005  # seconds of a piece of work
TABLES: Final = [
    "jobs",
    "outcomes",
    "scheduled",
    "ready",
    "leases",
    "keys",
    "worker_groups",
    "waiting",
    "witnesses",
]

# A claim that was given back leaves no row; so a trigger keeps its own books of claims.
WITNESS: Final = """
CREATE TABLE public.gate_sent (job_id bigint);
CREATE TABLE public.gate_claims (job_id bigint);
CREATE FUNCTION public.gate_note() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO public.gate_claims VALUES (NEW.id); RETURN NULL; END';
CREATE TRIGGER gate_note AFTER INSERT ON triojobs.leases FOR EACH ROW EXECUTE FUNCTION public.gate_note();
"""

jobs: triojobs.Queue[str, str] = triojobs.Queue("gate", str, result=str)
children: triojobs.Queue[str, str] = triojobs.Queue("gate_children", str, result=str)


class Place(NamedTuple):
    """The occurrence-th time (from 0) that a call of this operation comes to this point."""

    operation: str
    occurrence: int
    point: str


class Boom(Exception):
    """What the sibling raises."""


@dataclass(eq=False)
class Run:
    """One call of a handler. `ended`: running, returned, failed, interrupted. `committed`: job.commit came back."""

    job_id: int
    fence: Any
    ended: str = "running"
    committed: bool = False

    @property
    def status(self) -> str | None:
        """The outcome that must stand under this fence; None: the claim was given back."""
        if self.committed or self.ended == "returned":
            return "done"
        return "failed" if self.ended == "failed" else None


class Program(trio.abc.Instrument):
    """A worker group, its handlers, and the injection into it: at a place, or before the k-th task step."""

    def __init__(self, conninfo: str, mode: str, place: Place | None, k: int | None = None) -> None:
        self.conninfo = conninfo
        self.mode = mode
        self.place = place
        self.k = k
        self.steps = 0
        self.seen: list[Place] = []
        self.runs: list[Run] = []
        self.overlaps: list[int] = []
        self.injected_at: float | None = None
        self.ended_at = 0.0
        self.error: BaseException | None = None
        self.group: triojobs.WorkerGroup | None = None
        self._active: Counter[int] = Counter()
        self._counted: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._go_on = threading.Event()
        self._outer = trio.CancelScope()
        self._boom = trio.Event()
        self._all_done = trio.Event()

    # The gate, in the call's thread.

    def reached(self, operation: str, point: str) -> None:
        operation = NUMBER.sub("N", operation)  # ids and batch sizes differ from run to run
        with self._lock:
            occurrence = self._counted[operation, point]
            self._counted[operation, point] += 1
            here = Place(operation, occurrence, point)
            self.seen.append(here)
        if here == self.place:
            go_on = self._go_on
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._inject, go_on)
                go_on.wait(PATIENCE)

    # On the loop.

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.steps == self.k:
            self._deliver()
        self.steps += 1

    def _inject(self, go_on: threading.Event) -> None:
        trio.lowlevel.spawn_system_task(_release, go_on)
        self._deliver()

    def _deliver(self) -> None:
        self.injected_at = time.monotonic()
        if self.mode == "cancel":
            self._outer.cancel()
        elif self.mode == "sibling":
            self._boom.set()
        elif self.mode == "sigint":
            signal.raise_signal(signal.SIGINT)
        elif self.group is not None:
            self.group.stop()

    def run(self) -> None:
        """Run it; keeps what it raised."""
        before = _bridge.reached
        _bridge.reached = self.reached
        try:
            trio.run(self._main, instruments=[self])
        except BaseException as exc:
            self.error = exc
        finally:
            _bridge.reached = before
            self._go_on.set()
            self.ended_at = time.monotonic()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        retry = triojobs.Backoff(first=0.01, limit=0.02)
        workers = [
            triojobs.Worker(jobs, self._handle, concurrency=2, retry=retry),
            triojobs.Worker(children, self._handle, concurrency=1, retry=retry),
        ]
        with trio.move_on_after(PATIENCE) as patience, self._outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sibling)
                async with triojobs.open_worker_group(self.conninfo, workers, **OPTIONS) as group:
                    self.group = group
                    await self._until_done(group)
                nursery.cancel_scope.cancel()
        assert not patience.cancelled_caught, "the program hangs"

    async def _until_done(self, group: triojobs.WorkerGroup) -> None:
        async with trio.open_nursery() as nursery:

            async def leave(wait: Callable[[], Any]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(leave, group.wait_stopped)
            nursery.start_soon(leave, self._all_done.wait)

    async def _sibling(self) -> None:
        await self._boom.wait()
        raise Boom

    async def _handle(self, job: triojobs.Job[str]) -> str:
        run = Run(job.id, job.fence)
        self.runs.append(run)
        if self._active[job.id]:
            self.overlaps.append(job.id)
        self._active[job.id] += 1
        try:
            await getattr(self, f"_{job.payload}")(job, run)
        except BaseException as exc:
            cancelled = trio.current_effective_deadline() == -math.inf
            run.ended = "interrupted" if cancelled or not isinstance(exc, Exception) else "failed"
            raise
        else:
            run.ended = "returned"
            return job.payload
        finally:
            self._active[job.id] -= 1
            if len({r.job_id for r in self.runs if r.status == "done"}) == len(KINDS) + 1:
                self._all_done.set()

    async def _instant(self, job: triojobs.Job[str], run: Run) -> None:
        """No checkpoint at all."""

    _child = _instant

    async def _sleeps(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.sleep(UNIT)

    async def _thread(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.to_thread.run_sync(threading.Event().wait, UNIT)

    async def _fails_once(self, job: triojobs.Job[str], run: Run) -> None:
        await trio.lowlevel.checkpoint()
        if job.attempt == 1:
            raise ValueError("the first attempt fails")

    async def _nursery(self, job: triojobs.Job[str], run: Run) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, UNIT)
                nursery.start_soon(trio.sleep, 2 * UNIT)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2 * UNIT)

    async def _commits(self, job: triojobs.Job[str], run: Run) -> None:
        def work(conn: psycopg.Connection[Any]) -> str:
            conn.execute("INSERT INTO public.gate_sent VALUES (%s)", [job.id])
            triojobs.enqueue_on(conn, children, "child")
            return job.payload

        await job.commit(work)
        run.committed = True
        await trio.sleep(UNIT)


async def _release(go_on: threading.Event) -> None:
    for _ in range(STEPS):
        await trio.lowlevel.checkpoint()
    go_on.set()


# What must hold.


def violations(program: Program, db: psycopg.Connection[Any]) -> list[str]:
    """Return "name: what" for everything that does not hold after a run."""
    return [
        f"{check.__name__.strip('_').replace('_', '-')}: {what}"
        for check in CHECKS
        for what in check(program, db)
    ]


def _no_row_running(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    yield from (f"job {job_id}" for (job_id,) in db.execute("SELECT id FROM triojobs.leases"))


def _group_closed(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rows = db.execute("SELECT id FROM triojobs.worker_groups WHERE closed_at IS NULL")
    yield from (str(group_id) for (group_id,) in rows)


def _done_iff_returned(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rows = {
        (job_id, group_id, claim_no): status
        for job_id, group_id, claim_no, status in db.execute(
            "SELECT job_id, group_id, claim_no, status FROM triojobs.outcomes"
        )
    }
    for run in program.runs:
        found = rows.pop((run.job_id, *run.fence), None)
        if found != run.status:
            yield f"job {run.job_id}: the handler {run.ended} (committed {run.committed}), the row says {found}"
    yield from (f"{key} {status}, which no handler ran" for key, status in rows.items())


def _attempts_exact(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    rows = db.execute(
        "SELECT s.id, s.attempts, count(o.no) FROM triojobs.job_status s"
        " LEFT JOIN triojobs.outcomes o ON o.job_id = s.id GROUP BY s.id, s.attempts"
    )
    yield from (f"job {job_id}: {said} said, {made} made" for job_id, said, made in rows if said != made)


def _commits_exact(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    row = db.execute(
        "SELECT (SELECT count(*) FROM public.gate_sent),"
        " (SELECT count(*) FROM triojobs.jobs WHERE queue = 'gate_children'),"
        " (SELECT count(*) FROM triojobs.outcomes o JOIN triojobs.jobs j ON j.id = o.job_id"
        "  WHERE o.status = 'done' AND convert_from(j.payload, 'UTF8') LIKE '%commits')"
    ).fetchone()
    if row is not None and len(set(row)) > 1:
        yield f"{row[0]} writes, {row[1]} follow-ups, {row[2]} completions"


def _runs_once(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    ends = Counter(run.job_id for run in program.runs if run.status == "done")
    yield from (f"job {job_id} ran {n} times to its end" for job_id, n in ends.items() if n > 1)


def _no_overlap(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    yield from (f"two handlers of job {job_id} at once" for job_id in program.overlaps)


def _no_handler_left(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    yield from (f"job {run.job_id}" for run in program.runs if run.ended == "running")


def _ledger_empty(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    for live in program.group._registrations if program.group is not None else ():
        if live.ledger.held or live.ledger.unsettled:
            yield f"holds {live.ledger.held_ids()}"


def _report_equals_rows(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    if program.group is None:
        return
    report = program.group.report
    rows = Counter(status for (status,) in db.execute("SELECT status FROM triojobs.outcomes"))
    settled = {status: n for status, n in report.settled.items() if n}
    if settled != dict(rows):
        yield f"settled {settled}, but rows {dict(rows)}"
    claims = db.execute("SELECT count(*) FROM public.gate_claims").fetchone()
    if claims is not None and report.released != claims[0] - rows.total():
        yield f"released {report.released}, but {claims[0]} claims and {rows.total()} outcomes"
    if report.abandoned or report.unknown_claims:
        yield f"abandoned {report.abandoned}, {report.unknown_claims} unknown claims"


def _only_permitted_errors(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    permitted = {"sibling": Boom, "sigint": KeyboardInterrupt}.get(program.mode)
    for leaf in _leaves(program.error):
        if permitted is None or not isinstance(leaf, permitted):
            yield repr(leaf)


def _exit_in_time(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    bound = OPTIONS["grace_period"] + OPTIONS["close_timeout"] + OPTIONS["call_timeout"] + 1.0 + SLACK
    if program.injected_at is not None and program.ended_at - program.injected_at > bound:
        yield f"{program.ended_at - program.injected_at:.1f} s"


def _nothing_left_open(program: Program, db: psycopg.Connection[Any]) -> Iterator[str]:
    # A backend ends a moment after its client has said goodbye, a thread that asks for a cancel within a second.
    query = (
        "SELECT application_name FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'triojobs %'"
    )
    give_up_at = time.monotonic() + PATIENCE
    while True:
        threads = [t.name for t in threading.enumerate() if t.name.startswith("triojobs")]
        sessions = db.execute(query).fetchall()
        if not threads and not sessions:
            return
        if time.monotonic() > give_up_at:
            yield f"threads {threads}, sessions {sessions}"
            return


CHECKS = (
    _nothing_left_open,  # waits for sessions that end late; what they wrote is seen by the others
    _no_row_running,
    _group_closed,
    _done_iff_returned,
    _attempts_exact,
    _commits_exact,
    _runs_once,
    _no_overlap,
    _no_handler_left,
    _ledger_empty,
    _report_equals_rows,
    _only_permitted_errors,
    _exit_in_time,
)


def _leaves(exc: BaseException | None) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    elif exc is not None:
        yield exc


# Many runs on one database.


@dataclass
class Gate:
    """A migrated database, used again and again."""

    conninfo: str
    runs: int = 0
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.db = psycopg.connect(self.conninfo, autocommit=True, application_name="gate")
        self.db.execute(WITNESS)

    def close(self) -> None:
        self.db.close()

    def one(self, mode: str, place: Place | None, k: int | None = None) -> tuple[Program, list[str]]:
        """Run once; return the program and what did not hold."""
        for table in TABLES:
            self.db.execute(f"DELETE FROM triojobs.{table}")  # type: ignore[arg-type]
        self.db.execute("DELETE FROM public.gate_sent")
        self.db.execute("DELETE FROM public.gate_claims")
        triojobs.enqueue_many_on(self.db, jobs, list(KINDS))
        program = Program(self.conninfo, mode, place, k)
        with _quiet():
            program.run()
        self.runs += 1
        wrong = violations(program, self.db)
        if wrong:
            self.found.append("\n    ".join([command(mode, place, k), *wrong]))
        return program, wrong

    def plain(self) -> Program:
        """Run without an injection: it tells the places, in the order in which they were reached, and the steps."""
        program, wrong = self.one("none", None)
        assert not wrong, wrong
        return program


def command(mode: str, place: Place | None, k: int | None) -> str:
    """Return the command that repeats a run."""
    if place is None:
        return f"python -m tests.sweep.gate --mode {mode}" + ("" if k is None else f" --k {k}")
    return (
        f"python -m tests.sweep.gate --mode {mode} --operation '{place.operation}'"
        f" --occurrence {place.occurrence} --point {place.point}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def own_gate() -> Iterator[Gate]:
    """A gate on a server of its own, without durability: nobody wants its rows back."""
    from triojobs._embedded_cluster import Cluster, running_cluster

    with running_cluster(Cluster(settings={"fsync": "off", "full_page_writes": "off"})) as conninfo:
        triojobs.migrate(conninfo)
        with contextlib.closing(Gate(conninfo)) as gate:
            yield gate


def sweep() -> tuple[int, int]:
    """Inject every mode at every point, and a cancel before every step; return (runs, bad ones).

    Violations go to stderr.
    """
    with own_gate() as gate:
        plain = gate.plain()
        for place in plain.seen:
            for mode in MODES:
                gate.one(mode, place)
        for k in range(plain.steps):
            gate.one("cancel", None, k)
        for found in gate.found:
            print(found, file=sys.stderr)
        return gate.runs, len(gate.found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.gate", description=__doc__)
    parser.add_argument("--mode", choices=(*MODES, "none"))
    parser.add_argument("--operation")
    parser.add_argument("--occurrence", type=int, default=0)
    parser.add_argument("--point", choices=POINTS)
    parser.add_argument("--k", type=int, help="before this task step, without a gate")
    asked = parser.parse_args()
    if asked.mode is None:
        began = time.monotonic()
        runs, bad = sweep()
        print(f"{runs} runs, {bad} with violations, {time.monotonic() - began:.1f} s")
        return bool(bad)
    place = None if asked.operation is None else Place(asked.operation, asked.occurrence, asked.point)
    with own_gate() as gate:
        program, wrong = gate.one(asked.mode, place, asked.k)
    for seen in program.seen:
        print(f"  {seen.operation} {seen.occurrence} {seen.point}")
    for run in program.runs:
        print(f"  job {run.job_id}: {run.ended}")
    print("\n".join(wrong) or "everything holds")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
