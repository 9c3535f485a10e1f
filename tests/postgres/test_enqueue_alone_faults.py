"""A task that enqueues alone, in one round trip without a thread, beside everything that can go wrong on its way.

What is answered is true: an id is a row, `committed=False` is none, and None may be either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from forms import plain

import triojobs
from tests.tools.fault_proxy import fault_proxy
from tests.tools.gates import PATIENCE
from tests.tools.looking import rows, until, value
from tests.tools.mutants import Patch, all_of, code, noticed
from tests.tools.shots import Shot, ctrl_c
from triojobs._bridge import Line
from triojobs._flusher import Flusher
from triojobs._sql import exchange

INSERT, LOOK = b".ready (id", b".waiting w"  # in the statements
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'triojobs %'"
COUNT = "SELECT count(*) FROM triojobs.jobs"
BLOCKED = (
    "SELECT count(*) = 1 FROM pg_stat_activity"
    " WHERE wait_event_type = 'Lock' AND application_name = 'triojobs enqueue'"
)


# Replies.


async def test_without_a_reply_the_fate_is_unknown_and_the_job_is_there_once(conninfo: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through) as client:
            await client.enqueue(plain, 1)
            lost = proxy.lose_reply(INSERT)
            with pytest.raises(triojobs.DatabaseError) as caught:
                await client.enqueue(plain, 2)
            assert lost.answered.is_set()
            assert (caught.value.committed, caught.value.transient) == (None, True)
            assert value(conninfo, COUNT) == 2
            assert await client.enqueue(plain, 3)
    assert value(conninfo, COUNT) == 3


async def test_a_connection_that_is_lost_after_the_commit_loses_the_notification_alone(
    conninfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="triojobs")
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through) as client:
            await client.enqueue(plain, 1)
            lost = proxy.lose_reply(LOOK)
            job_id = await client.enqueue(plain, 2)
            assert lost.answered.is_set()
            assert await client.enqueue(plain, 3) > job_id
    assert (job_id,) in rows(conninfo, "SELECT id FROM triojobs.ready")
    assert [r.getMessage()[:27] for r in caplog.records] == ["a notification was not sent"]


async def test_answers_that_come_byte_by_byte_are_understood(conninfo: str) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through) as client:
            await client.enqueue(plain, 1)
            proxy.bytewise = True
            ids = [await client.enqueue(plain, n) for n in range(3)]
    assert {(job_id,) for job_id in ids} < set(rows(conninfo, "SELECT id FROM triojobs.ready"))


async def test_in_a_black_hole_a_call_ends_in_time_and_its_connection_is_not_used_again(
    conninfo: str,
) -> None:
    with fault_proxy(conninfo) as (proxy, through):
        async with triojobs.open_client(through, call_timeout=0.5) as client:
            await client.enqueue(plain, 1)
            assert proxy.freeze("enqueue") == 1
            began = time.monotonic()
            with pytest.raises(triojobs.DatabaseError) as caught:
                await client.enqueue(plain, 2)
            # The bound of every call; generous against a machine that does other things as well.
            assert time.monotonic() - began < 0.5 + 2 + 2
            assert (caught.value.committed, caught.value.transient) == (None, True)
            await client.enqueue(plain, 3)
    assert value(conninfo, COUNT) == 2


# Cancellation.


def enqueue_beside(conninfo: str, k: int, fire: Callable[[trio.CancelScope], None]) -> tuple[bool, list[Any]]:
    """Enqueue alone; `fire` before step `k`. Returns whether it came so far, and the ids that were answered."""
    scope = trio.CancelScope()
    shot = Shot(k, lambda: fire(scope))
    answered: list[Any] = []

    async def main() -> None:
        with trio.fail_after(PATIENCE):
            async with triojobs.open_client(conninfo) as client:
                await client.enqueue(plain, "before")
                with scope:
                    shot.armed = True
                    answered.append(await client.enqueue(plain, "it"))
                    shot.armed = False
                shot.armed = False
                answered.append(await client.enqueue(plain, "after"))

    try:
        trio.run(main, instruments=[shot])
    except KeyboardInterrupt:
        assert shot.fired
    return shot.fired, answered


async def test_in_a_cancelled_scope_nothing_is_sent(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, 1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.enqueue(plain, 2)
        assert scope.cancelled_caught
    assert value(conninfo, COUNT) == 1


async def test_a_cancel_at_any_step_of_an_exchange_is_answered_by_what_happened(conninfo: str) -> None:
    await trio.to_thread.run_sync(cancel_at_every_step, conninfo)


def cancel_at_every_step(conninfo: str) -> None:
    fired, k = True, 0
    while fired:
        rows(conninfo, "TRUNCATE triojobs.jobs, triojobs.ready")
        fired, answered = enqueue_beside(conninfo, k, trio.CancelScope.cancel)
        assert value(conninfo, COUNT) == 1 + len(answered), f"a cancel before step {k}"
        k += 1
    assert k >= 2  # it struck at least once; an answer that is there already saves a step


def test_ctrl_c_at_any_step_leaves_nothing_open_and_no_half(conninfo: str) -> None:
    fired, k = True, 0
    while fired:
        rows(conninfo, "TRUNCATE triojobs.jobs, triojobs.ready")
        fired, answered = enqueue_beside(conninfo, k, lambda scope: ctrl_c())
        found = rows(conninfo, "SELECT count(*), (SELECT count(*) FROM triojobs.ready) FROM triojobs.jobs")
        assert found[0][0] == found[0][1] >= 1 + len(answered)
        k += 1
    assert k >= 2  # it struck at least once; an answer that is there already saves a step
    trio.run(until, conninfo, f"SELECT ({SESSIONS}) = 0")


async def test_a_cancel_while_the_server_works_is_answered_by_what_happened(conninfo: str) -> None:
    answered: list[Any] = []
    async with triojobs.open_client(conninfo) as client, trio.open_nursery() as nursery:
        await client.enqueue(plain, 1)
        scope = trio.CancelScope()

        async def enqueue() -> None:
            with scope:
                answered.append(await client.enqueue(plain, 2))

        with psycopg.connect(conninfo) as holder:
            holder.execute("LOCK TABLE triojobs.jobs IN ACCESS EXCLUSIVE MODE")
            nursery.start_soon(enqueue)
            await until(conninfo, BLOCKED)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert len(answered) == 1
    assert (answered[0],) in rows(conninfo, "SELECT id FROM triojobs.ready")


# Time.


async def test_a_client_that_closes_meanwhile_waits_for_the_answer(conninfo: str) -> None:
    answered: list[Any] = []

    async def enqueue(client: triojobs.Client) -> None:
        answered.append(await client.enqueue(plain, 2))

    async def release_when_closing() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert answered == []
        holder.rollback()

    with psycopg.connect(conninfo) as holder:
        async with trio.open_nursery() as nursery, triojobs.open_client(conninfo) as client:
            await client.enqueue(plain, 1)
            holder.execute("LOCK TABLE triojobs.jobs IN ACCESS EXCLUSIVE MODE")
            nursery.start_soon(enqueue, client)
            await until(conninfo, BLOCKED)
            nursery.start_soon(release_when_closing)
    assert (answered[0],) in rows(conninfo, "SELECT id FROM triojobs.ready")
    await until(conninfo, f"SELECT ({SESSIONS}) = 0")


async def test_an_answer_that_waits_behind_a_blocked_loop_is_taken(conninfo: str) -> None:
    answered: list[Any] = []
    async with triojobs.open_client(conninfo, call_timeout=0.5) as client, trio.open_nursery() as nursery:
        await client.enqueue(plain, 1)

        async def enqueue() -> None:
            answered.append(await client.enqueue(plain, 2))

        with psycopg.connect(conninfo) as holder:
            holder.execute("LOCK TABLE triojobs.jobs IN ACCESS EXCLUSIVE MODE")
            nursery.start_soon(enqueue)
            await until(conninfo, BLOCKED)
            holder.rollback()
            time.sleep(1.5)  # what must not be done: three times the call's limit
    assert (answered[0],) in rows(conninfo, "SELECT id FROM triojobs.ready")


# They are sharp.

MUTANTS: dict[str, tuple[Patch, Callable[..., Any]]] = {
    "nobody is shielded from a cancel": (
        all_of(
            code(Line, "exchange", ("trio.CancelScope(shield=True)", "trio.CancelScope()")),
            code(Flusher, "_commit_alone", ("trio.CancelScope(shield=True)", "trio.CancelScope()")),
        ),
        test_a_cancel_while_the_server_works_is_answered_by_what_happened,
    ),
    "what fails behind the commit fails the enqueue": (
        code(exchange, "enqueue_now", ("    jobs.check(found)\n        error = exc\n", "    raise\n")),
        test_a_connection_that_is_lost_after_the_commit_loses_the_notification_alone,
    ),
    "a lost reply means that nothing was written": (
        code(
            Line,
            "_exchange",
            (
                "raise translate(exc, operation=operation) from exc",
                "(error := translate(exc, operation=operation)).committed = False; raise error",
            ),
        ),
        test_without_a_reply_the_fate_is_unknown_and_the_job_is_there_once,
    ),
    "an exchange may take longer than other calls": (
        code(Line, "_exchange", ("Call(conn, clock() + self._call_timeout,", "Call(conn, clock() + 6.0,")),
        test_in_a_black_hole_a_call_ends_in_time_and_its_connection_is_not_used_again,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mutant_is_noticed(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mutant: str
) -> None:
    change, test = MUTANTS[mutant]
    change(monkeypatch)
    await noticed(test, conninfo=conninfo, caplog=caplog)
