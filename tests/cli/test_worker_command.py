"""`triojobs worker` and `triojobs dev`: modules that hold workers, and those that do not; signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest
from command import Command, running, wait_for_line
from tools import Connection, read

import triojobs
from tests.tools.pooler import pgbouncer, program

MODULE = """
import contextlib
import trio
import triojobs

mail = triojobs.Queue("mail", dict)

async def send(job):
    await trio.sleep(job.payload.get("seconds", 0))

one = triojobs.Worker(mail, send, concurrency=3)
workers = [one]
both = (one, triojobs.Worker(triojobs.Queue("other"), send))

def made():
    return [one]

async def made_in_trio():
    await trio.sleep(0)
    return one

@contextlib.asynccontextmanager
async def kept_open():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        yield workers
        print("closed", flush=True)
        nursery.cancel_scope.cancel()

async def by_itself():
    print("ran by itself")

class Holder:
    workers = [one]

nothing = []
a_number = 7
some = [one, 7]

def with_an_argument(x):
    return [one]

def empty():
    return []

def unlucky():
    raise KeyError("DATABASE_URL")
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory with the module `app`, and some that cannot be imported."""
    (tmp_path / "app.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import app\nx = undefined\n")
    (tmp_path / "crooked.py").write_text("def (:\n")
    (tmp_path / "needy.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "hasty.py").write_text("import sys\nsys.exit(3)\n")
    return tmp_path


def fails(app: Path, *arguments: str, dsn: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    environment = {**os.environ, "TRIOJOBS_DSN": dsn}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "triojobs", *arguments],
        cwd=app,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "attribute", ["one", "workers", "both", "made", "made_in_trio", "kept_open", "Holder.workers"]
)
def test_workers_are_found_in_whatever_an_attribute_gives(
    app: Path, dsn: str, triojobs_: Command, db: Connection, attribute: str
) -> None:
    job = int(triojobs_.ok("enqueue", "mail", "{}"))
    with running("worker", f"app:{attribute}", dsn=dsn, cwd=app) as process:
        assert "mail (3)" in wait_for_line(process, "serves")
        with triojobs.SyncClient(dsn) as client:
            client.result(job, timeout=60.0)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped in" in err.splitlines()[-1]
    assert "1 done; 0 given back" in err.splitlines()[-1]
    assert out == ("closed\n" if attribute == "kept_open" else "")
    assert read(db, job).status == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_outlives_the_grace_period_is_given_back(
    app: Path, dsn: str, triojobs_: Command, db: Connection, number: signal.Signals
) -> None:
    options = ["--name", "web-1", "--grace-period", "0s"]
    with running("worker", "app:workers", *options, dsn=dsn, cwd=app) as process:
        wait_for_line(process, "web-1 serves")
        job = int(triojobs_.ok("enqueue", "mail", '{"seconds": 1000}'))
        while read(db, job).status != "running":
            pass
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.splitlines()[-1].endswith("nothing was done; 1 given back")
    assert (read(db, job).status, read(db, job).attempts) == ("pending", 0)


def test_an_async_function_may_do_everything_by_itself(app: Path, dsn: str) -> None:
    done = fails(app, "worker", "app:by_itself", dsn=dsn)
    assert (done.returncode, done.stdout) == (0, "ran by itself\n")
    assert "gave no workers" in done.stderr


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("nowhere:workers", "there is no module nowhere; run the command in the directory that holds it"),
        ("app.nowhere:workers", "there is no module app.nowhere"),
        ("app:nothing_there", "app has no attribute nothing_there; it has workers in: both, one, workers"),
        ("app:nothing", "app:nothing is, or gives, no worker at all"),
        ("app:unlucky", "calling app:unlucky: KeyError: 'DATABASE_URL' ("),
        ("app:empty", "app:empty is, or gives, no worker at all"),
        ("app:a_number", "app:a_number is, or gives, a int; it must be a triojobs.Worker"),
        ("app:some", "app:some is, or gives, a list; it must be a triojobs.Worker"),
        ("app:with_an_argument", "cannot be called without arguments: missing a required argument: 'x'"),
        ("broken:workers", "importing broken: NameError: name 'undefined' is not defined"),
        ("crooked:workers", "importing crooked: "),
        ("needy:workers", "importing needy: No module named 'a_library_that_is_not_there'"),
        ("hasty:workers", "importing hasty: it ends the program"),
    ],
)
def test_what_holds_no_workers_is_told_in_one_line(app: Path, dsn: str, attribute: str, words: str) -> None:
    done = fails(app, "worker", attribute, dsn=dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    "attribute", ["app", "app:", ":workers", "app:wor kers", "app.py:workers:x", "../app:workers"]
)
def test_what_is_no_module_and_attribute_is_wrong_usage(app: Path, attribute: str) -> None:
    done = fails(app, "worker", attribute, dsn="host=/nowhere")
    assert done.returncode == 2
    assert "MODULE:ATTRIBUTE" in done.stderr


@pytest.mark.skipif(program() is None, reason="there is no PgBouncer here")
def test_a_worker_runs_behind_a_pooler(app: Path, dsn: str, triojobs_: Command) -> None:
    with pgbouncer(dsn) as pooler:
        options = ["--pooled", "--listen-dsn", dsn]
        with running("worker", "app:workers", *options, dsn=pooler.conninfo, cwd=app) as process:
            wait_for_line(process, "serves")
            job = int(triojobs_.ok("enqueue", "mail", "{}"))
            with triojobs.SyncClient(dsn) as client:
                client.result(job, timeout=60.0)
            process.terminate()
            _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "1 done; 0 given back" in err.splitlines()[-1]


def test_a_server_that_is_not_there_is_one_line(app: Path, tmp_path: Path) -> None:
    done = fails(app, "worker", "app:workers", dsn=f"host={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "check host and port" in done.stderr


def test_options_that_contradict_each_other_are_one_line(app: Path, dsn: str) -> None:
    done = fails(app, "worker", "app:workers", "--concurrency", "10000001", dsn=dsn)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "concurrency is 10000001" in done.stderr


def asked(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


@pytest.mark.parametrize("command", ["worker", "dev"])
def test_health_is_answered_beside_the_workers(app: Path, dsn: str, triojobs_: Command, command: str) -> None:
    with running(
        command, "app:workers", "--health", "127.0.0.1:0", "--name", "w", dsn=dsn, cwd=app
    ) as process:
        found = re.search(r"health on (http://127\.0\.0\.1:\d+)/readyz", wait_for_line(process, "health on"))
        assert found is not None
        status, body = asked(f"{found[1]}/readyz")
        assert (status, json.loads(body)["groups"]["w"]["state"]) == (200, "running")
        assert asked(f"{found[1]}/livez")[0] == 200
        assert asked(f"{found[1]}/other")[0] == 404
        if command == "worker":
            job = int(triojobs_.ok("enqueue", "mail", "{}"))
            with triojobs.SyncClient(dsn) as client:
                client.result(job, timeout=60.0)
        status, body = asked(f"{found[1]}/metrics")
        assert status == 200
        assert 'triojobs_slots_free{group="w"}' in body
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped in" in err.splitlines()[-1]


def test_an_address_that_is_taken_is_one_line_before_anything_runs(app: Path, dsn: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = fails(app, "worker", "app:workers", "--health", address, dsn=dsn)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: cannot listen on {address}: Address already in use; give --health another address\n",
    )


def test_where_nothing_is_opened_the_address_is_given_up(app: Path, dsn: str) -> None:
    """Warnings are errors there: a socket that is left open is told on stderr."""
    done = fails(app, "worker", "app:empty", "--health", "127.0.0.1:0", dsn=dsn)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("address", ["8086", "here:", ":8086", "127.0.0.1:99999", "127.0.0.1:http"])
def test_what_is_no_address_is_wrong_usage(app: Path, address: str) -> None:
    done = fails(app, "worker", "app:workers", "--health", address, dsn="host=/nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{address!r} is not HOST:PORT" in done.stderr


def test_dev_runs_workers_on_a_server_of_its_own(app: Path) -> None:
    with running("dev", "app:workers", cwd=app) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        (dsn,) = re.findall(r'^export TRIOJOBS_DSN="(.*)"$', line)
        wait_for_line(process, "serves mail (3)")
        job = int(Command(dsn).ok("enqueue", "mail", "{}"))
        with triojobs.SyncClient(dsn) as client:
            client.result(job, timeout=60.0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "1 done; 0 given back" in err.splitlines()[-1]
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


def test_dev_goes_on_with_the_jobs_of_a_directory(app: Path, tmp_path: Path) -> None:
    module = textwrap.dedent(
        """
        import triojobs
        async def never(job): raise AssertionError
        workers = triojobs.Worker(triojobs.Queue("unused"), never)
        """
    )
    (app / "idle.py").write_text(module)
    data = tempfile.mkdtemp(prefix="triojobs-dev-", dir="/tmp")
    os.chmod(data, 0o755)  # the server of root belongs to another account
    try:
        job = None
        for _ in range(2):
            with running("dev", "idle:workers", "--data", f"{data}/db", cwd=app) as process:
                assert process.stdout is not None
                dsn = process.stdout.readline().removeprefix('export TRIOJOBS_DSN="').removesuffix('"\n')
                wait_for_line(process, "serves")
                if job is None:
                    job = int(Command(dsn).ok("enqueue", "kept", "1"))
                else:
                    assert Command(dsn).json("jobs", "list")[0]["id"] == job
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=60)
            assert process.returncode == 0
    finally:
        shutil.rmtree(data, ignore_errors=True)


def test_dev_that_is_interrupted_while_it_starts_leaves_nothing(app: Path) -> None:
    with running("dev", "app:workers", cwd=app) as process:
        wait_for_line(process, "starting an embedded PostgreSQL")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    # The signal may come before, or after, the workers run.
    assert process.returncode in (0, 128 + signal.SIGTERM)
