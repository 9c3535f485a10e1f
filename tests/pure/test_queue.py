"""Declarations and the border: every keyword and limit of an enqueue."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from triojobs._codec import CborCodec, EncodeError, JsonCodec
from triojobs._errors import OptionError
from triojobs._model import NewRow
from triojobs._queue import NewJob, Queue, Worker, new_row

AT = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.timezone(dt.timedelta(hours=2)))
queue = Queue("emails", int)


def row(**changes: Any) -> NewRow:
    return new_row(queue, NewJob(1, **changes))


def test_a_row_without_keywords_has_the_defaults() -> None:
    assert row() == NewRow(queue="emails", payload=b"\x01", encoding="cbor")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"delay": 5}, {"delay": 5.0}),
        ({"delay": 0}, {"delay": 0.0}),
        ({"run_at": AT}, {"run_at": AT}),
        ({"priority": 0}, {"priority": 0}),
        ({"priority": 2**31 - 1}, {"priority": 2**31 - 1}),
        ({"max_attempts": 1}, {"max_attempts": 1}),
        ({"timeout": 0.5}, {"timeout": 0.5}),
        ({"deadline": AT}, {"deadline": AT}),
        ({"key": ""}, {"key": "", "hold": "kept"}),
        ({"key": "k" * 1024}, {"key": "k" * 1024}),
        ({"key": "k", "key_until": "ended"}, {"hold": "ended", "hold_seconds": None}),
        ({"key": "k", "key_until": 60}, {"hold": "until", "hold_seconds": 60.0}),
        ({"key": "k", "on_conflict": "replace"}, {"on_conflict": "replace"}),
        ({"metadata": None}, {"metadata": "{}"}),
        ({"metadata": {}}, {"metadata": "{}"}),
        ({"metadata": {"ü": [1, None]}}, {"metadata": '{"ü":[1,null]}'}),
        ({"metadata": {"a": "\\u0000 as text"}}, {"metadata": '{"a":"\\\\u0000 as text"}'}),
        (
            {"metadata": {"a": "x" * (8192 - 8)}},
            {"metadata": json.dumps({"a": "x" * 8184}, separators=(",", ":"))},
        ),
        ({"job_id": 7}, {"job_id": 7}),
    ],
)
def test_keywords_are_stored_as_given(given: dict[str, Any], stored: dict[str, Any]) -> None:
    found = row(**given)
    for name, value in stored.items():
        assert getattr(found, name) == value


def test_times_are_stored_in_utc() -> None:
    found = row(run_at=AT, deadline=AT)
    assert found.run_at is not None
    assert found.run_at.tzinfo is dt.UTC
    assert found.deadline is not None
    assert found.deadline.tzinfo is dt.UTC


NAN, INF = float("nan"), float("inf")
NAIVE = dt.datetime(2026, 11, 24)
LAST = dt.datetime.max.replace(tzinfo=dt.UTC)
FIRST = dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=14)))


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        *(("delay", bad, "finite seconds >= 0") for bad in (-1, NAN, INF, "1", True, 1e12)),
        *(("run_at", bad, "an aware datetime") for bad in (NAIVE, "2026", 1.0, dt.date(2026, 1, 1))),
        *(("run_at", bad, "in the years 1900 to 8999") for bad in (LAST, FIRST)),
        *(("priority", bad, f"an int from 0 to {2**31 - 1}") for bad in (-1, 2**31, 1.0, True, "1", None)),
        *(("max_attempts", bad, f"an int from 1 to {2**31 - 1}") for bad in (0, -1, 2**31, 1.5, False, None)),
        *(("timeout", bad, "finite seconds > 0") for bad in (0, -1, NAN, INF, "1", True)),
        *(("deadline", bad, "an aware datetime") for bad in (NAIVE, 5)),
        ("deadline", LAST, "in the years"),
        *(
            ("key", bad, "a str of 0 to 1024 bytes")
            for bad in ("k" * 1025, "ü" * 513, "a\0", 1, b"k", "\ud800")
        ),
        ("metadata", ["a"], "a mapping of str"),
        ("metadata", "", "a mapping of str"),
        ("metadata", {1: 2}, "a mapping of str"),
        ("metadata", {"a": object()}, "not JSON serializable"),
        ("metadata", {"a": NAN}, "not JSON compliant"),
        ("metadata", {"a": "\0"}, "without NUL"),
        ("metadata", {"\0": 1}, "without NUL"),
        ("metadata", {"a": "\\\0"}, "without NUL"),
        ("metadata", {"a": "\ud800"}, "a mapping of str"),
        ("metadata", {"a": "x" * 8185}, r"\(it has 8193 bytes\)"),
        ("metadata", {"a": "ü" * 4093}, r"\(it has 8194 bytes\)"),
        *(("job_id", bad, "an int from 1 to") for bad in (0, -1, 2**63, "1", True)),
        *(("on_conflict", bad, "'raise', 'return' or 'replace'") for bad in ("ignore", None, ["raise"])),
    ],
)
def test_what_is_out_of_range_is_refused_with_field_value_and_limit(
    field: str, value: Any, limit: str
) -> None:
    with pytest.raises(OptionError, match=limit) as caught:
        row(**{field: value})
    assert caught.value.field == field
    assert caught.value.value is value
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["forever", -1, NAN, INF, None, True])
def test_a_keys_hold_is_kept_ended_or_seconds(value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        row(key="k", key_until=value)
    assert caught.value.field == "key_until"


@pytest.mark.parametrize("value", ["ended", 60, "forever"])
def test_a_hold_without_a_key_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="left out when there is no key"):
        row(key_until=value)


def test_delay_and_run_at_exclude_each_other() -> None:
    with pytest.raises(OptionError, match=r"run_at is .*, but must be None when delay is given"):
        row(delay=1.0, run_at=AT)


def test_a_cyclic_metadata_is_refused() -> None:
    metadata: dict[str, Any] = {}
    metadata["a"] = metadata
    with pytest.raises(OptionError, match="Circular reference"):
        row(metadata=metadata)


def test_a_payload_of_the_wrong_type_is_refused_by_its_name() -> None:
    with pytest.raises(OptionError, match="payload is '1', but must be a value of int"):
        new_row(queue, NewJob("1"))


def test_payload_and_result_have_limits_of_their_own() -> None:
    small = Queue("small", bytes, result=bytes, payload_limit=10, result_limit=20)
    assert len(small.encode_payload(b"x" * 9)) == 10
    assert len(small.encode_result(b"x" * 19)) == 20
    with pytest.raises(OptionError, match="payload is 11 bytes, but must be at most 10 bytes"):
        small.encode_payload(b"x" * 10)
    with pytest.raises(OptionError, match="result is 21 bytes, but must be at most 20 bytes"):
        small.encode_result(b"x" * 20)


def test_a_payload_may_have_one_mebibyte() -> None:
    queue = Queue("q", bytes)
    assert len(queue.encode_payload(b"x" * (1024 * 1024 - 5))) == 1024 * 1024
    with pytest.raises(OptionError, match="at most 1048576 bytes"):
        queue.encode_payload(b"x" * (1024 * 1024 - 4))


@pytest.mark.parametrize("name", ["", "x" * 256, "ü" * 128, "a\0b", None, 1, b"q"])
def test_a_queue_name_has_1_to_255_bytes_without_nul(name: Any) -> None:
    with pytest.raises(OptionError, match=r"queue is .*, but must be a str of 1 to 255 bytes"):
        Queue(name)


@pytest.mark.parametrize("field", ["payload_limit", "result_limit"])
@pytest.mark.parametrize("value", [0, 256 * 1024 * 1024 + 1, 1.0, True])
def test_the_limits_of_a_queue_have_limits(field: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Queue("q", **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("codec", [None, object(), "json", JsonCodec])
def test_a_codec_is_an_object_with_its_methods(codec: Any) -> None:
    with pytest.raises(OptionError, match="an object with name, encode"):
        Queue("q", codec=codec)


def test_a_codecs_name_fits_into_its_column() -> None:
    class Long(CborCodec):
        name = "x" * 33

    with pytest.raises(OptionError, match=r"codec\.name"):
        Queue("q", codec=Long())


class Plain:
    """A class that msgspec knows nothing about."""


@dataclass
class Holder:
    inner: list[Plain]


@dataclass
class Node:
    """Describes itself, and another class."""

    next: Node | None
    other: Sequence[object]


@dataclass
class Early:
    later: Later  # type: ignore[name-defined]  # noqa: F821 - as in a module that defines it below


@pytest.mark.parametrize("field", ["payload", "result"])
@pytest.mark.parametrize("codec", [CborCodec(), JsonCodec()])
@pytest.mark.parametrize("declared", [Plain, Holder, dict[str, Plain], Node | Holder, complex, "int", 3])
def test_a_type_that_no_value_can_be_sent_as_is_refused_where_it_is_declared(
    field: str, codec: Any, declared: Any
) -> None:
    types = {"payload": int, "result": int, field: declared}
    with pytest.raises(OptionError, match="a type that msgspec can convert") as caught:
        Queue("q", types["payload"], result=types["result"], codec=codec)
    assert caught.value.field == field


@pytest.mark.parametrize("declared", [Node, Early, object, dict[str, object], Hashable, None, int | str, Any])
def test_a_type_that_may_be_sent_is_not_refused(declared: Any) -> None:
    assert Queue("q", declared, result=declared).payload is declared


def test_the_types_of_another_codec_are_its_own_business() -> None:
    class Pickier(CborCodec):
        name = "pickier"

    assert Queue("q", Plain, codec=Pickier()).payload is Plain


def test_queues_and_workers_show_themselves() -> None:
    assert repr(Queue("emails", int)) == "Queue('emails', int)"
    assert repr(Worker(queue, handle, concurrency=3)) == "Worker('emails', concurrency=3)"


def test_only_a_queue_is_a_queue() -> None:
    with pytest.raises(OptionError, match=r"a triojobs\.Queue"):
        new_row("emails", NewJob(1))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"a triojobs\.Queue"):
        Worker("emails", handle)  # type: ignore[arg-type]


async def handle(job: Any, extra: int = 0) -> None: ...


async def stream(job: Any) -> Any:
    yield 1


def generate(job: Any) -> Any:
    yield 1


@pytest.mark.parametrize("handler", [None, "handle", stream, generate])
def test_a_handler_is_an_async_function(handler: Any) -> None:
    with pytest.raises(OptionError, match="an async function that takes a job"):
        Worker(queue, handler)


@pytest.mark.parametrize("handler", [handle, partial(handle, extra=1), lambda job: handle(job)])
def test_a_handler_may_be_bound(handler: Callable[[Any], Any]) -> None:
    assert Worker(queue, handler).handler is handler


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concurrency", 0),
        ("concurrency", 100_001),
        ("concurrency", 1.0),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", NAN),
        ("retry", 5),
    ],
)
def test_a_workers_options_have_ranges(field: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Worker(queue, handle, **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("codec", [CborCodec(), JsonCodec()], ids=["cbor", "json"])
def test_a_result_of_none_is_encoded_like_any_other(codec: CborCodec | JsonCodec) -> None:
    queue = Queue("q", codec=codec)
    assert queue.encode_result(None) == codec.encode(None)
    assert queue.decode_result(queue.encode_result(None), codec.name) is None


def test_a_result_of_none_is_refused_where_it_is_none() -> None:
    with pytest.raises(EncodeError, match="result"):
        Queue("q", int, result=int).encode_result(None)
    with pytest.raises(EncodeError, match="at most 3 bytes"):
        Queue("q", codec=JsonCodec(), result_limit=3).encode_result(None)


def test_a_users_codec_encodes_each_result_of_none() -> None:
    class Counting(CborCodec):
        calls = 0

        def encode(self, value: Any) -> bytes:
            self.calls += 1
            return super().encode(value)

    codec = Counting()
    queue = Queue("q", codec=codec)
    before = codec.calls
    queue.encode_result(None)
    assert codec.calls > before
