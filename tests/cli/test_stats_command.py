"""`triojobs stats`: at once, as lines, as JSON, and as a live view on a terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from command import Command
from test_queues_and_groups_commands import LISTED, register
from tools import Connection, Group, put

SHOW_CURSOR, LEAVE_SCREEN = "\x1b[?25h", "\x1b[?1049l"


def test_figures_queues_and_groups_are_shown_at_once(
    triojobs_: Command, db: Connection, group: Group
) -> None:
    put(db, 3, queue="mail")
    group.claim(db, 1, queue="mail")
    register(db, "web", mail=4)
    text = triojobs_.ok("stats")
    assert text.startswith("1 running, 2 due, 2 pending, 0 to be retried")
    assert re.search(r"^mail +2 +0 +1 +0 ", text, re.MULTILINE)
    assert re.search(r"^web +host:1 +alive +0 +4 ", text, re.MULTILINE)


def test_json_is_one_object(triojobs_: Command, db: Connection) -> None:
    put(db, 3, queue="mail")
    register(db, "web", mail=4)
    (found,) = triojobs_.json("stats")
    assert found.keys() == {"queues", "groups", "figures"}
    assert found["queues"][0].keys() == LISTED
    assert (found["queues"][0]["name"], found["queues"][0]["ready"]) == ("mail", 3)
    assert found["groups"][0]["name"] == "web"
    assert found["figures"]["PENDING_JOBS"] == 3


def test_without_a_terminal_each_look_is_lines(triojobs_: Command, db: Connection) -> None:
    put(db, 3, queue="mail")
    lines = triojobs_.ok("stats", "--watch", "--count", "2", "--interval", "10ms").splitlines()
    assert len(lines) == 4
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)
    assert "queue=mail ready=3 later=0 running=0" in lines[1]
    assert lines[1].endswith("state=unserved")


def test_each_look_is_one_object_of_json(triojobs_: Command) -> None:
    assert len(triojobs_.json("stats", "--watch", "--count", "3", "--interval", "10ms")) == 3


@pytest.mark.parametrize(
    "options",
    [["--interval", "0s"], ["--interval", "soon"], ["--window", "0s"], ["--count", "3"], ["--count", "0"]],
)
def test_what_cannot_be_meant_is_wrong_usage(triojobs_: Command, options: list[str]) -> None:
    assert triojobs_("stats", *options).exit_code == 2


class Screen:
    """A process on a terminal of its own, and what it has written there."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self.text = ""

    def read_until(self, words: str) -> None:
        """Read until the words were written; the end of the process is a failure."""
        while words not in self.text:
            self.text += os.read(self._terminal, 65536).decode(errors="replace")

    def read_rest(self) -> None:
        """Read until the process has ended."""
        try:
            while more := os.read(self._terminal, 65536):
                self.text += more.decode(errors="replace")
        except OSError:  # how Linux says that nobody has the other side open
            pass


@contextmanager
def on_a_terminal(dsn: str, *arguments: str, rows: int = 24, columns: int = 80) -> Iterator[Screen]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (rows, columns))
    environment = {**os.environ, "TRIOJOBS_DSN": dsn, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "error", "-m", "triojobs", *arguments]
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            yield Screen(process, ours)
        finally:
            process.kill()
            os.close(ours)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_terminal_back(dsn: str, db: Connection, number: signal.Signals) -> None:
    put(db, 3, queue="mail")
    with on_a_terminal(dsn, "stats", "--watch") as screen:
        screen.read_until("Ctrl-C ends")
        screen.process.send_signal(number)
        screen.read_rest()
        assert screen.process.wait(60) == 128 + number
    assert (
        screen.text.rstrip().endswith(LEAVE_SCREEN) or SHOW_CURSOR in screen.text.partition(LEAVE_SCREEN)[2]
    )
    assert screen.text.rindex(SHOW_CURSOR) > screen.text.rindex("Ctrl-C ends")
    assert "Traceback" not in screen.text


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (40, 120), (10, 60)])
def test_the_live_view_stays_inside_the_window(dsn: str, db: Connection, rows: int, columns: int) -> None:
    for n in range(50):
        put(db, 1, queue=f"a-queue-with-a-rather-long-name-{n}")
    for n in range(20):
        register(db, f"group-{n}", q=1)
    with on_a_terminal(dsn, "stats", "--watch", "--count", "1", rows=rows, columns=columns) as screen:
        screen.read_rest()
        assert screen.process.wait(60) == 0
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.text).replace("\r", "").split("\n")
    assert "Ctrl-C ends" in screen.text
    assert max(map(len, drawn)) <= columns
    assert re.search(r"\d+ more queue\(s\), \d+ more group\(s\)", screen.text)


def test_a_lost_connection_is_waited_for(dsn: str, db: Connection, triojobs_: Command) -> None:
    with on_a_terminal(dsn, "stats", "--watch", "--interval", "100ms") as screen:
        screen.read_until("Ctrl-C ends")
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'triojobs admin' AND datname = current_database()"
            )
        screen.text = ""
        screen.read_until("Ctrl-C ends")


def test_a_table_is_cut_to_the_terminal(dsn: str, db: Connection) -> None:
    name = "a-queue-with-a-name-that-is-longer-than-the-window-is-wide-" * 2
    for n in range(3):
        put(db, 1, queue=name, key=f"{n}" * 200)
    with on_a_terminal(dsn, "jobs", "list") as screen:
        screen.read_rest()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.text).replace("\r", "").splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80
    assert "…" in lines[1]
