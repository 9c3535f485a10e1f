"""`triojobs enqueue`: one job from the command line."""

from __future__ import annotations

import datetime as dt
import sys
from typing import Final, Literal

import click

from .ending import Failure, Misuse
from .options import Target, json_option, target_options
from .output import print_json
from .values import DURATION, INSTANT, Duration, parsed_json

__all__ = ["enqueue"]

MOST: Final = 256 * 1024 * 1024  # bytes of stdin that are looked at; a payload is at most 1 MiB


@click.command()
@click.argument("queue", metavar="QUEUE")
@click.argument("payload", metavar="JSON")
@target_options
@click.option("--delay", type=DURATION, metavar="DURATION", help="Due so long from now.")
@click.option("--run-at", type=INSTANT, metavar="TIME", help="Due then: 2030-01-31T09:00Z.")
@click.option(
    "--priority", default=0, type=click.IntRange(0, 2**31 - 1), metavar="N", help="Higher goes first."
)
@click.option("--max-attempts", default=5, show_default=True, type=click.IntRange(1, 2**31 - 1), metavar="N")
@click.option("--timeout", type=Duration(positive=True), metavar="DURATION", help="For each attempt.")
@click.option(
    "--deadline", type=INSTANT, metavar="TIME", help="Not started after it; cancelled when it runs."
)
@click.option("--key", metavar="KEY", help="At most one job of the queue has it.")
@click.option(
    "--on-conflict",
    default="raise",
    show_default=True,
    type=click.Choice(["raise", "return", "replace"]),
    help="When another job has the key: fail, give its id, or put this payload into it if it has not started.",
)
@click.option("--metadata", metavar="OBJECT", help="A JSON object for handlers and operators.")
@json_option
def enqueue(
    target: Target,
    queue: str,
    payload: str,
    delay: float | None,
    run_at: dt.datetime | None,
    priority: int,
    max_attempts: int,
    timeout: float | None,
    deadline: dt.datetime | None,
    key: str | None,
    on_conflict: Literal["raise", "return", "replace"],
    metadata: str | None,
    as_json: bool,
) -> None:
    """Enqueue one job and print its id.

    JSON is the payload: '{"to": "ada@example.com"}'; - reads it from stdin. It is checked before anything is
    written; whether it fits the type of the queue, its worker finds out.
    """
    value = parsed_json(_read_stdin() if payload == "-" else payload, "JSON")
    details = None if metadata is None else parsed_json(metadata, "--metadata")
    if delay is not None and run_at is not None:
        raise click.UsageError("--delay and --run-at say the same thing: give one of them")
    if key is None and on_conflict != "raise":
        raise click.UsageError("--on-conflict is for a --key")
    from .. import DuplicateJobError, JsonCodec, Queue

    # As the SQL function has it: texts stay texts until the queue's type says that they are times.
    jobs: Queue[object, object] = Queue(queue, codec=JsonCodec())
    jobs.encode_payload(value)
    try:
        with target.client() as client:
            entry = client.try_enqueue(
                jobs,
                value,
                delay=delay,
                run_at=run_at,
                priority=priority,
                max_attempts=max_attempts,
                timeout=timeout,
                deadline=deadline,
                key=key,
                metadata=details,
                on_conflict=on_conflict,
            )
    except DuplicateJobError as exc:
        raise Failure(
            f"key {key!r} of queue {queue!r} is held by job {exc.job_id}; nothing was enqueued; "
            "--on-conflict return gives its id, replace changes it"
        ) from None
    if as_json:
        print_json(entry)
    else:
        click.echo(str(entry.id))


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MOST)
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise Misuse(
            f"stdin is no UTF-8 (byte {exc.start}); nothing was enqueued; send the JSON as UTF-8"
        ) from None
