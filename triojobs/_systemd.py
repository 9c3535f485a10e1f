"""What a service manager is told: ready, alive, stopping. The protocol of sd_notify(3).

Its library for Python is eight lines around a datagram and has not moved since 2017; here they are.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from ._logs import Log

__all__ = ["Manager"]

log = Log("triojobs.health")

MICROSECONDS: Final = 1_000_000


class Manager:
    """The service manager that started this process, if there is one.

    Attributes:
        watchdog_interval: seconds between signs of life, half of what the manager allows; None: it wants none.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        found = os.environ if environment is None else environment
        self._address = found.get("NOTIFY_SOCKET", "")
        self.watchdog_interval: float | None = _watchdog_interval(found) if self._address else None

    @property
    def listens(self) -> bool:
        """Whether anybody wants to be told."""
        return bool(self._address)

    def tell(self, **state: str) -> None:
        """Send assignments, such as READY="1". Never blocks; nobody listening is no error."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "\n".join(f"{name}={value}" for name, value in state.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(text.encode(), address)
        except OSError as exc:
            log.warning("the service manager was not told: %s", exc, extra={"event": "notify_socket_failed"})


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    """Return half of WATCHDOG_USEC in seconds, if it is for this process."""
    allowed, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not allowed.isdigit() or int(allowed) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(allowed) / MICROSECONDS / 2
