"""`triojobs jobs list`, `show` and `explain`."""

from __future__ import annotations

import pytest
from command import Command
from tools import Connection, Group, make_due, put, put_one

from triojobs._model import Outcome


def ids(listed: list[dict[str, object]]) -> list[object]:
    return [job["id"] for job in listed]


def test_a_list_has_the_newest_first_as_one_object_a_line(triojobs_: Command, db: Connection) -> None:
    jobs = put(db, 3, metadata='{"tenant": 7}')
    listed = triojobs_.json("jobs", "list")
    assert ids(listed) == jobs[::-1]
    assert listed[0] | {"run_at": 0, "enqueued_at": 0} == {
        "id": jobs[2],
        "queue": "q",
        "status": "pending",
        "attempts": 0,
        "max_attempts": 5,
        "priority": 0,
        "run_at": 0,
        "key": None,
        "metadata": {"tenant": 7},
        "group": None,
        "enqueued_at": 0,
        "claimed_at": None,
        "finished_at": None,
        "deadline": None,
        "error": None,
        "cancel_reason": None,
    }


def test_a_list_goes_on_where_the_one_before_ended(triojobs_: Command, db: Connection) -> None:
    jobs = put(db, 5)
    first = triojobs_("jobs", "list", "--limit", "2", "--oldest-first", "--json")
    words, _, cursor = first.stderr.strip().rpartition(" ")
    assert (first.exit_code, words) == (0, "more follow: --after")
    rest = triojobs_.json("jobs", "list", "--oldest-first", "--after", cursor)
    assert ids(rest) == jobs[2:]


def test_without_a_limit_every_page_is_listed(triojobs_: Command, db: Connection) -> None:
    jobs = put(db, 2345)
    assert ids(triojobs_.json("jobs", "list", "--limit", "0", "--oldest-first")) == jobs


def test_filters_narrow_a_list(triojobs_: Command, db: Connection, group: Group) -> None:
    done = put_one(db, queue="mail", key="k", metadata='{"tenant": 7}')
    group.settle(db, group.claim_one(db, queue="mail"), Outcome.DONE)
    waiting = put_one(db, queue="mail")
    other = put_one(db, queue="other")
    expected: dict[tuple[str, ...], list[int]] = {
        ("--queue", "mail"): [waiting, done],
        ("--status", "done"): [done],
        ("--status", "done", "--status", "pending"): [other, waiting, done],
        ("--key", "k"): [done],
        ("--metadata", '{"tenant": 7}'): [done],
        ("--finished-since", "1h"): [done],
        ("--finished-until", "1h"): [],
        ("--enqueued-since", "2030-01-01T00:00Z"): [],
        ("--enqueued-until", "2030-01-01T00:00Z"): [other, waiting, done],
    }
    for options, jobs in expected.items():
        assert ids(triojobs_.json("jobs", "list", *options)) == jobs, options


def test_a_table_has_a_line_for_each_job(triojobs_: Command, db: Connection, group: Group) -> None:
    job = put_one(db, key="welcome:42")
    group.settle(db, group.claim_one(db), Outcome.FAILED, error="ValueError: no\nTraceback …", delay=60.0)
    head, line = triojobs_.ok("jobs", "list").splitlines()
    assert head.split()[:4] == ["ID", "QUEUE", "STATUS", "TRIES"]
    assert line.split()[:4] == [str(job), "q", "failed", "1/5"]
    assert line.endswith("welcome:42  ValueError: no")


def test_control_characters_of_a_job_do_not_reach_the_terminal(
    triojobs_: Command, db: Connection, group: Group
) -> None:
    job = put_one(db, queue="\x1b[2Jq", key="\x1b[2Jgone\r")
    group.settle(db, group.claim_one(db, queue="\x1b[2Jq"), Outcome.FAILED, error="a\x1b[2Jb\rc", delay=0.0)
    commands = [
        ["jobs", "list"],
        ["jobs", "show", str(job)],
        ["jobs", "explain", str(job)],
        ["queues", "list"],
    ]
    for command in [*commands, ["stats"], ["stats", "--watch", "--count", "1"], ["doctor"]]:
        text = triojobs_.ok(*command)
        assert "\x1b" not in text, command
        assert "\r" not in text, command


def test_an_unknown_queue_is_told_with_the_name_that_was_meant(triojobs_: Command, db: Connection) -> None:
    put_one(db, queue="emails")
    line = triojobs_.refused("jobs", "list", "--queue", "emials")
    assert line == "error: there is no queue 'emials'; did you mean 'emails'? see `triojobs queues list`"


def test_a_known_queue_without_such_jobs_is_an_empty_list(triojobs_: Command, db: Connection) -> None:
    put_one(db)
    done = triojobs_("jobs", "list", "--queue", "q", "--status", "killed")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no job matches\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--status", "lost"], "'lost' is not one of"),
        (["--metadata", "{"], "this is no JSON"),
        (["--metadata", "[1]"], "[1] is no JSON object"),
        (["--enqueued-since", "yesterday"], "'yesterday' is not a time with its zone"),
        (["--enqueued-since", "2030-01-01T00:00"], "is not a time with its zone"),
        (["--limit", "many"], "'many' is not a valid integer"),
    ],
)
def test_a_filter_that_says_nothing_is_wrong_usage(
    triojobs_: Command, options: list[str], words: str
) -> None:
    assert words in triojobs_.refused("jobs", "list", *options, code=2)


def test_a_cursor_of_something_else_is_refused(triojobs_: Command) -> None:
    assert "after is 'x'" in triojobs_.refused("jobs", "list", "--after", "x")


def test_show_has_payload_result_and_all_attempts(triojobs_: Command, db: Connection, group: Group) -> None:
    job = int(triojobs_.ok("enqueue", "q", '{"to": "ada"}'))
    group.settle(db, group.claim_one(db), Outcome.FAILED, error="ValueError: no")
    make_due(db)
    group.settle(db, group.claim_one(db), Outcome.DONE, result=b"42", encoding="json")
    (shown,) = triojobs_.json("jobs", "show", str(job))
    assert (shown["payload"], shown["result"], shown["status"]) == ({"to": "ada"}, 42, "done")
    assert [(a["number"], a["status"], a["error"]) for a in shown["history"]] == [
        (1, "failed", "ValueError: no"),
        (2, "done", None),
    ]
    text = triojobs_.ok("jobs", "show", str(job))
    assert "payload  " in text
    assert '{"to": "ada"}' in text


def test_bytes_that_are_no_payload_are_shown_all_the_same(triojobs_: Command, db: Connection) -> None:
    job = put_one(db, payload=b"\xff\x00")
    (shown,) = triojobs_.json("jobs", "show", str(job))
    assert shown["payload"] == "/wA="


def test_explain_says_why_and_what_would_change_it(triojobs_: Command, db: Connection) -> None:
    job = put_one(db)
    why, remedy = triojobs_.ok("jobs", "explain", str(job)).splitlines()
    assert why == f"job {job} (pending): no living worker group serves queue 'q'"
    assert remedy == "to change that: start a group with a worker for this queue"
    (found,) = triojobs_.json("jobs", "explain", str(job))
    assert (found["job_id"], found["reason"]) == (job, "no group")


@pytest.mark.parametrize("command", ["show", "explain"])
def test_an_unknown_id_is_one_line(triojobs_: Command, command: str) -> None:
    assert "there is no job 999; check the id" in triojobs_.refused("jobs", command, "999")


@pytest.mark.parametrize("given", ["0", "-1", "x", "9223372036854775808"])
def test_what_is_no_id_is_wrong_usage(triojobs_: Command, given: str) -> None:
    assert triojobs_("jobs", "show", "--", given).exit_code == 2
