"""The command line: python -m bench MEASURE [--against …] [--jobs N] [--rounds R] [--json]."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from . import drain, enqueue, footprint, latency, profile, report, scale, volume
from .peers import PEERS, installed
from .rounds import Line, show
from .running import BenchError
from .server import private_server

__all__ = ["MEASURES", "main"]

Measure = Callable[..., Iterator[Line]]
MEASURES: Final[dict[str, Measure]] = {
    "drain": drain.drain,
    "enqueue": enqueue.enqueue,
    "latency": latency.latency,
    "idle": footprint.idle,
    "memory": footprint.memory,
    "start": footprint.start,
    "history": volume.history,
    "backlog": volume.backlog,
    "snapshot": drain.snapshot,
    "payload": drain.payload,
    "processes": scale.processes,
    "distance": scale.distance,
    "profile": profile.profile,
}
NAMES: Final = ["sql", *PEERS]


def those_here(context: click.Context, option: click.Parameter, value: str | None) -> list[str]:
    """Return whom to measure beside: those named, or all. Who is not installed is left out, and said."""
    names = NAMES if value is None else [name for name in value.split(",") if name]
    for name in names:
        if name not in NAMES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(NAMES)}")
    return [name for name in names if is_installed(name)]


def is_installed(name: str) -> bool:
    """Return whether this one can be measured; say what to do where it cannot."""
    try:
        return name == "sql" or installed(name).name == name
    except BenchError as exc:
        click.echo(f"left out: {exc}", err=True)
        return False


@click.group()
def main() -> None:
    """Measure triojobs beside bare SQL and its peers, on one private PostgreSQL.

    Results go to stdout, one a line; what is being done goes to stderr.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped


def command(name: str, measure: Measure) -> click.Command:
    """Return the command of a measure."""

    def run(as_json: bool, **options: Any) -> None:
        try:
            with private_server() as server:
                click.echo(server.description, err=True)
                for line in measure(server, **options):
                    show(line | {"server": server.description}, as_json=as_json)
        except BenchError as exc:
            raise click.ClickException(str(exc)) from exc

    options: list[click.Parameter] = [
        click.Option(["--against"], callback=those_here, help="Comma-separated; default: sql and all peers."),
        click.Option(["--jobs"], type=click.IntRange(min=1), help="Default: what the measure is meant for."),
        click.Option(["--rounds"], type=click.IntRange(min=1), default=5, show_default=True),
        click.Option(["--json", "as_json"], is_flag=True, help="One JSON object a line."),
    ]
    return click.Command(name, callback=run, params=options, help=measure.__doc__)


for name, measure in MEASURES.items():
    main.add_command(command(name, measure))


@main.command("report")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def report_all(rounds: int) -> None:
    """Run every measure and write bench/results.jsonl, bench/results.rst and the plots."""
    try:
        report.check_plotting()
        names = [name for name in NAMES if is_installed(name)]
        lines: list[Line] = []
        with private_server() as server:
            for name, measure in MEASURES.items():
                for line in measure(server, against=names, jobs=None, rounds=rounds):
                    lines.append(line | {"command": name})
                    show(line, as_json=False)
                server.forget_templates()
            report.write(server.description, lines)
    except BenchError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main(prog_name="python -m bench")
