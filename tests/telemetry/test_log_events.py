"""The table of events in docs/telemetry.rst is what the source logs; jobs' ends are logged with their fields."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triojobs
from triojobs import testing

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"^``(\w+)`` +``([\w.]+)`` +([A-Z]+) +(.*(?:\n {40,}.*)*)", re.MULTILINE)
LEVELS = {"exception": "ERROR"}
CONDITIONAL = {"job_killed": "WARNING", "job_failed": "INFO"}  # one call logs both
plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


def log_calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (logger, method, call) of each call that logs."""
    for path in sorted((ROOT / "triojobs").rglob("*.py")):
        if path.name == "_logs.py":
            continue
        tree = ast.parse(path.read_text())
        loggers = [
            node.value.args[0].value  # type: ignore[attr-defined]
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "Log"
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                (logger,) = loggers
                yield logger, node.func.attr, node  # type: ignore[attr-defined]


def events_of(call: ast.Call) -> Iterator[tuple[str, list[str]]]:
    """Yield each event that a call may log, with its fields."""
    (extra,) = [keyword.value for keyword in call.keywords if keyword.arg == "extra"]
    assert isinstance(extra, ast.Dict)
    names = [key.value for key in extra.keys if isinstance(key, ast.Constant)]
    event = extra.values[names.index("event")]
    for node in ast.walk(event):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, [name for name in names if name != "event"]


def logged() -> dict[tuple[str, str], tuple[str, frozenset[str]]]:
    found = {}
    for logger, method, call in log_calls():
        for event, fields in events_of(call):
            level = CONDITIONAL.get(event) or LEVELS.get(method, method.upper())
            if level == "LOG":
                level = "WARNING" if "WARNING" in ast.unparse(call.args[0]) else "INFO"
            found[event, logger] = (level, frozenset(fields))
    return found


def documented() -> dict[tuple[str, str], tuple[str, frozenset[str]]]:
    text = (ROOT / "docs" / "telemetry.rst").read_text()
    return {
        (event, logger): (level, frozenset(re.findall(r"``(\w+)``", what)))
        for event, logger, level, what in TABLE.findall(text)
    }


# What the table words differently: an option that is named, "the same" of a row above, two loggers of one event.
OPTIONS = {"grace_period", "loop_dead_after", "hard_stop"}
SAME = {"job_killed": "job_failed"}


def test_every_event_is_in_the_table_with_its_logger_and_level() -> None:
    table = documented()
    for (event, logger), (level, _) in logged().items():
        rows = {where: row for (name, where), row in table.items() if name == event}
        assert rows, f"{event} is not in the table"
        assert logger in rows or len(rows) == 1, f"{event} of {logger} is not in the table"
        assert level in {row[0] for row in rows.values()}, f"{event} is logged as {level}"


def test_every_field_is_in_the_table() -> None:
    table = documented()
    for (event, _), (_, fields) in logged().items():
        told = {
            field
            for (name, _), (_, named) in table.items()
            if name in (event, SAME.get(event))
            for field in named
        }
        assert fields - told <= {"sqlstate"} if event.endswith("_failed") else fields <= told, event


def test_the_table_names_nothing_that_is_not_logged() -> None:
    source = logged()
    events = {event for event, _ in source}
    for (event, _), (_, named) in documented().items():
        assert event in events, f"nobody logs {event}"
        fields = {field for (name, _), (_, found) in source.items() if name == event for field in found}
        assert named - OPTIONS <= fields, event


async def handler(job: triojobs.Job[Any]) -> None:
    raise ValueError("no\nand why")


async def test_failures_are_logged_and_only_the_last_one_is_a_warning(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    database = testing.MemoryDatabase()
    with caplog.at_level(logging.INFO, "triojobs"):
        worker = triojobs.Worker(plain, handler)
        async with testing.open_memory_group(database, [worker], name="g") as group:
            job_id = await group.client.enqueue(plain, None, max_attempts=2)
            with pytest.raises(triojobs.JobFailedError):
                await group.client.result(job_id)
    records = [(r.levelname, r.event, r.getMessage()) for r in caplog.records]  # type: ignore[attr-defined]
    assert [record[:2] for record in records] == [
        ("INFO", "group_started"),
        ("INFO", "job_failed"),
        ("WARNING", "job_killed"),
        ("INFO", "group_stopped"),
    ]
    assert records[1][2] == f"job {job_id} of 'plain' failed (attempt 1 of 2): ValueError: no"
    killed = caplog.records[2]
    assert (killed.job_id, killed.queue, killed.attempt) == (job_id, "plain", 2)  # type: ignore[attr-defined]
    assert "and why" in killed.error  # type: ignore[attr-defined]
