"""Jobs that go on while connections are ended under them, and the proof that each ran once to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, LiteralString

import trio

import triojobs
from tests.tools.looking import rows, value

from .rig import AT_ONCE, SHORT, plain, running

ROLES: Final = ("claim", "settle", "client", "job", "heartbeat", "listen")


class Effects:
    """A handler whose work is committed with its job, and which counts how often it got to its end."""

    def __init__(self, conninfo: str) -> None:
        rows(conninfo, "CREATE TABLE public.effects (job bigint)")
        self.returned: Counter[int] = Counter()

    async def handle(self, job: triojobs.Job[Any]) -> int:
        if job.payload == "commit":
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
    """Run jobs while connections of one role after the other are ended, every 50 ms, until each was hit twice."""
    effects = Effects(conninfo)
    hit: Counter[str] = Counter()
    ids: list[int] = []
    async with (
        triojobs.open_client(conninfo) as client,
        triojobs.open_worker_group(through, [effects.worker()], **SHORT) as group,
    ):
        with trio.fail_after(60):
            while min(hit[role] for role in ROLES) < 2:
                ids += await client.enqueue_many(plain, ["sleep", "commit", "sleep"])
                for role in ROLES:
                    hit[role] += end(role)
                    # The client's connection is in use, too; its caller hears of the loss.
                    with suppress_transient():
                        await group.client.get(ids[0])
                    await trio.sleep(0.05)
            # A commit that was cut off is a failed attempt; it comes again at once.
            async with client.as_completed(ids) as completions:
                statuses = {info.status async for info in completions}
        assert statuses == {"done"}
        assert group.statistics().registrations == 1  # no lease was lost
        assert group.statistics().stale == 0
    check_all_done_once(conninfo, ids, effects)
