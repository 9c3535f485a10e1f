"""Options that several commands share: where the tables are, who may be asked, how long is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from .values import parsed_duration

if TYPE_CHECKING:
    from .. import Retention, SyncAdmin, SyncClient

__all__ = [
    "Decorator",
    "Target",
    "dsn_option",
    "json_option",
    "keep_option",
    "retention_of",
    "schema_option",
    "target_options",
    "yes_option",
]

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

CALL_TIMEOUT: Final = 10.0  # seconds for one call of the database


def dsn_option(*, required: bool, pooled: bool = False) -> Decorator:
    """Return the option `--dsn`, the same for every command that talks to the database."""
    return click.option(
        "--dsn",
        required=required,
        envvar="TRIOJOBS_DSN",
        show_envvar=True,
        metavar="CONNINFO",
        help="A libpq URI or key=value string" + ("." if pooled else ", without a pooler in between."),
    )


schema_option: Decorator = click.option(
    "--schema", default="triojobs", show_default=True, metavar="NAME", help="The schema of the job tables."
)

pooled_option: Decorator = click.option(
    "--pooled", is_flag=True, help="The DSN leads to PgBouncer in transaction mode."
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object a line, instead of a table."
)

yes_option: Decorator = click.option("--yes", "-y", is_flag=True, help="Do it without asking.")

keep_option: Decorator = click.option(
    "--keep",
    multiple=True,
    metavar="[QUEUE:]STATUS=DURATION",
    help="How long to keep done, killed or cancelled jobs, in all queues or in one: done=7d, "
    "audit:done=forever. Repeatable; what is not named keeps its default of 7d for done, 30d for the others.",
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a command works."""

    dsn: str
    schema: str
    pooled: bool

    def admin(self) -> SyncAdmin:
        """Return an admin to be entered."""
        from .. import SyncAdmin

        return SyncAdmin(self.dsn, schema=self.schema, call_timeout=CALL_TIMEOUT, pooled=self.pooled)

    def client(self) -> SyncClient:
        """Return a client to be entered."""
        from .. import SyncClient

        return SyncClient(self.dsn, schema=self.schema, call_timeout=CALL_TIMEOUT, pooled=self.pooled)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--dsn`, `--schema` and `--pooled`; it gets them as `target`."""

    @wraps(command)
    def with_target(dsn: str, schema: str, pooled: bool, **given: Any) -> Any:
        return command(target=Target(dsn, schema, pooled), **given)

    return dsn_option(required=True, pooled=True)(schema_option(pooled_option(with_target)))


def retention_of(keep: tuple[str, ...]) -> Retention:
    """Return what the `--keep` options say."""
    from .. import Retention

    rules: dict[str, dict[str, Any]] = {}
    for given in keep:
        place, _, duration = given.rpartition("=")
        queue, _, status = place.rpartition(":")
        if status not in ("done", "killed", "cancelled"):
            raise click.BadParameter(
                f"{given!r} is not [QUEUE:]STATUS=DURATION with done, killed or cancelled as STATUS",
                param_hint="'--keep'",
            )
        try:
            rules.setdefault(queue, {})[status] = parsed_duration(duration, forever=True)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="'--keep'") from None
    general = rules.pop("", {})
    # A queue's own rule says everything about it, so it starts from the general one.
    queues = {name: replace(Retention(), **{**general, **rule}) for name, rule in rules.items()}
    return replace(Retention(), **general, queues=queues)
