"""The command line: the root group, and what an error looks like.

Commands are imported when they are used, not before: `triojobs migrate` must work where the extras of
another command are not installed, and `--help` must not wait for imports it does not need.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage; both with one line `error: …` on stderr and without
a traceback. `demo` ends with 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from importlib.util import find_spec
from typing import IO, Any, Final

import click
from click.exceptions import NoArgsIsHelpError

from .._errors import TriojobsError

__all__ = ["cli"]

# Command -> the module that has it as an attribute of that name.
COMMANDS: Final = {
    "demo": "triojobs.cli.demo",
    "migrate": "triojobs.cli.schema",
    "verify": "triojobs.cli.schema",
}

BROKEN_PIPE: Final = 141  # as a shell has it for SIGPIPE
NO_LIBPQ: Final = 'psycopg finds no libpq on this machine; pip install "triojobs[binary]", or install libpq'


class Failure(click.ClickException):
    """What the user sees of an error: one line."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line to stderr."""
        click.echo(f"error: {' '.join(self.message.split())}", file=file, err=True)


class OutputError(Exception):
    """The output cannot be written: its reader has gone, or the disk is full."""

    def __init__(self, error: OSError) -> None:
        self.error = error
        super().__init__(str(error))


class Misuse(Failure):
    """A command line that click refuses, also as one line."""

    exit_code = 2


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

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except TriojobsError as exc:
            raise Failure(str(exc)) from exc
        except click.UsageError as exc:
            if isinstance(exc, NoArgsIsHelpError):
                raise
            command = (exc.ctx or ctx).command_path
            raise Misuse(f"{exc.format_message().rstrip('.')}; see `{command} --help`") from exc
        except ImportError as exc:
            raise Failure(_missing(exc)) from exc
        except (OutputError, OSError) as exc:
            raise _output_failed(exc.error if isinstance(exc, OutputError) else exc) from exc


def _output_failed(error: OSError) -> SystemExit | Failure:
    """Return how a command ends whose output cannot be written: quietly when nobody reads it any more."""
    # What is still in the buffer would be written, and fail once more, when the interpreter ends.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return SystemExit(BROKEN_PIPE)
    return Failure(f"{error.strerror or error}")


def _missing(exc: ImportError) -> str:
    # "no pq wrapper available", with a list of attempts, or "couldn't import requested psycopg 'c' …"
    if "pq wrapper" in str(exc) or "psycopg" in str(exc):
        return NO_LIBPQ
    return f"{exc}; is an extra of triojobs missing?"


def _unavailable(name: str, exc: ImportError) -> click.Command:
    def fail(arguments: tuple[str, ...]) -> None:
        raise Failure(_missing(exc)) from exc

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
