"""Fixtures and probes for the embedded server's own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from triojobs._embedded_programs import Account

OWNER = """
import sys, trio
from triojobs.embedded import open_embedded_postgres

async def main():
    async with open_embedded_postgres(sys.argv[1]) as conninfo:
        print(conninfo, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture
def place(memory: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that every account can enter (pytest's own are closed), and where temporary files go."""
    # In memory the tests take half the time; but some run programs there, which a container may forbid.
    if memory is not None and os.statvfs(memory).f_flag & os.ST_NOEXEC:
        memory = None
    path = Path(tempfile.mkdtemp(prefix="tj-", dir=memory or "/tmp")).resolve()
    path.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def owner(place: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start a process that owns the server of a directory; returns it and its conninfo."""
    with ExitStack() as stack:

        def start(data_dir: Path, script: str = OWNER) -> tuple[subprocess.Popen[str], str]:
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(data_dir)],
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(place)},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, process.stdout.readline().strip()

        yield start


def names_in(directory: Path) -> list[str]:
    """Return what a directory holds."""
    return sorted(entry.name for entry in directory.iterdir())


def run_as(command: list[str], account: Account) -> subprocess.Popen[bytes]:
    """Start a program as an account; one that ends at once is dead, but not reaped, on return."""
    process = subprocess.Popen(command, **account.popen_options())
    if command == ["true"]:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def processes_below(place: Path) -> list[str]:
    """Return the living processes that work in a directory below `place`, as servers do."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(place):
                found.append(process.name)
        except OSError:
            continue  # it ended, or is not ours to see
    return found


def value(conninfo: str, query: str) -> object:
    """Return the one value of a query."""
    with psycopg.connect(conninfo) as conn:
        row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]
