"""The programs in examples/ do what they say, each as a process of its own."""

from __future__ import annotations

import configparser
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


def state_of(url: str) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON of an answer, whatever it is."""
    try:
        return 200, ask(url)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc)


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


def test_one_trace_leads_from_the_request_to_the_jobs_job(database: str) -> None:
    with running("tracing.py", database) as program:
        printed, errors = program.communicate(timeout=PATIENCE)
    assert (program.returncode, errors) == (0, "")
    assert "a receipt for ada@example.com" in printed
    spans = [line.split(maxsplit=4) for line in printed.splitlines() if " from " in line]
    assert len({trace_id for trace_id, *_ in spans}) == 1
    parents = {own: parent.removesuffix(":") for _, own, _, parent, _ in spans}
    names = {own: name for _, own, _, _, name in spans}
    (last,) = [own for own, name in names.items() if name == "CONSUMER process receipts"]
    chain = [last]
    while parents[chain[-1]] in names:
        chain.append(parents[chain[-1]])
    assert [names[each] for each in chain] == [
        "CONSUMER process receipts",
        "PRODUCER enqueue receipts",
        "CONSUMER process orders",
        "PRODUCER enqueue orders",
        "INTERNAL request",
    ]


def test_a_scrape_of_the_worker_shows_its_jobs(database: str) -> None:
    port = free_port()
    with running("metrics.py", database, "--port", str(port)) as worker:
        wait_for_rows(database, "SELECT count(*) >= 3 FROM triojobs.outcomes", seconds=PATIENCE)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            scraped = answer.read().decode()
        stop(worker)
    samples = dict(line.rsplit(" ", 1) for line in scraped.splitlines() if not line.startswith("#"))
    assert float(samples['triojobs_jobs_enqueued_total{queue="numbers"}']) >= 3
    assert float(samples['triojobs_jobs_claimed_total{queue="numbers"}']) >= 3
    assert any(name.startswith("triojobs_lease_age_seconds") for name in samples)


def test_the_worker_tells_whoever_asks_how_it_is(database: str) -> None:
    numbers = triojobs.Queue("numbers", int)
    with running("health.py", database, "--bind", "127.0.0.1:0") as worker:
        assert worker.stdout is not None
        url = worker.stdout.readline().strip()
        assert ask(url)["status"] == "ok"
        with triojobs.SyncClient(database) as client:
            client.enqueue(numbers, 3600)
        wait_for_rows(database, "SELECT count(*) FROM triojobs.leases", seconds=PATIENCE)
        worker.send_signal(signal.SIGTERM)
        status, body = state_of(url)
        while status == 200:
            status, body = state_of(url)
        assert (status, [group["state"] for group in body["groups"].values()]) == (503, ["stopping"])
        assert ask(url.replace("readyz", "livez"))["status"] == "ok"
        stop(worker)


def test_each_line_of_the_json_logs_is_an_event(database: str) -> None:
    with running("json_logs.py", database) as program:
        printed, errors = program.communicate(timeout=PATIENCE)
    assert (program.returncode, errors) == (0, "")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["event"] for line in lines] == ["group_started", "job_killed", "group_stopped"]
    assert lines[1]["queue"] == "mails"
    assert lines[1]["error"] == "'nowhere' is no address"
    assert (lines[2]["settled"]["done"], lines[2]["settled"]["killed"]) == (1, 1)


def test_systemd_hears_of_the_worker(database: str, tmp_path: Path) -> None:
    unit = configparser.ConfigParser()
    unit.read(EXAMPLES / "worker.service")
    assert unit["Service"]["Type"] == "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        with running("worker.py", database, NOTIFY_SOCKET=str(tmp_path / "notify")) as worker:
            assert manager.recv(1000).startswith(b"READY=1\n")
            worker.send_signal(signal.SIGTERM)
            assert manager.recv(1000).startswith(b"STOPPING=1\n")
            assert worker.wait(PATIENCE) == 0


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
