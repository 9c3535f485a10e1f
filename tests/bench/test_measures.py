"""Each measure runs with tiny numbers and says what it promises; counts that are off are noticed. No times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import enqueue, footprint, peers, scale, volume
from bench.__main__ import main
from bench.contenders import OURS, SQL
from bench.drain import drained
from bench.running import BenchError, Program
from bench.server import Database, Server

PROMISED = {"what", "ours", "peer", "ratio", "rounds", "spread"}
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(cluster: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a measure on the tests' server beside `sql`; return its lines."""
    monkeypatch.setenv("TRIOJOBS_BENCH_DSN", cluster)

    def invoke(*arguments: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(main, [*arguments, "--against", "sql", "--rounds", "1", "--json"])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    return invoke


@pytest.fixture
def server(cluster: str) -> Iterator[Server]:
    """The tests' server as the bench sees it."""
    server = Server(cluster)
    yield server
    server.forget_templates()


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    """A database with our tables and three jobs that wait."""
    with server.database() as database:
        OURS.fill(database, "best", jobs=3)
        yield database


def test_a_drain_beside_bare_sql_is_exactly_one_line(run: Run) -> None:
    [line] = run("drain", "--jobs", "40")

    assert line.keys() >= PROMISED
    assert (line["what"], line["against"], line["jobs"], line["rounds"]) == ("drain", "sql", 40, 1)
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"], abs=1e-3)
    assert line["spread"] == [line["ratio"]] * 2


@pytest.mark.parametrize(
    ("measure", "jobs", "whats"),
    [
        (
            "enqueue",
            16,
            {
                "enqueue, one at a time",
                "enqueue, one at a time, SyncClient",
                "enqueue, 5 tasks",
                "enqueue, 5 threads",
                "enqueue, 2 connections, nobody waits",
                "enqueue, 2 connections, a group waits",
                "enqueue, 2 connections, notified inside the caller's transaction",
            },
        ),
        ("latency", 3, {"latency p50", "latency p99"}),
        ("idle", 1, {"idle CPU"}),
        ("memory", 20, {"memory, draining"}),
        ("start", 1, {"start until the first handler", "exit of an idle group"}),
        ("history", 20, {"drain, 50 finished"}),
        (
            "backlog",
            20,
            {"drain, 50 waiting behind", "drain, 50 scheduled", "drain, 50 waiting in 1,000 other queues"},
        ),
        ("snapshot", 20, {"drain, snapshot held"}),
        (
            "payload",
            20,
            {"drain, 1.5 kB payload (triojobs)", "drain, 1.5 kB payload (sql)", "drain, 1.5 kB payload"},
        ),
        ("distance", 20, {"drain, 1 ms away"}),
        ("processes", 30, {"drain, 2 processes"}),
    ],
)
def test_a_measure_says_what_it_promises(
    run: Run, monkeypatch: pytest.MonkeyPatch, measure: str, jobs: int, whats: set[str]
) -> None:
    monkeypatch.setattr(volume, "MILLION", 50)
    monkeypatch.setattr(enqueue, "CALLERS", 5)
    monkeypatch.setattr(enqueue, "CONNECTIONS", 2)
    monkeypatch.setattr(scale, "PROCESSES", (1, 2))
    monkeypatch.setattr(footprint, "SETTLING", 0.0)
    monkeypatch.setattr(footprint, "IDLE", 0.1)

    lines = run(measure, "--jobs", str(jobs))

    assert {line["what"] for line in lines} == whats
    for line in lines:
        assert line.keys() >= PROMISED
        assert (line["peer"] is None) == (line["ratio"] is None) == (line["against"] is None)


@pytest.mark.parametrize("contender", [OURS, SQL], ids=lambda contender: contender.name)
def test_a_drain_leaves_each_job_done_once(server: Server, contender: Any) -> None:
    assert drained(server, contender, "best", jobs=7).rate > 0


def test_jobs_that_were_not_run_are_no_number(database: Database) -> None:
    with pytest.raises(BenchError, match=r"given 3 jobs.*'waiting': 3"):
        OURS.check(database, 3)


@pytest.mark.parametrize(
    ("spoil", "noticed"),
    [
        ("DELETE FROM triojobs.outcomes WHERE job_id = 2", "'finished': 2"),
        ("UPDATE triojobs.outcomes SET status = 'killed' WHERE job_id = 2", "'not_done': 1"),
        (
            "INSERT INTO triojobs.outcomes (job_id, claim_no, attempt, status) VALUES (2, 9, 1, 'done')",
            "'repeated': 1",
        ),
        (
            "INSERT INTO triojobs.leases (id, claim_no, group_id, attempt, max_attempts, queue, priority, run_at)"
            " VALUES (9, 1, gen_random_uuid(), 1, 1, 'bench', 0, now())",
            "'running': 1",
        ),
    ],
)
def test_a_count_that_is_off_is_no_number(database: Database, spoil: Any, noticed: str) -> None:
    with SQL.program(database, "best", "work", jobs=3) as program:
        program.start().hear("handled")
        handled = program.last()["count"]
    OURS.check(database, 3, handled)

    database.execute(spoil)

    with pytest.raises(BenchError, match=noticed):
        OURS.check(database, 3, handled)


def test_a_handler_that_ran_twice_is_no_number(database: Database) -> None:
    with SQL.program(database, "best", "work", jobs=3) as program:
        program.start().hear("handled")

    with pytest.raises(BenchError, match="'handled': 4"):
        OURS.check(database, 3, handled=4)


def test_a_program_that_fails_says_why(database: Database) -> None:
    with (
        pytest.raises(BenchError, match="KeyError"),
        Program(SQL.command, {"do": "work"}, database) as program,
    ):
        program.hear("ready")


def test_a_peer_that_is_not_installed_is_left_out_with_the_command_that_installs_it(
    cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRIOJOBS_BENCH_DSN", cluster)
    monkeypatch.setattr(peers, "HOME", tmp_path)

    result = CliRunner().invoke(main, ["start", "--against", "graphile,sql", "--rounds", "1"])

    assert result.exit_code == 0, result.output
    assert "python -m bench.peers install graphile" in result.stderr


def test_an_unknown_peer_is_refused() -> None:
    result = CliRunner().invoke(main, ["drain", "--against", "celery"])

    assert result.exit_code == 2
    assert "celery" in result.stderr
