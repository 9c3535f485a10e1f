"""Claims that go on from positions: the same rows as from the head, but for what landed behind."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

import pytest
from contract_rig import Group, World, enqueue, number_of, row

from triojobs import _positions
from triojobs._model import Claim, Outcome
from triojobs._positions import Positions
from triojobs._store import ClaimOrder, Store


@pytest.fixture(autouse=True)
def few_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_positions, "MANY", 1)


class Walker:
    """A group that claims as its fetcher does."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.positions = Positions(1000.0)

    async def claim(self, wants: int = 100, *queues: str, head: bool = False) -> list[Claim]:
        if head:
            self.positions.forget_all()
        names = dict.fromkeys(queues or ("q",), wants)
        starts = self.positions.starts(names, 0.0)
        self.group.claim_no += 1
        booked: list[Claim] = []
        await self.group.store.claim(
            ClaimOrder(self.group.id, self.group.epoch, self.group.claim_no, names, starts=starts),
            booked.extend,
        )
        self.positions.claimed(names, starts, booked, sent=0.0, now=0.0)
        return booked

    async def numbers(self, wants: int = 100, *queues: str, head: bool = False) -> list[int]:
        return [number_of(claim) for claim in await self.claim(wants, *queues, head=head)]


def ago(world: World, seconds: float) -> dt.datetime:
    return world.now() - dt.timedelta(seconds=seconds)


async def test_a_full_claim_is_gone_on_from_in_order(store: Store, group: Group, world: World) -> None:
    at = ago(world, 100)
    await store.enqueue([row(n, run_at=at + dt.timedelta(seconds=n // 3)) for n in range(10)])
    walker = Walker(group)
    assert [await walker.numbers(4) for _ in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]


async def test_microseconds_are_kept_apart(store: Store, group: Group, world: World) -> None:
    """Positions travel as floats; two neighbouring times must not become one."""
    at = ago(world, 100).replace(microsecond=999_990)
    await store.enqueue([row(n, run_at=at + dt.timedelta(microseconds=n)) for n in range(20)])
    walker = Walker(group)
    assert [n for _ in range(10) for n in await walker.numbers(2)] == list(range(20))


async def test_a_row_that_landed_behind_is_found_from_the_head(
    store: Store, group: Group, world: World
) -> None:
    await store.enqueue([row(n, run_at=ago(world, 100 - n)) for n in range(6)])
    walker = Walker(group)
    assert await walker.numbers(2) == [0, 1]
    await store.enqueue([row(99, run_at=ago(world, 1000))])
    assert await walker.numbers(2) == [2, 3]
    assert await walker.numbers(2, head=True) == [99, 4]


async def test_a_released_row_is_found_from_the_head_in_its_place(
    store: Store, group: Group, world: World
) -> None:
    await store.enqueue([row(n, run_at=ago(world, 100 - n)) for n in range(6)])
    walker = Walker(group)
    first = (await walker.claim(2))[0]
    await group.end(first, Outcome.RELEASED)
    assert await walker.numbers(2) == [2, 3]
    assert await walker.numbers(2, head=True) == [0, 4]


async def test_higher_priorities_that_come_later_are_claimed_first(
    store: Store, group: Group, world: World
) -> None:
    """In a band that is known, in one above all, in one between, in one below."""
    at = ago(world, 100)
    await store.enqueue([row(n, run_at=at, priority=p) for n, p in enumerate([5, 5, 2, 2, 2, 2, 2])])
    walker = Walker(group)
    assert await walker.numbers(3) == [0, 1, 2]
    late = ago(world, 50)
    early = ago(world, 500)
    await store.enqueue(
        [
            row(10, run_at=late, priority=2),
            row(11, run_at=late, priority=5),
            row(12, run_at=early, priority=9),
            row(13, run_at=early, priority=3),
            row(14, run_at=early, priority=0),
        ]
    )
    assert await walker.numbers(9) == [12, 11, 13, 3, 4, 5, 6, 10, 14]


async def test_some_queues_go_on_and_others_begin_at_the_head(
    store: Store, group: Group, world: World
) -> None:
    at = ago(world, 100)
    for queue in ("a", "b", "c"):
        await store.enqueue([row(n, queue=queue, run_at=at) for n in range(5)])
    walker = Walker(group)
    assert len(await walker.claim(2, "a", "b")) == 4
    walker.positions.forget("b")
    await store.enqueue([row(9, queue=queue, run_at=ago(world, 500)) for queue in ("a", "b", "c")])
    claims = await walker.claim(2, "a", "b", "c", "nothing")
    found = {q: [number_of(c) for c in claims if c.queue == q] for q in ("a", "b", "c")}
    assert found == {"a": [2, 3], "b": [9, 2], "c": [9, 0]}


async def test_a_paused_queue_gives_nothing_from_a_position(store: Store, group: Group, world: World) -> None:
    await store.enqueue([row(n) for n in range(4)])
    walker = Walker(group)
    assert len(await walker.claim(2)) == 2
    world.pause("q")
    assert await walker.claim(2) == []
    world.resume("q")
    assert len(await walker.claim(2)) == 2


async def test_without_late_rows_the_order_is_that_of_the_head(
    store: Store, group: Group, world: World
) -> None:
    random_ = random.Random(7)
    at = ago(world, 1000)
    rows: list[Any] = [
        row(n, priority=random_.randrange(20), run_at=at + dt.timedelta(seconds=random_.randrange(5)))
        for n in range(200)
    ]
    ids = await enqueue(store, *rows)
    order = [
        n
        for _, n in sorted(
            ((-r.priority, r.run_at, i), n) for n, (r, i) in enumerate(zip(rows, ids, strict=True))
        )
    ]
    walker = Walker(group)
    found: list[int] = []
    while len(found) < 200:
        found += await walker.numbers(random_.randrange(1, 12))
    assert found == order
