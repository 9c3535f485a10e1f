"""Rows 44, 45, 46b, 47: clocks that jump, groups beside each other, and races for one job."""

from __future__ import annotations

import datetime as dt
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import triojobs
from tests.postgres.tools import Group, ended, history, open_session, place, put, together
from tests.tools.looking import blocked, locked, rows, value
from triojobs._model import Outcome
from triojobs._sql import groups as groups_sql
from triojobs._sql import settle as settle_sql

from .processes import WorkerProcess
from .rig import PATIENCE, SHORT, outcomes, plain, running, wait_for_rows, wait_until, waiting

Start = Callable[..., WorkerProcess]
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


class WallClock:
    """The wall clock of one process, moved by a file; its monotonic clocks are left alone."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        self._file.write_text(f"{seconds:+d}s")

    @property
    def environment(self) -> dict[str, str]:
        """What moves it: libfaketime, which Python's own clock cannot evade; else a patched `time.time`."""
        if FAKETIME is None:
            return {"TRIOJOBS_TEST_CLOCK": str(self._file)}
        return {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def clean_up(self, pid: int) -> None:
        """libfaketime leaves its shared memory where its process was killed."""
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.fixture
def wall_clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path / "offset")


@pytest.mark.parametrize("hours", [1, -1])
async def test_row_44_the_clients_clock_jumps(
    conninfo: str, worker: Start, wall_clock: WallClock, hours: int
) -> None:
    options = SHORT | {"lease_duration": 2.0, "lease_margin": 0.5}
    process = worker(conninfo, options=options, env=wall_clock.environment)
    try:
        async with triojobs.open_client(conninfo) as client:
            kept = await client.enqueue(plain, "wait")
            await trio.to_thread.run_sync(lambda: process.wait_for("began", job=kept))
            wall_clock.set(3600 * hours)
            clock = await client.enqueue(plain, "clock")
            told = await trio.to_thread.run_sync(lambda: process.wait_for("clock", job=clock))
            server = value(conninfo, "SELECT extract(epoch FROM clock_timestamp())::float8")
            assert abs(told["wall"] - server - 3600 * hours) < 60  # it has jumped indeed
            soon = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1)
            past = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
            ids = [
                await client.enqueue(plain, "return", deadline=soon),
                await client.enqueue(plain, "return", delay=0.5),
                await client.enqueue(plain, "sleep 0.1", timeout=30.0),
            ]
            late = await client.enqueue(plain, "return", deadline=past)
            with trio.fail_after(PATIENCE):
                assert [await client.result(job_id) for job_id in ids] == ["returned", "returned", "sleep"]
                with pytest.raises(triojobs.JobFailedError, match="past its deadline"):
                    await client.result(late)
            # Long enough for the lease to be over, had a beat or a deadline looked at that clock.
            lease = value(conninfo, "SELECT lease_until FROM triojobs.worker_groups")
            await trio.to_thread.run_sync(lambda: wait_for_lease_after(conninfo, lease))
        process.send(signal.SIGINT)
        await trio.to_thread.run_sync(process.wait)
    finally:
        wall_clock.clean_up(process.pid)
    (report,) = process.all("report")
    assert (report["registrations"], report["stale"]) == (1, 0)
    assert process.all("log", level="ERROR") == []
    stored = "SELECT max(abs(extract(epoch FROM clock_timestamp() - t))) FROM (" + " UNION ALL ".join(
        f"SELECT {column} AS t FROM triojobs.{table}"
        for table, column in (
            ("outcomes", "claimed_at"), ("outcomes", "finished_at"), ("worker_groups", "registered_at"),
            ("worker_groups", "lease_until"), ("worker_groups", "closed_at"),
        )
    ) + ") times"  # fmt: skip
    assert value(conninfo, stored) < 120  # type: ignore[arg-type]  # every stored time is the server's
    assert waiting(conninfo) == {kept: 0}


def wait_for_lease_after(conninfo: str, lease: dt.datetime) -> None:
    wait_for_rows(conninfo, "SELECT lease_until > %s + interval '1 s' FROM triojobs.worker_groups", lease)


async def test_row_45_two_groups_in_one_process_one_inside_the_other(conninfo: str) -> None:
    """They share a queue and a name; the inner one leaves while the outer one has handlers at work."""
    ran: dict[str, list[tuple[int, Any]]] = {"outer": [], "inner": []}
    held = trio.Event()

    def worker(where: str) -> triojobs.Worker[Any, Any]:
        async def handler(job: triojobs.Job[Any]) -> str:
            ran[where].append((job.id, job.fence))
            if job.payload == "wait":
                await held.wait()
            await trio.lowlevel.checkpoint()
            return where

        return triojobs.Worker(plain, handler, concurrency=3)

    options = SHORT | {"name": "same"}
    async with triojobs.open_worker_group(conninfo, [worker("outer")], **options) as outer:
        waits = await outer.client.enqueue(plain, "wait")
        await wait_until(lambda: ran["outer"])
        async with triojobs.open_worker_group(conninfo, [worker("inner")], **options) as inner:
            ids = await inner.client.enqueue_many(plain, ["quick"] * 300)
            with trio.fail_after(PATIENCE):
                async with outer.client.as_completed(ids) as completions:
                    results = Counter([info.result async for info in completions])
        assert outer.statistics().running == 1
        assert rows(conninfo, "SELECT id FROM triojobs.leases") == [(waits,)]
        after = await outer.client.enqueue(plain, "quick")
        with trio.fail_after(PATIENCE):
            assert await outer.client.result(after) == "outer"
        held.set()
        with trio.fail_after(PATIENCE):
            assert await outer.client.result(waits) == "outer"
    assert outer.group_id != inner.group_id
    assert results["outer"] + results["inner"] == len(ids)
    assert min(results.values()) > 0
    for group, where in ((outer, "outer"), (inner, "inner")):
        # Each settled what it had claimed, and nothing else.
        own = "SELECT job_id, group_id, claim_no FROM triojobs.outcomes WHERE group_id = %s ORDER BY job_id"
        assert [(j, (g, n)) for j, g, n in rows(conninfo, own, group.group_id)] == sorted(ran[where])
        assert group.report.settled["done"] == len(ran[where])
        assert (group.report.released, group.statistics().stale) == (0, 0)
    assert outcomes(conninfo) == [(1, "done")] * (len(ids) + 2)


REPLACE = """
SELECT triojobs.replace_job(id, %s, encoding, metadata, priority, max_attempts, timeout, deadline, run_at)
FROM triojobs.jobs WHERE id = %s
"""


@pytest.mark.parametrize("by", ["replace", "an operator's edit"])
async def test_row_46b_a_body_is_changed_while_it_is_claimed(conninfo: str, by: str) -> None:
    """Once success was reported, the old body never runs; first with a claim that looked before, then in a race."""
    seen: dict[int, list[str]] = {}

    async def handler(job: triojobs.Job[Any]) -> None:
        seen.setdefault(job.id, []).append(job.payload)
        await trio.lowlevel.checkpoint()

    async def change(client: triojobs.Client, job_id: int, key: str) -> bool:
        if by == "replace":
            answer = await client.try_enqueue(plain, "new", key=key, on_conflict="replace")
            assert (answer.id, answer.created) == (job_id, False)
            return answer.replaced
        body = plain.encode_payload("new")
        return bool(await trio.to_thread.run_sync(lambda: value(conninfo, REPLACE, body, job_id)))

    worker = triojobs.Worker(plain, handler)
    async with (
        triojobs.open_client(conninfo) as client,
        triojobs.open_worker_group(conninfo, [worker], **SHORT) as group,
    ):
        with locked(conninfo, "SELECT FROM triojobs.worker_groups FOR UPDATE") as gate:
            first = await client.enqueue(plain, "old", key="first")
            await blocked(conninfo, "claim")  # it has its snapshot, and waits for the group's row
            assert await change(client, first, "first")
            gate.rollback()
        with trio.fail_after(PATIENCE):
            await client.result(first)
        assert seen.pop(first) == ["new"]

        changed: dict[int, bool] = {}
        for n in range(60):
            job_id = await client.enqueue(plain, "old", key=str(n))
            await trio.sleep(random.uniform(0, 0.01))  # the race: who comes first is open
            changed[job_id] = await change(client, job_id, str(n))
        with trio.fail_after(PATIENCE):
            await group.wait_idle()
    assert seen == {job_id: ["new" if replaced else "old"] for job_id, replaced in changed.items()}
    assert running(conninfo) == 0


def test_row_47_a_rescue_races_settlement_release_claim_close_and_another_rescue(conninfo: str) -> None:
    """At a barrier, from the same instant on; each claim ends once, and its attempt is counted or refunded."""
    winners: Counter[str] = Counter()
    with open_session(conninfo) as db:
        sessions = [open_session(conninfo) for _ in range(6)]
        try:
            for _ in range(40):
                race_once(db, sessions, winners)
        finally:
            for session in sessions:
                session.close()
    assert set(winners) >= {"rescued"}
    assert len(winners) >= 3, winners  # it was a race


def race_once(db: Any, sessions: list[Any], winners: Counter[str]) -> None:
    ids = put(db, 4)
    group, schema = Group(db), "triojobs"
    claims = {claim.job_id: claim for claim in group.claim(db, 4)}
    fresh = put(db, 1)[0]
    group.lapse(db)
    done, failed, released, _ = ids

    def settle(conn: Any) -> list[int]:
        batch = [ended(claims[done], Outcome.DONE), ended(claims[failed], Outcome.FAILED, delay=60.0)]
        return [w.job_id for w in settle_sql.settle(conn, schema, group.id, batch)[0]]

    def release(conn: Any) -> list[int]:
        return [w.job_id for w in group.settle(conn, claims[released], Outcome.RELEASED)]

    def claim(conn: Any) -> list[int]:
        return [c.job_id for c in group.claim(conn, 1)]

    def close(conn: Any) -> list[int]:
        return [w.job_id for w in groups_sql.close_group(conn, schema, group.id)[0]]

    def rescue(conn: Any) -> list[int]:
        return [groups_sql.rescue(conn, schema).jobs]

    actors = [settle, release, claim, rescue, rescue, *random.choice([[close], []])]
    calls = [lambda act=act, conn=conn: act(conn) for act, conn in zip(actors, sessions, strict=False)]
    results = together(*calls)
    groups_sql.rescue(db, schema)  # what a rescue passed over because somebody else had it locked
    for job_id in ids:
        where, attempts = place(db, job_id)
        ends = [status for _, status, _ in history(db, job_id)]
        rescued = ends == ["failed"] and where == "ready"
        winners["rescued" if rescued else "given back" if where == "ready" else where] += 1
        assert (where, attempts, ends) in (
            [("ready", 1, ["failed"]), ("ready", 0, [])]
            + [("done", 1, ["done"])] * (job_id == done)
            + [("scheduled", 1, ["failed"])] * (job_id == failed)
        ), (job_id, ids)
        assert (job_id in results[0]) == (where in ("done", "scheduled"))
    # The claim either matched nothing, or what it took was rescued or closed.
    assert place(db, fresh) in ([("ready", 0)] if results[2] == [] else [("ready", 0), ("ready", 1)])
    db.execute("DELETE FROM triojobs.ready")
    db.execute("DELETE FROM triojobs.scheduled")
