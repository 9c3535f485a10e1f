"""The report: runs everything, keeps the lines, draws what README.rst shows.

`python -m bench report` writes, into bench/: results.jsonl (every line), results.rst (the same as tables,
with machine, versions and commands), and the plots as SVG.
"""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from .peers import PEERS
from .rounds import Line, number
from .running import BenchError

__all__ = ["check_plotting", "draw", "tables", "write"]

HERE: Final = Path(__file__).parent
OURS: Final = "#c2410c"
OTHERS: Final = "#64748b"
Bar: TypeAlias = tuple[float, tuple[float, float] | None]


def machine() -> str:
    """Return what it ran on, in one line."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if "MemTotal" in line), 0)
    return (
        f"{os.cpu_count()} x {cpu}, {memory / 2**20:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def check_plotting() -> None:
    """Raise BenchError before an hour has passed, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("matplotlib draws the plots; run: uv run --group bench python -m bench report")


def write(server: str, lines: Sequence[Line], directory: Path = HERE) -> None:
    """Write the lines, the tables and the plots."""
    (directory / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "results.rst").write_text("\n".join(tables(server, lines)) + "\n")
    draw(lines, directory)


def tables(server: str, lines: Sequence[Line]) -> Iterator[str]:
    """Yield results.rst, line by line."""
    title = "Results"
    yield from (title, "=" * len(title), "")
    yield f"Measured {dt.date.today().isoformat()} by ``python -m bench report``, which writes this page."
    yield from ("", f"* Machine: {machine()}", f"* Server: {server}")
    yield from (f"* {peer.name}: {peer.version}" for peer in PEERS.values())
    yield ""
    for command in dict.fromkeys(line["command"] for line in lines):
        heading = f"python -m bench {command}"
        yield from (heading, "-" * len(heading), "", ".. list-table::", "   :header-rows: 1", "")
        yield from _row("measure", "beside", "ours", "theirs", "ratio", "lowest to highest", "configuration")
        for line in lines:
            if line["command"] == command:
                yield from _row(*_cells(line))
        yield ""


def _cells(line: Line) -> Iterator[str]:
    low, high = line["spread"]
    yield f"{line['what']} ({line['unit']})"
    yield line["against"] or ""
    yield number(line["ours"])
    yield "" if line["peer"] is None else number(line["peer"])
    yield "" if line["ratio"] is None else f"{line['ratio']:.2f}"
    yield f"{number(low)} to {number(high)}" if line["ratio"] is None else f"{low:.2f} to {high:.2f}"
    yield line["config"]


def _row(first: str, *cells: str) -> Iterator[str]:
    yield f"   * - {first}"
    yield from (f"     - {cell}".rstrip() for cell in cells)


def draw(lines: Sequence[Line], directory: Path) -> None:
    """Draw the plots; matplotlib comes with the dependency group `bench`."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "triojobs", "font.size": 9, "axes.spines.top": False}
    drains = {line["against"]: line for line in lines if line["what"] == "drain"}
    if drains:
        bars(directory / "drain.svg", "No-op jobs run to their outcome, jobs a second", sides(drains))
    for name, title, pick in (
        ("enqueue", "One producer, one job a commit, jobs a second", "enqueue, one at a time"),
        ("bulk", "10,000 jobs in a call, jobs a second", "enqueue, 10,000 in a call"),
        ("latency", "From enqueue to handler, 99th percentile, ms", "latency p99"),
        ("memory", "Peak memory of a draining worker, MB", "memory, draining"),
    ):
        found = {line["against"]: line for line in lines if line["what"] == pick and line["against"]}
        if found:
            bars(directory / f"{name}.svg", title, sides(found))
    ratios = {
        line["what"].removeprefix("drain, ").removesuffix(" (triojobs)"): line
        for line in lines
        if line["against"] in ("none", "triojobs without", "one process", "triojobs near")
        or line["what"].endswith("payload (triojobs)")
    }
    if ratios:
        values = {what: (line["ratio"], tuple(line["spread"])) for what, line in ratios.items()}
        bars(directory / "volume.svg", "Rate of our drain under a load, without it: 1.0", values)


def sides(lines: Mapping[str, Line]) -> dict[str, Bar]:
    """Return ours and everybody else's values."""
    bars: dict[str, Bar] = {"triojobs": (next(iter(lines.values()))["ours"], None)}
    return bars | {name: (line["peer"], None) for name, line in lines.items()}


def bars(path: Path, title: str, values: Mapping[str, Bar]) -> None:
    """Draw horizontal bars."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(values)))
    names = list(values)
    axes.barh(
        names,
        [value for value, _ in values.values()],
        color=[OTHERS if "triojobs" in names and name != "triojobs" else OURS for name in names],
    )
    for at, (value, spread) in enumerate(values.values()):
        if spread is not None:
            axes.plot(spread, [at, at], color="black", linewidth=1)
        end = value if spread is None else max(value, spread[1])
        axes.annotate(f" {value:,.3g}" if value < 1000 else f" {value:,.0f}", (end, at), va="center")
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=9)
    axes.spines["right"].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
