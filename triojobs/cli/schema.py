"""`triojobs migrate` and `triojobs verify`: the schema from the command line."""

from __future__ import annotations

import click

from .options import dsn_option, schema_option

__all__ = ["migrate", "verify"]


@click.command()
@dsn_option(required=False)
@schema_option
@click.option(
    "--sql",
    "as_sql",
    is_flag=True,
    help="Print a script for psql instead; with a DSN, of what is pending there.",
)
@click.option(
    "--lock-wait",
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait while another process migrates.",
)
def migrate(dsn: str | None, schema: str, as_sql: bool, lock_wait: float) -> None:
    """Create the schema, or bring it up to this version."""
    # psycopg is imported here, so that --help works where libpq is missing.
    from .._sql import schema as runner

    if as_sql:
        click.echo(runner.pending_sql(dsn, schema=schema), nl=False)
        return
    if dsn is None:
        raise click.UsageError("Missing option '--dsn' (env var: 'TRIOJOBS_DSN').")
    applied = runner.migrate(dsn, schema=schema, lock_wait=lock_wait)
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo(f"schema {schema} is up to date")


@click.command()
@dsn_option(required=True)
@schema_option
def verify(dsn: str, schema: str) -> None:
    """Check that this version can work with the schema."""
    from .._sql import schema as runner

    runner.verify_schema(dsn, schema=schema)
    click.echo(f"schema {schema} fits this version")
