"""Jobs that go on while connections are ended under them, and the proof that each ran once to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, LiteralString

import trio

import triojobs
from tests.tools.looking import blocked, locked, rows, until, value

from .rig import AT_ONCE, PATIENCE, SHORT, plain, running, wait_until

ROLES: Final = ("claim", "settle", "client", "job", "heartbeat", "listen")
IN_STATEMENTS: Final = ("client", "job", "settle", "claim", "heartbeat")  # listen has none
OUR_TABLES: Final = (
    "LOCK TABLE triojobs.worker_groups, triojobs.jobs, triojobs.leases IN ACCESS EXCLUSIVE MODE"
)
LASTING: Final[dict[str, Any]] = {"lease_duration": 60.0}  # longer than everybody waits for the lock


class Effects:
    """A handler whose work is committed with its job, and which counts how often it got to its end."""

    def __init__(self, conninfo: str) -> None:
        rows(conninfo, "CREATE TABLE public.effects (job bigint)")
        self.returned: Counter[int] = Counter()
        self.held: set[int] = set()
        self.go_on = trio.Event()

    async def handle(self, job: triojobs.Job[Any]) -> int:
        if job.payload.startswith("hold"):
            self.held.add(job.id)
            await self.go_on.wait()
        if job.payload.endswith("commit"):
            await job.commit(
                lambda conn: conn.execute("INSERT INTO public.effects VALUES (%s)", [job.id]).rowcount
            )
        else:
            await trio.sleep(0.02)
        self.returned[job.id] += 1
        return job.attempt

    def worker(self) -> triojobs.Worker[Any, Any]:
        return triojobs.Worker(plain, self.handle, concurrency=5, retry=AT_ONCE)


def check_all_done_once(conninfo: str, ids: list[int], effects: Effects) -> None:
    """Nothing is lost, no finished job ran again, no work was committed twice."""
    done = rows(conninfo, "SELECT job_id FROM triojobs.outcomes WHERE status = 'done' ORDER BY job_id")
    assert [job_id for (job_id,) in done] == sorted(ids)
    assert effects.returned == Counter(ids)
    committed = rows(conninfo, "SELECT job FROM public.effects")
    assert len(set(committed)) == len(committed)
    assert running(conninfo) == 0


def terminate(conninfo: str, role: str) -> int:
    """End the sessions of a role; return how many there were."""
    query: LiteralString = """
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'triojobs ' || %s
    """
    ended = value(conninfo, query, role)
    assert isinstance(ended, int)
    return ended


@contextmanager
def suppress_transient() -> Iterator[None]:
    """Let errors pass that say of themselves that the same call may succeed later."""
    try:
        yield
    except triojobs.DatabaseError as exc:
        if not exc.transient:
            raise


async def disturb_sessions(conninfo: str, through: str, end: Callable[[str], int]) -> None:
    """Run jobs while connections are ended: every 50 ms those of another role, then in mid-statement."""
    effects = Effects(conninfo)
    hit: Counter[str] = Counter()
    ids: list[int] = []
    async with (
        triojobs.open_client(conninfo) as client,
        triojobs.open_worker_group(through, [effects.worker()], **SHORT | LASTING) as group,
    ):
        with trio.fail_after(PATIENCE):
            while min(hit[role] for role in ROLES) < 2:
                ids += await client.enqueue_many(plain, ["sleep", "commit", "sleep"])
                for role in ROLES:
                    hit[role] += end(role)
                    # The client's connection is in use, too; its caller hears of the loss.
                    with suppress_transient():
                        await group.client.get(ids[0])
                    await trio.sleep(0.05)
            ids += await client.enqueue_many(plain, ["hold", "hold and commit"] * 2)
            await end_in_mid_statement(conninfo, group, effects, end)
            # A commit that was cut off is a failed attempt; it comes again at once.
            async with client.as_completed(ids) as completions:
                statuses = {info.status async for info in completions}
        assert statuses == {"done"}
        assert group.statistics().registrations == 1  # no lease was lost
        assert group.statistics().stale == 0
    check_all_done_once(conninfo, ids, effects)


async def end_in_mid_statement(
    conninfo: str, group: triojobs.WorkerGroup, effects: Effects, end: Callable[[str], int]
) -> None:
    """Have every role's statement wait for a lock, and end its connection there."""

    async def read() -> None:
        with suppress_transient():
            await group.client.get(1)

    async with trio.open_nursery() as nursery:
        await wait_until(lambda: len(effects.held) == 4)  # of five slots: one claims
        with locked(conninfo, OUR_TABLES):
            effects.go_on.set()  # now there is something to commit and to settle
            nursery.start_soon(read)
            sessions = []
            for role in IN_STATEMENTS:
                sessions.append(await blocked(conninfo, role))
                assert end(role)
            # What they were about to write is lost, and has to be written anew.
            await until(
                conninfo, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY (%s))", sessions
            )
