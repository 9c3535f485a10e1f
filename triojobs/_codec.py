"""Payloads and results as bytes, and back: CBOR by default, converted strictly to the declared type.

A value goes typed object → plain values (msgspec) → bytes (cbor2), and comes back the same way.
Each row says its encoding, so a queue may change its codec while old jobs wait. Never pickle.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import io
import uuid
from collections.abc import Mapping
from typing import Any, Final, Protocol, runtime_checkable

import cbor2
import msgspec

from ._errors import CodecError, OptionError

__all__ = [
    "CborCodec",
    "Codec",
    "EncodeError",
    "JsonCodec",
    "PydanticCodec",
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
        return cbor2.dumps(msgspec.to_builtins(value, builtin_types=CBOR_NATIVE))

    def plain(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        try:
            value = cbor2.load(stream)
        except Exception as exc:
            raise CodecError(f"{len(data)} bytes are no CBOR: {exc}", operation="decoding") from exc
        if stream.tell() != len(data):
            raise CodecError(
                f"{len(data) - stream.tell()} of {len(data)} bytes follow the CBOR value",
                operation="decoding",
            )
        return value

    def decode(self, data: bytes, type: Any) -> Any:
        return self.convert(self.plain(data), type)

    def convert(self, plain: Any, type: Any) -> Any:
        return msgspec.convert(plain, type, strict=True, builtin_types=CBOR_NATIVE)


class JsonCodec:
    """JSON (RFC 8259) as UTF-8. datetime, UUID, Decimal and bytes travel as strings."""

    name = "json"

    def encode(self, value: Any) -> bytes:
        return msgspec.json.encode(value)

    def plain(self, data: bytes) -> Any:
        try:
            return msgspec.json.decode(data)
        except Exception as exc:
            raise CodecError(f"{len(data)} bytes are no JSON: {exc}", operation="decoding") from exc

    def decode(self, data: bytes, type: Any) -> Any:
        return self.convert(self.plain(data), type)

    def convert(self, plain: Any, type: Any) -> Any:
        return msgspec.convert(plain, type, strict=True)


CBOR: Final = CborCodec()
JSON: Final = JsonCodec()
BY_NAME: Final[Mapping[str, CborCodec | JsonCodec]] = {"cbor": CBOR, "json": JSON}


class PydanticCodec:
    """Pydantic models on CBOR bytes: `Queue("emails", Email, codec=PydanticCodec())`.

    pydantic is imported at the first use and is no dependency of triojobs.
    """

    name = "cbor"

    def encode(self, value: Any) -> bytes:
        from pydantic import TypeAdapter

        return CBOR.encode(TypeAdapter(type(value)).dump_python(value, mode="json"))

    def decode(self, data: bytes, type: Any) -> Any:
        return self.convert(CBOR.plain(data), type)

    def convert(self, plain: Any, type: Any) -> Any:
        if type is Any:
            return plain
        from pydantic import TypeAdapter

        return TypeAdapter(type).validate_python(plain)


def encode(field: str, value: Any, type: Any, codec: Codec, *, limit: int) -> bytes:
    """Return the bytes of `value`, checked against `type` and `limit` (bytes).

    Raises:
        EncodeError: names `field`, the value and what is allowed.
    """
    if _is_record(type) and not isinstance(value, type):
        raise EncodeError(field, value, f"an instance of {_name(type)}")
    try:
        data = codec.encode(value)
        if not isinstance(data, bytes):
            raise TypeError(f"{codec.name}.encode returned {data.__class__.__name__}, not bytes")
        if type is not Any:
            codec.decode(data, type)
    except Exception as exc:
        raise EncodeError(
            field, value, f"a value of {_name(type)} that {codec.name} can encode ({exc})"
        ) from exc
    if len(data) > limit:
        raise EncodeError(field, f"{len(data)} bytes", f"at most {limit} bytes when encoded")
    return data


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


def _is_record(type: Any) -> bool:
    """Whether `type` is a class whose instances msgspec would take apart into fields."""
    return isinstance(type, CLASS) and (
        dataclasses.is_dataclass(type)
        or issubclass(type, msgspec.Struct)
        or hasattr(type, "__attrs_attrs__")
        or (issubclass(type, tuple) and hasattr(type, "_fields"))
    )


def _name(type: Any) -> str:
    return getattr(type, "__qualname__", str(type))
