"""`python -m triojobs`, and the entry point of the command `triojobs`."""

from __future__ import annotations

import io
import sys

from triojobs.cli import cli

__all__ = ["main"]


def main() -> None:
    """Run the command line on this process's arguments; never returns."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Keys and errors hold whatever users wrote; a terminal that cannot show it gets its number.
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="triojobs")


if __name__ == "__main__":
    main()
