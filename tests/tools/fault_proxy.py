"""A proxy in front of a PostgreSQL socket that can go away, fall silent, or come back.

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

from psycopg import conninfo as conninfos

PORT = "5432"


class FaultProxy:
    """Listens on a Unix socket of its own and forwards to `target` (a socket's path, or host and port)."""

    def __init__(self, target: str | tuple[str, int], directory: str) -> None:
        self._target = target
        self._path = os.path.join(directory, f".s.PGSQL.{PORT}")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self._path)
        self._listener.listen(64)
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._deaf = False
        self._refusing = False
        self._closed = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        with self._lock:
            self._refusing = True
            pairs, self._pairs = self._pairs, set()
        self._flowing.set()
        for pair in pairs:
            _close(pair)

    def stall(self) -> None:
        """Forward nothing, but keep everything open: a black hole."""
        self._flowing.clear()

    def lose_replies(self) -> None:
        """Forward what clients say, and drop what the server answers."""
        self._deaf = True

    def heal(self) -> None:
        """Work again."""
        self._deaf = False
        with self._lock:
            self._refusing = False
        self._flowing.set()

    def close(self) -> None:
        self._closed = True
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._refusing or self._closed:
                    near.close()
                    continue
                family = socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET
                far = socket.socket(family, socket.SOCK_STREAM)
                far.connect(self._target)
                pair = (near, far)
                self._pairs.add(pair)
            for source, sink in (pair, pair[::-1]):
                thread = threading.Thread(target=self._pump, args=(source, sink, pair), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                with self._lock:
                    cut = pair not in self._pairs
                if cut:
                    break  # what was held back is lost
                if not (self._deaf and source is pair[1]):
                    sink.sendall(data)
        _close(pair)
        with self._lock:
            self._pairs.discard(pair)


def _close(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextlib.contextmanager
def fault_proxy(conninfo: str) -> Iterator[tuple[FaultProxy, str]]:
    """Yield a proxy in front of `conninfo`'s server, and the conninfo that leads through it."""
    given = conninfos.conninfo_to_dict(conninfo)
    host, port = str(given.get("host", "")), str(given.get("port", "5432"))
    target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))
    with tempfile.TemporaryDirectory(
        prefix="tjp", dir="/tmp" if Path("/tmp").is_dir() else None
    ) as directory:
        proxy = FaultProxy(target, directory)
        try:
            yield proxy, conninfos.make_conninfo(conninfo, host=directory, port=PORT)
        finally:
            proxy.close()
