"""Fixtures of the fault tests: servers, processes, links, and the proof that a test left nothing behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools.pooler import Pooler, pgbouncer, program

from .links import Link, NamespaceLink, ProxyLink, namespaces_refused
from .processes import WorkerProcess, worker_processes
from .rig import PATIENCE, Figures
from .servers import Server, Template, servers


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="triojobs")


@pytest.fixture(autouse=True)
def leaves_nothing(cluster: str) -> Iterator[None]:
    """Fail a test that leaves a process, a thread or a network interface, whatever else it did.

    `cluster` comes first, so that the session's server is none of the test's leavings.
    """
    before = leavings()
    yield
    deadline = time.monotonic() + PATIENCE
    while left := leavings() - before:
        assert time.monotonic() < deadline, f"left behind: {sorted(left)}"
        time.sleep(0.01)


def leavings() -> set[str]:
    """Return the names of what a test could leave: our children, threads, interfaces."""
    found = {f"interface {path.name}" for path in Path("/sys/class/net").glob("tjf*")}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found |= {f"process {pid}" for pid in (task / "children").read_text().split()}
    # Trio keeps idle worker threads for ten seconds, and it does so for everybody.
    found |= {f"thread {t.name}" for t in threading.enumerate() if not t.name.startswith("Trio thread")}
    return found


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Keeps what was measured."""
    return Figures(request.node.name)


def open_place(memory: Path | None) -> Path:
    """Make a directory that the servers' account may enter, in memory where there is room."""
    path = Path(tempfile.mkdtemp(prefix="tjf-", dir=memory or "/tmp")).resolve()
    path.chmod(0o711)
    return path


@pytest.fixture(scope="session")
def server_template(memory: Path | None) -> Iterator[Template]:
    """A migrated cluster to copy."""
    place = open_place(memory)
    try:
        yield Template(place / "template")
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def make_server(server_template: Template, memory: Path | None) -> Iterator[Callable[..., Server]]:
    """Makes servers of the test's own: `server = make_server(max_connections="20")`, then start it."""
    place = open_place(memory)
    try:
        with servers(server_template, place) as make:
            yield make
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    """One server with a migrated database, running."""
    server = make_server()
    server.copy_template()
    server.start()
    return server


@pytest.fixture
def worker() -> Iterator[Callable[..., WorkerProcess]]:
    """Starts worker processes: `worker(conninfo, options={…})`."""
    with worker_processes() as start:
        yield start


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    """The way to the server, which can become a black hole: a real link where the machine allows one.

    Elsewhere, or with TRIOJOBS_TEST_LINK=proxy, the fault proxy stands in.
    """
    stand_in = os.environ.get("TRIOJOBS_TEST_LINK") == "proxy" or namespaces_refused()
    with ProxyLink(conninfo) if stand_in else NamespaceLink(conninfo) as opened:
        yield opened


@pytest.fixture
def bouncer(conninfo: str) -> Iterator[Pooler]:
    """A PgBouncer in transaction mode in front of the test's database."""
    if program() is None:
        pytest.skip("pgbouncer is not installed")
    with pgbouncer(conninfo) as pooler:
        yield pooler
