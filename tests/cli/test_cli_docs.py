"""docs/cli.rst says what the commands have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from triojobs.cli import COMMANDS, cli

TEXT = (Path(__file__).parents[2] / "docs" / "cli.rst").read_text()
OF_OTHERS = {"--help"}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command and subcommand with its name."""
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())


def options() -> set[str]:
    return {
        option
        for _, command in commands()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }


def test_every_option_that_the_docs_name_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert named - options() - OF_OTHERS == set()


def test_every_command_is_in_the_docs() -> None:
    described = TEXT.partition("\nCommands\n")[2].partition(".. _cli-json:")[0]
    for name, _ in commands():
        group, _, inner = name.partition(" ")
        assert re.search(rf"``{group}\b", described), name
        if inner:
            assert re.search(rf"``{group} [a-z|]*\b{inner}\b", described), name
