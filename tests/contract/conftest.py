"""One suite, two stores: MemoryStore and PostgresStore, both on the real clock."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from contract_rig import Group, MemoryWorld, PostgresWorld, World

from triojobs._store import Store


@pytest.fixture(params=["memory", "postgres"])
def world(request: pytest.FixtureRequest) -> World:
    """A database of either kind."""
    if request.param == "memory":
        return MemoryWorld()
    return PostgresWorld(request.getfixturevalue("database"))


@pytest.fixture
async def store(world: World) -> AsyncIterator[Store]:
    """An open store."""
    store = world.make_store()
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def other_store(world: World) -> AsyncIterator[Store]:
    """Another open store on the same database: another process."""
    store = world.make_store()
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def group(store: Store) -> Group:
    """A registered group."""
    return await Group(store).register()


@pytest.fixture
async def rival(other_store: Store) -> Group:
    """A registered group of another process."""
    return await Group(other_store).register()
