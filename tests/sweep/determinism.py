"""One seed decides everything: Trio's scheduler, latencies, jitter and ids.

The two switches of Trio are private; `test_determinism.py` pins them.
"""

from __future__ import annotations

import random
import types
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from trio._core import _run

from triojobs import _handling


@contextmanager
def deterministic(seed: int) -> Iterator[random.Random]:
    """Make what runs in the block repeatable; yields the harness's own source of randomness.

    The scheduler shuffles each batch by `_r`, which is how a seed chooses an interleaving.
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

    scheduler, jitter = _run._r.getstate(), random.getstate()
    with ExitStack() as stack:
        patch: Any = mock.patch.object
        stack.enter_context(patch(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True))
        stack.enter_context(patch(uuid, "uuid4", lambda: uuid.UUID(int=ids.getrandbits(128), version=4)))
        stack.enter_context(patch(_handling, "time", types.SimpleNamespace(perf_counter=perf_counter)))
        _run._r.seed(seed)
        random.seed(seed)
        try:
            yield own
        finally:
            _run._r.setstate(scheduler)
            random.setstate(jitter)
