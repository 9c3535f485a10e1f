"""One run from start to findings."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import trio

import triojobs

from .checks import Findings, verify
from .disturbers import Disturbers
from .fleet import Fleet, running_fleet
from .history import History, add_events, add_rows, add_tracebacks
from .journal import Journal, clock, read_journals
from .mutants import CONSTRAINTS_DROPPED
from .plan import CONTROL, Plan
from .producers import Canceller, Producers
from .server import Server, private_server
from .workload import SCHEMA

Say = Callable[[str], None]

LEFT: Final = """
SELECT (SELECT count(*) FROM triojobs.ready) + (SELECT count(*) FROM triojobs.scheduled)
     + (SELECT count(*) FROM triojobs.leases)
"""
LOOK_EVERY: Final = 0.1


async def chaos(plan: Plan, say: Say) -> tuple[Findings, dict[str, Any]]:
    """Run it; return what was found and the figures. Nothing is left running, whatever happens."""
    began = clock()
    with journals_directory(plan) as directory:
        journal = Journal(directory / "driver.journal")
        async with private_server() as server:
            triojobs.migrate(server.conninfo)
            with psycopg.connect(server.conninfo) as conn:
                conn.execute(SCHEMA)
                if dropped := CONSTRAINTS_DROPPED.get(plan.mutant or ""):
                    conn.execute(dropped)
            say(f"server and {plan.workers} workers start; {plan.jobs} jobs over {plan.span:.0f} s or more")
            async with running_fleet(server.conninfo, directory, journal, plan) as fleet:
                figures = await disturbed_work(plan, server, fleet, journal, say)
            history = History()
            add_events(history, read_journals(directory))
            add_tracebacks(history, directory)
            with psycopg.connect(server.conninfo) as conn:
                add_rows(history, conn)
        journal.close()
        findings = verify(history)
    return findings, {**figures, "seconds": round(clock() - began, 1)}


@contextlib.contextmanager
def journals_directory(plan: Plan) -> Iterator[Path]:
    """Give a directory for the journals: the one to keep, or one that is removed."""
    if plan.keep is not None:
        plan.keep.mkdir(parents=True)
        yield plan.keep
        return
    with tempfile.TemporaryDirectory(prefix="triojobs-chaos-") as name:
        yield Path(name)


async def disturbed_work(
    plan: Plan, server: Server, fleet: Fleet, journal: Journal, say: Say
) -> dict[str, Any]:
    """Enqueue, disturb, wait until all has ended, and drain the workers; at most `plan.seconds`."""
    disturbers = Disturbers(plan, server, fleet, journal)
    with trio.move_on_after(plan.seconds) as bound:
        async with triojobs.open_client(server.conninfo) as client, trio.open_nursery() as nursery:
            producers = Producers(plan, client, server.conninfo, journal)
            nursery.start_soon(tell_progress, producers, fleet, disturbers, say)
            nursery.start_soon(Canceller(plan, client, journal).run, producers)
            nursery.start_soon(disturbers.terminate_backends)
            nursery.start_soon(disturbers.kill_workers)
            nursery.start_soon(disturbers.drain_workers)
            nursery.start_soon(disturbers.stop_workers_shortly)
            nursery.start_soon(disturbers.stop_workers_beyond_their_lease)
            nursery.start_soon(disturbers.crash_server, lambda: producers.share)
            await producers.run()
            await disturbers.seen_all()
            nursery.cancel_scope.cancel()
        say("nobody disturbs any more; waiting until every job has ended")
        await everything_ended(server)
        say("every job has ended; the workers are drained")
        await fleet.drain_all()
    if bound.cancelled_caught:
        say(f"given up after {plan.seconds:g} s")
    return {
        "kills": fleet.counts["kill"],
        "terminates": disturbers.counts["terminate"],
        "restarts": disturbers.counts["restart"],
        "stops": fleet.counts["stop"],
        "drains": fleet.counts["drain"],
        "given_up": bound.cancelled_caught,
    }


async def everything_ended(server: Server) -> None:
    """Return when no job waits or runs."""
    with psycopg.connect(server.conninfo, application_name=CONTROL, autocommit=True) as conn:
        while True:
            row = conn.execute(LEFT).fetchone()
            if row == (0,):
                return
            await trio.sleep(LOOK_EVERY)


async def tell_progress(producers: Producers, fleet: Fleet, disturbers: Disturbers, say: Say) -> None:
    while True:
        await trio.sleep(2)
        say(
            f"{producers.committed} enqueued; {fleet.counts['kill']} kills, {fleet.counts['stop']} stops,"
            f" {fleet.counts['drain']} drains, {disturbers.counts['terminate']} terminated backends,"
            f" {disturbers.counts['restart']} restarts"
        )
