"""PostgreSQL's protocol as far as a proxy needs it: where messages end, and what a few of them say."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

CANCEL_REQUEST: Final = 80877102
STARTUP: Final = b""  # the first message of a client has no type

# Types of messages. One letter may mean another thing in each direction.
PARSE, BIND, SYNC, QUERY = b"P", b"B", b"S", b"Q"  # from the client
READY, NOTIFICATION = b"Z", b"A"  # from the server


class Message(NamedTuple):
    """One message: `raw` is what goes over the wire, `body` what follows type and length."""

    kind: bytes
    body: bytes
    raw: bytes


class Messages:
    """Cuts one direction of a connection into messages; keeps what is not whole yet."""

    def __init__(self, *, from_client: bool) -> None:
        self._begins = from_client
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are whole now."""
        self._rest += data
        while True:
            head = 0 if self._begins else 1
            if len(self._rest) < head + 4:
                return
            end = head + struct.unpack_from("!i", self._rest, head)[0]
            if len(self._rest) < end:
                return
            raw, self._rest = self._rest[:end], self._rest[end:]
            self._begins = False
            yield Message(raw[:head], raw[head + 4 :], raw)


def application_name(startup: bytes) -> str:
    """Return what a start-up message says the client is; "cancel" for a request to cancel a statement."""
    if struct.unpack_from("!i", startup)[0] == CANCEL_REQUEST:
        return "cancel"
    words = startup[4:].split(b"\0")
    return dict(zip(words[::2], words[1::2], strict=False)).get(b"application_name", b"").decode()


def statement_of(message: Message) -> tuple[bytes, bytes]:
    """Return the name and the text of a Parse, or the name of what a Bind executes and no text."""
    if message.kind == PARSE:
        name, text = message.body.split(b"\0", 2)[:2]
        return name, text
    return message.body.split(b"\0", 2)[1], b""


def error(sqlstate: str, text: str, *, in_transaction: bool) -> bytes:
    """Return a server's reply that refuses a statement."""
    fields = b"".join(
        code + value.encode() + b"\0"
        for code, value in ((b"S", "ERROR"), (b"V", "ERROR"), (b"C", sqlstate), (b"M", text))
    )
    body = fields + b"\0"
    ready = READY + struct.pack("!i", 5) + (b"E" if in_transaction else b"I")
    return b"E" + struct.pack("!i", len(body) + 4) + body + ready
