"""A job with one attempt, enqueued inside a transaction, whose handler commits a follow-up job of its own.

However the follow-up is committed, and whether the handler then returns or raises: the handler is
called exactly once, the job ends done or killed and is never claimable again, and there is exactly
one follow-up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import places, rows


@dataclass(frozen=True)
class SendEmail:
    to: str


@dataclass(frozen=True)
class LogActivity:
    kind: str
    to: str


emails = triojobs.Queue("emails", SendEmail, result=str)
activity = triojobs.Queue("activity", LogActivity)
Way = Callable[[str, "triojobs.Job[SendEmail]"], Awaitable[Any]]


def follow_up(conn: psycopg.Connection[Any], job: triojobs.Job[SendEmail]) -> str:
    triojobs.enqueue_on(conn, activity, LogActivity("email_sent", job.payload.to))
    return "sent"


async def by_transact(conninfo: str, job: triojobs.Job[SendEmail]) -> None:
    await job.transact(lambda conn: follow_up(conn, job))


async def by_commit(conninfo: str, job: triojobs.Job[SendEmail]) -> None:
    await job.commit(lambda conn: follow_up(conn, job))


async def by_a_connection_of_its_own(conninfo: str, job: triojobs.Job[SendEmail]) -> None:
    def in_thread() -> None:
        with psycopg.connect(conninfo) as conn, conn.transaction():
            follow_up(conn, job)

    await trio.to_thread.run_sync(in_thread)


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("way", [by_transact, by_commit, by_a_connection_of_its_own])
async def test_called_once_one_follow_up_and_never_again(conninfo: str, way: Way, raises: bool) -> None:
    # A commit completes the job: what the handler raises afterwards changes nothing.
    fails = raises and way is not by_commit
    called: list[int] = []
    logged: list[LogActivity] = []

    async def send_email(job: triojobs.Job[SendEmail]) -> str:
        called.append(job.id)
        await way(conninfo, job)
        if raises:
            raise ConnectionError("the mail server is down")
        return "sent"

    async def log_activity(job: triojobs.Job[LogActivity]) -> None:
        logged.append(job.payload)

    with psycopg.connect(conninfo) as conn, conn.transaction():
        conn.execute("CREATE TABLE orders (customer text)")
        conn.execute("INSERT INTO orders VALUES ('ada')")
        job_id = triojobs.enqueue_on(conn, emails, SendEmail("ada@example.com"), max_attempts=1)
    assert rows(conninfo, "SELECT customer FROM orders") == [("ada",)]

    mailer = triojobs.Worker(emails, send_email)
    async with triojobs.open_worker_group(conninfo, [mailer]) as group:
        with trio.fail_after(30):
            if fails:
                with pytest.raises(triojobs.JobFailedError, match="the mail server is down"):
                    await group.client.result(job_id, emails)
            else:
                assert await group.client.result(job_id, emails) == "sent"
        info = await group.client.get(job_id)

    assert info is not None
    assert info.status == ("killed" if fails else "done")
    assert (info.attempts, called) == (1, [job_id])
    follow_ups = rows(conninfo, "SELECT queue, attempts FROM triojobs.ready")
    assert follow_ups == [("activity", 0)]
    assert places(conninfo) == {"jobs": 2, "ready": 1, "outcomes": 1}

    # Never claimable again: neither by that group's successor, nor by the follow-up's.
    workers = [mailer, triojobs.Worker(activity, log_activity)]
    async with triojobs.open_worker_group(conninfo, workers) as second:
        with trio.fail_after(30):
            await second.wait_idle()
    assert called == [job_id]
    assert logged == [LogActivity("email_sent", "ada@example.com")]
    assert places(conninfo) == {"jobs": 2, "outcomes": 2}
    assert second.statistics().claimed == 1


async def test_rolled_back_there_is_neither_the_order_nor_the_job(conninfo: str) -> None:
    called: list[int] = []

    async def send_email(job: triojobs.Job[SendEmail]) -> str:
        called.append(job.id)
        return "sent"

    rows(conninfo, "CREATE TABLE orders (customer text)")
    with psycopg.connect(conninfo) as conn:
        conn.execute("INSERT INTO orders VALUES ('ada')")
        job_id = triojobs.enqueue_on(conn, emails, SendEmail("ada@example.com"), max_attempts=1)
        assert job_id > 0
        conn.rollback()
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(emails, send_email)]) as group:
        with trio.fail_after(30):
            await group.wait_idle()
        assert await group.client.get(job_id) is None
    assert called == []
    assert rows(conninfo, "SELECT customer FROM orders") == []
    assert places(conninfo) == {}


async def test_the_job_is_not_seen_before_its_transaction_commits(conninfo: str) -> None:
    called: list[int] = []

    async def send_email(job: triojobs.Job[SendEmail]) -> str:
        called.append(job.id)
        return "sent"

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(emails, send_email)]) as group:
        with psycopg.connect(conninfo) as conn:
            job_id = triojobs.enqueue_on(conn, emails, SendEmail("ada@example.com"))
            with trio.fail_after(30):
                await group.wait_idle()
            assert called == []
            conn.commit()
        with trio.fail_after(30):
            assert await group.client.result(job_id, emails) == "sent"
    assert called == [job_id]
