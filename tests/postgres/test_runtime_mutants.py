"""Tests of the runtime are sharp: each rule is broken once, and a named test must notice."""

from __future__ import annotations

import pytest
import test_fetching as fetching
import test_group_life as life
import test_handlers as handlers
import test_lease_and_outage as leases

from tests.tools.mutants import Mutant, code, noticed
from triojobs._demand import Demand
from triojobs._handling import Slots
from triojobs._heartbeat import LeaseWatch
from triojobs._postgres import BeatLoop

MUTANTS: dict[str, Mutant] = {
    "context variables stay from job to job": (
        code(Slots, "_ready_for_next", ("task.context = self._clean.copy()", "pass")),
        handlers.test_context_variables_of_one_job_are_not_seen_by_the_next,
        {"isolation": "slot"},
    ),
    "a handler that returned is cancelled all the same": (
        code(
            Slots,
            "_run",
            (
                "value = await self._call_handler(job)\n",
                "value = await self._call_handler(job)\n        await trio.lowlevel.checkpoint_if_cancelled()\n",
            ),
        ),
        handlers.test_a_handler_that_swallows_the_cancel_and_returns_is_done,
        {},
    ),
    "the end of the lease is not read again": (
        code(
            LeaseWatch,
            "look",
            (
                "live.lease.provable(self._store.now())",
                "self._store.now() < vars(self).setdefault('until', live.lease.until)",
            ),
        ),
        leases.test_a_blocked_loop_loses_neither_its_lease_nor_its_healthy_handlers,
        {},
    ),
    "a closed row is news during the closing": (
        code(BeatLoop, "_beat", ("if not self._control.stopped:", "if True:")),
        life.test_a_beat_that_finds_the_group_closed_during_the_closing_is_no_lease_loss,
        {},
    ),
    "a claim waits until half of the slots are free": (
        code(Demand, "next_claim", ("if soon or now >= ripe:", "if soon:")),
        fetching.test_a_free_slot_beside_long_jobs_is_filled_at_once,
        {},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mutant_is_noticed(
    mutant: str, conninfo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patch, test, values = MUTANTS[mutant]
    patch(monkeypatch)
    caplog.set_level("INFO", logger="triojobs")
    fixtures = {"conninfo": conninfo, "monkeypatch": monkeypatch, "caplog": caplog}
    await noticed(test, **(fixtures | values))
