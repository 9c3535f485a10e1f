"""Many jobs in one call: one transaction whatever their number, or a stream of commits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import psycopg
import pytest
import trio
from forms import plain

import triojobs
from tests.tools.gates import ThreadGate
from tests.tools.looking import places, rows, value
from triojobs._flusher import Flusher
from triojobs._memory import MemoryStore
from triojobs._sql import enqueue as enqueue_sql


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
    store = MemoryStore()
    client = triojobs.Client(store, Flusher(store))
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
    assert caught.value.index == 2
    assert str(caught.value) == (
        "while enqueueing: priority of item 2 of the call is -1, but must be an int from 0 to 2147483647"
    )
    assert places(conninfo) == {}


@pytest.mark.parametrize("payloads", ["abc", b"abc", {"to": "ada"}, 7, triojobs.NewJob("abc")], ids=repr)
async def test_what_is_one_payload_is_no_collection_of_them(conninfo: str, payloads: Any) -> None:
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.OptionError, match="one payload goes to `enqueue`") as caught:
            await client.enqueue_many(plain, payloads)
    assert caught.value.field == "payloads"
    with psycopg.connect(conninfo) as conn, pytest.raises(triojobs.OptionError):
        triojobs.enqueue_many_on(conn, plain, payloads)
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


async def test_chunks_have_ten_thousand_rows(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    send = enqueue_sql.enqueue_plain

    def counted(conn: Any, schema: Any, rows: Sequence[Any], **options: Any) -> list[int]:
        sizes.append(len(rows))
        return send(conn, schema, rows, **options)

    monkeypatch.setattr(enqueue_sql, "enqueue_plain", counted)
    async with triojobs.open_client(conninfo, call_timeout=60.0) as client:
        ids = await client.enqueue_many(plain, range(25_000))
    assert sizes == [10_000, 10_000, 5_000]
    assert len(set(ids)) == 25_000
    assert value(conninfo, "SELECT count(DISTINCT xmin::text) FROM triojobs.jobs") == 1


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_cancel_between_chunks_rolls_everything_back(
    conninfo: str, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    monkeypatch.setattr(enqueue_sql, "CHUNK", 10)
    monkeypatch.setattr(enqueue_sql, "KEYED_CHUNK", 10)
    gate = ThreadGate()
    if keyed:
        patched = gate.before(enqueue_sql.SpecialRows.enqueue, call=15)
        monkeypatch.setattr(enqueue_sql.SpecialRows, "enqueue", lambda *a, **k: patched(*a, **k))
    else:
        monkeypatch.setattr(enqueue_sql, "enqueue_plain", gate.before(enqueue_sql.enqueue_plain, call=2))
    jobs = [triojobs.NewJob(n, key=f"k{n}" if keyed else None) for n in range(100)]
    async with triojobs.open_client(conninfo, call_timeout=60.0) as client:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            @nursery.start_soon
            async def cancel() -> None:
                await gate.reached()
                scope.cancel()
                gate.open()

            with scope:
                await client.enqueue_many(plain, jobs)
        assert scope.cancelled_caught
        assert places(conninfo) == {}
        assert len(await client.enqueue_many(plain, range(3))) == 3  # on the same connection


async def test_an_error_in_a_later_chunk_undoes_the_earlier_ones(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enqueue_sql, "CHUNK", 10)
    rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")
    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.DatabaseError) as caught:
            await client.enqueue_many(plain, [*range(25), triojobs.NewJob(None, priority=7)])
    assert (caught.value.committed, caught.value.sqlstate) == (False, "23514")
    assert places(conninfo) == {}


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


async def test_a_database_error_in_a_stream_keeps_what_was_committed(conninfo: str) -> None:
    rows(conninfo, "ALTER TABLE triojobs.ready ADD CONSTRAINT no_seven CHECK (priority <> 7)")

    async def items() -> AsyncIterator[Any]:
        for i in range(10):
            yield triojobs.NewJob(i, priority=i)

    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.DatabaseError) as caught:
            await client.enqueue_stream(plain, items(), chunk=3)
    assert caught.value.enqueued == 6  # type: ignore[attr-defined]
    assert caught.value.committed is False
    assert places(conninfo) == {"jobs": 6, "ready": 6}


async def test_a_refused_item_of_a_stream_is_named_by_its_place_in_the_stream(conninfo: str) -> None:
    async def items() -> AsyncIterator[Any]:
        for i in range(10):
            yield triojobs.NewJob(i, priority=-1 if i == 7 else 0)

    async with triojobs.open_client(conninfo) as client:
        with pytest.raises(triojobs.OptionError) as caught:
            await client.enqueue_stream(plain, items(), chunk=3)
    assert caught.value.enqueued == 6  # type: ignore[attr-defined]
    assert caught.value.index == 7
    assert "item 7 of the call" in str(caught.value)


async def test_a_cancelled_stream_keeps_its_chunks_and_closes_its_source(conninfo: str) -> None:
    closed = []

    async def items() -> AsyncIterator[Any]:
        try:
            for i in range(5):
                yield i
            scope.cancel()
            await trio.sleep_forever()
        finally:
            closed.append(True)

    async with triojobs.open_client(conninfo) as client:
        with trio.CancelScope() as scope:
            await client.enqueue_stream(plain, items(), chunk=2)
    assert scope.cancelled_caught
    assert places(conninfo) == {"jobs": 4, "ready": 4}
    assert closed == [True]
