"""`triojobs enqueue`."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from command import Command
from tools import Connection, count, place, put_one, read

import triojobs


def test_a_job_is_enqueued_as_a_worker_reads_it(triojobs_: Command, db: Connection) -> None:
    job = int(triojobs_.ok("enqueue", "mail", '{"to": "ada", "at": "2030-01-01T00:00:00Z"}'))
    raw = read(db, job)
    typed = triojobs.Queue("mail", dict[str, str])
    assert typed.decode_payload(raw.payload, raw.encoding) == {"to": "ada", "at": "2030-01-01T00:00:00Z"}


def test_every_option_reaches_the_row(triojobs_: Command, db: Connection) -> None:
    options = [
        *("--run-at", "2100-01-31T09:00+01:00"),
        *("--priority", "9"),
        *("--max-attempts", "2"),
        *("--deadline", "2101-01-01T00:00Z"),
        *("--key", "welcome:42"),
        *("--metadata", '{"tenant": 7}'),
    ]
    job = int(triojobs_.ok("enqueue", "mail", "[1]", *options))
    raw = read(db, job)
    assert (raw.run_at, raw.priority, raw.max_attempts, raw.key, raw.metadata) == (
        dt.datetime(2100, 1, 31, 8, tzinfo=dt.UTC),
        9,
        2,
        "welcome:42",
        {"tenant": 7},
    )
    assert raw.deadline == dt.datetime(2101, 1, 1, tzinfo=dt.UTC)


def test_a_delay_is_a_duration(triojobs_: Command, db: Connection) -> None:
    job = int(triojobs_.ok("enqueue", "mail", "1", "--delay", "1h30m", "--timeout", "90s"))
    raw = read(db, job)
    assert 5390 <= (raw.run_at - raw.enqueued_at).total_seconds() <= 5410
    assert db.execute("SELECT timeout FROM triojobs.jobs WHERE id = %s", [job]).fetchone() == (90.0,)
    assert place(db, job)[0] == "scheduled"


def test_a_dash_reads_the_payload_from_stdin(triojobs_: Command, db: Connection) -> None:
    job = int(triojobs_.ok("enqueue", "mail", "-", input='{"to":\n "ådå"}\n'))
    assert json.loads(read(db, job).payload) == {"to": "ådå"}


def test_a_key_that_is_held_is_told_with_what_to_do(triojobs_: Command, db: Connection) -> None:
    first = triojobs_.json("enqueue", "mail", "1", "--key", "k")
    assert first == [{"id": first[0]["id"], "created": True, "replaced": False}]
    line = triojobs_.refused("enqueue", "mail", "2", "--key", "k")
    assert line == (
        f"error: key 'k' of queue 'mail' is held by job {first[0]['id']}; nothing was enqueued; "
        "--on-conflict return gives its id, replace changes it"
    )
    (again,) = triojobs_.json("enqueue", "mail", "2", "--key", "k", "--on-conflict", "return")
    assert again == {"id": first[0]["id"], "created": False, "replaced": False}
    (replaced,) = triojobs_.json("enqueue", "mail", "3", "--key", "k", "--on-conflict", "replace")
    assert replaced == {"id": first[0]["id"], "created": False, "replaced": True}
    assert read(db, first[0]["id"]).payload == b"3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{"], "line 1, column 2"),
        ([""], "this is no JSON"),
        (["ada"], "a text needs its quotes"),
        (["NaN"], "NaN is no JSON"),
        (['{"a": 1, "a": 2}'], "an object has a name twice"),
        (["[" * 100_000], "this is no JSON"),
        (["1", "--metadata", "{"], "'--metadata': this is no JSON"),
        (["1", "--delay", "soon"], "'soon' is not a duration such as 90s, 1h30m or 7d"),
        (["1", "--delay", "-1h"], "is not a duration"),
        (["1", "--delay", "99999999w"], "at most ten years"),
        (["1", "--timeout", "0s"], "is not more than nothing"),
        (["1", "--run-at", "tomorrow"], "'tomorrow' is not a time with its zone"),
        (["1", "--priority", "high"], "'high' is not a valid integer"),
        (["1", "--max-attempts", "0"], "0 is not in the range"),
        (["1", "--delay", "1h", "--run-at", "2100-01-01T00:00Z"], "give one of them"),
        (["1", "--on-conflict", "replace"], "--on-conflict is for a --key"),
        (["1", "--key", "k", "--on-conflict", "ignore"], "'ignore' is not one of"),
    ],
)
def test_what_says_nothing_is_wrong_usage_and_writes_nothing(
    triojobs_: Command, db: Connection, arguments: list[str], words: str
) -> None:
    assert words in triojobs_.refused("enqueue", "mail", *arguments, code=2)
    assert count(db, "jobs") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "1"], "queue is ''"),
        (["q" * 256, "1"], "queue is 'qqq"),
        (["mail", "1", "--key", "k" * 1025], "key is 'kkk"),
        (["mail", "1", "--metadata", "[1]"], "metadata is [1]"),
        (["mail", json.dumps("x" * 1_100_000)], "payload"),
    ],
)
def test_what_is_too_large_is_refused_by_name(
    triojobs_: Command, db: Connection, arguments: list[str], words: str
) -> None:
    assert words in triojobs_.refused("enqueue", *arguments)
    assert count(db, "jobs") == 0


def test_bytes_that_are_no_text_are_refused(triojobs_: Command, db: Connection) -> None:
    assert "stdin is no UTF-8 (byte 1)" in triojobs_.refused("enqueue", "mail", "-", code=2, input=b'"\xff"')
    assert count(db, "jobs") == 0


def test_an_unknown_schema_is_told_with_the_command(triojobs_: Command, db: Connection) -> None:
    put_one(db)
    line = triojobs_.refused("enqueue", "mail", "1", "--schema", "other")
    assert "schema other is missing" in line
    assert "`triojobs migrate`" in line
