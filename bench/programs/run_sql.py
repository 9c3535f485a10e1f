"""Bare SQL as measured: one blocking psycopg thread with the very statements of triojobs.

No Trio, no handlers, no payload decoded, no lease kept, nobody notified: the floor below the worker and
the client. python run_sql.py ORDER; the database comes from PG* variables.
"""

from __future__ import annotations

import os
import uuid

import psycopg
from wire import ORDER, Handled, now, payload, say, wait_for_end, wait_for_start

import triojobs
from triojobs._model import NewRow, Outcome, Registration, Settlement
from triojobs._sql import claim, enqueue, groups, settle
from triojobs._sql.session import prepare_session

SCHEMA = "triojobs"
QUEUE = triojobs.Queue("bench")
NOTHING = QUEUE.encode_result(None)


def connect() -> psycopg.Connection[tuple[object, ...]]:
    """Return a connection set up as the worker's."""
    conn = psycopg.connect("", autocommit=True, prepare_threshold=2)
    prepare_session(conn, call_timeout=60.0)
    return conn


def done(job_id: int, claim_no: int) -> Settlement:
    """Return what the worker writes about a handler that returned None."""
    return Settlement(job_id, claim_no, Outcome.DONE, result=NOTHING, encoding=QUEUE.codec.name)


def work() -> None:
    """Claim `batch` jobs and settle them, until `jobs` are done."""
    handled = Handled()
    group_id = uuid.uuid4()
    with connect() as conn:
        groups.register(conn, SCHEMA, Registration(group_id, "sql", "here", os.getpid(), "", 3600.0))
        wait_for_start()
        claim_no = 0
        while handled.count < ORDER["jobs"]:
            claim_no += 1
            claims = claim.claim(
                conn,
                SCHEMA,
                group_id=group_id,
                epoch=1,
                claim_no=claim_no,
                wants={QUEUE.name: ORDER["config"]["batch"]},
            )
            for _ in claims:
                handled.one()
            settle.settle(conn, SCHEMA, group_id, [done(c.job_id, claim_no) for c in claims])
        wait_for_end()
        groups.close_group(conn, SCHEMA, group_id)
    handled.say_all()


def send(chunk: int) -> None:
    """Enqueue `chunk` jobs in each statement, which commits by itself."""
    with connect() as conn:
        wait_for_start()
        begun = now()
        for no in range(0, ORDER["jobs"], chunk):
            numbers = range(no, min(no + chunk, ORDER["jobs"]))
            rows = [NewRow(QUEUE.name, QUEUE.encode_payload(payload(n)), QUEUE.codec.name) for n in numbers]
            enqueue.enqueue(conn, SCHEMA, rows, notify_inside=False)
        say(seconds=now() - begun)


if __name__ == "__main__":
    match ORDER["do"]:
        case "prepare":
            triojobs.migrate("")
        case "work":
            work()
        case "bulk":
            send(ORDER["chunk"])
        case "single":
            send(1)
