"""What pruning does, on the tables in memory."""

from __future__ import annotations

from ._memory_tables import Tables
from ._retention import Pruned, Retention

__all__ = ["prune"]


def prune(tables: Tables, retention: Retention, now: float) -> Pruned:
    """Remove jobs that ended longer ago than they are kept, their keys, and old registrations."""
    jobs = [job_id for job_id in tables.jobs if _is_expired(tables, retention, job_id, now)]
    for job_id in jobs:
        del tables.jobs[job_id]
        tables.outcomes.pop(job_id, None)
    keys = [
        name
        for name, key in tables.keys.items()
        if key.job_id not in tables.jobs and (key.until is None or key.until <= now)
    ]
    for name in keys:
        del tables.keys[name]
    age = retention.longest()
    groups = [i for i, g in tables.groups.items() if g.closed_at is not None and g.closed_at < now - age]
    for group_id in groups:
        del tables.groups[group_id]
    return Pruned(jobs=len(jobs), keys=len(keys), groups=len(groups))


def _is_expired(tables: Tables, retention: Retention, job_id: int, now: float) -> bool:
    if tables.alive(job_id) or not tables.outcomes.get(job_id):
        return False
    last = tables.outcomes[job_id][-1]
    rule = retention.queues.get(tables.jobs[job_id].row.queue, retention)
    return now - last.finished_at >= float(getattr(rule, last.status))
