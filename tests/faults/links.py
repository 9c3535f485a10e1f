"""A way to the server that can turn into a black hole: packets go out, nothing comes back, nobody says so.

The real one is a pair of interfaces of which one lies in a network namespace, where a proxy listens. A
wrong neighbour entry on both sides sends every packet to a station that does not exist. It needs root
(or CAP_NET_ADMIN); elsewhere the fault proxy stands in, which keeps the sockets open and forwards nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import socket
import subprocess
import threading
from types import TracebackType
from typing import Final, Protocol

from tests.tools.fault_proxy import FaultProxy, fault_proxy

from .rig import PATIENCE

CLONE_NEWNET: Final = 0x40000000
NOBODY: Final = "02:00:00:00:00:99"  # a station that no interface has


class Link(Protocol):
    """A way to the server. `conninfo` leads over it."""

    conninfo: str
    proxy: FaultProxy

    def black_hole(self) -> None: ...
    def heal(self) -> None: ...


def run(*command: str) -> str:
    """Run a program that must succeed; return what it prints."""
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
    ).stdout


@functools.cache
def namespaces_refused() -> str:
    """Return why this machine gives us no network namespace, or ""."""
    try:
        with Namespace():
            return ""
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", "") or str(exc)
        return " ".join(said.split())[:100]


class Namespace:
    """A network namespace with one interface, whose other end is here.

    It lives as long as a process that waits for the end of its input: when we end, in whatever way, so
    does it, and the kernel removes namespace and interfaces.
    """

    def __init__(self) -> None:
        number = random.SystemRandom().randrange(2**15)
        # 198.18.0.0/15 is set aside for tests of networks; each of us takes four addresses of it.
        base = (198 << 24 | 18 << 16) + 4 * number
        self.near, self.far = (socket.inet_ntoa((base + n).to_bytes(4)) for n in (1, 2))
        self.near_name, self.far_name = f"tjf{number:x}n", f"tjf{number:x}f"

    def __enter__(self) -> Namespace:
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert self._keeper.stdout is not None
            if not self._keeper.stdout.readline():
                raise OSError(self._keeper.communicate()[1].decode())
            run("ip", "link", "add", self.near_name, "type", "veth", "peer", "name", self.far_name)
            run("ip", "link", "set", self.far_name, "netns", str(self._keeper.pid))
            run("ip", "addr", "add", f"{self.near}/30", "dev", self.near_name)
            run("ip", "link", "set", self.near_name, "up")
            self.inside("ip", "addr", "add", f"{self.far}/30", "dev", self.far_name)
            self.inside("ip", "link", "set", self.far_name, "up")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            run("ip", "link", "delete", self.near_name)  # at once, and not when the kernel gets to it
        for pipe in (self._keeper.stdin, self._keeper.stdout, self._keeper.stderr):
            if pipe is not None:
                pipe.close()
        self._keeper.kill()
        self._keeper.wait()

    def inside(self, *command: str) -> str:
        """Run a program inside."""
        return run("nsenter", "--target", str(self._keeper.pid), "--net", *command)

    def listener(self) -> socket.socket:
        """Return a socket that is bound inside."""
        made: list[socket.socket] = []

        def make() -> None:
            # A thread that has moved into another namespace cannot be used for anything else.
            descriptor = os.open(f"/proc/{self._keeper.pid}/ns/net", os.O_RDONLY)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(descriptor, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                bound = socket.socket(socket.AF_INET)
                bound.bind((self.far, 0))
                made.append(bound)
            finally:
                os.close(descriptor)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]

    def black_hole(self) -> None:
        """Send everything to nobody, both ways."""
        run("ip", "neigh", "replace", self.far, "lladdr", NOBODY, "dev", self.near_name, "nud", "permanent")
        self.inside(
            "ip", "neigh", "replace", self.near, "lladdr", NOBODY, "dev", self.far_name, "nud", "permanent"
        )

    def heal(self) -> None:
        """Find each other again."""
        run("ip", "neigh", "flush", "dev", self.near_name, "nud", "permanent")
        self.inside("ip", "neigh", "flush", "dev", self.far_name, "nud", "permanent")


class NamespaceLink:
    """A real link."""

    def __init__(self, conninfo: str) -> None:
        self._direct = conninfo
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> NamespaceLink:
        with self._stack:
            self._namespace = self._stack.enter_context(Namespace())
            self.proxy, self.conninfo = self._stack.enter_context(
                fault_proxy(self._direct, listener=self._namespace.listener())
            )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.close()

    def black_hole(self) -> None:
        self._namespace.black_hole()

    def heal(self) -> None:
        self._namespace.heal()


class ProxyLink:
    """The fault proxy in its place."""

    def __init__(self, conninfo: str) -> None:
        self._context = fault_proxy(conninfo)

    def __enter__(self) -> ProxyLink:
        self.proxy, self.conninfo = self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, exc, tb)

    def black_hole(self) -> None:
        self.proxy.stall()

    def heal(self) -> None:
        self.proxy.heal()
