"""A group that somebody asks to drain is told by its beat, and hears at once that a beat is due."""

from __future__ import annotations

from contract_rig import Group, World

from triojobs._store import Store


async def test_each_beat_tells_that_the_group_shall_drain_and_why(
    store: Store, group: Group, rival: Group, world: World
) -> None:
    async with group.beating() as events, rival.beating() as others:
        world.drain(group.id, "deploy")
        world.drain(group.id, "again")
        for told in (1, 2):
            store.beat_now(group.id)
            await events.wait_for(lambda told=told: len(events.drains) >= told)  # type: ignore[misc]
    assert set(events.drains) == {"deploy"}
    assert others.drains == []


async def test_the_group_that_listens_is_told_to_beat(group: Group, world: World) -> None:
    async with group.listening() as events:
        world.drain(group.id, "deploy")
        await events.wait_for(lambda: events.heard == ["group"])
