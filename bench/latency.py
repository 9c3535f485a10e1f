"""Latency: from the call that enqueues to the start of the handler in another process.

Both processes read CLOCK_MONOTONIC; the producer's reading travels in the payload. The producer's own
commit is part of the time: nobody may run a job that is not committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from .contenders import OURS, Contender
from .drain import wait_until_finished, who
from .rounds import Line, alone, compare, interleave
from .server import Server

__all__ = ["latency", "percentile"]

JOBS: Final = 500
RATE: Final = 50.0  # jobs a second: slow enough that nothing ever queues


@dataclass(frozen=True)
class Latencies:
    """Of one run, in milliseconds."""

    p50: float
    p99: float

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f} ms, p99 {self.p99:.2f} ms"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def paced(server: Server, contender: Contender, config: str, *, jobs: int) -> Latencies:
    """Send jobs at a steady rate to a worker that waits."""
    key = ("latency", contender.name, config)
    template = server.template(key, partial(contender.prepare, config=config))
    with server.database(template) as database:
        with contender.program(database, config, "work", jobs=jobs, measure="latency") as worker:
            worker.start().hear("open")
            with contender.program(database, config, "paced", jobs=jobs, rate=RATE) as producer:
                producer.start().hear("seconds")
            worker.hear("handled")
            wait_until_finished(database, contender)
            last = worker.last()
        contender.check(database, jobs, last["count"])
    milliseconds = [seconds * 1000 for seconds in last["latencies"]]
    return Latencies(percentile(milliseconds, 50), percentile(milliseconds, 99))


def latency(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """Median and 99th percentile beside each peer's quickest configuration."""
    jobs = jobs or JOBS
    peers = [c for c in who(against) if "default" in c.configs]  # bare SQL waits for nobody
    quickest = {peer.name: "quick" if "quick" in peer.configs else "best" for peer in peers}
    runs = {"triojobs": partial(paced, server, OURS, "default", jobs=jobs)}
    for peer in peers:
        runs[peer.name] = partial(paced, server, peer, quickest[peer.name], jobs=jobs)
    found = interleave(runs, rounds)
    for name in ("p50", "p99"):
        mine = [getattr(run, name) for run in found["triojobs"]]
        yield alone(f"latency {name}", mine, unit="ms", config=OURS.configs["default"].said, jobs=jobs)
        for peer in peers:
            yield compare(
                f"latency {name}",
                peer.name,
                mine,
                [getattr(run, name) for run in found[peer.name]],
                unit="ms",
                config=peer.configs[quickest[peer.name]].said,
                jobs=jobs,
                versions=peer.version,
            )
