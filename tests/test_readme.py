"""README.rst does what it says: its programs run, its tables list every option with its real default."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from prometheus_client import CollectorRegistry

import triojobs
from tests.faults.rig import SHORT
from tests.faults.test_rows import ROWS
from triojobs._options import HARD_STOP_AFTER, GroupOptions

README = Path(__file__).parents[1] / "README.rst"
TEXT = README.read_text()
BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", re.MULTILINE)
BLOCKS = [textwrap.dedent(block) for block in BLOCK.findall(TEXT)]
IMPORTS = "import functools, os, psycopg, trio, triojobs\nfrom dataclasses import dataclass\n"
TABLES = "create table orders (customer text); create table sent (recipient text)"


@pytest.fixture
def shop(conninfo: str) -> dict[str, Any]:
    """The names that the chapters define, one after the other, in a database with the shop's tables."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute(TABLES)
    program = BLOCKS[0].partition("trio.run")[0]
    names: dict[str, Any] = {"__name__": "shop"}
    for block in (IMPORTS, program, *BLOCKS[1:]):
        exec(compile(block, str(README), "exec", dont_inherit=True), names)
    return names


def test_the_first_program_runs_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(BLOCKS[0])
    ended = subprocess.run(
        [sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.stderr) == ("sent to ada@example.com by attempt 1\n", "")


def test_the_first_program_is_short() -> None:
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 20


async def test_the_chapters_programs_work_together(
    conninfo: str, shop: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ordered = shop["place_order"](conninfo, "dora@example.com")
    async with trio.open_nursery() as nursery:

        async def work() -> None:
            async with triojobs.open_worker_group(conninfo, shop["workers"], name="web-1"):
                await trio.sleep_forever()

        nursery.start_soon(work)
        await shop["produce"](conninfo)
        nursery.cancel_scope.cancel()
    report = await shop["work_until_idle"](conninfo)
    assert not report.abandoned
    async with triojobs.open_client(conninfo) as client:
        assert await client.result(ordered, shop["emails"]) == shop["Receipt"](f"message-{ordered}")
    with psycopg.connect(conninfo) as conn:
        sent = conn.execute("select recipient from sent order by recipient").fetchall()
        followed = conn.execute(
            "select count(*), min(status) from triojobs.job_status where queue = 'activity'"
        )
        assert sent == [(f"{name}@example.com",) for name in ("ada", "bob", "cy", "dora")]
        assert followed.fetchone() == (4, "done")
    assert "done Receipt" in capsys.readouterr().out


async def test_the_chapter_on_operating_looks_and_acts(
    conninfo: str, shop: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(shop["emails"], shop["SendEmail"]("ada"), metadata={"tenant": 7})
        assert await shop["look_and_act"](conninfo) == 0
        info = await client.get(job_id)
    assert info is not None
    assert info.status == "pending"
    assert capsys.readouterr().out.startswith("emails 1 0 0.")


def test_the_chapter_on_telemetry_watches(conninfo: str, shop: dict[str, Any]) -> None:
    registry = CollectorRegistry()
    seen: dict[str, float | None] = {}
    worked = shop["work_until_idle"]

    async def work(dsn: str) -> triojobs.ShutdownReport:
        report: triojobs.ShutdownReport = await worked(dsn)
        seen["done"] = registry.get_sample_value(
            "triojobs_jobs_settled_total", {"queue": "emails", "outcome": "done"}
        )
        return report

    shop["work_until_idle"] = work
    with triojobs.SyncClient(conninfo) as client:
        client.enqueue(shop["emails"], shop["SendEmail"]("ada@example.com"))
    assert shop["work_watched"](conninfo, registry).settled["done"] == 2
    assert seen == {"done": 1.0}


def test_the_chapter_on_testing_tests(shop: dict[str, Any]) -> None:
    trio.run(shop["test_one_handler_against_a_made_up_job"])
    shop["test_a_cancel_at_any_instant_does_no_harm"]()


async def test_the_chapter_on_testing_drains(conninfo: str, shop: dict[str, Any]) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.enqueue(shop["emails"], shop["SendEmail"]("ada@example.com"))
        await shop["test_all_jobs_until_nothing_is_left"](conninfo)
        assert await client.result(job_id, shop["emails"]) == shop["Receipt"](f"message-{job_id}")


def test_the_sql_enqueues(conninfo: str) -> None:
    (statement,) = re.findall(r"``(select triojobs\.enqueue\(.*\))``", TEXT)
    with psycopg.connect(conninfo) as conn:
        conn.execute(statement)
        found = conn.execute("select queue, status from triojobs.job_status").fetchall()
    assert found == [("emails", "pending")]


def rows_of(chapter: str) -> dict[str, str]:
    """The first two columns of the table in a chapter."""
    text = TEXT.partition(f"\n{chapter}\n{'-' * len(chapter)}\n")[2].partition("\n\n\n")[0]
    return dict(re.findall(r"^``(\w+)``\s+(\S+(?: \S+)*?)\s{2,}", text, re.MULTILINE))


def test_the_settings_are_all_there_with_their_defaults() -> None:
    given = rows_of("Settings")
    options = inspect.signature(triojobs.open_worker_group).parameters
    defaults = {name: p.default for name, p in options.items() if p.kind is p.KEYWORD_ONLY}
    assert given.keys() == defaults.keys()
    shown = {"name": "host:pid", "schema": "triojobs", "job_connections": "≤ 4", "retention": "a week"}
    for name, default in defaults.items():
        text = (
            f'"{default}"'
            if isinstance(default, str)
            else f"{default:g}"
            if type(default) is float
            else str(default)
        )
        assert given[name] == shown.get(name, text), name


def test_the_enqueue_keywords_are_all_there() -> None:
    keywords = {field.name for field in fields(triojobs.NewJob)} - {"payload"}
    assert len(keywords) == 11
    text = TEXT.partition("\nEnqueue\n-------\n")[2].partition("\nWorkers\n")[0]
    assert {name for name in keywords if f"``{name}``" not in text} == set()


def test_every_error_is_named() -> None:
    errors = [n for n in triojobs.__all__ if n.endswith("Error")]
    assert [name for name in errors if name not in TEXT] == []


FAULTS = TEXT.partition("\nWhat happens when…\n")[2].partition("\nThe schema\n")[0]


def faults() -> list[list[str]]:
    """The cells of the table of faults, without its heading."""
    table = FAULTS.partition("   * - fault\n")[2].partition("\n\n")[0]
    _, *found = table.split("\n   * - ")
    return [[" ".join(cell.split()) for cell in re.split(r"\n     -(?= |\n|$)", each)] for each in found]


def test_every_fault_that_has_a_test_is_told_and_every_one_that_is_told_has_a_test() -> None:
    told: set[str] = set()
    for fault, *_ in faults():
        for numbers in re.findall(r"\(([^)]*)\)", fault):
            for first, last in re.findall(r"(\d+[a-d]?)(?:–(\d+))?", numbers):
                told |= {str(n) for n in range(int(first), int(last) + 1)} if last else {first}
    assert told == set(ROWS)


def test_the_bounds_of_faults_follow_from_the_settings() -> None:
    values = {f.name: getattr(GroupOptions(name="x"), f.name) for f in fields(GroupOptions)}
    values["hard_stop_after"] = HARD_STOP_AFTER
    bounds = [cells for cells in faults() if any(cells[2:])]
    assert len(bounds) > 15
    for fault, _, rule, default, measured in bounds:
        (expression,) = re.findall(r"``(.*)``", rule)
        assert f"{eval(expression, {'min': min}, values):g}" == default, fault
        seconds, most = re.match(r"([\d.]+) of ([\d.]+) s", measured).groups()  # type: ignore[union-attr]
        assert float(seconds) <= float(most), fault


def test_the_settings_of_the_fault_tests_are_told() -> None:
    told = dict(re.findall(r"``(\w+)``\s+([\d.]+)(?=,|\s+and|\s)", FAULTS.partition(".. list-table")[0]))
    assert {name: float(seconds) for name, seconds in told.items()} == SHORT
