"""The tests of wake-ups are sharp: each step of the protocol is put in a wrong place, and one of them must notice."""

from __future__ import annotations

from typing import Any

import pytest
import test_wakeup_orders as orders
from wakeups import SOURCES, wakes_the_sleeper

from tests.tools.mutants import Mutant, code, noticed
from triojobs import _outbox
from triojobs._fetcher import Fetcher
from triojobs._postgres import PostgresStore

ENQUEUED = orders.test_a_job_that_is_enqueued_at_any_stage_is_claimed


def order(source: str, first: str, second: str) -> dict[str, Any]:
    """The producer's halves happen at these stages of the sleeper."""
    return {"source": source, "first": first, "second": second}


async def a_wake_up_that_was_heard_is_not_the_last(conninfo: str) -> None:
    assert await wakes_the_sleeper(conninfo, SOURCES["enqueue"], "asleep", "asleep", hear_first=True)


INSERT = "answers = enqueue_in_transaction(call, self.schema, rows, check_cancelled)\n"
AFTERWARDS = "self.notify_later(call, {row.queue for row in rows})"

MUTANTS: dict[str, Mutant] = {
    "the producer looks for marks before its commit": (
        code(
            PostgresStore,
            "enqueue",
            (
                INSERT,
                "notify.notify_waiting(call.conn, self.schema, {row.queue for row in rows})\n"
                f"        self.gate.pass_through()\n        {INSERT}",
            ),
            (AFTERWARDS, "pass"),
        ),
        ENQUEUED,
        order("enqueue", "before the mark", "asleep"),
    ),
    "the producer notifies before its commit": (
        code(
            PostgresStore,
            "enqueue",
            (
                INSERT,
                "call.conn.execute(\"SELECT pg_notify('triojobs', 'q')\")\n"
                f"        self.gate.pass_through()\n        {INSERT}",
            ),
            (AFTERWARDS, "pass"),
        ),
        a_wake_up_that_was_heard_is_not_the_last,
        {},
    ),
    "a shared commit notifies nobody": (
        code(
            PostgresStore,
            "enqueue_each",
            ("self.notify_later(call, shared.queues)", "self.notify_later(call, [])"),
        ),
        ENQUEUED,
        order("shared enqueue", "asleep", "asleep"),
    ),
    "a transaction of the caller's looks for marks": (
        code(
            _outbox,
            "enqueue_on_connection",
            (
                "answers = enqueue_sql.enqueue(conn, schema, rows, notify_inside=True)\n",
                "answers = enqueue_sql.enqueue(conn, schema, rows, notify_inside=False)\n"
                "            notify.notify_waiting(conn, schema, {row.queue for row in rows})\n",
            ),
        ),
        ENQUEUED,
        order("outbox", "before the mark", "asleep"),
    ),
    "the sleeper does not claim again after its mark": (
        code(Fetcher, "_draw_conclusions", ("short -= unmarked\n", "pass\n")),
        ENQUEUED,
        order("enqueue", "before the mark", "before the mark"),
    ),
    "the sleeper makes no mark": (
        code(
            Fetcher,
            "_draw_conclusions",
            ("await self._store.mark_waiting(self._live.group_id, sorted(unmarked), True)\n", "pass\n"),
        ),
        orders.test_the_mark_goes_with_its_group,
        {},
    ),
    "the last look is older than the registration of the listener": (
        code(
            Fetcher,
            "listening",
            (
                "self._listened = self._listened or healthy\n",
                "if self._listened:\n        return\n    self._listened = healthy\n",
            ),
        ),
        orders.test_what_was_enqueued_while_nobody_listened_is_claimed_after_the_reconnect,
        {},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mutant_of_the_wake_up_protocol_is_noticed(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    change, test, values = MUTANTS[mutant]
    change(monkeypatch)
    await noticed(test, conninfo=conninfo, **values)
