"""Rows 5 and 6: signals to whole processes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import triojobs

from .processes import WorkerProcess
from .rig import SHORT, Figures, exit_bound, outcomes, plain, running, waiting

Start = Callable[..., WorkerProcess]
PROCESSES = 2  # for each number of signals; they run beside each other


def test_row_05_sigint_twice_and_four_times_to_a_real_process(
    conninfo: str, worker: Start, figures: Figures
) -> None:
    """The program does nothing about signals: Python raises KeyboardInterrupt at the first one."""
    with triojobs.SyncClient(conninfo) as client:
        jobs = [triojobs.NewJob("sleep 0.05", priority=1)] * 2 + [triojobs.NewJob("wait")] * 3
        ids = client.enqueue_many(plain, jobs * 2 * PROCESSES)
    processes = [worker(conninfo, options=SHORT, concurrency=3) for _ in range(2 * PROCESSES)]
    exits = []
    for n, process in enumerate(processes):
        process.wait_for("began")
        for _ in range(2 if n < PROCESSES else 4):
            sent = process.send(signal.SIGINT)
            time.sleep(random.uniform(0, 0.01))  # the fault: they come as they come
        assert process.wait(exit_bound(SHORT)) in (-signal.SIGINT, 1)
        exits.append(time.monotonic() - sent)
        assert "KeyboardInterrupt" in process.errors
    figures.note("exit", max(exits), at_most=exit_bound(SHORT))
    assert running(conninfo) == 0
    assert all(status == "done" for _, status in outcomes(conninfo))
    left = waiting(conninfo)
    assert set(left.values()) == {0}
    assert len(left) + len(outcomes(conninfo)) == len(ids)


def test_row_06_sigterm_stops_gracefully(conninfo: str, worker: Start, figures: Figures) -> None:
    options = SHORT | {"grace_period": 2.0}
    with triojobs.SyncClient(conninfo) as client:
        ends, waits = client.enqueue_many(plain, ["sleep 0.6", "wait"])
    process = worker(conninfo, options=options, serve=True)
    process.wait_for("began", job=ends)
    process.wait_for("began", job=waits)
    sent = process.send(signal.SIGTERM)
    with triojobs.SyncClient(conninfo) as client:
        late = client.enqueue(plain, "return")
        assert process.wait(exit_bound(options)) == 0
        figures.note("exit", time.monotonic() - sent, at_most=exit_bound(options))
        assert client.get(ends).result == "sleep"  # type: ignore[union-attr]
    assert running(conninfo) == 0
    assert outcomes(conninfo) == [(1, "done")]
    assert waiting(conninfo)[waits] == 0
    assert process.all("began", job=late) == []
    (report,) = process.all("report")
    assert (report["released"], report["settled"]["done"], report["abandoned"]) == (1, 1, [])
    assert process.errors == ""
