"""What a process and its database hold, counted: nothing of it may be left after a scope was closed."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.tools import looking


@dataclass(frozen=True)
class Census:
    """Counts at one instant; two of them are equal when nothing was left behind in between.

    `threads` are those that nobody keeps for later: Trio's idle workers are not counted. `objects` are
    the instances of our own types, by name.
    """

    descriptors: int
    threads: tuple[str, ...]
    tasks: int
    borrowed_tokens: int
    instruments: int
    objects: Counter[str]


def census() -> Census:
    """Count, after the garbage is gone."""
    gc.collect()
    objects = gc.get_objects()
    ours = Counter(
        type(each).__qualname__ for each in objects if str(type(each).__module__).startswith("triojobs")
    )
    limiters = [each for each in objects if isinstance(each, trio.CapacityLimiter)]
    runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
    return Census(
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=tuple(sorted(t.name for t in threading.enumerate() if not t.name.startswith("Trio thread"))),
        tasks=trio.lowlevel.current_statistics().tasks_living,
        borrowed_tokens=sum(int(each.borrowed_tokens) for each in limiters),
        instruments=len(runner.instruments.get("_all", ())),
        objects=ours,
    )


def count_objects() -> int:
    """Count everything that the garbage collector knows, after the garbage is gone."""
    gc.collect()
    return len(gc.get_objects())


def resident_memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SESSIONS = """
SELECT count(*) = 0 FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


async def no_session_left(conninfo: str) -> None:
    """Return when the server has no session in this database any more; backends end a moment after their client."""
    await looking.until(conninfo, SESSIONS)
