"""`triojobs doctor`: what is wrong with the server, the role, the schema, the tables or the groups, and what to do."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from .options import Target, json_option, target_options
from .output import colour_of, console, one_line, print_json
from .values import DURATION

if TYPE_CHECKING:
    from .._diagnosis import Finding

__all__ = ["doctor"]


@click.command()
@target_options
@click.option(
    "--patience",
    type=DURATION,
    default="1m",
    show_default=True,
    help="What holds back VACUUM for longer is a finding.",
)
@click.option("--strict", is_flag=True, help="Fail on warnings, too.")
@json_option
def doctor(target: Target, patience: float, strict: bool, as_json: bool) -> None:
    """Look for what is wrong, and say what to do about it. Reads only.

    Exit codes: 0 nothing is broken (warnings may be there), 1 something is broken, or with --strict there is a
    warning, 2 wrong usage.
    """
    from .._diagnosis import Level
    from .._options import checked_schema

    checked_schema(target.schema)
    levels = []
    for finding in _findings(target, patience):
        levels.append(finding.level)
        if as_json:
            print_json(finding)
        else:
            _print(finding)
    bad = {Level.BROKEN, Level.WARNING} if strict else {Level.BROKEN}
    if bad.intersection(levels):
        raise SystemExit(1)


def _findings(target: Target, patience: float) -> Iterator[Finding]:
    """Yield findings as they come; a subject that cannot be asked about is one, too."""
    from .. import DatabaseError
    from .._diagnosis import Finding, Level
    from .._sql import diagnosing as sql

    try:
        conn = sql.open_session(target.dsn)
    except DatabaseError as exc:
        yield Finding(Level.BROKEN, "connection", _what(exc), exc.hint)
        return
    with closing(conn):
        yield Finding(Level.OK, "connection", f"the server answers as {conn.info.user}@{conn.info.dbname}")
        try:
            yield from _examined(conn, target, patience)
        except DatabaseError as exc:
            yield Finding(Level.BROKEN, "connection", _what(exc), exc.hint)


def _examined(conn: Any, target: Target, patience: float) -> Iterator[Finding]:
    from .. import _diagnosis as judge
    from .._sql import diagnosing as sql
    from .._sql.failures import translated

    operation = "looking at the server"
    with translated(operation):
        yield from judge.server(sql.server(conn), declared_pooled=target.pooled)
        yield from judge.clock(sql.clock(conn, time.time))
        role = sql.role(conn, target.schema)
        there = sql.schema_exists(conn, target.schema)
        if there:
            yield from judge.role(role)
        else:
            yield from (f for f in judge.role(role) if f.subject == "role")
    fits = yield from _schema(conn, target.schema)
    with translated(operation):
        yield from judge.holders(sql.holders(conn), patience=patience)
        if there:
            yield from judge.tables(sql.tables(conn, target.schema))
        if fits and not any(right.startswith(("SELECT", "USAGE on schema")) for right in role.lacks):
            yield from judge.groups(sql.groups(conn, target.schema))
            yield from judge.queues(sql.queues(conn, target.schema))


def _schema(conn: Any, schema: str) -> Generator[Finding, None, bool]:
    """Yield what is to be said of the schema's version; return whether this version can work with it."""
    from .. import DatabaseError, verify_schema
    from .._diagnosis import Finding, Level

    try:
        verify_schema(conn, schema=schema)
    except DatabaseError as exc:
        yield Finding(Level.BROKEN, "schema", _what(exc), exc.hint)
        return False
    yield Finding(Level.OK, "schema", f"schema {schema} fits this version")
    return True


def _what(exc: Any) -> str:
    """Return the error's words without its remedy."""
    return str(exc).removesuffix(f"; {exc.hint}") if exc.hint else str(exc)


def _print(finding: Finding) -> None:
    head = f"{finding.level:<8} {finding.subject:<10} "
    terminal = console()
    if terminal is None:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        click.echo(f"{head}{one_line(finding.text)}{one_line(remedy)}")
        return
    from rich.text import Text

    indent = " " * len(head)
    width = max(40, terminal.width)
    lines = textwrap.wrap(one_line(finding.text), width, initial_indent=head, subsequent_indent=indent)
    text = Text("\n".join(lines))
    text.stylize(colour_of(finding.level), 0, len(finding.level))
    terminal.print(text, soft_wrap=True)
    if finding.remedy:
        wrapped = textwrap.wrap(
            finding.remedy, width, initial_indent=indent + "→ ", subsequent_indent=indent + "  "
        )
        terminal.print(Text("\n".join(wrapped), style="bold"), soft_wrap=True)
