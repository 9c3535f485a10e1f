"""One seed decides everything: Trio's scheduler, latencies, jitter, ids, and what time it is.

The order of tasks is held still as for users' own explorations (`repeatable`), which knows Trio's private
switches; `test_determinism.py` pins them.
"""

from __future__ import annotations

import random
import types
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import trio

from triojobs import _client, _flusher, _handling
from triojobs._explore import repeatable

from . import lockstep


@contextmanager
def deterministic(seed: int) -> Iterator[random.Random]:
    """Make what runs in the block repeatable; yields the harness's own source of randomness.

    The scheduler shuffles each batch by `_r`, which is how a seed chooses an interleaving. What blocks
    in `enqueue_from_thread` blocks in lockstep with the loop, on the virtual clock.
    """
    own = random.Random(f"{seed} harness")
    ids = random.Random(f"{seed} ids")
    clock = random.Random(f"{seed} clock")
    now = 0.0

    def perf_counter() -> float:
        # Slots read it to see whether handlers have hogged the loop; both answers shall occur.
        nonlocal now
        now += clock.choice((0.0, 0.0, 0.002))
        return now

    with repeatable(seed), ExitStack() as stack:

        def patch(where: Any, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        patch(uuid, "uuid4", lambda: uuid.UUID(int=ids.getrandbits(128), version=4))
        patch(_handling, "time", types.SimpleNamespace(perf_counter=perf_counter))
        patch(_flusher, "ThreadEvent", lockstep.LockstepEvent)
        patch(_flusher, "time", types.SimpleNamespace(monotonic=lockstep.monotonic))
        patch(_client, "check_cancelled", lockstep.check_cancelled)
        yield own


def lift_shields(task: trio.lowlevel.Task) -> None:
    """Let a cancel reach this task whatever it shields: the way out of a run that would hang."""
    status = task._cancel_status
    while status is not None:
        status._scope.shield = False
        status = status._parent
