"""`python -m triojobs`, and the entry point of the command `triojobs`."""

from __future__ import annotations

from triojobs.cli import cli

__all__ = ["main"]


def main() -> None:
    """Run the command line on this process's arguments; never returns."""
    cli(prog_name="triojobs")


if __name__ == "__main__":
    main()
