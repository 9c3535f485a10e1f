"""`triojobs demo` while its database restarts, crashes, or stays away; and output that nobody takes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_demo import assert_complete, command, environment, report, run, running, value, wait_for_line

from tests.faults.servers import Server
from tests.tools.administrator import restart

AWAY = "the database is away, waiting for it"
BACK = r"the database is back, after \d+\.\d s"


def crash_a_backend(server: Server) -> None:
    """Have the postmaster end everybody and recover, as after a kill -9 of one session."""
    os.kill(server.backend("walwriter"), signal.SIGKILL)


def stop_and_start(server: Server) -> None:
    server.stop()
    server.start()


def crash_and_start(server: Server) -> None:
    server.crash()
    server.start()


@pytest.mark.parametrize("disturb", [crash_a_backend, stop_and_start, crash_and_start])
@pytest.mark.parametrize("when", ["enqueueing 300", r"done [1-9]"], ids=["enqueueing", "working"])
def test_a_restart_of_the_database_is_waited_out(
    server: Server,
    disturb: Callable[[Server], None],
    when: str,
) -> None:
    with running("--dsn", server.conninfo, "--jobs", "300") as process:
        wait_for_line(process, when)
        disturb(server)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_complete(report(output), 300)
    assert "Traceback" not in errors
    assert value(server.conninfo, "SELECT count(*) FROM triojobs_demo.sent") == 299


def test_several_restarts_in_a_row_are_told_and_waited_out(server: Server) -> None:
    with running("--dsn", server.conninfo, "--jobs", "200") as process:
        wait_for_line(process, "enqueueing 200")
        for _ in range(3):
            server.stop()
            wait_for_line(process, AWAY)
            server.start()
            wait_for_line(process, BACK)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_complete(report(output), 200)


def test_a_database_that_stays_away_is_one_line_and_the_next_demo_finishes(server: Server) -> None:
    with running("--dsn", server.conninfo, "--jobs", "100", "--patience", "0.5") as process:
        wait_for_line(process, "done [1-9]")
        server.crash()
        output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert "Traceback" not in errors
    assert re.fullmatch(r"error: .*; `triojobs demo --dsn …` again finishes them", errors.splitlines()[-1])
    server.start()
    again = run("--dsn", server.conninfo, "--json")
    assert "found an unfinished run of 100 e-mails" in again.stderr
    assert_complete(report(again.stdout), 100)


def test_a_restart_of_the_embedded_server_is_waited_out(data: Path) -> None:
    with running("--data", str(data), "--jobs", "200") as process:
        wait_for_line(process, "done [1-9]")
        restart(data)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_complete(report(output), 200)
    assert not (data / "pgdata" / "postmaster.pid").exists()
    assert_complete(report(run("--data", str(data), "--jobs", "5", "--json").stdout), 5)


# Output.


def test_who_stops_reading_ends_the_demo_quietly_and_jobs_are_given_back(empty_database: str) -> None:
    with subprocess.Popen(
        command("--dsn", empty_database, "--jobs", "200"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("enqueueing 200")
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        process.wait()
    assert (process.returncode, errors) == (141, "")
    assert value(empty_database, "SELECT count(*) FROM triojobs.leases") == 0


@pytest.mark.parametrize("arguments", [["demo", "--jobs", "5", "--dsn"], ["verify", "--dsn"]])
def test_a_full_disk_is_one_line(database: str, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-m", "triojobs", *arguments, database],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    words = f"stdout cannot be written: {os.strerror(errno.ENOSPC)}; what was asked for may have been done"
    assert (ended.returncode, ended.stderr) == (1, f"error: {words}\n")


def test_a_closed_output_is_none(empty_database: str) -> None:
    script = '"$@" >&-'
    ended = subprocess.run(
        ["sh", "-c", script, "sh", *command("--dsn", empty_database, "--jobs", "5")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert value(empty_database, "SELECT count(*) FROM triojobs_demo.sent") == 4


def test_an_interrupt_before_the_work_begins_prints_its_json(data: Path) -> None:
    with running("--data", str(data)) as process:
        wait_for_line(process, "starting an embedded PostgreSQL")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    found = json.loads(output)
    assert (process.returncode, found["enqueued"], found["lost"], found["running"]) == (130, 0, 0, 0)
    assert "stopping before any job runs" in errors
    assert not list(data.glob("pgdata.unfinished-*"))
