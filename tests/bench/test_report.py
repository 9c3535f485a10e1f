"""The report's tables and plots, from lines that somebody made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.report import draw, tables, write
from bench.rounds import Line, alone, compare

LINES: list[Line] = [
    compare("drain", "sql", [60.0], [80.0], unit="jobs/s", config="one thread") | {"command": "drain"},
    compare("drain", "pgboss", [60.0], [20.0], unit="jobs/s", config="batchSize 500") | {"command": "drain"},
    alone("idle CPU", [0.03], unit="% of a core", config="as it comes") | {"command": "idle"},
    compare("drain, 5 finished", "none", [9.0], [10.0], unit="jobs/s", config="") | {"command": "history"},
]


def test_each_line_stands_below_its_command() -> None:
    text = "\n".join(tables("PostgreSQL 99", LINES))

    assert "* Server: PostgreSQL 99" in text
    drain, idle = text.index("python -m bench drain"), text.index("python -m bench idle")
    assert drain < text.index("- pgboss") < idle < text.index("idle CPU (% of a core)")
    assert "     - 0.75\n" in text[drain:idle]


def test_lines_tables_and_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots come with the dependency group bench")

    write("PostgreSQL 99", LINES, tmp_path)

    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["what"] for line in written] == [line["what"] for line in LINES]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"drain.svg", "volume.svg"}


def test_the_same_lines_draw_the_same_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots come with the dependency group bench")
    draw(LINES, tmp_path)
    first = (tmp_path / "drain.svg").read_text()

    draw(LINES, tmp_path)

    assert (tmp_path / "drain.svg").read_text() == first
