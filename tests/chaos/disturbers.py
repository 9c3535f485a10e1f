"""Who disturbs what, and when. Everything is drawn from the seed; the machine's speed does the rest."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final, LiteralString

import psycopg
import trio

from .fleet import Fleet, Member
from .journal import Journal, clock
from .plan import CONTROL, STOP_AT_MOST, Plan
from .server import Server

TERMINATE_EVERY: Final = (0.05, 0.15)  # seconds between two terminated backends
KILL_EVERY: Final = (1.5, 3.5)
STOP_EVERY: Final = (1.0, 3.0)
SHORT_STOP: Final = (0.2, 1.2)
DRAIN_EVERY: Final = (3.0, 6.0)
DOWN: Final = (0.1, 4.0)  # seconds between the server's crash and its new start
CRASH_AT: Final = 0.5  # share of the jobs enqueued when the server crashes, at the earliest
CRASH_EVERY: Final = (20.0, 60.0)
LONG_IN_FLIGHT: Final = 0.3  # seconds after its claim, a job is one of the long ones
LOOK_AGAIN: Final = 0.05  # seconds between looks of those who wait for something to happen
AFTERMATH: Final = 1.0  # seconds in which a woken process settles and registers again
BEGUN: Final = 0.1  # seconds after its claim, a handler is at work

TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM (
    SELECT pid FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND application_name <> %s AND datname = current_database()
    ORDER BY random() LIMIT 1
) victim
"""
IN_FLIGHT: Final = """
SELECT g.name, count(*) FROM triojobs.leases l JOIN triojobs.worker_groups g ON g.id = l.group_id
WHERE l.claimed_at < clock_timestamp() - %s * interval '1 second' GROUP BY 1
"""
HELD: Final = """
SELECT l.id FROM triojobs.leases l JOIN triojobs.worker_groups g ON g.id = l.group_id
WHERE g.name = %s AND l.claimed_at < clock_timestamp() - %s * interval '1 second'
"""
HELD_BY_OTHERS: Final = """
SELECT l.id FROM triojobs.leases l JOIN triojobs.worker_groups g ON g.id = l.group_id
WHERE l.id = ANY (%s) AND g.name <> %s
"""


class Disturbers:
    """Each method disturbs in its way until it is cancelled; `seen_all` says when enough has happened."""

    def __init__(self, plan: Plan, server: Server, fleet: Fleet, journal: Journal) -> None:
        self.counts: Counter[str] = Counter()
        self.crashed = trio.Event()
        self.stopped_beyond_lease = trio.Event()
        self.stopped_often = trio.Event()
        self.killed = trio.Event()
        self._stops = plan.stops
        self._seed = plan.seed
        self._server = server
        self._fleet = fleet
        self._journal = journal

    async def seen_all(self) -> None:
        """Return when each kind has happened, and stops beyond a lease as often as planned."""
        for event in (self.crashed, self.killed, self.stopped_often):
            await event.wait()

    async def terminate_backends(self) -> None:
        """End random sessions of everybody but the driver's control."""
        rng = self._rng("terminate")
        while True:
            try:
                with psycopg.connect(
                    self._server.conninfo, application_name=CONTROL, autocommit=True
                ) as conn:
                    while True:
                        await trio.sleep(rng.uniform(*TERMINATE_EVERY))
                        row = conn.execute(TERMINATE, [CONTROL]).fetchone()
                        self.counts["terminate"] += bool(row and row[0])
            except psycopg.OperationalError:
                await trio.sleep(0.1)

    async def kill_workers(self) -> None:
        """SIGKILL."""
        rng = self._rng("kill")
        while True:
            self._fleet.kill(await self._victim(rng, KILL_EVERY))
            self.killed.set()

    async def drain_workers(self) -> None:
        """SIGTERM."""
        rng = self._rng("drain")
        while True:
            self._fleet.drain(await self._victim(rng, DRAIN_EVERY))

    async def stop_workers_shortly(self) -> None:
        """SIGSTOP and SIGCONT, mostly within the lease."""
        rng = self._rng("short stop")
        while True:
            member = await self._victim(rng, STOP_EVERY)
            await self._fleet.stop(member, partial(trio.sleep, rng.uniform(*SHORT_STOP)))

    async def stop_workers_beyond_their_lease(self) -> None:
        """SIGSTOP until others have rescued jobs of the process and run them, SIGCONT."""
        rng = self._rng("stop")
        while True:
            member = await self._victim(rng, STOP_EVERY, least=2, older=LONG_IN_FLIGHT)
            before = self.counts["stop beyond lease"]
            await self._fleet.stop(member, partial(self._until_taken_over, member))
            if self.counts["stop beyond lease"] > before:
                await trio.sleep(AFTERMATH)
                self.stopped_beyond_lease.set()
            if self.counts["stop beyond lease"] >= self._stops:
                self.stopped_often.set()

    async def _until_taken_over(self, member: Member) -> None:
        held = await self._look(HELD, [member.name, LONG_IN_FLIGHT])
        jobs = [job for (job,) in held]
        with trio.move_on_after(STOP_AT_MOST):
            while not await self._look(HELD_BY_OTHERS, [jobs, member.name]):
                await trio.sleep(LOOK_AGAIN)
            await trio.sleep(BEGUN)
            self.counts["stop beyond lease"] += 1

    async def _look(self, query: LiteralString, parameters: list[Any]) -> list[tuple[Any, ...]]:
        """Ask the server, as soon as it is up."""
        while True:
            try:
                with psycopg.connect(self._server.conninfo, application_name=CONTROL) as conn:
                    return conn.execute(query, parameters).fetchall()
            except psycopg.OperationalError:
                await trio.sleep(LOOK_AGAIN)

    async def crash_server(self, share: Callable[[], float]) -> None:
        """Let the server crash in the middle and start it again; in long runs now and then once more.

        The first time after a stop beyond a lease and what followed from it: during an outage nobody
        could take the jobs over, and the woken process could not try to settle them.
        """
        rng = self._rng("crash")
        await self.stopped_beyond_lease.wait()
        while share() < CRASH_AT:
            await trio.sleep(LOOK_AGAIN)
        while True:
            down_at = clock()
            with trio.CancelScope(shield=True):  # whoever ends us needs the server for its checks
                await self._server.crash()
                await trio.sleep(rng.uniform(*DOWN))
                await self._server.start_again()
            self._journal.write("crash", at=down_at, until=clock())
            self.counts["restart"] += 1
            self.crashed.set()
            await trio.sleep(rng.uniform(*CRASH_EVERY))

    async def _victim(
        self, rng: random.Random, every: tuple[float, float], *, least: int = 1, older: float = 0.0
    ) -> Member:
        """Return a member after a random time, the more probably the more jobs it has in flight.

        It has at least `least` jobs that it claimed more than `older` seconds ago.
        """
        await trio.sleep(rng.uniform(*every))
        while True:
            in_flight = self._jobs_in_flight(least, older)
            # One always goes on undisturbed, to rescue what the others held.
            if in_flight and len(self._fleet.idle_members()) > 1:
                return rng.choices(list(in_flight), list(in_flight.values()))[0]
            await trio.sleep(LOOK_AGAIN)

    def _jobs_in_flight(self, least: int, older: float) -> dict[Member, int]:
        members = self._fleet.idle_members()
        try:
            with psycopg.connect(self._server.conninfo, application_name=CONTROL) as conn:
                rows = dict(conn.execute(IN_FLIGHT, [older]).fetchall())
        except psycopg.OperationalError:
            return dict.fromkeys(members, 1)  # the server is down: anybody
        return {member: rows[member.name] for member in members if rows.get(member.name, 0) >= least}

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"{self._seed} {what}")
