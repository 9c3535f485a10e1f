"""The three faces of the admin: for Trio tasks, for threads, and on the caller's connection."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import psycopg
import trio
from tools import PATIENCE, SCHEMA, Connection, Group, put_one

import triojobs
from triojobs._model import Outcome
from triojobs._sql import operate

FACES = ("Admin", "SyncAdmin", "admin_on")


class Face:
    """Calls the methods of an admin by name, wherever they may run."""

    def __init__(self, admin: triojobs.Admin | triojobs.SyncAdmin) -> None:
        self._admin = admin

    async def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        call = partial(getattr(self._admin, method), *args, **options)
        if isinstance(self._admin, triojobs.Admin):
            return await call()
        return await trio.to_thread.run_sync(call)


@asynccontextmanager
async def open_face(name: str, conninfo: str) -> AsyncIterator[Face]:
    """Open one of the faces; `admin_on` gets a connection in autocommit."""
    if name == "Admin":
        async with triojobs.open_admin(conninfo, call_timeout=PATIENCE) as admin:
            yield Face(admin)
    elif name == "SyncAdmin":
        sync = triojobs.SyncAdmin(conninfo, call_timeout=PATIENCE)
        try:
            yield Face(sync)
        finally:
            sync.close()
    else:
        with psycopg.connect(conninfo, autocommit=True) as conn:
            yield Face(triojobs.admin_on(conn))


def every_status(db: Connection, group: Group, *, queue: str = "q", **options: Any) -> dict[str, int]:
    """Make a job of each kind; return their ids by a word for where they are."""
    found: dict[str, int] = {}

    def claimed(word: str) -> Any:
        # Ahead of what an earlier call has left waiting.
        found[word] = put_one(db, queue=queue, **({"priority": 1} | options))
        (claim,) = group.claim(db, 1, queue=queue)
        assert claim.job_id == found[word]
        return claim

    for outcome in (Outcome.DONE, Outcome.KILLED):
        group.settle(db, claimed(str(outcome)), outcome, error=None if outcome is Outcome.DONE else "boom")
    group.settle(db, claimed("failed"), Outcome.FAILED, error="oops", delay=3600.0)
    cancelled = claimed("cancelled running")
    operate.cancel(db, SCHEMA, cancelled.job_id, "enough")
    group.settle(db, cancelled, Outcome.FAILED, error="interrupted")
    claimed("running")
    found["cancelled waiting"] = put_one(db, queue=queue, **options)
    operate.cancel(db, SCHEMA, found["cancelled waiting"], "never")
    found["scheduled"] = put_one(db, queue=queue, delay=3600.0, **options)
    found["ready"] = put_one(db, queue=queue, **options)
    return found


def all_pages(admin: triojobs.SyncAdmin, which: triojobs.JobFilter, **options: Any) -> list[int]:
    """Return the ids of every page."""
    found: list[int] = []
    after: str | None = None
    while True:
        page = admin.jobs(which, after=after, **options)
        found += [job.id for job in page.items]
        if page.next is None:
            return found
        after = page.next


def serve(
    db: Connection, *, lease_duration: float = 600.0, concurrency: int | None = None, **slots: int
) -> Group:
    """Register a group that says which queues it serves."""
    group = Group(db, lease_duration=lease_duration)
    db.execute(
        "UPDATE triojobs.worker_groups SET queues = %s::text::jsonb, concurrency = %s WHERE id = %s",
        [json.dumps(slots), concurrency, group.id],
    )
    return group
