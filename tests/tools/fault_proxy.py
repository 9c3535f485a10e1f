"""A proxy in front of a PostgreSQL server that can go away, fall silent, lose a reply, or come back.

Plain threads: it must keep working while the event loop under test is blocked. A connection's role is
its application_name without "triojobs ": claim, settle, client, job, heartbeat, listen.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from psycopg import conninfo as conninfos

from . import wire

PORT = "5432"
ABORT: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset instead of a farewell
UP, DOWN = "up", "down"  # from the client to the server, and back


class Statement:
    """The next statement that contains `text`, and what is to happen to it."""

    def __init__(self, text: bytes, *, hold: bool) -> None:
        self.text = text
        self.hold = hold
        self.place = 0  # of its answer among its connection's; those before it, in a pipeline, pass
        self.sent = threading.Event()  # the client sent it
        self.answered = threading.Event()  # the server executed it


class Link:
    """One connection of a client through the proxy."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.role = ""
        self.open = {UP, DOWN}  # directions, as the rest
        self.frozen: set[str] = set()
        self.dead = False
        self.doomed = False  # it is reset as soon as what came before has been sent on
        self.watched: Statement | None = None
        self.refusing: str | None = None  # SQLSTATE, until the client's Sync
        self.in_transaction = False
        self.asked = self.answered = 0  # synchronization points: from the client, and the server's answers
        self.known: dict[bytes, bytes] = {}  # prepared statements: name → text

    def reset(self) -> None:
        """End both halves abruptly."""
        self.dead = True
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                if end.family != socket.AF_UNIX:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                # Wakes our own reader without telling the other side anything.
                end.shutdown(socket.SHUT_RD)
            end.close()

    def close(self) -> None:
        """End both halves as a program that closes its socket does."""
        self.dead = True
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class FaultProxy:
    """Listens on `listener` and forwards to `target` (a socket's path, or host and port)."""

    def __init__(self, target: str | tuple[str, int], listener: socket.socket) -> None:
        self.delay = 0.0  # seconds that each direction takes longer
        self.bytewise = False  # send on byte by byte
        self._target = target
        self._listener = listener
        self._changed = threading.Condition()
        self._links: set[Link] = set()
        self._stalled: set[str] = set()  # directions
        self._refusing = False
        self._deaf = self._deaf_to_cancels = False
        self._without_notifications = False
        self._closed = False
        self._watched: list[Statement] = []
        self._refuse: dict[bytes, Callable[[], str]] = {}
        self._threads = [threading.Thread(target=self._accept, name="fault proxy", daemon=True)]
        self._threads[0].start()

    # Whole network.

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        with self._changed:
            self._refusing = True
        self.reset()

    def reset(self, role: str | None = None) -> int:
        """Reset every connection (of one role); new ones are served. Returns how many."""
        with self._changed:
            chosen = {link for link in self._links if role in (None, link.role)}
            self._links -= chosen
            for link in chosen:
                link.reset()
            self._changed.notify_all()
        return len(chosen)

    def stall(self, *directions: str) -> None:
        """Forward nothing (in these directions), but keep everything open: a black hole."""
        with self._changed:
            self._stalled = set(directions or (UP, DOWN))

    def lose_replies(self) -> None:
        """Forward what clients say, and drop what the server answers."""
        self._deaf = True

    def heal(self) -> None:
        """Work again; what was held back is delivered now."""
        with self._changed:
            self._refusing = self._deaf = self._deaf_to_cancels = self._without_notifications = False
            self._stalled.clear()
            self._refuse.clear()
            self.delay = 0.0
            for link in self._links:
                link.frozen.clear()
            self._changed.notify_all()

    # One role.

    def freeze(self, role: str, *directions: str) -> int:
        """Make the present connections of a role half-open until `heal`; nobody's cancels get through.

        New connections work. Returns how many were frozen.
        """
        with self._changed:
            self._deaf_to_cancels = True
            chosen = [link for link in self._links if link.role == role]
            for link in chosen:
                link.frozen = set(directions or (UP, DOWN))
        return len(chosen)

    def thaw(self, role: str) -> None:
        """Deliver what the frozen connections of a role held back."""
        with self._changed:
            for link in self._links:
                if link.role == role:
                    link.frozen.clear()
            self._changed.notify_all()

    def drop_notifications(self) -> None:
        """Deliver no more notifications, and all else, until `heal`."""
        self._without_notifications = True

    # One message.

    def lose_reply(self, text: bytes) -> Statement:
        """Let the next statement that contains `text` be executed, and reset its connection then."""
        return self._watch(Statement(text, hold=False))

    def hold(self, text: bytes) -> Statement:
        """Hold the next statement that contains `text` back: its connection is frozen, see `freeze`."""
        return self._watch(Statement(text, hold=True))

    def _watch(self, statement: Statement) -> Statement:
        with self._changed:
            self._watched.append(statement)
        return statement

    def refuse(self, text: bytes, *sqlstates: str, times: int | None = None) -> list[float]:
        """Answer statements that contain `text` with errors, one code after the other, without the server.

        Until `heal`, or `times`. Returns the list that gathers when (monotonic seconds).
        """
        refused: list[float] = []

        def next_code() -> str:
            refused.append(time.monotonic())
            if len(refused) == times:
                del self._refuse[text]
            return sqlstates[(len(refused) - 1) % len(sqlstates)]

        with self._changed:
            self._refuse[text] = next_code
        return refused

    def close(self) -> None:
        """End every connection and thread."""
        with self._changed:
            self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        for thread in self._threads:
            thread.join(5)

    # Threads.

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(
                socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET, socket.SOCK_STREAM
            )
            link = Link(near, far)
            try:
                far.connect(self._target)
            except OSError:  # the server is away, and the client shall see it so
                link.reset()
                continue
            with self._changed:
                if self._refusing or self._closed:
                    link.reset()
                    continue
                self._links.add(link)
            for way in (UP, DOWN):
                thread = threading.Thread(
                    target=self._pump, args=(link, way), name=f"fault proxy {way}", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pump(self, link: Link, way: str) -> None:
        source, sink = (link.near, link.far) if way == UP else (link.far, link.near)
        messages = wire.Messages(from_client=way == UP)
        judge = self._judge_up if way == UP else self._judge_down
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                onwards = b"".join(judge(link, message) for message in messages.feed(data))
                if self.delay:
                    time.sleep(self.delay)
                self._wait_for_flow(link, way)
                for piece in (
                    [onwards] if not self.bytewise else (onwards[i : i + 1] for i in range(len(onwards)))
                ):
                    sink.sendall(piece)
                if link.doomed:
                    link.reset()
            self._wait_for_flow(link, way)  # nobody hears of a farewell in a black hole
            sink.shutdown(socket.SHUT_WR)  # what was said before it is still answered
            link.open.discard(way)
            if link.open:
                return
        with self._changed:
            self._links.discard(link)
            self._changed.notify_all()
        link.close()

    def _wait_for_flow(self, link: Link, way: str) -> None:
        with self._changed:
            while not link.dead and (
                way in self._stalled
                or way in link.frozen
                or (link.role == "cancel" and self._deaf_to_cancels)
            ):
                self._changed.wait()

    def _judge_up(self, link: Link, message: wire.Message) -> bytes:
        """Return what to send to the server instead of this message of the client."""
        if message.kind == wire.STARTUP:
            link.role = wire.application_name(message.body).removeprefix("triojobs ")
        if message.kind in (wire.PARSE, wire.BIND, wire.QUERY):
            self._recognize(link, self._executed(link, message))
        if link.refusing is None:
            link.asked += message.kind in (wire.STARTUP, wire.SYNC, wire.QUERY)
            return message.raw
        if message.kind in (wire.SYNC, wire.QUERY):
            sqlstate, link.refusing = link.refusing, None
            link.near.sendall(
                wire.error(sqlstate, "refused by the fault proxy", in_transaction=link.in_transaction)
            )
        return b""

    def _executed(self, link: Link, message: wire.Message) -> bytes:
        """Return the text of the statement that this message executes, if it does."""
        if message.kind == wire.QUERY:
            return message.body
        name, text = wire.statement_of(message)
        if message.kind == wire.BIND:
            return link.known.get(name, b"") if name else b""
        if name:
            link.known[name] = text  # prepared now, executed by name later
            return b""
        return text

    def _recognize(self, link: Link, text: bytes) -> None:
        with self._changed:
            for pattern, next_code in list(self._refuse.items()):
                if pattern in text:
                    link.refusing = next_code()
                    return
            for statement in self._watched:
                if statement.text in text:
                    self._watched.remove(statement)
                    statement.place = link.asked + 1
                    link.watched = statement
                    if statement.hold:
                        self._deaf_to_cancels = True
                        link.frozen = {UP, DOWN}
                    statement.sent.set()
                    return

    def _judge_down(self, link: Link, message: wire.Message) -> bytes:
        """Return what to send to the client instead of this message of the server."""
        if self._deaf or link.doomed or (message.kind == wire.NOTIFICATION and self._without_notifications):
            return b""
        is_ready = message.kind == wire.READY
        if is_ready:
            link.in_transaction = message.body != b"I"
            link.answered += 1
        watched = link.watched
        if watched is None or link.answered + (not is_ready) < watched.place:
            return message.raw
        if is_ready:  # so it has been executed
            link.watched = None
            watched.answered.set()  # first: whoever sees the reset may look
            link.doomed = not watched.hold
        return message.raw if watched.hold else b""


@contextlib.contextmanager
def fault_proxy(
    conninfo: str, *, tcp: bool = False, listener: socket.socket | None = None
) -> Iterator[tuple[FaultProxy, str]]:
    """Yield a proxy in front of `conninfo`'s server, and the conninfo that leads through it.

    It listens on a Unix socket of its own; with `tcp` on the loopback, where a reset is a real one; or
    on a `listener` that is bound already (in another network namespace, say).
    """
    given = conninfos.conninfo_to_dict(conninfo)
    host, port = str(given.get("host", "")), str(given.get("port", "5432"))
    target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))
    with tempfile.TemporaryDirectory(
        prefix="tjp", dir="/tmp" if Path("/tmp").is_dir() else None
    ) as directory:
        if listener is None:
            listener = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
            listener.bind(("127.0.0.1", 0) if tcp else os.path.join(directory, f".s.PGSQL.{PORT}"))
        listener.listen(64)
        address = listener.getsockname()
        near = (directory, PORT) if isinstance(address, str) else (address[0], str(address[1]))
        proxy = FaultProxy(target, listener)
        try:
            # Without encryption there is nothing to negotiate, and messages can be told apart.
            yield (
                proxy,
                conninfos.make_conninfo(
                    conninfo, host=near[0], port=near[1], sslmode="disable", gssencmode="disable"
                ),
            )
        finally:
            proxy.close()
