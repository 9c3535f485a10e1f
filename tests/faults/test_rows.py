"""Each row of the table of faults has exactly one test, which a reader finds by its number."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROWS = [str(n) for n in range(1, 51)] + ["10b", "10c", "30b", "30c", "30d", "40b", "46b", "46c"]


def test_every_row_has_exactly_one_test() -> None:
    names = [
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    found = Counter(row[1] for name in names if (row := re.match(r"test_row_0?(\d+[a-d]?)_", name)))
    assert found == Counter(ROWS)
