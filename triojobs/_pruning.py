"""A round of pruning, as steps: what to look at, what to drop, what to delete."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, Final, TypeVar

from ._admin_store import Step
from ._errors import DatabaseError
from ._model import ENDED
from ._retention import Pruned, Retention
from ._sql import retention as sql
from ._sql.deleting import deleting
from ._sql.effects import Effect

__all__ = ["LATER", "prune", "take_turn"]

T = TypeVar("T")

LATER: Final = 86400.0  # seconds that worker groups give a range to go as a whole
MOVED: Final = 1_000  # survivors of a range that are moved: about 10 ms under the lock
STRETCH: Final = 50_000  # ids in one look for survivors: some 50 ms
ROWS: Final = 5_000  # jobs in one look for expired ones: some 50 ms
BATCH: Final = 500  # jobs deleted in a transaction
KEYS: Final = 5_000  # keys in one look
GROUPS: Final = 1_000  # groups deleted in a transaction
NOT_OURS: Final = "42501"  # insufficient_privilege
FIRST_ID: Final = -(2**63) + 1


def take_turn(seconds: float) -> Step[bool]:
    """Ask whether it is time to prune, and if so keep everybody else from it for so long."""
    return _step("taking a turn", sql.take_turn, seconds)


def prune(
    retention: Retention, *, slack: float, dry_run: bool, progress: Callable[[Pruned], object] | None = None
) -> Generator[Step[Any], Any, Pruned]:
    """Remove what is older than `retention` says.

    Args:
        slack: seconds after which jobs go one by one out of a range that cannot go as a whole.
        dry_run: count what would go, and change nothing. progress: told after each part.
    """
    result = Pruned()
    told = progress or (lambda _: None)
    if retention.least != float("inf"):
        where: sql.Horizon = yield _step("looking how far to prune", sql.horizon, retention.least)
        counted: set[int] = set()
        for n in (yield _step("looking for old ranges", sql.ranges)):
            if (n + 1) * sql.WIDTH > where.last or n * sql.WIDTH > where.high:
                break  # ids of it are being given out, or nothing in it is old enough
            kept = yield from _survivors(retention, n)
            if kept is None:
                continue
            if dry_run:
                counted.add(n)
                result = replace(result, ranges=result.ranges + 1, moved=result.moved + len(kept))
            else:
                result = yield from _drop(n, kept, where.seen, result)
            told(result)
        result = yield from _delete_jobs(retention, where, counted, slack, dry_run, result, told)
    if not dry_run:
        result = yield from _delete_keys(result)
        if retention.longest() != float("inf"):
            result = yield from _delete_groups(retention.longest(), result)
        told(result)
    return result


def _survivors(retention: Retention, n: int) -> Generator[Step[Any], Any, set[int] | None]:
    """Return which jobs of a range have to be kept; None: too many of them."""
    kept: set[int] = set()
    low, high = n * sql.WIDTH, (n + 1) * sql.WIDTH
    while high > low:  # the newest first: they are the ones that have to stay
        start = max(low, high - STRETCH)
        # An attempt is a row, so a job may come more than once.
        found = yield _step(
            f"looking what to keep of range {n}", sql.survivors, retention, start, high, 10 * MOVED
        )
        kept |= found
        if len(kept) > MOVED:
            return None
        high = start
    return kept


def _drop(n: int, kept: set[int], seen: int, result: Pruned) -> Generator[Step[Any], Any, Pruned]:
    def drop(conn: Any, schema: str) -> Effect[int | None]:
        return Effect(sql.drop_range(conn, schema, n, sorted(kept), seen=seen, most=2 * MOVED))

    try:
        moved = yield Step(f"dropping range {n}", drop)
    except DatabaseError as exc:
        # Where we may not drop tables, their jobs go one by one.
        if not exc.transient and exc.sqlstate != NOT_OURS:
            raise
        return replace(result, postponed=result.postponed + 1)
    if moved is None:
        return result
    return replace(result, ranges=result.ranges + 1, moved=result.moved + moved)


def _delete_jobs(
    retention: Retention,
    where: sql.Horizon,
    counted: set[int],
    slack: float,
    dry_run: bool,
    result: Pruned,
    told: Callable[[Pruned], object],
) -> Generator[Step[Any], Any, Pruned]:
    low = FIRST_ID
    act = deleting(ENDED, latest=where.seen)

    def look(conn: Any, schema: str) -> Effect[sql.Rows]:
        return Effect(sql.expired(conn, schema, retention, low, where.high, slack=slack, most=ROWS))

    while True:
        rows: sql.Rows = yield Step("looking for old jobs", look)
        if rows.last is None:
            return result
        low = rows.last + 1
        if dry_run:
            count = sum(job_id // sql.WIDTH not in counted for job_id in rows.ids)
            result = replace(result, jobs=result.jobs + count)
        for start in range(0, 0 if dry_run else len(rows.ids), BATCH):
            batch = rows.ids[start : start + BATCH]
            deleted = yield Step(
                "deleting old jobs",
                lambda conn, schema, batch=batch: Effect(len(act(conn, schema, batch, wait=False).ids)),  # type: ignore[misc]
                looks_again=True,
            )
            result = replace(result, jobs=result.jobs + deleted)
        told(result)


def _delete_keys(result: Pruned) -> Generator[Step[Any], Any, Pruned]:
    after = sql.FIRST_KEY
    while True:
        keys: sql.Keys = yield _step("looking for old keys", sql.gone_keys, after, KEYS)
        if keys.gone:
            deleted = yield _step("deleting old keys", sql.delete_keys, keys.gone)
            result = replace(result, keys=result.keys + deleted)
        if keys.last is None:
            return result
        after = keys.last


def _delete_groups(age: float, result: Pruned) -> Generator[Step[Any], Any, Pruned]:
    while True:
        deleted = yield _step("deleting old worker groups", sql.delete_groups, age, GROUPS)
        result = replace(result, groups=result.groups + deleted)
        if deleted < GROUPS:
            return result


def _step(operation: str, fn: Callable[..., T], *args: Any) -> Step[T]:
    return Step(operation, lambda conn, schema: Effect(fn(conn, schema, *args)))
