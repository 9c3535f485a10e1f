"""A proxy that knows when a job's connection commits, and can stop it there.

A gate stands either before COMMIT reaches the server or after the server has answered it and before
the client hears. What stands there may pass, or its connection is cut, or nothing more is said on it
(a black hole). Everything else flows as through `FaultProxy`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Final, Literal

import trio
from psycopg.conninfo import make_conninfo

from tests.tools.fault_proxy import FaultProxy, fault_proxy

JOB_ROLE: Final = b"triojobs job\0"  # the application's name in the startup message
COMMIT: Final = b"COMMIT\0"
Pair = tuple[socket.socket, socket.socket]
Side = Literal["before", "after"]


class CommitGate:
    """Where one COMMIT stops. `before`: the server has not seen it. `after`: it has happened."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._arrived = threading.Event()
        self._decided = threading.Event()
        self._fate = "pass"

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

    def stand(self) -> str:
        """In the proxy: stand here until told what becomes of it."""
        self._arrived.set()
        self._decided.wait()
        return self._fate

    def _decide(self, fate: str) -> None:
        if not self._decided.is_set():
            self._fate = fate
            self._decided.set()


class CommitProxy(FaultProxy):
    """A FaultProxy in which the next COMMIT of a job's work can be stopped; one gate at a time."""

    def __init__(self, target: str | tuple[str, int], directory: str) -> None:
        self._gates: list[CommitGate] = []
        self._open_gate: CommitGate | None = None
        self._job_pairs: set[Pair] = set()
        self._committing: set[Pair] = set()
        super().__init__(target, directory)

    def gate(self, side: Side) -> CommitGate:
        """Stop the next COMMIT of a job's work."""
        gate = self._open_gate = CommitGate(side)
        self._gates.append(gate)
        return gate

    def cut_job_connections(self) -> None:
        """Reset the connections that jobs work on, and nothing else."""
        for pair in list(self._job_pairs):
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for gate in self._gates:
            gate.cut()
        super().close()

    def _flow(self, source: socket.socket, sink: socket.socket, pair: Pair) -> None:
        while data := source.recv(65536):
            self._flowing.wait()
            fate = self._fate_of(data, pair, upwards=source is pair[0])
            if fate == "cut":
                return
            if fate == "silence":
                self._flowing_never(source)
                return
            sink.sendall(data)

    def _fate_of(self, data: bytes, pair: Pair, *, upwards: bool) -> str:
        if upwards and JOB_ROLE in data:
            self._job_pairs.add(pair)
        if pair not in self._job_pairs:
            return "pass"
        if upwards and COMMIT in data:
            self._committing.add(pair)
        elif upwards:
            self._committing.discard(pair)
        gate = self._open_gate
        if gate is None or pair not in self._committing or (gate.side == "before") is not upwards:
            return "pass"
        self._open_gate = None
        return gate.stand()

    @staticmethod
    def _flowing_never(source: socket.socket) -> None:
        """Read and forget, so that the sender notices nothing."""
        while source.recv(65536):
            pass


@contextlib.contextmanager
def commit_proxy(conninfo: str) -> Iterator[tuple[CommitProxy, str]]:
    """Yield a CommitProxy in front of `conninfo`'s server, and the conninfo that leads through it."""
    with fault_proxy(conninfo, CommitProxy) as (proxy, through):
        # Readable bytes: the proxy looks for words in them.
        yield proxy, make_conninfo(through, sslmode="disable", gssencmode="disable")
