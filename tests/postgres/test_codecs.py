"""Every kind of payload and result, from enqueue through a handler to the waiter, and what the rows say."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import attrs
import cbor2
import msgspec
import psycopg
import pydantic
import pytest
import trio

import triojobs
from tests.tools.looking import rows
from tests.tools.running import AT_ONCE, outcomes

AT = dt.datetime(2026, 11, 24, 12, 30, 15, 123456, tzinfo=dt.UTC)
ID = uuid.UUID("12345678123456781234567812345678")


@dataclass(frozen=True)
class Line:
    article: str
    price: decimal.Decimal


@dataclass(frozen=True)
class Order:
    number: int
    at: dt.datetime
    token: uuid.UUID
    scan: bytes
    lines: list[Line] = field(default_factory=list)
    note: str | None = None


@attrs.frozen
class AttrsOrder:
    number: int
    at: dt.datetime


class StructOrder(msgspec.Struct, frozen=True):
    number: int
    token: uuid.UUID


class DictOrder(TypedDict):
    number: int
    at: dt.datetime


class TupleOrder(NamedTuple):
    number: int
    note: str


class ModelOrder(pydantic.BaseModel):
    number: int
    at: dt.datetime
    lines: list[str] = []


class LinesCodec:
    """A codec of the user's own: lists of texts, one a line."""

    name = "lines"

    def encode(self, value: Any) -> bytes:
        return "\n".join(value).encode()

    def decode(self, data: bytes, type: Any) -> Any:
        try:
            return data.decode().split("\n")
        except UnicodeDecodeError as exc:
            raise triojobs.CodecError("no text", operation="decoding") from exc


ORDER = Order(7, AT, ID, b"\x00\xff", [Line("a", decimal.Decimal("1.10"))], "ü")
PLAIN: Any = {"int": 2**70, "list": [1, "two", b"\x03", None, True, 0.5], "at": AT, "id": ID, "": {}}
CBOR, JSON = triojobs.CborCodec(), triojobs.JsonCodec()

# id: the declared type, a value of it, the codec, the encoding that the row says
KINDS: dict[str, tuple[Any, Any, Any, str]] = {
    "dataclass": (Order, ORDER, CBOR, "cbor"),
    "attrs": (AttrsOrder, AttrsOrder(1, AT), CBOR, "cbor"),
    "Struct": (StructOrder, StructOrder(1, ID), CBOR, "cbor"),
    "TypedDict": (DictOrder, {"number": 1, "at": AT}, CBOR, "cbor"),
    "NamedTuple": (TupleOrder, TupleOrder(1, "n"), CBOR, "cbor"),
    "plain": (Any, PLAIN, CBOR, "cbor"),
    "None": (Any, None, CBOR, "cbor"),
    "optional": (AttrsOrder | None, None, CBOR, "cbor"),
    "list of dataclasses": (list[Line], ORDER.lines, CBOR, "cbor"),
    "pydantic": (ModelOrder, ModelOrder(number=1, at=AT, lines=["x"]), triojobs.PydanticCodec(), "cbor"),
    "own codec": (Any, ["one", "zwei ü", ""], LinesCodec(), "lines"),
    "dataclass as JSON": (Order, ORDER, JSON, "json"),
    "attrs as JSON": (AttrsOrder, AttrsOrder(1, AT), JSON, "json"),
    "Struct as JSON": (StructOrder, StructOrder(1, ID), JSON, "json"),
    "plain as JSON": (Any, {"a": [1, "two", None, True, 0.5]}, JSON, "json"),
}


@pytest.mark.parametrize("way", ["returns", "commits"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_value_goes_to_the_handler_and_comes_back_as_it_was(
    conninfo: str, kind: str, way: str
) -> None:
    declared, value, codec, encoding = KINDS[kind]
    queue: triojobs.Queue[Any, Any] = triojobs.Queue("q", declared, result=declared, codec=codec)
    seen: list[Any] = []

    async def handler(job: triojobs.Job[Any]) -> Any:
        seen.append(job.payload)
        return await job.commit(lambda conn: job.payload) if way == "commits" else job.payload

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(queue, handler)]) as group:
        job_id = await group.client.enqueue(queue, value)
        with trio.fail_after(15):
            result = await group.client.result(job_id, queue)
        info = await group.client.get(job_id, queue)
    assert info is not None
    for found in (seen[0], result, info.payload, info.result):
        assert (found, type(found)) == (value, type(value))
    assert rows(conninfo, "SELECT encoding FROM triojobs.jobs") == [(encoding,)]
    assert rows(conninfo, "SELECT encoding, status FROM triojobs.outcomes") == [(encoding, "done")]


async def test_the_bytes_of_a_row_are_what_the_encoding_says(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        for codec in (CBOR, JSON):
            queue: triojobs.Queue[Any, Any] = triojobs.Queue("q", TupleOrder, codec=codec)
            await client.enqueue(queue, TupleOrder(1, "ü"))
    found = dict(rows(conninfo, "SELECT encoding, payload FROM triojobs.jobs"))
    assert cbor2.loads(found["cbor"]) == [1, "ü"]
    assert found["json"].decode() == '[1,"ü"]'


# Rows of another encoding: a queue changes its codec while old jobs wait; SQL enqueues JSON.


@pytest.mark.parametrize(("old", "new"), [(CBOR, JSON), (JSON, CBOR), (JSON, triojobs.PydanticCodec())])
async def test_jobs_of_the_old_codec_are_read_after_the_change(conninfo: str, old: Any, new: Any) -> None:
    declared: Any = ModelOrder if isinstance(new, triojobs.PydanticCodec) else AttrsOrder
    value: Any = declared(number=1, at=AT)
    sent: Any = value.model_dump(mode="json") if declared is ModelOrder else value
    before: triojobs.Queue[Any, Any] = triojobs.Queue("q", codec=old)
    after: triojobs.Queue[Any, Any] = triojobs.Queue("q", declared, result=declared, codec=new)

    async def handler(job: triojobs.Job[Any]) -> Any:
        assert job.payload == value
        return job.payload

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(after, handler)]) as group:
        job_id = await group.client.enqueue(before, msgspec.to_builtins(sent, builtin_types=(dt.datetime,)))
        with trio.fail_after(15):
            assert await group.client.result(job_id, after) == value
            # A reader that has not changed yet reads the new result by its own encoding.
            plain = await group.client.result(job_id, before)
    assert plain["number"] == 1
    assert rows(conninfo, "SELECT encoding FROM triojobs.jobs") == [(old.name,)]
    assert rows(conninfo, "SELECT encoding FROM triojobs.outcomes") == [(new.name,)]


async def test_a_job_enqueued_in_sql_reaches_a_typed_handler(conninfo: str) -> None:
    queue: triojobs.Queue[Order, Order] = triojobs.Queue("q", Order, result=Order)

    async def handler(job: triojobs.Job[Order]) -> Order:
        return job.payload

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(queue, handler)]) as group:
        with psycopg.connect(conninfo) as conn:
            row = conn.execute(
                "SELECT triojobs.enqueue('q', jsonb_build_object('number', 7, 'at', %s::text, 'token', %s::text,"
                " 'scan', 'AP8=', 'lines', jsonb_build_array(jsonb_build_object('article', 'a',"
                " 'price', '1.10')), 'note', 'ü'))",
                [AT.isoformat(), str(ID)],
            ).fetchone()
        assert row is not None
        with trio.fail_after(15):
            assert await group.client.result(row[0], queue) == ORDER
    assert rows(conninfo, "SELECT encoding FROM triojobs.jobs") == [("json",)]


async def test_an_encoding_that_this_version_does_not_know_is_left_to_another_attempt(conninfo: str) -> None:
    """During a rolling deploy another worker may know it: failed, not killed, and never guessed."""
    theirs: triojobs.Queue[Any, Any] = triojobs.Queue("q", codec=LinesCodec())
    ours: triojobs.Queue[Any, Any] = triojobs.Queue("q")

    async def handler(job: triojobs.Job[Any]) -> Any:
        return job.payload

    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(theirs, ["one", "two"], max_attempts=3)
        slow = triojobs.Backoff(first=0.1, jitter=0.0)
        async with triojobs.open_worker_group(
            conninfo, [triojobs.Worker(ours, handler, retry=slow)]
        ) as group:
            with trio.fail_after(15):
                while not group.statistics().settled:
                    await trio.sleep(0.01)
        workers = [triojobs.Worker(theirs, handler, retry=AT_ONCE)]
        async with triojobs.open_worker_group(conninfo, workers):
            with trio.fail_after(15):
                assert await client.result(job_id, theirs) == ["one", "two"]
        assert await client.result(job_id) == b"one\ntwo"  # nobody here can read them: bytes as they are
        info = await client.get(job_id)
        assert info is not None
        assert (info.payload, info.result) == (b"one\ntwo", b"one\ntwo")
    first, *_ = rows(conninfo, "SELECT status, error FROM triojobs.outcomes ORDER BY no")
    assert first[0] == "failed"
    assert "'lines' is not known" in first[1]
    assert outcomes(conninfo, job_id)[-1][1] == "done"


async def test_what_a_codec_of_the_users_own_cannot_read_is_killed_at_once(conninfo: str) -> None:
    queue: triojobs.Queue[Any, Any] = triojobs.Queue("q", codec=LinesCodec())

    async def handler(job: triojobs.Job[Any]) -> None:
        raise AssertionError("must not run")

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(queue, handler)]) as group:
        (job_id,) = rows(
            conninfo,
            "SELECT id FROM (SELECT nextval('triojobs.job_ids') AS id) n, triojobs.insert_job(id, 'q',"
            " '\\xff'::bytea, 'lines', NULL, '{}', 0, 5, NULL, NULL, now())",
        )[0]
        with trio.fail_after(15), pytest.raises(triojobs.JobFailedError, match="no text") as caught:
            await group.client.result(job_id)
    assert caught.value.attempts == 1


async def test_a_codec_that_fails_on_a_result_fails_the_attempt_and_nothing_else(conninfo: str) -> None:
    queue: triojobs.Queue[Any, Any] = triojobs.Queue("q", codec=LinesCodec())

    async def handler(job: triojobs.Job[Any]) -> Any:
        return [1, 2] if job.attempt == 1 else ["fine"]

    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(queue, handler, retry=AT_ONCE)]
    ) as group:
        job_id = await group.client.enqueue(queue, ["x"])
        with trio.fail_after(15):
            assert await group.client.result(job_id, queue) == ["fine"]
    first, _ = rows(conninfo, "SELECT status, error FROM triojobs.outcomes ORDER BY no")
    assert first[0] == "failed"
    assert "result" in first[1]
