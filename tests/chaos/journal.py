"""Append-only files in which processes say what they do.

One line is one write to a file opened with O_APPEND: what was written survives the death of the
process that wrote it, and lines of threads do not mix. Nothing is synced to disk, because processes
are killed and the machine is not. The clock is the machine's monotonic one, the same in all processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Journal", "clock", "read_journals"]

clock = time.monotonic


class Journal:
    """The file of one process.

    Args:
        path: its name without suffix is the name of the process in all checks.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: str, /, **fields: Any) -> None:
        """Write what happened, and when unless `at` says it."""
        fields.setdefault("at", clock())
        line = json.dumps({"event": event, **fields}, separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_journals(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (process, event) of every line of every journal in the directory."""
    for path in sorted(directory.glob("*.journal")):
        for line in path.read_bytes().splitlines():
            yield path.stem, json.loads(line)
