"""`triojobs queues` and `triojobs groups`."""

from __future__ import annotations

import uuid

import pytest
from command import Command
from tools import Connection, Group, count, put, put_one

from triojobs._model import Registration
from triojobs._sql import groups as groups_sql

LISTED = {
    "name", "ready", "scheduled", "running", "failed", "exact", "oldest_due_at", "oldest_due_age", "groups",
    "slots", "paused_at", "pause_reason", "window", "ended", "throughput", "wait", "run",
}  # fmt: skip


def register(db: Connection, name: str, **queues: int) -> uuid.UUID:
    group_id = uuid.uuid4()
    groups_sql.register(
        db, "triojobs", Registration(group_id, name, "host", 1, "0", lease_duration=600.0, queues=queues)
    )
    return group_id


def test_queues_are_listed_with_their_counts(triojobs_: Command, db: Connection, group: Group) -> None:
    put(db, 3, queue="mail")
    put_one(db, queue="mail", delay=3600.0)
    group.claim(db, 1, queue="mail")
    register(db, "web", mail=4)
    (queue,) = triojobs_.json("queues", "list")
    assert queue.keys() == LISTED
    assert [queue[name] for name in ("name", "ready", "scheduled", "running", "groups", "slots")] == [
        "mail", 2, 1, 1, 1, 4,
    ]  # fmt: skip
    head, line = triojobs_.ok("queues", "list").splitlines()
    assert head.split()[:4] == ["QUEUE", "READY", "LATER", "RUNNING"]
    assert line.split()[:4] == ["mail", "2", "1", "1"]
    assert line.endswith("served")


def test_queues_are_listed_page_by_page(triojobs_: Command, db: Connection) -> None:
    for name in ("a", "b", "c"):
        put_one(db, queue=name)
    first = triojobs_("queues", "list", "--limit", "2", "--json")
    assert first.stderr == "more follow: --after b\n"
    assert [queue["name"] for queue in triojobs_.json("queues", "list", "--after", "b")] == ["c"]


def test_a_queue_is_paused_and_resumed(triojobs_: Command, db: Connection, group: Group) -> None:
    put_one(db)
    assert triojobs_.ok("queues", "pause", "q", "--reason", "a bad deploy") == "queue q is paused\n"
    assert triojobs_.ok("queues", "pause", "q") == "queue q is paused, as it was before; its reason stays\n"
    assert triojobs_.json("queues", "list")[0]["pause_reason"] == "a bad deploy"
    assert group.claim(db) == []
    assert triojobs_.ok("queues", "resume", "q") == "queue q is resumed\n"
    assert len(group.claim(db)) == 1
    assert triojobs_.ok("queues", "resume", "q") == "queue q was not paused\n"


def test_a_queue_that_nobody_knows_is_paused_only_as_a_new_one(triojobs_: Command, db: Connection) -> None:
    put_one(db, queue="emails")
    line = triojobs_.refused("queues", "pause", "email")
    assert line.startswith("error: there is no queue 'email'; did you mean 'emails'?")
    assert line.endswith("or --new to pause it before its first job")
    assert count(db, "paused_queues") == 0
    triojobs_.ok("queues", "pause", "email", "--new")
    assert count(db, "paused_queues") == 1


def test_a_queue_that_nobody_knows_is_not_resumed(triojobs_: Command) -> None:
    assert "there is no queue 'nowhere'" in triojobs_.refused("queues", "resume", "nowhere")


def test_groups_are_listed_with_state_and_queues(triojobs_: Command, db: Connection) -> None:
    web = register(db, "web", mail=4, report=1)
    (group,) = triojobs_.json("groups", "list")
    assert (group["id"], group["name"], group["state"]) == (str(web), "web", "alive")
    assert group["queues"] == {"mail": 4, "report": 1}
    head, line = triojobs_.ok("groups", "list").splitlines()
    assert head.split()[:4] == ["ID", "NAME", "HOST", "STATE"]
    assert line.split()[:4] == [str(web)[:8], "web", "host:1", "alive"]
    assert line.endswith("mail (4), report (1)")


def test_closed_groups_are_listed_when_asked_for(triojobs_: Command, db: Connection) -> None:
    register(db, "web", mail=4)
    db.execute("UPDATE triojobs.worker_groups SET closed_at = now()")
    assert triojobs_.json("groups", "list") == []
    assert [group["state"] for group in triojobs_.json("groups", "list", "--closed")] == ["closed"]


@pytest.mark.parametrize("called", ["id", "beginning", "name"])
def test_a_group_is_drained_by_id_beginning_or_name(triojobs_: Command, db: Connection, called: str) -> None:
    web = register(db, "web", mail=4)
    register(db, "worker", mail=4)
    names = {"id": str(web), "beginning": str(web)[:8], "name": "web"}
    assert triojobs_.ok("groups", "drain", names[called]) == f"group {web} drains\n"
    assert db.execute("SELECT group_id FROM triojobs.drains").fetchall() == [(web,)]


def test_of_two_groups_with_one_name_neither_is_drained(triojobs_: Command, db: Connection) -> None:
    ids = [register(db, "web", mail=4) for _ in range(2)]
    line = triojobs_.refused("groups", "drain", "web")
    assert all(str(each)[:8] in line for each in ids)
    assert count(db, "drains") == 0


@pytest.mark.parametrize("given", ["nobody", "00000000-0000-0000-0000-000000000000", ""])
def test_an_unknown_group_is_one_line(triojobs_: Command, given: str) -> None:
    assert "worker group" in triojobs_.refused("groups", "drain", given)
