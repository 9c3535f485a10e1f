"""Through a real PgBouncer in transaction mode: everything works but LISTEN, and nothing stays in a session."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import trio
from psycopg import sql

import triojobs
from tests.tools.looking import locked, places, rows, until, value
from tests.tools.pooler import Pooler, pgbouncer, program

pytestmark = pytest.mark.skipif(program() is None, reason="pgbouncer is not installed")

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
PATIENCE = 30.0
AT_ONCE = triojobs.Backoff(first=0.0, jitter=0.0)
SHORT: dict[str, Any] = {"poll_interval": 0.1, "beat_interval": 0.2}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


@pytest.fixture
def bouncer(conninfo: str) -> Iterator[Pooler]:
    with pgbouncer(conninfo) as pooler:
        yield pooler


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[Any]:
    return [record for record in caplog.records if getattr(record, "event", "") == event]


async def answer(job: triojobs.Job[Any]) -> Any:
    return job.payload


async def test_a_whole_group_runs_through_a_pooler(bouncer: Pooler, caplog: pytest.LogCaptureFixture) -> None:
    """Many jobs at once on three server connections: done, failed and retried, killed, cancelled, committed."""
    failed_once: set[int] = set()
    running = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> Any:
        match job.payload:
            case "fails once":
                if job.id not in failed_once:
                    failed_once.add(job.id)
                    raise ValueError("not yet")
                return job.attempt
            case "is killed":
                raise triojobs.Kill("enough")
            case "hangs":
                running.set()
                await trio.sleep_forever()
            case "commits":

                def work(conn: psycopg.Connection[Any]) -> str:
                    conn.execute("INSERT INTO public.written VALUES (%s)", [job.id])
                    triojobs.enqueue_on(conn, plain, "follow-up")
                    return "committed"

                return await job.commit(work)
        return job.payload

    rows(bouncer.direct, "CREATE TABLE public.written (id bigint)")
    worker = triojobs.Worker(plain, handler, concurrency=16, retry=AT_ONCE)
    async with triojobs.open_worker_group(bouncer.conninfo, [worker], pooled=True, **SHORT) as group:
        client = group.client
        ids = await client.enqueue_many(plain, list(range(300)))
        once = await client.enqueue(plain, "fails once", delay=0.1)
        killed = await client.enqueue(plain, "is killed", priority=5)
        hangs = await client.enqueue(plain, "hangs")
        commits = [await client.enqueue(plain, "commits", key=f"k{n}") for n in range(8)]
        with trio.fail_after(PATIENCE):
            await running.wait()
            assert await client.cancel(hangs, reason="stop it")
            assert [await client.result(i, plain) for i in ids] == list(range(300))
            assert await client.result(once, plain) == 2
            assert [await client.result(i, plain) for i in commits] == ["committed"] * 8
            with pytest.raises(triojobs.JobFailedError, match="enough"):
                await client.result(killed, plain)
            with pytest.raises(triojobs.JobCancelledError, match="stop it"):
                await client.result(hangs, plain)
            with pytest.raises(triojobs.DuplicateJobError):
                await client.enqueue(plain, "commits", key="k0")
            assert await trio.to_thread.run_sync(
                lambda: client.enqueue_from_thread(plain, "from a thread", timeout=PATIENCE)
            )
            await group.wait_idle()
        assert group.statistics().stale == 0
    settled = {"done": 300 + 1 + 8 + 8 + 1, "failed": 1, "killed": 1, "cancelled": 1, "snoozed": 0}
    assert (group.report.settled, group.report.released, group.report.abandoned) == (settled, 0, ())
    assert sorted(rows(bouncer.direct, "SELECT id FROM public.written")) == [(i,) for i in commits]
    assert places(bouncer.direct).keys() == {"jobs", "outcomes", "keys"}
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [*told(caplog, "cannot_listen"), *told(caplog, "job_killed")]
    assert len(warned) == 2


async def test_rows_are_given_back_through_a_pooler(bouncer: Pooler) -> None:
    started = trio.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        started.set()
        await trio.sleep_forever()

    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, handler)], pooled=True, grace_period=0.0, **SHORT
    ) as group:
        job_id = await group.client.enqueue(plain, None)
        await started.wait()
    assert group.report.released == 1
    assert rows(bouncer.direct, "SELECT id, attempts FROM triojobs.ready") == [(job_id, 0)]


async def test_a_group_that_cannot_listen_says_so_once_and_polls(
    bouncer: Pooler, caplog: pytest.LogCaptureFixture
) -> None:
    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, answer)], pooled=True, **SHORT
    ) as group:
        with trio.fail_after(PATIENCE):
            assert await group.client.result(await group.client.enqueue(plain, 1), plain) == 1
        registered = group.group_id
        rows(
            bouncer.direct, "UPDATE triojobs.worker_groups SET closed_at = now()"
        )  # a new registration listens anew
        with trio.fail_after(PATIENCE):
            while group.group_id == registered:
                await trio.sleep(0.02)
    [warning] = told(caplog, "cannot_listen")
    assert warning.levelno == logging.WARNING
    assert "listen_conninfo" in warning.getMessage()
    assert not value(bouncer.direct, "SELECT count(*) FROM triojobs.waiting")


async def test_a_group_without_notifications_is_not_warned(
    bouncer: Pooler, caplog: pytest.LogCaptureFixture
) -> None:
    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, answer)], pooled=True, notify=False, **SHORT
    ) as group:
        with trio.fail_after(PATIENCE):
            assert await group.client.result(await group.client.enqueue(plain, 1), plain) == 1
    assert told(caplog, "cannot_listen") == []


async def test_a_direct_conninfo_for_listening_wakes_a_group_at_once(bouncer: Pooler) -> None:
    never: dict[str, Any] = {"poll_interval": 3600.0, "listening_poll_interval": 3600.0}
    async with triojobs.open_worker_group(
        bouncer.conninfo,
        [triojobs.Worker(plain, answer)],
        pooled=True,
        listen_conninfo=bouncer.direct,
        **never,
    ) as group:
        await until(bouncer.direct, "SELECT count(*) > 0 FROM triojobs.waiting")
        async with triojobs.open_client(bouncer.conninfo, pooled=True) as client:
            with trio.fail_after(PATIENCE):
                assert await client.result(await client.enqueue(plain, 1), plain) == 1
        assert group.statistics().claimed == 1


async def test_a_pooler_that_was_not_declared_is_refused_at_start_with_the_remedy(bouncer: Pooler) -> None:
    with pytest.raises(triojobs.DatabaseError, match="pooled=True") as caught:
        async with triojobs.open_worker_group(bouncer.conninfo, [triojobs.Worker(plain, answer)]):
            raise AssertionError("must not open")
    assert not caught.value.transient
    with pytest.raises(triojobs.DatabaseError, match="pooled=True"):
        async with triojobs.open_client(bouncer.conninfo):
            raise AssertionError("must not open")
    with pytest.raises(triojobs.DatabaseError, match="pooled=True"):
        await trio.to_thread.run_sync(lambda: triojobs.SyncClient(bouncer.conninfo).__enter__())


async def test_listening_through_a_pooler_is_refused_at_start(bouncer: Pooler) -> None:
    with pytest.raises(
        triojobs.DatabaseError, match="listen_conninfo leads through a connection pooler"
    ) as caught:
        async with triojobs.open_worker_group(
            bouncer.conninfo,
            [triojobs.Worker(plain, answer)],
            pooled=True,
            listen_conninfo=bouncer.conninfo,
        ):
            raise AssertionError("must not open")
    assert not caught.value.transient
    assert "server's own host and port" in caught.value.hint


async def test_a_listening_server_that_is_away_does_not_keep_a_group_from_opening(
    bouncer: Pooler, caplog: pytest.LogCaptureFixture
) -> None:
    async with triojobs.open_worker_group(
        bouncer.conninfo,
        [triojobs.Worker(plain, answer)],
        pooled=True,
        listen_conninfo="host=127.0.0.1 port=1 user=nobody dbname=none",
        **SHORT,
    ) as group:
        with trio.fail_after(PATIENCE):
            assert await group.client.result(await group.client.enqueue(plain, 1), plain) == 1
    assert told(caplog, "listen_failed")


def test_a_program_without_trio_works_through_a_pooler(bouncer: Pooler) -> None:
    with triojobs.SyncClient(bouncer.conninfo, pooled=True) as client:
        job_id = client.enqueue(plain, "x", key="k")
        assert client.get(job_id, plain).payload == "x"  # type: ignore[union-attr]
        assert client.cancel(job_id)
    assert value(bouncer.direct, "SELECT status FROM triojobs.job_status") == "cancelled"


def test_migrations_are_refused_through_a_pooler(bouncer: Pooler) -> None:
    with pytest.raises(triojobs.DatabaseError, match="pooler") as caught:
        triojobs.migrate(bouncer.conninfo)
    assert "the server's own host and port" in caught.value.hint


# What travels, and that it does not stay.

SETTINGS = (
    "statement_timeout",
    "lock_timeout",
    "plan_cache_mode",
    "enable_seqscan",
    "jit",
    "transaction_isolation",
)
SEEN = """
CREATE TABLE public.seen (place text, name text, setting text);
CREATE FUNCTION public.look() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.seen SELECT TG_TABLE_NAME, n, current_setting(n) FROM unnest({names}::text[]) n;
    RETURN NULL;
END $$;
"""
LOOK = """
CREATE TRIGGER look AFTER INSERT OR UPDATE ON triojobs.{table}
FOR EACH STATEMENT EXECUTE FUNCTION public.look()
"""


def look_at_settings(conninfo: str, *tables: str) -> None:
    """Have the server note the settings under which these tables are written."""
    with psycopg.connect(conninfo) as conn:
        conn.execute(sql.SQL(SEEN).format(names=sql.Literal(list(SETTINGS))))
        for table in tables:
            conn.execute(sql.SQL(LOOK).format(table=sql.Identifier(table)))


def settings_seen(conninfo: str, table: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, setting in rows(conninfo, "SELECT name, setting FROM public.seen WHERE place = %s", table):
        found.setdefault(name, set()).add(setting)
    return found


async def test_settings_travel_in_the_transaction_and_leave_nothing_behind(bouncer: Pooler) -> None:
    with psycopg.connect(bouncer.direct, autocommit=True) as conn:
        name = sql.Identifier(conn.info.dbname)
        conn.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'").format(name)
        )
    look_at_settings(bouncer.direct, "leases", "outcomes", "jobs", "worker_groups")
    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, answer)], pooled=True, call_timeout=7.0, **SHORT
    ) as group:
        with trio.fail_after(PATIENCE):
            await group.client.result(await group.client.enqueue(plain, 1))
        await until(bouncer.direct, "SELECT count(*) > 12 FROM public.seen WHERE place = 'worker_groups'")
    ours = {
        "statement_timeout": {"8s"},
        "lock_timeout": {"2s"},
        "plan_cache_mode": {"force_generic_plan"},
        "enable_seqscan": {"off"},
        "jit": {"off"},
        "transaction_isolation": {"read committed"},
    }
    for table in ("leases", "outcomes", "jobs", "worker_groups"):
        assert settings_seen(bouncer.direct, table) == ours, table
    with psycopg.connect(bouncer.conninfo, autocommit=True, prepare_threshold=None) as conn:
        left = {name: conn.execute(f"SHOW {name}").fetchone()[0] for name in SETTINGS}  # type: ignore[index, call-overload]
    assert left["statement_timeout"] == left["lock_timeout"] == "0"
    assert (left["plan_cache_mode"], left["enable_seqscan"]) == ("auto", "on")


async def test_the_users_work_keeps_its_own_plans_and_time(bouncer: Pooler) -> None:
    rows(bouncer.direct, "CREATE TABLE public.mine (id bigint)")
    seen: dict[str, str] = {}

    async def handler(job: triojobs.Job[Any]) -> None:
        def work(conn: psycopg.Connection[Any]) -> None:
            for name in SETTINGS:
                seen[name] = conn.execute(f"SHOW {name}").fetchone()[0]  # type: ignore[index, call-overload]

        await job.commit(work)

    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, handler)], pooled=True, **SHORT
    ) as group:
        with trio.fail_after(PATIENCE):
            await group.client.result(await group.client.enqueue(plain, 1))
    assert seen == {
        "statement_timeout": "0",
        "lock_timeout": "0",
        "plan_cache_mode": "auto",
        "enable_seqscan": "on",
        "jit": "on",
        "transaction_isolation": "read committed",
    }


async def test_no_statement_is_prepared_on_a_server_that_is_shared(bouncer: Pooler) -> None:
    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, answer, concurrency=4)], pooled=True, **SHORT
    ) as group:
        for _ in range(8):  # psycopg would prepare at the second or the fifth repetition
            ids = await group.client.enqueue_many(plain, [1, 2, 3, 4])
            with trio.fail_after(PATIENCE):
                for job_id in ids:
                    await group.client.result(job_id)
        with psycopg.connect(bouncer.conninfo, autocommit=True, prepare_threshold=None) as conn:
            for _ in range(20):  # whichever server connection it gets
                assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


async def test_a_commit_whose_claim_has_moved_on_writes_nothing(bouncer: Pooler) -> None:
    rows(bouncer.direct, "CREATE TABLE public.written (id bigint)")
    errors: list[BaseException] = []
    moved = threading.Event()

    async def handler(job: triojobs.Job[Any]) -> None:
        if job.attempt > 1:
            return

        def work(conn: psycopg.Connection[Any]) -> None:
            conn.execute("INSERT INTO public.written VALUES (%s)", [job.id])
            rows(bouncer.direct, "UPDATE triojobs.leases SET claim_no = claim_no + 1000")
            moved.set()

        try:
            await job.commit(work)
        except triojobs.StaleClaimError as exc:
            errors.append(exc)
            raise

    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, handler)], pooled=True, **SHORT
    ) as group:
        await group.client.enqueue(plain, 1)
        with trio.fail_after(PATIENCE):
            while group.statistics().stale == 0:
                await trio.sleep(0.02)
    assert moved.is_set()
    assert len(errors) == 1
    assert rows(bouncer.direct, "SELECT id FROM public.written") == []


async def test_a_call_that_hangs_behind_the_pooler_is_broken_off(
    bouncer: Pooler, caplog: pytest.LogCaptureFixture
) -> None:
    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, answer)], pooled=True, call_timeout=0.5, **SHORT
    ) as group:
        with locked(bouncer.direct, "SELECT FROM triojobs.worker_groups FOR UPDATE"):
            job_id = await group.client.enqueue(plain, 1)
            with trio.fail_after(PATIENCE):
                while not told(caplog, "claim_failed"):
                    await trio.sleep(0.02)
        with trio.fail_after(PATIENCE):
            assert await group.client.result(job_id, plain) == 1
        assert group.statistics().registrations == 1


async def test_a_restart_of_the_server_behind_the_pooler_is_noticed(bouncer: Pooler) -> None:
    """The pooler hides it: the connection to it lives on. What a crash leaves of the unlogged tables tells."""
    started = trio.Event()
    runs: list[int] = []

    async def handler(job: triojobs.Job[Any]) -> str:
        runs.append(job.attempt)
        if len(runs) == 1:
            started.set()
            await trio.sleep_forever()
        return "again"

    async with triojobs.open_worker_group(
        bouncer.conninfo, [triojobs.Worker(plain, handler)], pooled=True, **SHORT
    ) as group:
        job_id = await group.client.enqueue(plain, None)
        await started.wait()
        with psycopg.connect(bouncer.direct) as conn:
            conn.execute(
                "WITH lost AS (DELETE FROM triojobs.leases RETURNING *)"
                " INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)"
                " SELECT id, queue, priority, run_at, attempt - 1, max_attempts FROM lost"
            )
            conn.execute("TRUNCATE triojobs.waiting, triojobs.witnesses")
        with trio.fail_after(PATIENCE):
            assert await group.client.result(job_id, plain) == "again"
        assert (group.statistics().stale, group.statistics().registrations) == (1, 1)
    assert runs == [1, 1]
