"""Where the microseconds of one job go: each step of the worker's way alone, in processor time.

The statements run as bare SQL does, in this process; the steps on the event loop run without a database.
What a real worker needs beyond their sum are threads, wake-ups and the scheduler's passes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import psycopg
import trio
import trio.testing

import triojobs
from triojobs._handling import Slots
from triojobs._lease import Lease
from triojobs._ledger import Ledger
from triojobs._model import Claim, Outcome, Registration, Settled, Settlement
from triojobs._registration import LiveRegistration
from triojobs._sql import claim, groups, settle
from triojobs._sql.session import prepare_session

from .contenders import BATCH, OURS
from .drain import JOBS, drained
from .rounds import Line, alone, interleave
from .server import Database, Server, cpu_seconds

__all__ = ["profile"]

QUEUE: Final = triojobs.Queue("bench")
MICRO: Final = 1e6
SLOTS: Final = 1000


class Steps(dict[str, float]):
    """Seconds of processor time by step."""

    @contextmanager
    def taking(self, step: str) -> Iterator[None]:
        """Add what the block takes in this thread to a step."""
        before = time.thread_time()
        yield
        self[step] = self.get(step, 0.0) + time.thread_time() - before

    def per_job(self, jobs: int) -> dict[str, float]:
        return {step: seconds / jobs * MICRO for step, seconds in self.items()}


def registration() -> Registration:
    return Registration(uuid.uuid4(), "profile", "here", 0, "", 3600.0)


def done(c: Claim) -> Settlement:
    result = QUEUE.encode_result(None)
    return Settlement(c.job_id, c.claim_no, Outcome.DONE, result=result, encoding=QUEUE.codec.name)


def statements(database: Database, jobs: int) -> dict[str, float]:
    """Claim and settle everything: the client's side of both, the server's side of both, the ledger."""
    steps, ledger, record = Steps(), Ledger(), registration()
    with psycopg.connect(database.conninfo, autocommit=True, prepare_threshold=2) as conn:
        prepare_session(conn, call_timeout=60.0)
        groups.register(conn, "triojobs", record)
        pid = conn.info.backend_pid
        for claim_no in range(1, -(-jobs // BATCH) + 1):
            wants = {QUEUE.name: BATCH}
            at = cpu_seconds(pid)
            with steps.taking("claim: send, fetch, build"):
                claims = claim.claim(
                    conn, "triojobs", group_id=record.group_id, epoch=1, claim_no=claim_no, wants=wants
                )
            claimed = cpu_seconds(pid)
            with steps.taking("ledger: book"):
                ledger.book(claims)
            for one in ledger.take_booked():
                ledger.settle(one, done(one))
            batch = ledger.ended(BATCH)
            sent = cpu_seconds(pid)
            with steps.taking("settle: pack, send, fetch"):
                written, _ = settle.settle(conn, "triojobs", record.group_id, batch)
            settled = cpu_seconds(pid)
            with steps.taking("ledger: close out"):
                ledger.close_out(batch, written)
            steps["claim: server"] = steps.get("claim: server", 0.0) + claimed - at
            steps["settle: server"] = steps.get("settle: server", 0.0) + settled - sent
    return steps.per_job(jobs)


async def on_the_loop(jobs: int) -> dict[str, float]:
    """Hand claims to slots until all are settled, then the parts of that alone."""
    steps = Steps()
    data = QUEUE.encode_payload({"to": "ada@example.com", "no": 1, "text": "x" * 45})

    async def handler(job: triojobs.Job[Any]) -> None:
        pass

    record = registration()
    live = LiveRegistration(record, Lease(duration=30.0, margin=5.0, interval=6.0))
    worker = triojobs.Worker(QUEUE, handler, concurrency=SLOTS)
    store: Any = None  # nothing here commits
    slots = Slots(worker, live, store, busy_ids=set(), on_free=lambda: None)
    rest = (1, 5, 0, 0.0, 0.0, data, b"cbor", None, None, 0.0, None, None, None)
    claims = [Claim(n, 1, record.group_id, QUEUE.name, *rest) for n in range(jobs)]
    async with trio.open_nursery() as nursery:
        for _ in range(SLOTS):
            nursery.start_soon(slots.slot)
        await trio.testing.wait_all_tasks_blocked()
        for first in range(0, jobs, BATCH):
            batch = claims[first : first + BATCH]
            live.ledger.book(batch)
            live.ledger.take_booked()
            with steps.taking("loop, all of it"):
                slots.hand_in(batch, 0.0)
                await trio.testing.wait_all_tasks_blocked()
            ended = live.ledger.ended(BATCH)
            live.ledger.close_out(ended, [Settled(s.job_id, s.claim_no, s.outcome) for s in ended])
        nursery.cancel_scope.cancel()
    job = triojobs.Job(claims[0], None, slots)
    ledger = Ledger()
    ledger.book(claims)
    parts: dict[str, Callable[[Claim], object]] = {
        "loop: decode the payload": lambda c: QUEUE.decode_payload(data, "cbor"),
        "loop: call the handler": lambda c: _run(slots._call_handler(job)),
        "loop: encode the result": lambda c: QUEUE.encode_result(None),
        "loop: note the outcome": lambda c: ledger.settle(c, done(c)),
    }
    for step, part in parts.items():
        with steps.taking(step):
            for one in claims:
                part(one)
    found = steps.per_job(jobs)
    found["loop: note the outcome"] -= found["loop: encode the result"]  # `done` encodes, too
    whole = found.pop("loop, all of it")
    found["loop: schedule, scope, job"] = whole - sum(v for k, v in found.items() if k.startswith("loop"))
    return found


def _run(coroutine: Any) -> None:
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("this handler does not wait")


def once(server: Server, jobs: int) -> dict[str, float]:
    """Return microseconds per job by step."""
    template = server.template(("triojobs", "best", jobs, 95), partial(OURS.fill, config="best", jobs=jobs))
    with server.database(template) as database:
        found = statements(database, jobs)
    found |= trio.run(on_the_loop, jobs)
    whole = drained(server, OURS, "best", jobs=jobs)
    found["worker: client, all of it"] = whole.client_cpu
    found["worker: server, all of it"] = whole.server_cpu
    return found


def profile(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """Processor time of each step of a job's way through a worker with 1,000 slots."""
    jobs = jobs or JOBS
    found = interleave({"profile": partial(once, server, jobs)}, rounds)["profile"]
    for step in found[0]:
        values = [one[step] for one in found]
        yield alone(
            f"profile, {step}", values, unit="us of CPU a job", config=OURS.configs["best"].said, jobs=jobs
        )
