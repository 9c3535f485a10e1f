"""Values there and back, and everything that must be refused with a clear word."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import attrs
import cbor2
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triojobs._codec import CBOR, JSON, EncodeError, PydanticCodec, decode, decode_plain, encode
from triojobs._errors import CodecError, OptionError

LIMIT = 1024 * 1024
AT = dt.datetime(2026, 11, 24, 12, 30, 15, 123456, tzinfo=dt.UTC)
ID = uuid.UUID("12345678123456781234567812345678")


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True)
class Deeper(Point):
    z: int = 0


@dataclass
class Everything:
    point: Point
    at: dt.datetime
    id: uuid.UUID
    data: bytes
    price: decimal.Decimal
    colour: Colour
    day: dt.date
    span: dt.timedelta
    share: float
    flag: bool
    points: list[Point] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    maybe: Point | None = None
    table: dict[str, Point] = field(default_factory=dict)


@attrs.frozen
class AttrsPoint:
    x: int
    at: dt.datetime


class StructPoint(msgspec.Struct):
    x: int
    id: uuid.UUID


class DictPoint(TypedDict):
    x: int


class TuplePoint(NamedTuple):
    x: int
    y: str


EVERYTHING = Everything(
    point=Point(1),
    at=AT,
    id=ID,
    data=b"\x00\xff",
    price=decimal.Decimal("1.10"),
    colour=Colour.RED,
    day=dt.date(2026, 11, 24),
    span=dt.timedelta(hours=1, microseconds=5),
    share=0.5,
    flag=True,
    points=[Point(2, 3)],
    names={"a", "b", "c"},
    maybe=Point(9),
    table={"a": Point(4)},
)

TYPED = [
    (EVERYTHING, Everything),
    (Point(1, 2), Point),
    (AttrsPoint(1, AT), AttrsPoint),
    (StructPoint(1, ID), StructPoint),
    ({"x": 1}, DictPoint),
    (TuplePoint(1, "y"), TuplePoint),
    ([Point(1), Point(2)], list[Point]),
    ({1: Point(1)}, dict[int, Point]),
    (Point(1), Point | None),
    (None, Point | None),
    (AT, dt.datetime),
    (ID, uuid.UUID),
    (b"\xff\x00", bytes),
    (2**70, int),
    (None, None),
    ("ü\n", str),
]


@pytest.mark.parametrize(("value", "type"), TYPED, ids=lambda v: repr(v)[:60])
@pytest.mark.parametrize("codec", [CBOR, JSON], ids=["cbor", "json"])
def test_typed_values_come_back_equal(codec: Any, value: Any, type: Any) -> None:
    if codec is JSON and value == 2**70:
        pytest.skip("integers beyond 64 bits are CBOR's")
    data = encode("payload", value, type, codec, limit=LIMIT)
    assert decode(data, type, codec.name, codec) == value


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(plain)
def test_plain_values_come_back_equal(value: Any) -> None:
    data = encode("payload", value, Any, CBOR, limit=LIMIT)
    assert decode(data, Any, "cbor", CBOR) == value
    assert decode_plain(data, "cbor") == value


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_codec_errors(data: bytes) -> None:
    for codec in (CBOR, JSON):
        with contextlib.suppress(CodecError):
            codec.plain(data)


@pytest.mark.parametrize(
    ("value", "type", "path"),
    [
        (Everything, Point, "payload"),
        ({"x": 1}, Point, "an instance of Point"),
        (Point(x="1"), Point, "$.x"),  # type: ignore[arg-type]
        (Point(x=True), Point, "$.x"),
        (Point(x=1.0), Point, "$.x"),  # type: ignore[arg-type]
        ([Point(1), Point(None)], list[Point], "$[1].x"),  # type: ignore[arg-type]
        ({"a": {"x": "1"}}, dict[str, DictPoint], "$[...].x"),
        (TuplePoint("1", "y"), TuplePoint, "$[0]"),  # type: ignore[arg-type]
        (AttrsPoint(1, "soon"), AttrsPoint, "$.at"),  # type: ignore[arg-type]
        (True, int, "Expected `int`, got `bool`"),
        (1, bool, "Expected `bool`, got `int`"),
        (1.0, int, "Expected `int`, got `float`"),
        ("1", int, "Expected `int`, got `str`"),
        (Point(1), StructPoint, "an instance of StructPoint"),
        (object(), Any, "object is unsupported"),
        ("\ud800", Any, "surrogates"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_anything_is_sent(
    value: Any, type: Any, path: str
) -> None:
    with pytest.raises(EncodeError) as caught:
        encode("payload", value, type, CBOR, limit=LIMIT)
    assert caught.value.field == "payload"
    assert caught.value.value is value
    assert path in str(caught.value)


def test_an_encode_error_is_an_option_error_and_a_codec_error_and_a_value_error() -> None:
    with pytest.raises(EncodeError) as caught:
        encode("result", "1", int, CBOR, limit=LIMIT)
    assert isinstance(caught.value, OptionError)
    assert isinstance(caught.value, CodecError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("value", "type", "key"),
    [
        (Deeper(1, 2, 3), Point, "'z'"),
        ([Deeper(1, 2, 3)], list[Point], "'z'"),
        (Everything(**{**EVERYTHING.__dict__, "maybe": Deeper(1)}), Everything, "'z'"),
        ({"x": 1, "more": 2}, DictPoint, "'more'"),
    ],
)
def test_fields_that_would_be_dropped_without_a_word_are_refused(value: Any, type: Any, key: str) -> None:
    with pytest.raises(EncodeError, match=f"has no field {key}"):
        encode("payload", value, type, CBOR, limit=LIMIT)


def test_an_integer_may_stand_for_a_float() -> None:
    data = encode("payload", [1, 2.5], list[float], CBOR, limit=LIMIT)
    assert decode(data, list[float], "cbor", CBOR) == [1.0, 2.5]


@pytest.mark.parametrize("type", [Any, dt.datetime])
def test_naive_datetimes_are_refused(type: Any) -> None:
    with pytest.raises(EncodeError, match="naive datetime"):
        encode("payload", AT.replace(tzinfo=None), type, CBOR, limit=LIMIT)


def test_the_size_limit_names_size_and_limit() -> None:
    assert len(encode("payload", b"x" * 97, Any, CBOR, limit=99)) == 99
    with pytest.raises(EncodeError, match="payload is 100 bytes, but must be at most 99 bytes") as caught:
        encode("payload", b"x" * 98, Any, CBOR, limit=99)
    assert caught.value.value == 100


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(CodecError, match="1 of 2 bytes follow the CBOR value"):
        CBOR.plain(b"\x01\x02")
    with pytest.raises(CodecError):
        JSON.plain(b"1 2")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x81" * 500 + b"\x00",  # nesting
        b"\xc1" * 500 + b"\x00",
        b"\x9f" * 500,
        b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",  # an array of 2**63 - 1 items
        b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",  # a byte string of 2**63 - 1 bytes
        b"\x7b\x00\x00\x00\x7f\xff\xff\xff\xff",
        b"\x61\xff",  # text that is no UTF-8
        b"\xc0\x61x",  # a time that is none
        b"\x1c",
    ],
)
def test_poisoned_bytes_are_codec_errors_at_once(data: bytes) -> None:
    with pytest.raises(CodecError, match="are no CBOR"):
        decode(data, Any, "cbor", CBOR)


def test_what_could_not_be_read_again_is_refused_when_it_is_sent() -> None:
    value: list[Any] = []
    for _ in range(401):
        value = [value]
    with pytest.raises(EncodeError, match="nesting"):
        encode("payload", value, Any, CBOR, limit=LIMIT)


def test_a_cyclic_value_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(EncodeError):
        encode("payload", value, Any, CBOR, limit=LIMIT)


def test_a_value_without_a_repr_is_refused_all_the_same() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(EncodeError, match="Shy that cannot be shown"):
        encode("payload", Shy(), Any, CBOR, limit=LIMIT)


def test_a_payload_that_does_not_fit_the_type_is_no_codec_error() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(cbor2.dumps({"y": 1}), Point, "cbor", CBOR)


def test_an_unknown_encoding_is_no_codec_error() -> None:
    with pytest.raises(LookupError, match="'xml' is not known"):
        decode(b"<a/>", Any, "xml", CBOR)
    assert decode_plain(b"<a/>", "xml") == b"<a/>"
    assert decode_plain(None, None) is None


def test_a_row_from_sql_is_read_by_its_own_encoding() -> None:
    assert decode(b'{"x": 1}', Point, "json", CBOR) == Point(1)
    assert decode(cbor2.dumps({"x": 1}), Point, "cbor", JSON) == Point(1)


def test_a_codec_that_returns_no_bytes_is_told_so() -> None:
    class Wrong:
        name = "wrong"

        def encode(self, value: Any) -> Any:
            return "text"

        def decode(self, data: bytes, type: Any) -> Any:
            return data

    with pytest.raises(EncodeError, match=r"wrong\.encode returned str, not bytes"):
        encode("payload", 1, Any, Wrong(), limit=LIMIT)


def test_the_text_of_a_codecs_error_is_cut() -> None:
    class Talkative:
        name = "talkative"

        def encode(self, value: Any) -> bytes:
            raise ValueError("x" * 100_000)

        def decode(self, data: bytes, type: Any) -> Any:
            return data

    with pytest.raises(EncodeError) as caught:
        encode("payload", 1, Any, Talkative(), limit=LIMIT)
    assert len(str(caught.value)) < 1000


# pydantic


class Address(pydantic.BaseModel):
    street: str


class Email(pydantic.BaseModel):
    to: str = pydantic.Field(alias="To")
    body: bytes
    at: dt.datetime
    id: uuid.UUID
    price: decimal.Decimal
    address: Address
    colour: Colour = Colour.RED
    tags: set[str] = set()
    homepage: pydantic.AnyUrl | None = None


MODEL = Email(
    To="ada@example.com",
    body=b"\xff\x00",
    at=AT,
    id=ID,
    price=decimal.Decimal("1.10"),
    address=Address(street="x"),
    tags={"a", "b"},
    homepage=pydantic.AnyUrl("https://example.com/"),
)


def test_a_pydantic_model_comes_back_equal() -> None:
    codec = PydanticCodec()
    data = encode("payload", MODEL, Email, codec, limit=LIMIT)
    assert decode(data, Email, "cbor", codec) == MODEL


def test_pydantic_leaves_bytes_and_times_as_they_are() -> None:
    stored = decode_plain(PydanticCodec().encode(MODEL), "cbor")
    assert stored["body"] == b"\xff\x00"
    assert stored["at"] == AT
    assert stored["id"] == ID


def test_lists_of_pydantic_models_come_back_equal() -> None:
    codec = PydanticCodec()
    data = encode("payload", [MODEL, MODEL], list[Email], codec, limit=LIMIT)
    assert decode(data, list[Email], "cbor", codec) == [MODEL, MODEL]


@pytest.mark.parametrize("value", [Address(street="x"), {"street": 1}, 1])
def test_pydantic_refuses_another_model_at_encode(value: Any) -> None:
    with pytest.raises(EncodeError):
        encode("payload", value, Email, PydanticCodec(), limit=LIMIT)


def test_pydantic_reads_a_row_from_sql() -> None:
    assert decode(b'{"street": "x"}', Address, "json", PydanticCodec()) == Address(street="x")


def test_pydantic_tells_what_is_no_model_from_what_is_no_cbor() -> None:
    with pytest.raises(pydantic.ValidationError):
        decode(cbor2.dumps({"street": 1}), Address, "cbor", PydanticCodec())
    with pytest.raises(CodecError):
        decode(b"\xff", Address, "cbor", PydanticCodec())
