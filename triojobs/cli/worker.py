"""`triojobs worker`: a worker group from the user's module, under a program's signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click

from .ending import Failure
from .health import ADDRESS, Health
from .loading import load, opened
from .options import Decorator, Target, keep_option, retention_of, target_options
from .output import note
from .values import DURATION, Duration

if TYPE_CHECKING:
    from .. import ShutdownReport

__all__ = ["Group", "group_options", "one_line_of", "run_group", "worker"]

LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True, slots=True)
class Group:
    """What to run: the attribute's name, what it is, the options of `serve`, where to tell its health."""

    name: str
    thing: object
    options: dict[str, Any]
    health: tuple[str, int] | None = None


def group_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a worker group; it gets them as `group`."""
    options: list[Decorator] = [
        click.argument("attribute", metavar="MODULE:ATTRIBUTE"),
        click.option("--name", metavar="TEXT", help="What the group is called; default host:pid."),
        click.option(
            "--concurrency",
            type=click.IntRange(1),
            metavar="N",
            help="At most so many jobs at once, of all queues.",
        ),
        click.option(
            "--grace-period",
            type=DURATION,
            default="10s",
            show_default=True,
            help="How long handlers may go on after a stop.",
        ),
        click.option(
            "--lease-duration",
            type=Duration(positive=True),
            default="30s",
            show_default=True,
            help="How long a group that died keeps its jobs.",
        ),
        keep_option,
        click.option(
            "--log-level",
            type=click.Choice(LEVELS),
            default="info",
            show_default=True,
            help="What goes to stderr, unless the module configures logging.",
        ),
        click.option(
            "--health",
            type=ADDRESS,
            metavar="HOST:PORT",
            help="Answer /livez and /readyz here, and /metrics where prometheus-client is installed.",
        ),
    ]

    @wraps(command)
    def with_group(
        attribute: str,
        name: str | None,
        concurrency: int | None,
        grace_period: float,
        lease_duration: float,
        keep: tuple[str, ...],
        log_level: str,
        health: tuple[str, int] | None,
        **given: Any,
    ) -> Any:
        retention = retention_of(keep)
        thing = load(attribute)
        logging.basicConfig(level=log_level.upper(), format=LOG_FORMAT)
        options = {
            "name": name,
            "concurrency": concurrency,
            "grace_period": grace_period,
            "lease_duration": lease_duration,
            # As far as the defaults go, in the same proportions: 6 and 5 of 30 seconds.
            "beat_interval": lease_duration / 5,
            "lease_margin": lease_duration / 6,
            "retention": retention,
        }
        return command(group=Group(attribute, thing, options, health), **given)

    given_all: Callable[..., Any] = with_group
    for option in reversed(options):
        given_all = option(given_all)
    return given_all


@click.command()
@group_options
@target_options
@click.option("--listen-dsn", metavar="CONNINFO", help="A direct one for LISTEN when --dsn is pooled.")
def worker(target: Target, group: Group, listen_dsn: str | None) -> None:
    """Run workers of a module until SIGTERM or SIGINT.

    The attribute is a triojobs.Worker, a list of them, or a function without arguments that gives these: plain,
    async, or an async context manager. The current directory is importable.

    The first signal stops gracefully, the second cancels the handlers, the third ends the process at once.

    Exit codes: 0 stopped as asked, 1 an error, or jobs had to be left to others, 2 wrong usage.
    """
    import trio

    options = {
        **group.options,
        "pooled": target.pooled,
        "schema": target.schema,
        "listen_conninfo": listen_dsn,
    }
    try:
        report = trio.run(run_group, target.dsn, group, options)
    except KeyboardInterrupt:  # before the signals are received
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as exc:
        raise one_line_of(exc) from exc
    finish(report)


async def run_group(conninfo: str, group: Group, options: dict[str, Any]) -> ShutdownReport | None:
    """Serve until the end; None: the attribute did its work by itself."""
    with nullcontext() if group.health is None else Health(group.health) as health:
        return await _run_beside(health, conninfo, group, options)


async def _run_beside(
    health: Health | None, conninfo: str, group: Group, options: dict[str, Any]
) -> ShutdownReport | None:
    from functools import partial

    import trio

    from .. import WorkerGroup, serve

    async with opened(group.thing, group.name) as workers:
        if workers is None:
            return None
        async with trio.open_nursery() as nursery:
            running: WorkerGroup = await nursery.start(partial(serve, conninfo, workers, **options))
            served = ", ".join(f"{each.queue.name} ({each.concurrency})" for each in workers)
            note(f"worker group {running.name} serves {served}; Ctrl-C stops it")
            if health is not None:
                async with health.beside(running):
                    await running.wait_stopped()
    return running.report


def finish(report: ShutdownReport | None) -> None:
    """Say what was done, and fail when something had to be left."""
    if report is None:
        note("it has ended by itself, and gave no workers")
        return
    settled = ", ".join(f"{count} {outcome}" for outcome, count in report.settled.items() if count)
    note(f"stopped in {report.duration:.1f} s: {settled or 'nothing was done'}; {report.released} given back")
    if report.abandoned or report.unknown_claims:
        ids = ", ".join(map(str, report.abandoned[:10])) + (", …" if len(report.abandoned) > 10 else "")
        raise Failure(
            f"the database could not be reached in time: {len(report.abandoned)} job(s) stay running until their "
            f"lease ends ({ids or 'unknown'}); any other group takes them then"
        )


def one_line_of(exc: Exception) -> Exception:
    """Return what ends the command: one line for what the user can mend, else the error itself."""
    from .. import TriojobsError
    from .._errors import sole_error

    alone = sole_error(exc)
    if isinstance(alone, (TriojobsError, click.ClickException)):
        return alone
    return exc
