"""What the fault tests share: a queue, options with short bounds, and looking until something shows."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, LiteralString

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import rows, value
from triojobs._bridge import CANCEL_WAIT
from triojobs._lease import rescue_interval
from triojobs._options import GroupOptions

PATIENCE: Final = 60.0  # seconds for what takes a few; only a hang needs them, or a very busy machine

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
AT_ONCE: Final = triojobs.Backoff(first=0.0, jitter=0.0)

# Short, so that bounds are reached within seconds; long enough for a machine that does other things too.
SHORT: Final[dict[str, Any]] = {
    "lease_duration": 3.0,
    "lease_margin": 1.0,
    "beat_interval": 0.4,
    "call_timeout": 1.0,
    "close_timeout": 2.0,
    "grace_period": 0.5,
    "poll_interval": 0.2,
    "listening_poll_interval": 0.5,
}
NEVER_POLLS: Final[dict[str, Any]] = {"listening_poll_interval": 3600.0, "poll_interval": 3600.0}

# Makes claims of a job wait inside their statement, when they have locked the group's row.
GATE: Final[LiteralString] = """
INSERT INTO triojobs.leases (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at)
VALUES (%s, 0, gen_random_uuid(), 1, 1, 'gate', 0, now())
"""
# Parts of our statements as they go over the wire.
CLAIM: Final = b'INSERT INTO "triojobs".leases'
SETTLE: Final = b"USING asked a"


def exit_bound(options: dict[str, Any]) -> float:
    """Return what leaving a group with these options may take."""
    return GroupOptions(name="bound", **options).exit_bound


def call_bound(options: dict[str, Any]) -> float:
    """Return how long one call may take: its time, the breaker's wait for a cancel, and a second."""
    return GroupOptions(name="bound", **options).call_timeout + CANCEL_WAIT + 1.0


def rescue_bound(options: dict[str, Any]) -> float:
    """Return how long after its last beat a dead group's jobs may stay with it: lease, then a round."""
    chosen = GroupOptions(name="bound", **options)
    return chosen.lease_duration + rescue_interval(chosen.lease_duration) + chosen.call_timeout


def outcomes(conninfo: str) -> list[tuple[int, str]]:
    """Return attempt and status of every outcome, in order."""
    return rows(conninfo, "SELECT attempt, status FROM triojobs.outcomes ORDER BY no")  # type: ignore[return-value]


def waiting(conninfo: str) -> dict[int, int]:
    """Return the attempts so far of every job that waits, ready or scheduled."""
    return dict(
        rows(
            conninfo,
            "SELECT id, attempts FROM triojobs.ready UNION ALL SELECT id, attempts FROM triojobs.scheduled",
        )
    )


def running(conninfo: str) -> int:
    """Return how many jobs are `running`."""
    found = value(conninfo, "SELECT count(*) FROM triojobs.job_status WHERE status = 'running'")
    assert found == value(conninfo, "SELECT count(*) FROM triojobs.leases")
    assert isinstance(found, int)
    return found


def keep_claims(conninfo: str) -> None:
    """Have the server keep a list of all claims that were committed, see `committed_claims`."""
    rows(conninfo, "CREATE TABLE public.claims (no serial, job bigint, claim_no bigint, attempt int)")
    rows(
        conninfo,
        "CREATE FUNCTION keep_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.claims (job, claim_no, attempt) VALUES (new.id, new.claim_no, new.attempt);"
        " RETURN NULL; END $$",
    )
    rows(
        conninfo,
        "CREATE TRIGGER keep_claim AFTER INSERT ON triojobs.leases FOR EACH ROW EXECUTE FUNCTION keep_claim()",
    )


def committed_claims(conninfo: str) -> list[tuple[int, int]]:
    """Return claim_no and attempt of every claim that was committed, whatever became of it."""
    return rows(conninfo, "SELECT claim_no, attempt FROM public.claims ORDER BY no")  # type: ignore[return-value]


def wait_for_rows(conninfo: str, query: LiteralString, *parameters: Any, seconds: float = PATIENCE) -> Any:
    """Poll until the query's first value is true; return it. Blocks its thread."""
    deadline = time.monotonic() + seconds
    with psycopg.connect(conninfo, autocommit=True) as conn:
        while True:
            row = conn.execute(query, parameters or None).fetchone()
            if row and row[0]:
                return row[0]
            assert time.monotonic() < deadline, f"not seen within {seconds:g} s: {query}"
            time.sleep(0.01)


async def wait_until(true: Callable[[], object], *, seconds: float = PATIENCE) -> None:
    """Poll until `true()` is; a bound, not an order."""
    with trio.fail_after(seconds):
        while not true():
            await trio.sleep(0.005)


class Journal:
    """A handler that does what its payload says, and keeps book: who began, who was cancelled, who ended.

    `wait`: until `go_on` is set. `return`: at once. `fail`: raises each time.
    """

    def __init__(self) -> None:
        self.began: list[tuple[int, int]] = []  # job, attempt
        self.cancelled: list[tuple[int, int]] = []
        self.returned: list[tuple[int, int]] = []
        self.overlaps: list[int] = []
        self.go_on = trio.Event()
        self._inside: set[int] = set()

    async def handle(self, job: triojobs.Job[Any]) -> Any:
        run = (job.id, job.attempt)
        if job.id in self._inside:
            self.overlaps.append(job.id)
        self._inside.add(job.id)
        self.began.append(run)
        try:
            if job.payload == "wait":
                await self.go_on.wait()
            elif job.payload == "fail":
                raise ValueError("as asked for")
            else:
                await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cancelled.append(run)
            raise
        finally:
            self._inside.discard(job.id)
        self.returned.append(run)
        return job.attempt

    async def wait_for_beginnings(self, count: int) -> None:
        """Wait until so many handlers have begun."""
        await wait_until(lambda: len(self.began) >= count)

    def worker(self, **options: Any) -> triojobs.Worker[Any, Any]:
        """Return a worker that runs this handler."""
        return triojobs.Worker(plain, self.handle, **({"retry": AT_ONCE} | options))


@asynccontextmanager
async def background_group(
    conninfo: str, workers: Sequence[triojobs.Worker[Any, Any]], **options: Any
) -> AsyncIterator[tuple[trio.CancelScope, list[triojobs.WorkerGroup]]]:
    """Run a group beside the block until the scope is cancelled; when the block is left it has ended."""
    scope = trio.CancelScope()
    groups: list[triojobs.WorkerGroup] = []

    async def live() -> None:
        with scope:
            async with triojobs.open_worker_group(conninfo, workers, **SHORT | options) as group:
                groups.append(group)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await wait_until(lambda: groups)
        yield scope, groups


def logged(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    """Return our log records about an event."""
    return [record for record in caplog.records if getattr(record, "event", None) == event]


class Figures:
    """Times that a test measures, each beside the bound that it asserts.

    With TRIOJOBS_TEST_FIGURES they are also appended to the file of that name: test, what, seconds, bound.
    """

    def __init__(self, test: str) -> None:
        self._test = test

    def note(self, what: str, seconds: float, *, at_most: float) -> None:
        """Assert that it took no longer than it may, and keep the number."""
        if path := os.environ.get("TRIOJOBS_TEST_FIGURES"):
            with open(path, "a") as file:
                file.write(f"{self._test}\t{what}\t{seconds:.3f}\t{at_most:.2f}\n")
        assert seconds <= at_most, f"{what} took {seconds:.2f} s, at most {at_most:.2f} s are promised"
