"""Row 46c: whatever makes a job claimable while a group is about to sleep starts it all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import until
from triojobs._sql import notify as notify_sql

from .gates import BEFORE, CLAIM, COMMITTED, RETURNING, StatementGate
from .rig import AT_ONCE, NEVER_POLLS, PATIENCE, SHORT, background_group, outcomes, plain, running, wait_until

Gate = Callable[[pytest.MonkeyPatch, Any], StatementGate]


def gate_at_mark(point: str) -> Gate:
    """Stop the group where it says that it sleeps."""

    def make(patch: pytest.MonkeyPatch, group_id: Any) -> StatementGate:
        return StatementGate(
            patch,
            (notify_sql, "mark_waiting"),
            point=point,
            which=lambda conn, schema, group, queues: group == group_id,
        )

    return make


def gate_at_last_claim(point: str) -> Gate:
    """Stop the group where it claims once more after it has said so."""

    def make(patch: pytest.MonkeyPatch, group_id: Any) -> StatementGate:
        marked: list[Any] = []
        mark = notify_sql.mark_waiting

        def marking(conn: Any, schema: str, group: Any, queues: Any) -> None:
            mark(conn, schema, group, queues)
            marked.append(group)

        patch.setattr(notify_sql, "mark_waiting", marking)
        return StatementGate(patch, *CLAIM, point=point, which=lambda asked, *args: asked.group_id in marked)

    return make


ORDERS = {
    "before the mark": gate_at_mark(BEFORE),
    "after the mark": gate_at_mark(COMMITTED),
    "before the last claim": gate_at_last_claim(BEFORE),
    "after the last claim": gate_at_last_claim(COMMITTED),
    "while the last claim returns": gate_at_last_claim(RETURNING),
}


class Sleeper:
    """A group of one slot that never polls; what it ran is in `ran`."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    async def handle(self, job: triojobs.Job[Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.ran.append(job.payload)

    def open(self, conninfo: str) -> Any:
        worker = triojobs.Worker(plain, self.handle, concurrency=1)
        return triojobs.open_worker_group(conninfo, [worker], **SHORT | NEVER_POLLS)


async def bring_to_the_gate(
    conninfo: str, group: triojobs.WorkerGroup, patch: pytest.MonkeyPatch, order: str
) -> StatementGate:
    """Let the group run a job that fills it, and stop it where it goes to sleep again."""
    await until(conninfo, "SELECT count(*) FROM triojobs.waiting WHERE group_id = %s", group.group_id)
    await trio.testing.wait_all_tasks_blocked()
    gate = ORDERS[order](patch, group.group_id)
    await group.client.enqueue(plain, "bait")
    await wait_until(gate.reached.is_set)
    return gate


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source", ["enqueue", "outbox", "retry", "release"])
async def test_row_46c_a_job_becomes_claimable_while_a_group_goes_to_sleep(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, source: str, order: str
) -> None:
    sleeper = Sleeper()
    if source in ("enqueue", "outbox"):
        async with sleeper.open(conninfo) as group, triojobs.open_client(conninfo) as producer:
            gate = await bring_to_the_gate(conninfo, group, monkeypatch, order)
            if source == "enqueue":
                await producer.enqueue(plain, "target")
            else:
                with psycopg.connect(conninfo) as conn:
                    triojobs.enqueue_on(conn, plain, "target")
            gate.open.set()
            await wait_until(lambda: sleeper.ran == ["bait", "target"])
            await wait_until(lambda: group.statistics().settled == 2)
        expected = [(1, "done")] * 2
    else:
        await given_back_by_another_group(conninfo, monkeypatch, source, order, sleeper)
        expected = [(1, "done")] * 2 if source == "release" else [(1, "done"), (1, "failed"), (2, "done")]
    assert sorted(outcomes(conninfo)) == sorted(expected)
    assert running(conninfo) == 0


async def given_back_by_another_group(
    conninfo: str, patch: pytest.MonkeyPatch, source: str, order: str, sleeper: Sleeper
) -> None:
    """Another group has the target; it stops, and its handler fails (a retry) or is cancelled (a release)."""
    began, fail = trio.Event(), trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        began.set()
        await fail.wait()
        others[0].stop()  # so that it does not claim the job again
        raise ValueError("to be retried at once")

    worker = triojobs.Worker(plain, handler, concurrency=1, retry=AT_ONCE)
    async with background_group(conninfo, [worker]) as (scope, others):
        await others[0].client.enqueue(plain, "target")
        with trio.fail_after(PATIENCE):
            await began.wait()
        async with sleeper.open(conninfo) as group:
            gate = await bring_to_the_gate(conninfo, group, patch, order)
            if source == "retry":
                fail.set()
            else:
                scope.cancel()
            closed = "SELECT closed_at IS NOT NULL FROM triojobs.worker_groups WHERE id = %s"
            await until(conninfo, closed, others[0].group_id)
            gate.open.set()
            await wait_until(lambda: sleeper.ran == ["bait", "target"])
            await wait_until(lambda: group.statistics().settled == 2)
        scope.cancel()
