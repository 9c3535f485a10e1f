"""`python -m triojobs`, and the entry point of the command `triojobs`."""

from __future__ import annotations

import io
import os
import sys

from triojobs.cli import cli

__all__ = ["main"]


def main() -> None:
    """Run the command line on this process's arguments; never returns."""
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Keys and errors hold whatever users wrote; a terminal that cannot show it gets its number.
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="triojobs")


def _open_what_is_closed() -> None:
    """Write to nowhere instead of a standard stream that is closed; the next socket would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for the process's life
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()
