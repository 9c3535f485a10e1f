"""The command line: the root group. How commands end when they fail is in `ending`.

Commands are imported when they are used, not before: `triojobs migrate` must work where the extras of
another command are not installed, and `--help` must not wait for imports it does not need.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, Final

import click

from .ending import Failure, missing, one_line_at_the_end, usage_in_one_line

__all__ = ["cli"]

# Command -> the module that has it as an attribute of that name.
COMMANDS: Final = {
    "demo": "triojobs.cli.demo",
    "dev": "triojobs.cli.dev",
    "doctor": "triojobs.cli.doctor",
    "enqueue": "triojobs.cli.enqueue",
    "groups": "triojobs.cli.groups",
    "jobs": "triojobs.cli.jobs",
    "migrate": "triojobs.cli.schema",
    "prune": "triojobs.cli.prune",
    "queues": "triojobs.cli.queues",
    "stats": "triojobs.cli.stats",
    "verify": "triojobs.cli.schema",
    "worker": "triojobs.cli.worker",
}


class LazyGroup(click.Group):
    """A group whose commands are imported by name; errors of triojobs end it with one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands that this installation has."""
        return [name for name, module in COMMANDS.items() if find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; one whose imports are missing is still listed, and fails when it is run."""
        if cmd_name not in self.list_commands(ctx):
            return None
        try:
            command = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name)
        except ImportError as exc:
            return _unavailable(cmd_name, exc)
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options that stand before the command."""
        with usage_in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        with one_line_at_the_end(ctx):
            return super().invoke(ctx)


def _unavailable(name: str, exc: ImportError) -> click.Command:
    def fail(arguments: tuple[str, ...]) -> None:
        raise Failure(missing(exc)) from exc

    return click.Command(
        name,
        callback=fail,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
        short_help="(not installed)",
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="triojobs", prog_name="triojobs")
def cli() -> None:
    """A durable job queue on PostgreSQL for Trio programs."""
