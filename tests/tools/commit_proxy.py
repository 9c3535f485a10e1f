"""A proxy that knows when a job's connection commits, and can stop it there.

A gate stands either before COMMIT reaches the server or after the server has answered it and before
the client hears. What stands there may pass, or its connection is cut, or nothing more is said on it.
Around it the whole network may go away: `cut`, `stall`, `heal`.

Plain threads: it must keep working while the event loop under test is blocked.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias

import trio
from psycopg.conninfo import conninfo_to_dict, make_conninfo

PORT: Final = "5432"
JOB_ROLE: Final = b"triojobs job\0"  # the application's name in the start-up message
COMMIT: Final = b"COMMIT\0"
Side: TypeAlias = Literal["before", "after"]
Fate: TypeAlias = Literal["pass", "cut", "silence"]


class CommitGate:
    """Where one COMMIT stops. `before`: the server has not seen it. `after`: it has happened."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._arrived = threading.Event()
        self._decided = threading.Event()
        self._fate: Fate = "pass"

    async def reached(self, seconds: float = 15.0) -> None:
        """Wait until a COMMIT stands here."""
        with trio.fail_after(seconds):
            while not self._arrived.is_set():
                await trio.sleep(0.005)

    def let_pass(self) -> None:
        """Let it go on its way."""
        self._decide("pass")

    def cut(self) -> None:
        """Reset the connection: neither side hears from the other again."""
        self._decide("cut")

    def silence(self) -> None:
        """Keep the connection open and say nothing on it any more."""
        self._decide("silence")

    def stand(self) -> Fate:
        """In the proxy: stand here until told what becomes of it."""
        self._arrived.set()
        self._decided.wait()
        return self._fate

    def _decide(self, fate: Fate) -> None:
        if not self._decided.is_set():
            self._fate = fate
            self._decided.set()


class Link:
    """One connection of a client through the proxy."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.of_a_job = False
        self.committing = False

    def close(self) -> None:
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class CommitProxy:
    """Listens on a Unix socket of its own and forwards to `target` (a socket's path, or host and port)."""

    def __init__(self, target: str | tuple[str, int], directory: str) -> None:
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.path.join(directory, f".s.PGSQL.{PORT}"))
        self._listener.listen(64)
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        self._gates: list[CommitGate] = []
        self._gate: CommitGate | None = None
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def gate(self, side: Side) -> CommitGate:
        """Stop the next COMMIT of a job's work; one gate at a time."""
        gate = self._gate = CommitGate(side)
        self._gates.append(gate)
        return gate

    def cut_job_connections(self) -> None:
        """Reset the connections that jobs work on, and nothing else."""
        self._close({link for link in self._links if link.of_a_job})

    def cut(self) -> None:
        """Reset every connection and refuse new ones; what stands at a gate stays there."""
        self._refusing = True
        self._close(set(self._links))

    def stall(self) -> None:
        """Forward nothing, but keep everything open: a black hole."""
        self._flowing.clear()

    def heal(self) -> None:
        """Work again."""
        self._refusing = False
        self._flowing.set()

    def close(self) -> None:
        """End every connection and thread."""
        for gate in self._gates:
            gate.cut()
        self._flowing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._close(set(self._links))
        for thread in self._threads:
            thread.join(5)

    def _close(self, links: set[Link]) -> None:
        with self._lock:
            self._links -= links
        for link in links:
            link.close()

    # Threads.

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                near.close()
                continue
            far = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
            far.connect(self._target)
            link = Link(near, far)
            with self._lock:
                self._links.add(link)
            for upwards in (True, False):
                thread = threading.Thread(target=self._pump, args=(link, upwards), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, link: Link, upwards: bool) -> None:
        source, sink = (link.near, link.far) if upwards else (link.far, link.near)
        silent = False
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                fate = "silence" if silent else self._fate_of(link, data, upwards)
                if fate == "cut":
                    break
                silent = fate == "silence"  # it is read and forgotten, so that the sender notices nothing
                if not silent:
                    sink.sendall(data)
        self._close({link})

    def _fate_of(self, link: Link, data: bytes, upwards: bool) -> Fate:
        if upwards:
            link.of_a_job = link.of_a_job or JOB_ROLE in data
            link.committing = link.of_a_job and COMMIT in data
        gate = self._gate
        if gate is None or not link.committing or (gate.side == "before") is not upwards:
            return "pass"
        self._gate = None
        return gate.stand()


@contextlib.contextmanager
def commit_proxy(conninfo: str) -> Iterator[tuple[CommitProxy, str]]:
    """Yield a CommitProxy in front of `conninfo`'s server, and the conninfo that leads through it."""
    given = conninfo_to_dict(conninfo)
    host, port = str(given.get("host", "")), str(given.get("port", PORT))
    target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))
    # A socket's path has 107 bytes, which pytest's own directories may use up.
    short = "/tmp" if Path("/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="tjc", dir=short) as directory:
        proxy = CommitProxy(target, directory)
        try:
            # Readable bytes: the proxy looks for words in them.
            yield (
                proxy,
                make_conninfo(conninfo, host=directory, port=PORT, sslmode="disable", gssencmode="disable"),
            )
        finally:
            proxy.close()
