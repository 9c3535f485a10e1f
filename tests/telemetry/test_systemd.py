"""What a service manager hears: datagrams on a socket, as systemd opens one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

import triojobs
from triojobs import testing
from triojobs._systemd import Manager

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
PATIENCE = 30.0  # seconds; only a hang needs them

PROGRAM = """
import sys, trio, triojobs

async def handler(job):
    pass

trio.run(triojobs.serve, sys.argv[1], [triojobs.Worker(triojobs.Queue("plain"), handler)])
"""


class Systemd:
    """The manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(PATIENCE)
        self.environment = {"NOTIFY_SOCKET": address}

    def hears(self) -> dict[str, str]:
        """Return the assignments of the next datagram."""
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def heard(self) -> list[dict[str, str]]:
        """Return what has come until now."""
        self._socket.setblocking(False)
        found = []
        try:
            while True:
                found.append(self.hears())
        except BlockingIOError:
            return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["file", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = str(tmp_path / "notify") if request.param == "file" else f"@triojobs-{os.getpid()}"
    manager = Systemd(address)
    yield manager
    manager.close()


def test_serve_says_when_it_is_ready_that_it_lives_and_when_it_stops(conninfo: str, systemd: Systemd) -> None:
    # A shell would name its own id; without WATCHDOG_PID the interval is for whoever gets it.
    environment = os.environ | systemd.environment | {"WATCHDOG_USEC": "100000"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, conninfo], env=environment)
    try:
        ready = systemd.hears()
        assert (ready["READY"], ready["STATUS"]) == (
            "1",
            f"worker group {socket.gethostname()}:{process.pid}",
        )
        assert [systemd.hears() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
        process.send_signal(signal.SIGTERM)
        while (said := systemd.hears()) == {"WATCHDOG": "1"}:
            pass
        assert said["STOPPING"] == "1"
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


async def test_a_blocked_loop_is_silent_and_a_waiting_one_is_not(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    for name, value in (systemd.environment | {"WATCHDOG_USEC": "20000000"}).items():
        monkeypatch.setenv(name, value)
    database = testing.MemoryDatabase()

    async def handler(job: triojobs.Job[Any]) -> None:
        await trio.sleep(35)

    async with (
        testing.open_memory_group(database, [triojobs.Worker(plain, handler)], name="g") as group,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(triojobs.notify_systemd, group)
        await group.client.enqueue(plain, None)
        while not group.statistics().running:
            await trio.lowlevel.checkpoint()
        group.stop()
        await group.wait_stopped()
    heard = systemd.heard()
    assert heard[0] == {"READY": "1", "STATUS": "worker group g"}
    # Every 10 of 20 seconds, also while the graceful stop waits for its handler (10 s of grace).
    assert heard.count({"WATCHDOG": "1"}) == 2
    assert [each for each in heard if "STOPPING" in each] == [
        {"STOPPING": "1", "STATUS": "worker group g stops"}
    ]


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdogs_interval_is_half_of_what_is_allowed_to_this_process(
    environment: dict[str, str], interval: float | None
) -> None:
    assert Manager({"NOTIFY_SOCKET": "/nowhere"} | environment).watchdog_interval == interval
    assert Manager(environment).watchdog_interval is None  # nobody to tell


async def test_a_manager_that_is_gone_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    Manager({"NOTIFY_SOCKET": "/nowhere/at/all"}).tell(READY="1")
    assert [record.event for record in caplog.records] == ["notify_socket_failed"]  # type: ignore[attr-defined]


async def test_without_a_manager_it_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    database = testing.MemoryDatabase()

    async def handler(job: triojobs.Job[Any]) -> None:
        pass

    async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)]) as group:
        await triojobs.notify_systemd(group)
