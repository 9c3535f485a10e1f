"""`triojobs dev`: a private PostgreSQL, the schema, and the user's workers, in one process."""

from __future__ import annotations

import shlex
import signal
from functools import partial
from typing import TYPE_CHECKING

import click

from .options import schema_option
from .output import note
from .worker import Group, finish, group_options, one_line_of, run_group

if TYPE_CHECKING:
    from .. import ShutdownReport

__all__ = ["dev"]


class Interrupted(Exception):
    """A signal came before the workers ran."""


@click.command()
@group_options
@click.option("--data", metavar="DIR", help="Keep the database here; else it is gone at the end.")
@schema_option
def dev(group: Group, data: str | None, schema: str) -> None:
    """Run workers on an embedded PostgreSQL.

    Nothing has to be installed or set up. Prints the line that another terminal needs to enqueue and look.
    Ctrl-C stops everything; with --data the next one goes on with the same jobs.

    Exit codes: as `triojobs worker`; 130 and 143 when it was interrupted before the workers ran.
    """
    import trio

    from .._options import checked_schema

    checked_schema(schema)
    try:
        outcome = trio.run(_run, group, data, schema)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as exc:
        raise one_line_of(exc) from exc
    if isinstance(outcome, int):
        note("interrupted before the workers ran")
        raise SystemExit(128 + outcome)
    finish(outcome)


async def _run(group: Group, data: str | None, schema: str) -> ShutdownReport | int | None:
    """Returns the report, or the signal that came before the workers ran."""
    import trio

    from .. import migrate, open_embedded_postgres

    interrupted = 0
    report: ShutdownReport | None = None
    # `serve` handles signals while it runs, and puts these back.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                nonlocal interrupted
                async for number in signals:
                    interrupted = number
                    nursery.cancel_scope.cancel(reason="interrupted")

            nursery.start_soon(obey)
            note("starting an embedded PostgreSQL")
            async with open_embedded_postgres(data) as conninfo:
                await trio.to_thread.run_sync(partial(migrate, conninfo, schema=schema))
                given = "" if schema == "triojobs" else f" --schema {schema}"
                click.echo(f"export TRIOJOBS_DSN={_quoted(conninfo)}")
                note(f"with that line another terminal can `triojobs enqueue{given} QUEUE JSON`")
                report = await run_group(conninfo, group, {**group.options, "schema": schema})
            nursery.cancel_scope.cancel()
    return report if report is not None or not interrupted else interrupted


def _quoted(text: str) -> str:
    """Return a text as a shell's word; a conninfo has single quotes of its own, so double ones where they do."""
    return shlex.quote(text) if set('"$`\\!') & set(text) else f'"{text}"'
