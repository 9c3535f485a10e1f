"""Footprint: what a worker costs that has nothing to do, its memory, how soon it starts and ends."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from .contenders import OURS, Contender
from .drain import JOBS, wait_until_finished, who
from .rounds import Line, alone, compare, interleave
from .running import Program
from .server import Server

__all__ = ["idle", "memory", "start"]

SETTLING: Final = 3.0  # seconds until a new worker has done what it does once
IDLE: Final = 20.0  # seconds of rest that are watched: beats, polls and probes come in each
Megabytes = float


def resident(program: Program) -> tuple[Megabytes, Megabytes]:
    """Return the resident memory of a process, now and at its peak."""
    status = Path(f"/proc/{program.process.pid}/status").read_text()
    sizes = {name: int(kilobytes) / 1024 for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return sizes["VmRSS"], sizes["VmHWM"]


def rest(server: Server, contender: Contender, config: str) -> float:
    """Return the percentage of one core that an idle worker uses."""
    key = ("rest", contender.name, config)
    template = server.template(key, partial(contender.prepare, config=config))
    with server.database(template) as database, contender.program(database, config, "work") as program:
        program.start().hear("open")
        time.sleep(SETTLING)
        before, begun = program.cpu_seconds(), time.monotonic()
        time.sleep(IDLE)
        used, passed = program.cpu_seconds() - before, time.monotonic() - begun
    return used / passed * 100


def idle(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """Processor time of an idle worker's process."""
    peers = [c for c in who(against) if "default" in c.configs]
    configs = {OURS.name: "default"} | {c.name: "quick" if "quick" in c.configs else "best" for c in peers}
    runs = {c.name: partial(rest, server, c, configs[c.name]) for c in [OURS, *peers]}
    found = interleave(runs, rounds)
    yield alone("idle CPU", found[OURS.name], unit="% of a core", config=OURS.configs["default"].said)
    for peer in peers:
        said = peer.configs[configs[peer.name]].said
        yield compare(
            "idle CPU", peer.name, found[OURS.name], found[peer.name], unit="% of a core", config=said
        )


def peak(server: Server, contender: Contender, config: str, *, jobs: int) -> float:
    """Return the most memory that a draining worker had."""
    key = (contender.name, config, jobs, 95)
    template = server.template(key, partial(contender.fill, config=config, jobs=jobs))
    with server.database(template) as database:
        with contender.program(database, config, "work", jobs=jobs) as program:
            program.start().hear("handled")
            wait_until_finished(database, contender)
            most = resident(program)[1]
            handled = program.last()["count"]
        contender.check(database, jobs, handled)
    return most


def memory(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """Peak memory of the process of a draining worker."""
    jobs = jobs or JOBS
    sides = [OURS, *who(against)]
    runs = {c.name: partial(peak, server, c, "best", jobs=min(jobs, c.configs["best"].most)) for c in sides}
    runs["triojobs default"] = partial(peak, server, OURS, "default", jobs=min(jobs, JOBS // 5))
    found = interleave(runs, rounds)
    for name, config in ((OURS.name, "best"), ("triojobs default", "default")):
        yield alone("memory, draining", found[name], unit="MB", config=OURS.configs[config].said)
    for peer in sides[1:]:
        said = peer.configs["best"].said
        yield compare(
            "memory, draining", peer.name, found[OURS.name], found[peer.name], unit="MB", config=said
        )


def started(server: Server) -> tuple[float, float]:
    """Return milliseconds until the first handler runs, and those that an idle group needs to close."""
    template = server.template(("start",), partial(OURS.fill, config="default", jobs=1))
    with server.database(template) as database, OURS.program(database, "default", "start") as program:
        program.start()
        last = program.last()
        OURS.check(database, 1)
    return last["until_claim"] * 1000, last["exit"] * 1000


def start(server: Server, against: Sequence[str], *, jobs: int | None, rounds: int) -> Iterator[Line]:
    """How soon a group runs its first job, and how soon an idle one has ended."""
    found = interleave({"start": partial(started, server)}, rounds)["start"]
    config = OURS.configs["default"].said
    yield alone("start until the first handler", [claim for claim, _ in found], unit="ms", config=config)
    yield alone("exit of an idle group", [end for _, end in found], unit="ms", config=config)
