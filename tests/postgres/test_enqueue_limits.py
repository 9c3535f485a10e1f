"""What is out of range is refused by every form before any SQL, naming field, value and limit."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
import trio
from forms import SendEmail, emails, plain

import triojobs
from tests.tools.looking import places, value

FAR = dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-12)))
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("delay", {"delay": -0.001}),
    ("delay", {"delay": math.inf}),
    ("delay", {"delay": math.nan}),
    ("delay", {"delay": "5"}),
    ("delay", {"delay": True}),
    ("run_at", {"run_at": dt.datetime(2030, 1, 1)}),
    ("run_at", {"run_at": 1_900_000_000.0}),
    ("run_at", {"run_at": FAR}),
    ("run_at", {"run_at": dt.datetime.now(dt.UTC), "delay": 1.0}),
    ("priority", {"priority": -1}),
    ("priority", {"priority": 2**31}),
    ("priority", {"priority": 1.0}),
    ("priority", {"priority": True}),
    ("max_attempts", {"max_attempts": 0}),
    ("max_attempts", {"max_attempts": 2**31}),
    ("timeout", {"timeout": -1.0}),
    ("timeout", {"timeout": math.nan}),
    ("timeout", {"timeout": math.inf}),
    ("deadline", {"deadline": dt.datetime(2030, 1, 1)}),
    ("key", {"key": "k" * 1025}),
    ("key", {"key": "k" * 4096}),
    ("key", {"key": "é" * 513}),
    ("key", {"key": "nul\0"}),
    ("key", {"key": "\ud800"}),
    ("key", {"key": 7}),
    ("key_until", {"key": "k", "key_until": "forever"}),
    ("key_until", {"key": "k", "key_until": -1.0}),
    ("key_until", {"key": "k", "key_until": math.inf}),
    ("key_until", {"key_until": "ended"}),
    ("metadata", {"metadata": {"k": "x" * 8185}}),
    ("metadata", {"metadata": {"k": "x" * 16384}}),
    ("metadata", {"metadata": {"k": "nul\0"}}),
    ("metadata", {"metadata": {"k": math.nan}}),
    ("metadata", {"metadata": {"k": object()}}),
    ("metadata", {"metadata": {1: "x"}}),
    ("metadata", {"metadata": ["no", "object"]}),
    ("job_id", {"job_id": 0}),
    ("job_id", {"job_id": "7"}),
    ("on_conflict", {"on_conflict": "ignore"}),
]


async def in_thread(fn: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(fn)


def entrances(
    client: triojobs.Client, conn: psycopg.Connection[Any], options: dict[str, Any]
) -> Iterator[Callable[[], Awaitable[Any]]]:
    """Every way in, as a call without arguments."""
    new = triojobs.NewJob(None, **options)
    sync = triojobs.SyncClient("not connected: nothing is sent")
    for_threads = {("job_timeout" if name == "timeout" else name): value for name, value in options.items()}

    async def stream() -> AsyncIterator[Any]:
        yield new

    yield lambda: client.enqueue(plain, None, **options)
    yield lambda: client.try_enqueue(plain, None, **options)
    yield lambda: client.enqueue_many(plain, [new])
    yield lambda: client.try_enqueue_many(plain, [new])
    yield lambda: client.enqueue_stream(plain, stream())
    yield lambda: in_thread(lambda: client.enqueue_from_thread(plain, None, **for_threads))
    yield lambda: in_thread(lambda: triojobs.enqueue_on(conn, plain, None, **options))
    yield lambda: in_thread(lambda: triojobs.try_enqueue_on(conn, plain, None, **options))
    yield lambda: in_thread(lambda: triojobs.enqueue_many_on(conn, plain, [new]))
    yield lambda: in_thread(lambda: triojobs.try_enqueue_many_on(conn, plain, [new]))
    yield lambda: in_thread(lambda: sync.enqueue(plain, None, **options))
    yield lambda: in_thread(lambda: sync.try_enqueue(plain, None, **options))
    yield lambda: in_thread(lambda: sync.enqueue_many(plain, [new]))
    yield lambda: in_thread(lambda: sync.try_enqueue_many(plain, [new]))


@pytest.mark.parametrize(("field", "options"), REFUSED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(REFUSED)])
async def test_what_is_out_of_range_is_refused_before_any_sql(
    shared_database: str, monkeypatch: pytest.MonkeyPatch, field: str, options: dict[str, Any]
) -> None:
    def no_sql(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("SQL was sent")

    async with triojobs.open_client(shared_database) as client:
        with psycopg.connect(shared_database) as conn, monkeypatch.context() as patch:
            patch.setattr(psycopg.Cursor, "execute", no_sql)
            for call in entrances(client, conn, options):
                with pytest.raises(triojobs.OptionError) as caught:
                    await call()
                assert isinstance(caught.value, ValueError)
                assert caught.value.field == field
                if field in options:
                    assert caught.value.value is options[field] or caught.value.value == options[field]
                assert caught.value.limit in str(caught.value)
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


LATEST = dt.datetime(8999, 12, 31, 23, 59, tzinfo=dt.UTC)
ACCEPTED: list[dict[str, Any]] = [
    {"key": "k" * 36},
    {"key": "k" * 1024},
    {"key": "é" * 512},
    {"metadata": {"k": "x" * (1000 - 8)}},
    {"metadata": {"k": "x" * (8000 - 8)}},
    {"metadata": {"k": "x" * (8192 - 8)}},
    {"metadata": {"k": r"\u0000 written out"}},
    {"priority": 2**31 - 1, "max_attempts": 2**31 - 1},
    {"delay": 0, "timeout": 0.001},
    {"run_at": dt.datetime(1900, 1, 1, tzinfo=dt.UTC)},
    {"deadline": LATEST},
]


async def test_the_limits_themselves_are_accepted(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        ids = await client.enqueue_many(plain, [triojobs.NewJob(None, **options) for options in ACCEPTED])
        for job_id, options in zip(ids, ACCEPTED, strict=True):
            info = await client.get(job_id)
            assert info is not None
            stored = {name: getattr(info, name) for name in options if hasattr(info, name)}
            assert stored == {name: value for name, value in options.items() if name in stored}
        await client.enqueue(plain, b"x" * (2**20 - 5))
        assert value(conninfo, "SELECT max(octet_length(payload)) FROM triojobs.jobs") == 2**20


@pytest.mark.parametrize("name", ["q", "q" * 64, "q" * 255, "é" * 127])
async def test_a_queue_name_in_range_is_stored(conninfo: str, name: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(triojobs.Queue(name), None)
    assert value(conninfo, "SELECT queue FROM triojobs.ready") == name


@pytest.mark.parametrize("name", ["", "q" * 256, "q" * 1024, "é" * 128, "nul\0", 5, None])
def test_a_queue_name_out_of_range_cannot_be_declared(name: Any) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        triojobs.Queue(name)
    assert caught.value.field == "queue"


async def test_a_payload_over_the_limit_is_refused_and_nothing_is_written(conninfo: str) -> None:
    small: triojobs.Queue[Any, Any] = triojobs.Queue("small", payload_limit=10)
    async with triojobs.open_client(conninfo) as client:
        for queue, payload in ((plain, b"x" * 2**20), (small, "eleven byte")):
            with pytest.raises(triojobs.OptionError) as caught:
                await client.enqueue(queue, payload)
            assert caught.value.field == "payload"
            assert "at most" in caught.value.limit
    assert places(conninfo) == {}


@pytest.mark.parametrize(
    "payload", [{"to": "ada"}, SendEmail(to=5), "ada", None, triojobs.NewJob(SendEmail("x"))]
)  # type: ignore[arg-type]
async def test_a_payload_of_another_type_is_refused(conninfo: str, payload: Any) -> None:
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.OptionError) as caught:
            await client.enqueue(emails, payload)
    assert caught.value.field == "payload"
    assert places(conninfo) == {}


async def test_something_that_is_no_queue_is_refused(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.OptionError, match="queue"):
            await client.enqueue("emails", None)  # type: ignore[arg-type]
