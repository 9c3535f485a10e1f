"""The programs in examples/ do what they say, each as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triojobs
from tests.faults.rig import wait_for_rows
from tests.tools.looking import rows

EXAMPLES = Path(__file__).parents[1] / "examples"
PATIENCE = 60.0  # seconds; only a hang needs them


@contextmanager
def running(program: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run an example; what still runs at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / program), *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str]) -> str:
    """Send SIGTERM; return what the program printed."""
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return printed


def ask(url: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request as soon as the service listens; return the JSON that comes back."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(
                url, None if data is None else json.dumps(data).encode(), 10
            ) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.URLError as exc:
            if isinstance(exc, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_the_web_service_confirms_its_orders(database: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running("web_service.py", database, BIND=address) as service:
        order = ask(f"http://{address}/orders", {"customer": "ada@example.com"})["order"]
        wait_for_rows(
            database, "SELECT confirmed_at IS NOT NULL FROM orders WHERE id = %s", order, seconds=PATIENCE
        )
        found = ask(f"http://{address}/orders/{order}")
        stop(service)
    assert found == {"order": order, "customer": "ada@example.com", "confirmed": True}
    assert rows(database, "SELECT status FROM triojobs.outcomes") == [("done",)]


def test_several_producers_make_one_report_for_each_interval(database: str) -> None:
    with (
        running("periodic_producer.py", database, "--every", "0.2") as first,
        running("periodic_producer.py", database, "--every", "0.2") as second,
    ):
        wait_for_rows(database, "SELECT count(*) >= 5 FROM triojobs.jobs", seconds=PATIENCE)
        for producer in (first, second):
            producer.kill()
        told = "".join(producer.communicate()[0] for producer in (first, second))
    keys = rows(database, "SELECT key FROM triojobs.keys")
    assert len(keys) == len(set(keys)) == rows(database, "SELECT count(*) FROM triojobs.jobs")[0][0]
    assert "enqueued (job " in told


def test_the_worker_ends_gracefully_and_gives_back_what_it_cannot_end(database: str) -> None:
    pictures = triojobs.Queue("pictures")
    with triojobs.SyncClient(database) as client, running("worker.py", database) as worker:
        done = client.enqueue(pictures, {"picture": "ada.png", "width": 10})
        assert client.result(done, timeout=PATIENCE) == "ada.png is 10 wide"
        slow = client.enqueue(pictures, {"picture": "huge.png", "width": 10_000_000})
        wait_for_rows(database, "SELECT count(*) FROM triojobs.leases", seconds=PATIENCE)
        worker.send_signal(signal.SIGINT)
        printed = stop(worker)  # the second signal: nobody waits for the end of the grace period
        info = client.get(slow)
    assert printed == "done 1, given back 1, left behind 0\n"
    assert info is not None
    assert (info.status, info.attempts) == ("pending", 0)


def test_the_tests_of_the_handlers_pass() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "examples/test_handlers.py"],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        timeout=PATIENCE,
    )
    assert told.returncode == 0, told.stdout
    assert "4 passed" in told.stdout or "...." in told.stdout
