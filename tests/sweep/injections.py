"""What happens at point k."""

from __future__ import annotations

import signal
from typing import Final

import trio

from triojobs._client import on_loop
from triojobs._handling import Running

from .world import World

MODES: Final = (
    "cancel",
    "sibling",
    "stop",
    "sigint",
    "handler_sigint",
    "job_cancel",
    "timeout",
    "own_scope",
    "lose",
    "retire",
    "restart",
)
"""What an injection does.

cancel          the scope around everything is cancelled
sibling         a task next to the group raises
stop            group.stop()
sigint          SIGINT while the scheduler runs: KeyboardInterrupt in the main task
handler_sigint  SIGINT while a handler runs: KeyboardInterrupt in its frame
job_cancel      somebody cancels every running job of the group
timeout         the timeout of every running handler is over
own_scope       every handler's own scope, inside of it, is cancelled
lose            the lease can no longer be proven: handlers are cancelled, a new registration follows
retire          a rival rescues every registration of the group: their claims become failed attempts
restart         the server restarts: connections break, unlogged tables are empty
"""

ENDING: Final = frozenset({"cancel", "sibling", "stop", "sigint", "handler_sigint"})  # of the group


NEEDS_GROUP: Final = frozenset({"stop", "lose"})


def inject(world: World) -> None:
    """Do what the case says, between two steps of the event loop."""
    record = world.record
    if record.exit is not None:
        return  # our program has ended
    mode = record.case.modes[record.shots]
    record.shots += 1
    if mode in NEEDS_GROUP and record.group is None:
        return
    record.injections.append((mode, trio.current_time()))
    globals()[f"_{mode}"](world)


def _cancel(world: World) -> None:
    world.outer.cancel()


def _sibling(world: World) -> None:
    world.boom.set()


def _stop(world: World) -> None:
    assert world.record.group is not None
    if on_loop():
        world.record.group.stop()
    else:  # the loop is about to wait: whoever calls now is a thread or a signal
        world.record.group.stop_from_thread()


def _sigint(world: World) -> None:
    signal.raise_signal(signal.SIGINT)


def _handler_sigint(world: World) -> None:
    world.handlers.interrupt = lambda: signal.raise_signal(signal.SIGINT)


def _job_cancel(world: World) -> None:
    record, now = world.record, trio.current_time()
    for run in list(record.journal.running()):
        if run.fence[0] not in record.ours:
            continue
        cancelled, group_id = world.database.tables.cancel(run.job_id, "injected", now)
        if cancelled:
            record.cancels[run.job_id] = min(now, record.cancels.get(run.job_id, now))
        if group_id is not None:
            world.database.notify_group(group_id)


def _timeout(world: World) -> None:
    now = trio.current_time()
    at_work = {run.claim: run for run in world.record.journal.running()}
    for running in _at_work(world):
        run = at_work.get((running.claim.job_id, *running.claim.fence))
        if run is not None and running.limit > now:
            running.limit = running.scope.deadline = run.limit = now
            running.timeout = 1.0


def _own_scope(world: World) -> None:
    for scope in list(world.handlers.own_scopes):
        scope.cancel()


def _lose(world: World) -> None:
    assert world.record.group is not None
    world.record.group._registrations[-1].lose("injected")


def _retire(world: World) -> None:
    for group_id in world.record.ours:
        row = world.database.tables.groups.get(group_id)
        if row is not None and row.closed_at is None:
            before = world.database.tables._outcome_no
            world.database.retire(group_id)
            world.record.rescued.update(range(before + 1, world.database.tables._outcome_no + 1))


def _restart(world: World) -> None:
    tables = world.database.tables
    tables.crash(tables.snapshot())
    world.database.break_listeners()


def _at_work(world: World) -> list[Running]:
    group = world.record.group
    slots = [] if group is None else [s for per_queue in group._slots.values() for s in per_queue.values()]
    return [running for each in slots for running in each.running.values()]
