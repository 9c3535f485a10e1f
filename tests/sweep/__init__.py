"""Cancel at every schedule point: a worker group under every fault that can be ordered by number.

A schedule point is the boundary before one step of any task. Cancels are delivered at checkpoints
and each checkpoint ends a step, so k = 0..K covers every state in which an outside cancel can be
observed. (mode, seed, k) names a run exactly:

    python -m tests.sweep --mode cancel --seed 3 --k 117

determinism   the one place that touches Trio's private scheduler switches
jobs          the handlers under test, and the journal of what they did
harness       one run: modes, injections, faults of the store
invariants    what must hold after each run, by name
mutants       wrong variants of the runtime, each killed by a named invariant
gate          the same with real threads and PostgreSQL: a thread stops at a named point of a call
"""
