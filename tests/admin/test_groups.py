"""Worker groups as an operator sees them."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import pytest
from faces import Face
from tools import SCHEMA, Connection, Group, put

import triojobs
from triojobs._model import Registration
from triojobs._sql import groups, pausing


def register(db: Connection, name: str, **options: Any) -> uuid.UUID:
    """Register a group with everything that it can say of itself."""
    group_id = uuid.uuid4()
    groups.register(db, SCHEMA, Registration(group_id, name, "host-1", 42, "1.2.3", 60.0, **options))
    return group_id


async def test_a_group_is_shown_with_who_it_is_what_it_serves_and_what_it_runs(
    db: Connection, face: Face
) -> None:
    idle = register(db, "idle", queues={"a": 4, "b": 3}, concurrency=5)
    busy = Group(db)
    put(db, 3)
    busy.claim(db, 2)
    page = await face("groups")
    assert page.next is None
    assert [g.id for g in page.items] == [busy.id, idle]  # newest first
    second, first = page.items
    assert (first.name, first.host, first.pid, first.version) == ("idle", "host-1", 42, "1.2.3")
    assert (first.state, first.queues, first.concurrency, first.running) == (
        "alive",
        {"a": 4, "b": 3},
        5,
        0,
    )
    assert (second.queues, second.concurrency, second.running) == (None, None, 2)
    assert first.lease_until - first.beat_at == dt.timedelta(seconds=60)
    assert 0 <= first.lease_age < 60
    assert first.registered_at.tzinfo is dt.UTC
    assert (first.closed_at, first.drain_requested_at, first.drain_reason) == (None, None, None)


async def test_each_state_is_told_apart(db: Connection, face: Face) -> None:
    by_state = {state: Group(db) for state in triojobs.GroupState}
    pausing.drain(db, SCHEMA, by_state[triojobs.GroupState.DRAINING].id, "deploy")
    by_state[triojobs.GroupState.LAPSED].lapse(db)
    groups.close_group(db, SCHEMA, by_state[triojobs.GroupState.CLOSED].id)
    everybody = (await face("groups", closed=True)).items
    assert {g.id: g.state for g in everybody} == {group.id: state for state, group in by_state.items()}
    for shown in everybody:
        assert (shown.closed_at is not None) == (shown.state == "closed")
        assert (shown.lease_age > 600) == (shown.state == "lapsed")
        assert (shown.drain_reason == "deploy") == (shown.state == "draining")
    assert {g.state for g in (await face("groups")).items} == {"alive", "draining", "lapsed"}


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("closed", [True, False])
async def test_pages_hold_every_group_once(db: Connection, face: Face, limit: int, closed: bool) -> None:
    made = [Group(db) for _ in range(7)]
    db.execute("UPDATE triojobs.worker_groups SET registered_at = date_trunc('hour', registered_at)")
    groups.close_group(db, SCHEMA, made[3].id)
    expected = sorted((g.id for g in made if closed or g is not made[3]), reverse=True)
    found: list[uuid.UUID] = []
    after: str | None = None
    while True:
        page = await face("groups", closed=closed, limit=limit, after=after)
        found += [g.id for g in page.items]
        if page.next is None:
            break
        after = page.next
    assert found == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", 0),
        ("limit", 1001),
        ("closed", 1),
        ("after", "x"),
        ("after", "2024-01-01/92bf53f5-b940-40ba-a5e6-8c3bfc0cd3c4"),
        ("after", "2024-01-01T00:00:00+00:00/7"),
        ("after", 7),
    ],
    ids=repr,
)
async def test_what_cannot_be_meant_is_refused(face: Face, field: str, value: Any) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        await face("groups", **{field: value})
    assert caught.value.field == field


async def test_a_drain_is_asked_for_once(db: Connection, group: Group, face: Face) -> None:
    assert await face("drain", group.id, reason="deploy")
    assert await face("drain", group.id, reason="again")
    (shown,) = (await face("groups")).items
    assert (shown.state, shown.drain_reason) == ("draining", "deploy")
    groups.close_group(db, SCHEMA, group.id)
    assert not await face("drain", group.id)
    unknown = uuid.uuid4()
    with pytest.raises(triojobs.GroupNotFoundError) as caught:
        await face("drain", unknown)
    assert caught.value.group_id == unknown
    with pytest.raises(triojobs.OptionError):
        await face("drain", str(group.id))


async def test_a_drained_group_hears_it_at_once(db: Connection, group: Group, face: Face) -> None:
    db.execute(f'LISTEN "triojobs_group_{group.id.hex}"')  # type: ignore[call-overload]
    await face("drain", group.id)
    assert [n.payload for n in db.notifies(timeout=30, stop_after=1)] == [""]
