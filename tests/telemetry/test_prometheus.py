"""The metrics as a Prometheus server reads them: scraped as text, parsed by its own parser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import triojobs
from triojobs import prometheus, testing

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


async def handler(job: triojobs.Job[Any]) -> None:
    match job.payload:
        case "fails":
            raise ValueError("no")
        case "waits":
            await trio.sleep_forever()
        case "snoozes" if job.last_error is None and job.attempt == 1:
            raise triojobs.RetryAfter(0)
        case "sleeps":
            await trio.sleep(20)


class Scrape:
    """One look at a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = generate_latest(registry).decode()
        self.values = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get((f"triojobs_{name}", tuple(sorted(labels.items()))))


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    registry = CollectorRegistry()
    with prometheus.instrument(registry):
        yield registry
    assert generate_latest(registry) == b""  # all is taken out again


async def test_a_scrape_shows_what_happened(registry: CollectorRegistry, autojump_clock: Any) -> None:
    database = testing.MemoryDatabase()
    options: dict[str, Any] = {"grace_period": 0.0, "name": "g", "lease_duration": 3600}
    worker = triojobs.Worker(plain, handler, concurrency=4, retry=triojobs.Backoff(first=10.0, jitter=0.0))
    async with testing.open_memory_client(database) as client:
        ids = await client.enqueue_many(
            plain, ["done", "sleeps", triojobs.NewJob("fails", max_attempts=2), "snoozes"]
        )
        await trio.sleep(2.0)
        async with testing.open_memory_group(database, [worker], **options) as group:
            async with client.as_completed(ids) as ended:
                async for _ in ended:
                    pass
            await client.enqueue(plain, "waits")
            while not group.statistics().running:
                await trio.sleep(0.1)
            during = Scrape(registry)
    after = Scrape(registry)

    assert during("handlers_running", group="g") == 1
    assert during("slots_free", group="g") == 3
    assert during("jobs_unsettled", group="g") == 0
    age = during("lease_age_seconds", group="g")
    assert age is not None
    assert 0 <= age < 3600
    assert after("handlers_running", group="g") is None

    assert after("jobs_enqueued_total", queue="plain") == 5
    assert after("jobs_claimed_total", queue="plain") == 7
    settled = {
        outcome: after("jobs_settled_total", queue="plain", outcome=outcome)
        for outcome in ("done", "failed", "killed", "cancelled", "snoozed")
    }
    assert settled == {"done": 3, "failed": 2, "killed": 1, "cancelled": None, "snoozed": None}
    assert after("jobs_released_total", queue="plain") == 1
    assert after("jobs_rescued_total") is not None
    assert after("jobs_stale_total") is not None

    def histogram(name: str, le: float, **labels: str) -> float | None:
        return after(f"{name}_bucket", le=str(le), **labels)

    assert after("handler_duration_seconds_count", queue="plain", outcome="done") == 3
    assert after("handler_duration_seconds_count", queue="plain", outcome="released") == 1
    assert after("queue_latency_seconds_count", queue="plain") == 7
    # Four waited for two seconds, the others ran when they were due.
    assert histogram("queue_latency_seconds", 1.0, queue="plain") == 3
    assert histogram("queue_latency_seconds", 2.5, queue="plain") == 7


def test_a_registry_takes_them_once(registry: CollectorRegistry) -> None:
    with pytest.raises(ValueError, match="triojobs"):
        prometheus.instrument(registry)
    assert Scrape(registry)("jobs_rescued_total") is not None


async def test_every_way_to_enqueue_is_counted(conninfo: str, registry: CollectorRegistry) -> None:
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, 1)
        await client.try_enqueue(plain, 1, key="k")
        await client.try_enqueue(plain, 1, key="k")  # creates nothing
        await client.enqueue_many(plain, [1, 2])
        await client.try_enqueue_many(plain, [1])

        async def items() -> Any:
            for n in range(3):
                yield n

        await client.enqueue_stream(plain, items(), chunk=2)
        await trio.to_thread.run_sync(client.enqueue_from_thread, plain, 1)
        assert Scrape(registry)("jobs_enqueued_total", queue="plain") == 9

    def elsewhere() -> None:
        with triojobs.SyncClient(conninfo) as sync:
            sync.enqueue(plain, 1)
            sync.try_enqueue(plain, 1)
            sync.enqueue_many(plain, [1])
            sync.try_enqueue_many(plain, [1])
        with psycopg.connect(conninfo) as conn:
            triojobs.enqueue_on(conn, plain, 1)
            triojobs.try_enqueue_on(conn, plain, 1)
            triojobs.enqueue_many_on(conn, plain, [1])
            triojobs.try_enqueue_many_on(conn, plain, [1])

    await trio.to_thread.run_sync(elsewhere)
    assert Scrape(registry)("jobs_enqueued_total", queue="plain") == 17


async def test_the_event_loops_lag_is_measured_while_jobs_are_in_hand(
    conninfo: str, registry: CollectorRegistry
) -> None:
    async def measured(job: triojobs.Job[Any]) -> None:
        while not Scrape(registry)("loop_lag_seconds_count", group="g"):
            await trio.sleep(0.01)

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, measured)], name="g") as group:
        with trio.fail_after(30):
            await group.client.result(await group.client.enqueue(plain, None))
    lag = Scrape(registry)("loop_lag_seconds_sum", group="g")
    assert lag is not None
    assert 0 <= lag < 30


async def test_a_scrape_from_a_thread_does_not_wait_for_the_event_loop(
    conninfo: str, registry: CollectorRegistry
) -> None:
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], name="g"):
        looked = await trio.to_thread.run_sync(Scrape, registry)
        assert looked("slots_free", group="g") == 10
        age = looked("lease_age_seconds", group="g")
        assert age is not None
        assert 0 <= age < 25
