"""`triojobs demo`, the command; what it does is in `demo_course`, with psycopg and trio."""

from __future__ import annotations

from typing import Final

import click

from .options import schema_option

__all__ = ["demo"]

MOST_JOBS: Final = 1_000_000
PATIENCE: Final = 60.0  # seconds; a server that recovers from a crash may need them


@click.command()
@click.option("--jobs", default=300, show_default=True, metavar="N", help="How many e-mails to enqueue.")
@click.option(
    "--dsn",
    metavar="CONNINFO",
    help="Use this server, a libpq URI or key=value string, instead of an embedded one. Never taken from "
    "the environment: the demo makes tables.",
)
@click.option("--data", metavar="DIR", help="Keep the embedded server's data here, to be gone on with.")
@schema_option
@click.option(
    "--patience",
    default=PATIENCE,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a database that went away in the middle.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; progress on stderr.")
def demo(jobs: int, dsn: str | None, data: str | None, schema: str, patience: float, as_json: bool) -> None:
    """Run some hundred jobs on a private PostgreSQL, and count them.

    E-mails are enqueued from Trio, from threads and in transactions of their own. Some fail at first and
    are retried, one fails always, and each that was sent leaves an activity job, committed together with
    its row. The tables of the demo are in the schema triojobs_demo.

    Ctrl-C stops within seconds and gives unfinished jobs back; with --data or --dsn the next demo goes on
    with them, also after a kill -9. A restart of the database is waited out.

    Exit codes: 0 all jobs have ended, 1 an error or a lost job, 2 wrong usage, 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    if not 1 <= jobs <= MOST_JOBS:
        raise click.BadParameter(f"{jobs} is not from 1 to {MOST_JOBS}", param_hint="'--jobs'")
    if dsn is not None and data is not None:
        raise click.UsageError("--data is for the embedded server and --dsn for another: give one of them")
    from .demo_course import run

    run(jobs, dsn=dsn, data=data, schema=schema, patience=patience, as_json=as_json)
