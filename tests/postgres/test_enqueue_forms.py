"""Every form of enqueue writes the same rows, and refuses the same values before it writes anything."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import trio

import triojobs
from tests.tools.looking import blocked, locked, places, rows, terminate, value

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
other: triojobs.Queue[Any, Any] = triojobs.Queue("other")


@dataclass(frozen=True)
class SendEmail:
    to: str


emails = triojobs.Queue("emails", SendEmail, result=str)

# A form enqueues one job through one entrance: (conninfo, queue, payload, **options) -> id.
Form = Callable[..., Awaitable[int]]


async def by_client(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        return await client.enqueue(queue, payload, **options)


async def by_client_try(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        return (await client.try_enqueue(queue, payload, **options)).id


async def by_client_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async with triojobs.open_client(conninfo) as client:
        (job_id,) = await client.enqueue_many(queue, [triojobs.NewJob(payload, **options)])
        return job_id


async def by_client_stream(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    async def one() -> AsyncIterator[Any]:
        yield triojobs.NewJob(payload, **options)

    async with triojobs.open_client(conninfo) as client:
        assert await client.enqueue_stream(queue, one()) == 1
    return value(conninfo, "SELECT max(id) FROM triojobs.jobs")


async def by_thread(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    if "timeout" in options:
        options["job_timeout"] = options.pop("timeout")
    async with triojobs.open_client(conninfo) as client:
        return await trio.to_thread.run_sync(lambda: client.enqueue_from_thread(queue, payload, **options))


async def by_sync_client(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            return client.enqueue(queue, payload, **options)

    return await trio.to_thread.run_sync(call)


async def by_sync_client_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            (job_id,) = client.enqueue_many(queue, [triojobs.NewJob(payload, **options)])
            return job_id

    return await trio.to_thread.run_sync(call)


async def by_sync_client_try(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    def call() -> int:
        with triojobs.SyncClient(conninfo) as client:
            return client.try_enqueue(queue, payload, **options).id

    return await trio.to_thread.run_sync(call)


async def by_outbox(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        return triojobs.enqueue_on(conn, queue, payload, **options)


async def by_outbox_many(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        (job_id,) = triojobs.enqueue_many_on(conn, queue, [triojobs.NewJob(payload, **options)])
        return job_id


async def by_outbox_try(conninfo: str, queue: Any, payload: Any, **options: Any) -> int:
    with psycopg.connect(conninfo) as conn:
        return triojobs.try_enqueue_on(conn, queue, payload, **options).id


FORMS = [
    by_client,
    by_client_try,
    by_client_many,
    by_client_stream,
    by_thread,
    by_sync_client,
    by_sync_client_many,
    by_sync_client_try,
    by_outbox,
    by_outbox_many,
    by_outbox_try,
]


def named(form: Any) -> str:
    return str(form.__name__)


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_stores_all_that_it_was_given(conninfo: str, form: Form) -> None:
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    job_id = await form(
        conninfo,
        emails,
        SendEmail("ada@example.com"),
        run_at=soon,
        priority=5,
        max_attempts=9,
        timeout=2.5,
        deadline=soon + dt.timedelta(hours=1),
        key="welcome:42",
        metadata={"tenant": "ü", "n": [1, None]},
    )
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(job_id, emails)
    assert info is not None
    assert info.payload == SendEmail("ada@example.com")
    assert (info.id, info.queue, info.status, info.attempts) == (job_id, "emails", "pending", 0)
    assert (info.run_at, info.deadline) == (soon, soon + dt.timedelta(hours=1))
    assert (info.priority, info.max_attempts, info.key) == (5, 9, "welcome:42")
    assert info.metadata == {"tenant": "ü", "n": [1, None]}
    assert (info.result, info.error, info.finished_at, info.group) == (None, None, None, None)
    assert rows(conninfo, "SELECT timeout FROM triojobs.jobs") == [(2.5,)]
    assert places(conninfo) == {"jobs": 1, "scheduled": 1, "keys": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_has_the_documented_defaults(conninfo: str, form: Form) -> None:
    await form(conninfo, plain, {"x": 1})
    assert rows(
        conninfo,
        "SELECT priority, max_attempts, timeout, deadline, key, metadata, run_at <= enqueued_at FROM triojobs.jobs",
    ) == [(0, 5, None, None, None, {}, True)]
    assert places(conninfo) == {"jobs": 1, "ready": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_counts_a_delay_by_the_servers_clock(conninfo: str, form: Form) -> None:
    await form(conninfo, plain, None, delay=60)
    assert value(
        conninfo,
        "SELECT run_at - enqueued_at BETWEEN interval '59 s' AND interval '60.1 s' FROM triojobs.jobs",
    )
    assert places(conninfo) == {"jobs": 1, "scheduled": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_stores_until_when_the_key_holds(conninfo: str, form: Form) -> None:
    for key, key_until in (("a", "kept"), ("b", "ended"), ("c", 90.0), ("", 0)):
        await form(conninfo, plain, None, key=key, key_until=key_until)
    found = rows(conninfo, "SELECT key, hold, extract(epoch FROM until - now())::float8 FROM triojobs.keys")
    held = {key: (hold, until) for key, hold, until in found}
    assert held["a"] == ("kept", None)
    assert held["b"] == ("ended", None)
    assert held["c"] == ("until", pytest.approx(90.0, abs=10.0))
    assert held[""] == ("until", pytest.approx(0.0, abs=10.0))


async def test_each_form_repeats_a_job_id_without_effect(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.new_job_id()
    for form in FORMS:
        if form is not by_client_stream:
            assert await form(conninfo, plain, named(form), job_id=job_id) == job_id
    await by_client_stream(conninfo, plain, "again", job_id=job_id)
    assert places(conninfo) == {"jobs": 1, "ready": 1}
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(job_id)
    assert info is not None
    assert info.payload == "by_client"


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_refuses_a_job_id_that_was_not_handed_out(conninfo: str, form: Form) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        await form(conninfo, plain, None, job_id=10**9)
    assert (caught.value.field, caught.value.value) == ("job_id", 10**9)
    assert "new_job_id" in caught.value.limit
    assert places(conninfo) == {}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_names_the_holder_of_a_taken_key(conninfo: str, form: Form) -> None:
    first = await by_client(conninfo, plain, 1, key="k")
    with pytest.raises(triojobs.DuplicateJobError) as caught:
        await form(conninfo, plain, 2, key="k", on_conflict="raise")
    assert (caught.value.queue, caught.value.key, caught.value.job_id) == ("plain", "k", first)
    assert caught.value.index == (0 if "many" in named(form) or "stream" in named(form) else None)
    assert str(first) in str(caught.value)
    assert places(conninfo) == {"jobs": 1, "ready": 1, "keys": 1}


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
    ("key", {"key": "é" * 513}),
    ("key", {"key": "nul\0"}),
    ("key", {"key": "\ud800"}),
    ("key", {"key": 7}),
    ("key_until", {"key": "k", "key_until": "forever"}),
    ("key_until", {"key": "k", "key_until": -1.0}),
    ("key_until", {"key": "k", "key_until": math.inf}),
    ("key_until", {"key_until": "ended"}),
    ("metadata", {"metadata": {"k": "x" * 8185}}),
    ("metadata", {"metadata": {"k": "nul\0"}}),
    ("metadata", {"metadata": {"k": math.nan}}),
    ("metadata", {"metadata": {"k": object()}}),
    ("metadata", {"metadata": {1: "x"}}),
    ("metadata", {"metadata": ["no", "object"]}),
    ("job_id", {"job_id": 0}),
    ("job_id", {"job_id": "7"}),
    ("on_conflict", {"on_conflict": "ignore"}),
]


def refuses(form: Any, field: str, options: dict[str, Any]) -> str:
    return f"{field}-{REFUSED.index((field, options))}"


@pytest.mark.parametrize(("field", "options"), REFUSED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(REFUSED)])
async def test_what_is_out_of_range_is_refused_before_any_sql(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, field: str, options: dict[str, Any]
) -> None:
    def no_sql(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("SQL was sent")

    conn = psycopg.connect(conninfo)
    async with triojobs.open_client(conninfo) as client:
        monkeypatch.setattr("triojobs._sql.enqueue.enqueue", no_sql)
        new = triojobs.NewJob(None, **options)
        thread_options = {("job_timeout" if k == "timeout" else k): v for k, v in options.items()}

        async def stream() -> AsyncIterator[Any]:
            yield new

        async def in_thread(fn: Callable[[], Any]) -> Any:
            return await trio.to_thread.run_sync(fn)

        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.enqueue(plain, None, **options),
            lambda: client.try_enqueue(plain, None, **options),
            lambda: client.enqueue_many(plain, [new]),
            lambda: client.enqueue_stream(plain, stream()),
            lambda: in_thread(lambda: client.enqueue_from_thread(plain, None, **thread_options)),
            lambda: in_thread(lambda: triojobs.enqueue_on(conn, plain, None, **options)),
            lambda: in_thread(lambda: triojobs.enqueue_many_on(conn, plain, [new])),
            lambda: in_thread(lambda: triojobs.SyncClient(conninfo).enqueue(plain, None, **options)),
            lambda: in_thread(lambda: triojobs.SyncClient(conninfo).try_enqueue(plain, None, **options)),
        ]
        for call in calls:
            with pytest.raises(triojobs.OptionError) as caught:
                await call()
            assert isinstance(caught.value, ValueError)
            assert caught.value.field == field
            if field in options:
                assert caught.value.value is options[field] or caught.value.value == options[field]
            assert caught.value.limit in str(caught.value)
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    conn.close()
    assert places(conninfo) == {}


async def test_the_limits_themselves_are_accepted(conninfo: str) -> None:
    widest = triojobs.Queue("q" * 255)
    async with triojobs.open_client(conninfo) as client:
        ids = await client.enqueue_many(
            widest,
            [
                triojobs.NewJob(None, key="k" * 1024),
                triojobs.NewJob(None, key="é" * 512),
                triojobs.NewJob(None, metadata={"k": "x" * 8184}),
                triojobs.NewJob(None, metadata={"k": r"\u0000 written out"}),
                triojobs.NewJob(None, priority=2**31 - 1, max_attempts=2**31 - 1),
                triojobs.NewJob(b"x" * (2**20 - 5)),
                triojobs.NewJob(None, delay=0, timeout=0.001),
                triojobs.NewJob(None, run_at=dt.datetime(1970, 1, 1, tzinfo=dt.UTC)),
                triojobs.NewJob(None, deadline=dt.datetime.max.replace(tzinfo=dt.UTC)),
            ],
        )
        assert value(conninfo, "SELECT max(octet_length(payload)) FROM triojobs.jobs") == 2**20
        info = await client.get(ids[3])
        assert info is not None
        assert info.metadata == {"k": r"\u0000 written out"}
        info = await client.get(ids[-1])
        assert info is not None
        assert info.deadline == dt.datetime.max.replace(tzinfo=dt.UTC)


@pytest.mark.parametrize("name", ["", "q" * 256, "é" * 128, "nul\0", 5, None])
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


# enqueue_many


async def test_enqueue_many_returns_ids_in_the_order_given(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        reserved = await client.new_job_id()
        payloads = [
            1,
            triojobs.NewJob(2, key="z"),
            3,
            triojobs.NewJob(4, key="a"),
            triojobs.NewJob(5, job_id=reserved),
        ]
        ids = await client.enqueue_many(plain, payloads)
        infos = [await client.get(job_id) for job_id in ids]
    assert [info.payload for info in infos if info] == [1, 2, 3, 4, 5]
    assert ids[4] == reserved
    assert len(set(ids)) == 5


async def test_an_empty_list_enqueues_nothing_in_every_form(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        assert await client.enqueue_many(plain, []) == []
        assert await client.enqueue_many(plain, iter(())) == []
    with psycopg.connect(conninfo) as conn:
        assert triojobs.enqueue_many_on(conn, plain, []) == []
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE

    def sync() -> list[int]:
        with triojobs.SyncClient(conninfo) as sync_client:
            return sync_client.enqueue_many(plain, [])

    assert await trio.to_thread.run_sync(sync) == []


async def test_an_empty_list_is_a_checkpoint() -> None:
    class Nothing:
        def check_owner(self) -> None: ...

    client = triojobs.Client(Nothing(), None)  # type: ignore[arg-type]
    with trio.testing.assert_checkpoints():
        assert await client.enqueue_many(plain, []) == []


async def test_a_taken_key_undoes_the_whole_call_and_its_index_is_named(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        taken = await client.enqueue(plain, None, key="taken")
        with pytest.raises(triojobs.DuplicateJobError) as caught:
            await client.enqueue_many(
                plain, [1, 2, triojobs.NewJob(3, key="free"), triojobs.NewJob(4, key="taken"), 5]
            )
    assert (caught.value.index, caught.value.job_id, caught.value.key) == (3, taken, "taken")
    assert "item 3" in str(caught.value)
    assert places(conninfo) == {"jobs": 1, "ready": 1, "keys": 1}


async def test_a_key_twice_in_one_call_is_a_conflict(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.DuplicateJobError) as caught:
            await client.enqueue_many(plain, [triojobs.NewJob(i, key="same") for i in range(3)])
    assert caught.value.index == 1
    assert places(conninfo) == {}


async def test_each_item_has_a_conflict_rule_of_its_own(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        first = await client.enqueue(plain, "old", key="k")
        answers = await client.try_enqueue_many(
            plain,
            [
                triojobs.NewJob("kept out", key="k", on_conflict="return"),
                triojobs.NewJob("new", key="k", on_conflict="replace"),
                triojobs.NewJob("free", key="free"),
                "plain",
            ],
        )
        info = await client.get(first)
    assert answers[0] == triojobs.Enqueued(first, created=False, replaced=False)
    assert answers[1] == triojobs.Enqueued(first, created=False, replaced=True)
    assert [(a.created, a.replaced) for a in answers[2:]] == [(True, False), (True, False)]
    assert info is not None
    assert info.payload == "new"


async def test_one_bad_item_refuses_the_call_and_is_named(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.OptionError) as caught:
            await client.enqueue_many(plain, [1, 2, triojobs.NewJob(3, priority=-1)])
    assert any("item 2" in note for note in caught.value.__notes__)
    assert places(conninfo) == {}


async def test_a_call_of_several_chunks_is_one_transaction(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triojobs._sql.enqueue.CHUNK", 100)
    async with triojobs.open_client(conninfo) as client:
        ids = await client.enqueue_many(plain, range(250))
    assert len(set(ids)) == 250
    assert value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs") == 1
    assert [r[0] for r in rows(conninfo, "SELECT id FROM triojobs.jobs ORDER BY id")] == ids


async def test_large_payloads_make_small_chunks(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triojobs._sql.enqueue.CHUNK_BYTES", 1000)
    async with triojobs.open_client(conninfo) as client:
        ids = await client.enqueue_many(plain, [b"x" * size for size in (400, 400, 400, 5000, 1, 2)])
        assert [len((await client.get(i)).payload) for i in ids] == [400, 400, 400, 5000, 1, 2]  # type: ignore[union-attr]
    assert value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs") == 1


async def test_a_cancel_between_chunks_rolls_everything_back(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triojobs._sql.enqueue.CHUNK", 10)
    # The second chunk waits at the gate, in its statement; the cancel comes meanwhile.
    job_id = value(conninfo, "SELECT last_value + 15 FROM triojobs.job_ids")
    gate_row = "INSERT INTO triojobs.ready VALUES (%s, 'gate', 0, now(), 0, 1)"
    async with triojobs.open_client(conninfo) as client:
        with locked(conninfo, gate_row, job_id) as gate, trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def cancel() -> None:
                    await blocked(conninfo, "client")
                    scope.cancel()
                    gate.rollback()

                await client.enqueue_many(plain, range(100))
        assert scope.cancelled_caught
        assert places(conninfo) == {}
        assert len(await client.enqueue_many(plain, range(3))) == 3


# enqueue_stream


async def test_a_stream_is_committed_chunk_by_chunk_and_asked_for_more_only_then(conninfo: str) -> None:
    committed = []

    async def items() -> AsyncIterator[int]:
        for i in range(25):
            if i % 10 == 0:
                committed.append(value(conninfo, "SELECT count(*) FROM triojobs.jobs"))
            yield i

    async with triojobs.open_client(conninfo) as client:
        assert await client.enqueue_stream(plain, items(), chunk=10) == 25
    assert committed == [0, 10, 20]
    assert value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs") == 3


async def test_a_stream_may_be_a_memory_channel(conninfo: str) -> None:
    send, receive = trio.open_memory_channel[Any](5)
    for i in range(5):
        send.send_nowait(i)
    send.close()
    async with triojobs.open_client(conninfo) as client:
        assert await client.enqueue_stream(plain, receive, chunk=2) == 5


async def test_an_error_of_the_stream_says_how_many_were_committed(conninfo: str) -> None:
    closed = []

    async def items() -> AsyncIterator[Any]:
        try:
            for i in range(5):
                yield i
            raise ZeroDivisionError
        finally:
            closed.append(True)

    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(ZeroDivisionError) as caught:
            await client.enqueue_stream(plain, items(), chunk=2)
    assert caught.value.enqueued == 4  # type: ignore[attr-defined]
    assert "4 item(s)" in caught.value.__notes__[0]
    assert places(conninfo) == {"jobs": 4, "ready": 4}
    assert closed == [True]


async def test_a_conflict_in_a_stream_undoes_its_chunk_and_names_the_item(conninfo: str) -> None:
    closed = []

    async def items() -> AsyncIterator[Any]:
        try:
            for i in range(10):
                yield triojobs.NewJob(i, key="same" if i in (1, 4) else None)
        finally:
            closed.append(True)

    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.DuplicateJobError) as caught:
            await client.enqueue_stream(plain, items(), chunk=3)
    assert caught.value.index == 4
    assert caught.value.enqueued == 3  # type: ignore[attr-defined]
    assert places(conninfo) == {"jobs": 3, "ready": 3, "keys": 1}
    assert closed == [True]


@pytest.mark.parametrize("chunk", [0, 10_001, 1.5])
async def test_a_chunk_out_of_range_is_refused(conninfo: str, chunk: Any) -> None:
    async def items() -> AsyncIterator[Any]:
        yield 1

    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.OptionError, match="chunk"):
            await client.enqueue_stream(plain, items(), chunk=chunk)


# What is known after an error


async def test_a_lost_reply_leaves_committed_unknown_and_is_never_repeated(conninfo: str) -> None:
    next_id = value(conninfo, "SELECT last_value + 1 FROM triojobs.job_ids")
    gate_row = "INSERT INTO triojobs.ready VALUES (%s, 'gate', 0, now(), 0, 1)"
    async with triojobs.open_client(conninfo) as client:
        with locked(conninfo, gate_row, next_id) as gate:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def break_it() -> None:
                    terminate(conninfo, await blocked(conninfo, "client"))
                    gate.rollback()

                with pytest.raises(triojobs.DatabaseError) as caught:
                    await client.enqueue(plain, "once")
        assert caught.value.committed is None
        assert caught.value.transient
        assert isinstance(caught.value.__cause__, psycopg.Error)
        assert value(conninfo, "SELECT count(*) <= 1 FROM triojobs.jobs")
        assert value(conninfo, "SELECT last_value <= %s FROM triojobs.job_ids", next_id)
        await client.enqueue(plain, "the connection has healed")


async def test_a_repetition_with_the_same_job_id_is_safe_after_a_lost_reply(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.new_job_id()
        gate_row = "INSERT INTO triojobs.ready VALUES (%s, 'gate', 0, now(), 0, 1)"
        with locked(conninfo, gate_row, job_id) as gate:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def break_it() -> None:
                    terminate(conninfo, await blocked(conninfo, "client"))
                    gate.rollback()

                with pytest.raises(triojobs.DatabaseError) as caught:
                    await client.enqueue(plain, "once", job_id=job_id)
        assert caught.value.committed is None
        assert await client.enqueue(plain, "once", job_id=job_id) == job_id
        assert await client.enqueue(plain, "once", job_id=job_id) == job_id
    assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_a_server_that_refuses_has_not_committed(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
        with pytest.raises(triojobs.DatabaseError) as caught:
            await client.enqueue(plain, None, priority=7)
        assert (caught.value.committed, caught.value.transient, caught.value.sqlstate) == (
            False,
            False,
            "23514",
        )
        await client.enqueue(plain, None)
    assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_no_server_is_a_transient_error_that_committed_nothing(conninfo: str) -> None:
    async with triojobs.open_client(conninfo, call_timeout=1.0) as client:
        client._store._client_line._conninfo = "host=127.0.0.1 port=1 dbname=x"  # type: ignore[attr-defined]
        client._store._client_line._idle.pop().close()  # type: ignore[attr-defined]
        with pytest.raises(triojobs.DatabaseError) as caught:
            await client.enqueue(plain, None)
    assert (caught.value.committed, caught.value.transient) == (False, True)


async def test_a_closed_client_says_so(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        pass
    for call in (
        lambda: client.enqueue(plain, None),
        lambda: client.enqueue_many(plain, [1]),
        lambda: client.try_enqueue(plain, 1),
        lambda: client.get(1),
        lambda: client.result(1),
        lambda: client.cancel(1),
        lambda: client.new_job_id(),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await call()  # type: ignore[no-untyped-call]
    with pytest.raises(trio.ClosedResourceError):
        await trio.to_thread.run_sync(lambda: client.enqueue_from_thread(plain, None))


async def test_closing_a_client_leaves_no_connection_behind(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, None)
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with trio.fail_after(5):
        while value(conninfo, query):
            await trio.sleep(0.01)


async def test_a_cancelled_enqueue_happens_fully_or_not_at_all(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.enqueue(plain, "never begun")
        assert places(conninfo) == {}
        next_id = value(conninfo, "SELECT last_value + 1 FROM triojobs.job_ids")
        gate_row = "INSERT INTO triojobs.ready VALUES (%s, 'gate', 0, now(), 0, 1)"
        with locked(conninfo, gate_row, next_id) as gate, trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def cancel() -> None:
                    await blocked(conninfo, "client")
                    scope.cancel()
                    gate.execute("ROLLBACK")

                with pytest.raises(triojobs.DatabaseError):
                    # The gate's row is gone, so it goes through: handed off, it is answered.
                    await client.enqueue(plain, "begun")
                    raise triojobs.DatabaseError("answered")
        assert places(conninfo) == {"jobs": 1, "ready": 1}


async def test_tasks_share_commits(conninfo: str) -> None:
    ids = []
    async with triojobs.open_client(conninfo) as client, trio.open_nursery() as nursery:
        for i in range(200):

            @nursery.start_soon
            async def one(i: int = i) -> None:
                ids.append(await client.enqueue(plain, i))

    assert len(set(ids)) == 200
    assert value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs") < 20
