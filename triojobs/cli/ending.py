"""How a command ends when it does not end well: one line on stderr and an exit code, never a traceback.

Exit codes, the same for every command: 0 done; 1 refused or failed; 2 wrong usage, nothing was looked at;
130 after Ctrl-C and 143 after SIGTERM, where these are not the way to end the command; 141 when whoever
read stdout has gone.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Final

import click
from click.exceptions import NoArgsIsHelpError

__all__ = ["Failure", "Misuse", "OutputError", "missing", "one_line_at_the_end", "usage_in_one_line"]

INTERRUPTED: Final = 130  # as a shell has it for SIGINT
READER_GONE: Final = 141  # as a shell has it for SIGPIPE, which Python does not die of
CANNOT_WRITE: Final = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
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


@contextmanager
def one_line_at_the_end(ctx: click.Context) -> Iterator[None]:
    """Turn what a command may raise into one line; our own mistakes stay tracebacks."""
    from .._errors import TriojobsError

    try:
        with usage_in_one_line(ctx):
            yield
    except TriojobsError as exc:
        # The notes say how much of a bulk act had been done.
        words = "; ".join([str(exc), *getattr(exc, "__notes__", [])])
        raise Failure(_as_options(words)) from exc
    except ImportError as exc:
        raise Failure(missing(exc)) from exc
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except OutputError as exc:
        raise _output_failed(exc.error) from exc
    except OSError as exc:
        # What else a command opens has a name, and connections have errors of their own.
        if exc.filename is not None or exc.errno not in CANNOT_WRITE:
            raise
        raise _output_failed(exc) from exc


@contextmanager
def usage_in_one_line(ctx: click.Context) -> Iterator[None]:
    """Turn click's words about wrong usage into one line."""
    try:
        yield
    except NoArgsIsHelpError:
        raise
    except click.UsageError as exc:
        command = (exc.ctx or ctx).command_path
        raise Misuse(f"{exc.format_message().rstrip('.')}; see `{command} --help`") from exc


def missing(exc: ImportError) -> str:
    """Return what to install."""
    # "no pq wrapper available", with a list of attempts, or "couldn't import requested psycopg 'c' …"
    if "pq wrapper" in str(exc) or "psycopg" in str(exc):
        return NO_LIBPQ
    return f"{exc}; is an extra of triojobs missing?"


def _as_options(text: str) -> str:
    """Return a hint as it reads on the command line."""
    return text.replace(
        "pass pooled=True (and listen_conninfo=, a direct one)",
        "pass --pooled (and --listen-dsn to a worker)",
    )


def _output_failed(error: OSError) -> SystemExit | Failure:
    """Return how a command ends whose output cannot be written: quietly when nobody reads it any more."""
    # What is still in the buffer would be written, and fail once more, when the interpreter ends.
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    if error.errno == errno.EPIPE:
        return SystemExit(READER_GONE)
    return Failure(
        f"stdout cannot be written: {error.strerror or error}; what was asked for may have been done"
    )
