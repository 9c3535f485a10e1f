"""Payloads and results as bytes, and back: CBOR by default, converted strictly to the declared type.

A value goes typed object → plain values (msgspec) → bytes (cbor2), and comes back the same way.
Each row says its encoding, so a queue may change its codec while old jobs wait. Never pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import functools
import io
import typing
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, runtime_checkable

import cbor2
import msgspec
import msgspec.inspect

from ._errors import CodecError, OptionError, Size, cut, reason

__all__ = [
    "CborCodec",
    "Codec",
    "EncodeError",
    "JsonCodec",
    "PydanticCodec",
    "check_type",
    "decode",
    "decode_plain",
    "encode",
]

CLASS: Final = type  # parameters named `type` hide the builtin
# What CBOR carries by itself; everything else becomes str, list or dict.
CBOR_NATIVE: Final = (dt.datetime, uuid.UUID, bytes, decimal.Decimal)


class EncodeError(OptionError, CodecError):
    """A value cannot be sent: it does not fit its type, cannot be encoded, or is too large."""


@runtime_checkable
class Codec(Protocol):
    """Turns values into bytes and back. `name` is stored with each row as its encoding (1–32 bytes)."""

    name: str

    def encode(self, value: Any) -> bytes:
        """Return the bytes of `value`. Any exception refuses the value."""

    def decode(self, data: bytes, type: Any) -> Any:
        """Return the value of `data` as `type` (`typing.Any`: plain values).

        Raises:
            CodecError: these bytes can never be read, whatever the type (the job is killed).
            Exception: they do not fit the type (a failed attempt: another version may know it).
        """


class CborCodec:
    """CBOR (RFC 8949). Naive datetimes and trailing bytes are refused; nesting is limited to 400."""

    name = "cbor"

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value."""
        return cbor2.dumps(msgspec.to_builtins(value, builtin_types=CBOR_NATIVE))

    def plain(self, data: bytes) -> Any:
        """Return the plain values in `data`; CodecError: these bytes can never be read."""
        stream = io.BytesIO(data)
        try:
            value = cbor2.load(stream)
        except Exception as exc:
            raise CodecError(f"{len(data)} bytes are no CBOR: {reason(exc)}", operation="decoding") from exc
        if stream.tell() != len(data):
            raise CodecError(
                f"{len(data) - stream.tell()} of {len(data)} bytes follow the CBOR value",
                operation="decoding",
            )
        return value

    def decode(self, data: bytes, type: Any) -> Any:
        """Return `data` as `type`; CodecError when it can never be read, other errors when it does not fit."""
        return self.convert(self.plain(data), type)

    def convert(self, plain: Any, type: Any) -> Any:
        """Return plain values as `type`, strictly."""
        if type is Any:  # msgspec would return the same object, a microsecond later
            return plain
        return msgspec.convert(plain, type, strict=True, builtin_types=CBOR_NATIVE)


class JsonCodec:
    """JSON (RFC 8259) as UTF-8.

    datetime, UUID, Decimal and bytes (base64) travel as strings, NaN and infinities as null; they come
    back where the queue's type asks for them. Keys become strings.
    """

    name = "json"

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value."""
        return msgspec.json.encode(value)

    def plain(self, data: bytes) -> Any:
        """Return the plain values in `data`; CodecError: these bytes can never be read."""
        try:
            return msgspec.json.decode(data)
        except Exception as exc:
            raise CodecError(f"{len(data)} bytes are no JSON: {reason(exc)}", operation="decoding") from exc

    def decode(self, data: bytes, type: Any) -> Any:
        """Return `data` as `type`; CodecError when it can never be read, other errors when it does not fit."""
        return self.convert(self.plain(data), type)

    def convert(self, plain: Any, type: Any) -> Any:
        """Return plain values as `type`, strictly."""
        if type is Any:
            return plain
        return msgspec.convert(plain, type, strict=True, str_keys=True)


CBOR: Final = CborCodec()
JSON: Final = JsonCodec()
OURS: Final = (CborCodec, JsonCodec)  # not what a user has derived from them
BY_NAME: Final[Mapping[str, CborCodec | JsonCodec]] = {"cbor": CBOR, "json": JSON}


class PydanticCodec:
    """Pydantic models on CBOR bytes: `Queue("emails", Email, codec=PydanticCodec())`.

    bytes, datetime, UUID and Decimal travel as such, other types in the form of pydantic's JSON. pydantic
    is imported at the first use and is no dependency of triojobs.
    """

    name = "cbor"

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value."""
        from pydantic_core import to_jsonable_python

        # Not mode="json": it makes text of bytes and refuses those that are none.
        kind: Any = type(value)
        python = _adapter(kind).dump_python(value, by_alias=True, round_trip=True)
        plain = msgspec.to_builtins(python, builtin_types=CBOR_NATIVE, enc_hook=to_jsonable_python)
        return cbor2.dumps(plain)

    def decode(self, data: bytes, type: Any) -> Any:
        """Return `data` as `type`; CodecError when it can never be read, other errors when it does not fit."""
        return self.convert(CBOR.plain(data), type)

    def convert(self, plain: Any, type: Any) -> Any:
        """Return plain values as `type`, strictly."""
        if type is Any:
            return plain
        return _adapter(type).validate_python(plain)


@functools.lru_cache(maxsize=256)
def _adapter(type: Any) -> Any:
    """Return pydantic's adapter of a type; making one takes milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(type)


def encode(field: str, value: Any, type: Any, codec: Codec, *, limit: int) -> bytes:
    """Return the bytes of `value`, checked against `type` and `limit` (bytes).

    Raises:
        EncodeError: names `field`, the value and what is allowed.
    """
    if type is not Any and _is_record(type) and not isinstance(value, type):
        raise EncodeError(field, value, f"an instance of {_name(type)}")
    try:
        data = codec.encode(value)
        if not isinstance(data, bytes):
            raise TypeError(f"{codec.name}.encode returned {data.__class__.__name__}, not bytes")
        if len(data) <= limit:
            typed = codec.decode(data, type)
            # Plain values have no type that could drop anything, nor have flat records.
            whole = codec.__class__ in OURS and (type is Any or (value.__class__ is type and _is_flat(type)))
            lost = None if whole else _lost(data, typed, codec)
    except Exception as exc:
        raise EncodeError(
            field, value, f"a value of {_name(type)} that {codec.name} can encode ({reason(exc)})"
        ) from exc
    if len(data) > limit:
        raise EncodeError(field, Size(len(data)), f"at most {limit} bytes when encoded")
    if lost is not None:
        raise EncodeError(field, value, f"a value of {_name(type)}, which has no field {cut(repr(lost))}")
    return data


def _lost(data: bytes, typed: Any, codec: Codec) -> Any:
    """Return a key of `data` that the declared type drops without a word (a subclass's field), or None."""
    again = codec.encode(typed)
    other = BY_NAME.get(codec.name)
    if again == data or other is None:
        return None
    return next(_missing(other.plain(data), other.plain(again)), None)


def _missing(before: Any, after: Any) -> Iterator[Any]:
    """Yield the keys of mappings in `before` that `after` lacks at the same place."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from _missing(value, after[key])
            elif str(key) not in after:  # JSON has text keys only
                yield key
    elif isinstance(before, list) and isinstance(after, list):
        for one, other in zip(before, after, strict=False):
            yield from _missing(one, other)


def decode(data: bytes, type: Any, encoding: str, codec: Codec) -> Any:
    """Return `data` as `type`; `codec` is the queue's, `encoding` the row's.

    Raises:
        CodecError: the bytes can never be read here.
        Exception: whatever the conversion raises: they do not fit the type.
    """
    if encoding == codec.name:
        return codec.decode(data, type)
    other = BY_NAME.get(encoding)
    if other is None:
        raise LookupError(f"encoding {encoding!r} is not known to this queue's codec ({codec.name})")
    # Old rows, or rows enqueued from SQL: read the bytes by their encoding, convert by the queue's codec.
    convert = getattr(codec, "convert", other.convert) if isinstance(codec, PydanticCodec) else other.convert
    return convert(other.plain(data), type)


def decode_plain(data: bytes | None, encoding: str | None) -> Any:
    """Return plain values, or the bytes themselves when their encoding is not one of ours."""
    if data is None or encoding is None or encoding not in BY_NAME:
        return data
    return BY_NAME[encoding].plain(data)


def check_type(field: str, type: Any, codec: Codec) -> None:
    """Raise OptionError for a type that no value could ever be sent as. Knows our own two codecs only.

    A name that is not defined yet is no error: a module may declare its queues above its classes.
    """
    if type is Any or codec.__class__ not in OURS:
        return
    try:
        with contextlib.suppress(msgspec.ValidationError):
            codec.decode(codec.encode(None), type)
        unknown = _unknown_class(msgspec.inspect.type_info(type), set())
    except NameError:
        return
    except Exception as exc:
        raise OptionError(field, type, f"a type that msgspec can convert ({reason(exc)})") from exc
    if unknown is not None:
        limit = (
            f"a type that msgspec can convert ({_name(unknown)} is none, and {codec.name} cannot carry it)"
        )
        raise OptionError(field, type, limit)


PLAIN: Final[tuple[Any, ...]] = (
    None,
    True,
    1,
    1.0,
    "",
    b"",
    [],
    {},
    dt.datetime.now(dt.UTC),
    uuid.uuid4(),
    decimal.Decimal(),
)


def _unknown_class(node: Any, seen: set[int]) -> Any:
    """Return a class in a tree of msgspec's descriptions that no plain value is an instance of, or None."""
    if id(node) in seen:
        return None
    seen.add(id(node))
    if isinstance(node, msgspec.inspect.CustomType):
        cls = typing.get_origin(node.cls) or node.cls
        return None if any(isinstance(value, cls) for value in PLAIN) else node.cls
    if isinstance(node, msgspec.Struct):
        parts: Iterable[Any] = msgspec.structs.astuple(node)
    else:
        parts = node if isinstance(node, tuple) else ()
    return next(
        (found for found in (_unknown_class(part, seen) for part in parts) if found is not None), None
    )


def _is_record(type: Any) -> bool:
    """Whether `type` is a class whose instances msgspec would take apart into fields."""
    return isinstance(type, CLASS) and (
        dataclasses.is_dataclass(type)
        or issubclass(type, msgspec.Struct)
        or hasattr(type, "__attrs_attrs__")
        or (issubclass(type, tuple) and hasattr(type, "_fields"))
    )


@functools.lru_cache(maxsize=1024)
def _is_flat(type: Any) -> bool:
    """Whether a record of exactly this class holds scalars only, none of which can bring a subclass's fields."""
    try:
        fields = msgspec.inspect.type_info(type).fields  # type: ignore[attr-defined]
    except Exception:  # no record, or one that msgspec does not know
        return False
    return all(isinstance(field.type, SCALARS) for field in fields)


SCALARS: Final = (
    msgspec.inspect.BoolType,
    msgspec.inspect.BytesType,
    msgspec.inspect.FloatType,
    msgspec.inspect.IntType,
    msgspec.inspect.NoneType,
    msgspec.inspect.StrType,
)


def _name(type: Any) -> str:
    return type.__qualname__ if isinstance(type, CLASS) else str(type)
