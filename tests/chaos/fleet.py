"""The worker processes as seen from outside: kept running, killed, stopped, drained.

A member is one place in the fleet; when its process ends, the next one is started. Each process has a
name and a journal of its own. Whatever the driver does to a process it writes into its own journal
first, so that the checks know which handlers were in flight.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import trio

from .journal import Journal, clock
from .plan import CONTROL, Plan

ROOT = Path(__file__).resolve().parents[2]
END_OF_ALL = 20.0  # seconds in which drained processes must end
LEASED_TO = """
SELECT l.id FROM triojobs.leases l JOIN triojobs.worker_groups g ON g.id = l.group_id WHERE g.name = %s
"""


class Member:
    """One place in the fleet and the process that holds it now.

    `busy` is set while somebody does something to the process that shall not be mixed with other things.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = ""
        self.busy = False
        self.expected_codes: frozenset[int] = frozenset()
        self.process: trio.Process | None = None


class Fleet:
    """All worker processes. Made by `running_fleet`."""

    def __init__(self, conninfo: str, directory: Path, journal: Journal, plan: Plan) -> None:
        self.counts: Counter[str] = Counter()
        self.members = [Member(number) for number in range(1, plan.workers + 1)]
        self._conninfo = conninfo
        self._directory = directory
        self._journal = journal
        self._mutant = plan.mutant
        self._closing = False
        self._ended = 0
        self.all_ended = trio.Event()

    def idle_members(self) -> list[Member]:
        """Return the members with a process to which nobody does anything now."""
        return [m for m in self.members if m.process is not None and not m.expected_codes and not m.busy]

    def kill(self, member: Member) -> None:
        """End the process at once."""
        self._end(member, "kill", signal.SIGKILL, {-signal.SIGKILL})

    async def stop(self, member: Member, wait: Callable[[], Awaitable[object]]) -> None:
        """Stop the process until `wait` returns, or is cancelled."""
        process, name = member.process, member.name
        if process is None:
            return
        member.busy = True
        process.send_signal(signal.SIGSTOP)
        stopped_at = clock()
        self.counts["stop"] += 1
        try:
            await wait()
        finally:
            member.busy = False
            process.send_signal(signal.SIGCONT)  # a process that has ended does not mind
            self._journal.write("stop", process=name, at=stopped_at, until=clock())

    def drain(self, member: Member) -> None:
        """Ask the process to end gracefully. SIGTERM ends it as any other before its group is open."""
        self._end(member, "drain", signal.SIGTERM, {0, -signal.SIGTERM})

    async def drain_all(self) -> None:
        """End gracefully; return when every process has ended."""
        self._closing = True
        for member in self.members:
            if not member.expected_codes:
                self._end(member, "last drain", signal.SIGTERM, {0, -signal.SIGTERM})
        with trio.move_on_after(END_OF_ALL):
            await self.all_ended.wait()

    async def keep(self, member: Member) -> None:
        """Start processes for this member, one after another, until the fleet closes."""
        incarnation = 0
        while not self._closing:
            incarnation += 1
            member.name = f"worker-{member.number}-{incarnation}"
            member.expected_codes = frozenset()
            code = await self._run_process(member)
            self._journal.write(
                "ended", process=member.name, code=code, expected=code in member.expected_codes
            )
            if code == 0:
                await self._note_jobs_left(member.name)
        self._ended += 1
        if self._ended == len(self.members):
            self.all_ended.set()

    async def _run_process(self, member: Member) -> int:
        command = [sys.executable, "-m", "tests.chaos.worker", self._conninfo]
        command += [
            str(self._directory / f"{member.name}.journal"),
            *([self._mutant] if self._mutant else []),
        ]
        with (self._directory / f"{member.name}.stderr").open("wb") as stderr:
            # A session of its own: Ctrl-C in a terminal is for the driver alone.
            process = await trio.lowlevel.open_process(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        member.process = process
        try:
            return await process.wait()
        finally:
            member.process = None
            if process.returncode is None:  # we are being cancelled
                self._journal.write("kill", process=member.name)
                process.kill()
            with trio.CancelScope(shield=True):  # a killed process ends, stopped or not
                await process.wait()
                assert process.stdin is not None
                await process.stdin.aclose()

    async def _note_jobs_left(self, name: str) -> None:
        """Write down which jobs are still leased to a process that has ended gracefully."""
        while True:
            try:
                with psycopg.connect(self._conninfo, application_name=CONTROL) as conn:
                    jobs = [row[0] for row in conn.execute(LEASED_TO, [name])]
            except psycopg.OperationalError:
                await trio.sleep(0.1)  # the server is down
            else:
                self._journal.write("left", process=name, jobs=jobs)
                return

    def _end(self, member: Member, event: str, number: signal.Signals, codes: set[int]) -> None:
        self.counts[event] += 1
        self._journal.write(event, process=member.name)
        member.expected_codes = frozenset(codes)
        if member.process is not None:
            member.process.send_signal(number)


@asynccontextmanager
async def running_fleet(conninfo: str, directory: Path, journal: Journal, plan: Plan) -> AsyncIterator[Fleet]:
    """Run the processes; at the end, however it comes, none of them is left."""
    fleet = Fleet(conninfo, directory, journal, plan)
    async with trio.open_nursery() as nursery:
        for member in fleet.members:
            nursery.start_soon(fleet.keep, member)
        yield fleet
        nursery.cancel_scope.cancel()
