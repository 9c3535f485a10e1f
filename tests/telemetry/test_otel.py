"""Traces and metrics as a real OpenTelemetry SDK receives them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import triojobs
from triojobs import otel, testing
from triojobs._instruments import loop_was_late

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")
follow: triojobs.Queue[Any, Any] = triojobs.Queue("follow")


class Backend:
    """What a program exports to."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("a user's program")

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (found,) = self.spans(name)
        return found

    def metrics(self) -> dict[str, list[Any]]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    with otel.instrument(tracer_provider=backend.tracers, meter_provider=backend.meters):
        yield backend
    backend.meters.shutdown()


def attributes(span: ReadableSpan, *names: str) -> tuple[Any, ...]:
    assert span.attributes is not None
    return tuple(span.attributes.get(name) for name in names)


MESSAGE = (
    "messaging.system",
    "messaging.destination.name",
    "messaging.operation.name",
    "messaging.operation.type",
)


async def handler(job: triojobs.Job[Any]) -> None:
    match job.payload:
        case "fails":
            raise ValueError("no")
        case "follows":

            def work(conn: Any) -> None:
                triojobs.enqueue_on(conn, follow, "done")

            await job.commit(work)


async def run(conninfo: str, *queues: triojobs.Queue[Any, Any]) -> None:
    async with triojobs.open_worker_group(
        conninfo, [triojobs.Worker(queue, handler) for queue in queues]
    ) as group:
        with trio.fail_after(30):
            await group.wait_idle()


async def test_a_request_its_job_and_the_jobs_job_are_one_trace(conninfo: str, backend: Backend) -> None:
    with backend.tracer.start_as_current_span("request") as request, psycopg.connect(conninfo) as conn:
        job_id = triojobs.enqueue_on(conn, plain, "follows", metadata={"tenant": 7})
    await run(conninfo, plain, follow)

    sent, processed = backend.span("enqueue plain"), backend.span("process plain")
    sent_on, processed_last = backend.span("enqueue follow"), backend.span("process follow")
    chain = [request, sent, processed, sent_on, processed_last]
    for above, below in itertools.pairwise(chain):
        assert below.parent is not None  # type: ignore[attr-defined]
        assert below.parent.span_id == above.get_span_context().span_id  # type: ignore[attr-defined,union-attr]
    assert len({span.get_span_context().trace_id for span in chain}) == 1  # type: ignore[union-attr]
    assert [link.context.span_id for link in processed.links] == [sent.get_span_context().span_id]
    assert (sent.kind, processed.kind) == (trace.SpanKind.PRODUCER, trace.SpanKind.CONSUMER)
    assert attributes(sent, *MESSAGE) == ("triojobs", "plain", "enqueue", "send")
    assert attributes(processed, *MESSAGE) == ("triojobs", "plain", "process", "process")
    assert attributes(sent, "messaging.message.id") == attributes(processed, "messaging.message.id")
    assert attributes(processed, "messaging.message.id", "triojobs.attempt", "triojobs.outcome") == (
        str(job_id),
        1,
        "done",
    )
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(job_id)
    assert info is not None
    assert sorted(info.metadata) == ["tenant", "traceparent"]


async def test_each_attempt_is_a_span_and_an_error_is_one(backend: Backend, autojump_clock: Any) -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_client(database) as client:
        await client.enqueue(plain, "fails", max_attempts=2)
        worker = triojobs.Worker(plain, handler)
        async with testing.open_memory_group(database, [worker]) as group:
            while group.statistics().settled < 2:
                await trio.sleep(0.1)
    first, second = backend.spans("process plain")
    assert [attributes(each, "triojobs.attempt", "triojobs.outcome") for each in (first, second)] == [
        (1, "failed"),
        (2, "killed"),
    ]
    for each in (first, second):
        assert each.status.status_code is trace.StatusCode.ERROR
        assert attributes(each, "error.type") == ("ValueError",)
        assert [event.name for event in each.events] == ["exception"]


async def test_without_continue_trace_the_link_alone_leads_back(conninfo: str) -> None:
    backend = Backend()
    with otel.instrument(
        tracer_provider=backend.tracers, meter_provider=backend.meters, continue_trace=False
    ):
        async with triojobs.open_client(conninfo) as client:
            await client.enqueue(plain, "done")
        await run(conninfo, plain)
    sent, processed = backend.span("enqueue plain"), backend.span("process plain")
    assert processed.parent is None
    assert processed.get_span_context().trace_id != sent.get_span_context().trace_id
    assert [link.context.span_id for link in processed.links] == [sent.get_span_context().span_id]
    backend.meters.shutdown()


async def test_one_call_for_many_jobs_is_one_span(conninfo: str, backend: Backend) -> None:
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue_many(plain, ["done"] * 3)
    await run(conninfo, plain)
    sent = backend.span("enqueue plain")
    assert attributes(sent, "messaging.batch.message_count", "messaging.message.id") == (3, None)
    origins = [link.context.span_id for span in backend.spans("process plain") for link in span.links]
    assert origins == [sent.get_span_context().span_id] * 3


async def test_a_failed_enqueue_is_an_error(conninfo: str, backend: Backend) -> None:
    async with triojobs.open_client(conninfo) as client:
        await client.enqueue(plain, 1, key="k")
        with pytest.raises(triojobs.DuplicateJobError):
            await client.enqueue(plain, 2, key="k")
    _, failed = backend.spans("enqueue plain")
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert attributes(failed, "error.type") == ("DuplicateJobError",)


async def test_what_others_wrote_into_the_metadata_is_no_context(backend: Backend) -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_client(database) as client:
        ids = [
            await client.enqueue(plain, "done", metadata={"traceparent": value})
            for value in ("no trace", 7, None, ["00"], "")
        ]
        await testing.drain(database, [triojobs.Worker(plain, handler)])
        found = [await client.get(job_id) for job_id in ids]
    assert [job.status for job in found if job is not None] == ["done"] * 5
    spans = backend.spans("process plain")
    assert [(span.parent, span.links) for span in spans] == [(None, ())] * 5


async def test_one_jobs_span_is_not_the_next_ones(backend: Backend) -> None:
    """Slots run many jobs in one task; each is a child of its own enqueue, in clean context variables."""
    database = testing.MemoryDatabase()
    current: list[Any] = []

    async def look(job: triojobs.Job[Any]) -> None:
        current.append(trace.get_current_span().get_span_context().span_id)
        trace.set_span_in_context(trace.INVALID_SPAN)
        await trio.lowlevel.checkpoint()
        current.append(trace.get_current_span().get_span_context().span_id)

    async with testing.open_memory_client(database) as client:
        for n in range(3):
            await client.enqueue(plain, n)
        await testing.drain(database, [triojobs.Worker(plain, look, concurrency=1)])
    spans = [span.get_span_context().span_id for span in backend.spans("process plain")]
    assert current == [span_id for span_id in spans for _ in range(2)]
    parents = [span.parent.span_id for span in backend.spans("process plain") if span.parent]
    assert parents == [span.get_span_context().span_id for span in backend.spans("enqueue plain")]
    assert not trace.get_current_span().get_span_context().is_valid


async def test_metrics_are_counted_by_queue_and_outcome(backend: Backend, autojump_clock: Any) -> None:
    database = testing.MemoryDatabase()
    async with testing.open_memory_client(database) as client:
        await client.enqueue_many(plain, ["done", "done", triojobs.NewJob("fails", max_attempts=1)])
        await trio.sleep(1.5)
        worker = triojobs.Worker(plain, handler)
        async with testing.open_memory_group(database, [worker], name="g") as group:
            while group.statistics().settled < 3:
                await trio.sleep(0.1)
            during = backend.metrics()
    after = backend.metrics()

    def value(points: list[Any], **wanted: str) -> Any:
        (found,) = [p for p in points if wanted.items() <= dict(p.attributes).items()]
        return found.value

    assert value(after["messaging.client.sent.messages"]) == 3
    assert value(after["messaging.client.consumed.messages"]) == 3
    assert value(after["triojobs.job.settled"], **{"triojobs.outcome": "done"}) == 2
    assert value(after["triojobs.job.settled"], **{"triojobs.outcome": "killed"}) == 1
    (latency,) = after["triojobs.queue.latency"]
    assert (latency.count, round(latency.sum, 1)) == (3, 4.5)
    durations = after["messaging.process.duration"]
    assert sorted(point.count for point in durations) == [1, 2]
    (failed,) = [p for p in durations if "error.type" in p.attributes]
    assert failed.attributes["error.type"] == "ValueError"
    assert value(during["triojobs.slot.free"], **{"triojobs.group": "g"}) == 10
    assert value(during["triojobs.handler.running"]) == 0
    assert 0 <= value(during["triojobs.lease.age"]) < 30
    assert after.get("triojobs.slot.free", []) == []
    assert value(after["triojobs.job.stale"]) >= 0
    assert value(after["triojobs.job.rescued"]) >= 0


async def test_two_groups_of_one_name_are_one_point(backend: Backend) -> None:
    database = testing.MemoryDatabase()
    workers = [triojobs.Worker(plain, handler)]
    async with (
        testing.open_memory_group(database, workers, name="g"),
        testing.open_memory_group(database, workers, name="g"),
    ):
        (free,) = backend.metrics()["triojobs.slot.free"]
    assert free.value == 20


async def test_a_late_loop_is_told_in_buckets_of_milliseconds(backend: Backend) -> None:
    loop_was_late("g", 0.02)
    (lag,) = backend.metrics()["triojobs.loop.lag"]
    found = bisect.bisect_left(lag.explicit_bounds, 0.02)
    assert lag.bucket_counts[found] == 1
    assert (lag.explicit_bounds[found - 1], lag.explicit_bounds[found]) == (0.01, 0.025)


async def test_without_an_sdk_nothing_happens(conninfo: str) -> None:
    with otel.instrument():
        async with triojobs.open_client(conninfo) as client:
            job_id = await client.enqueue(plain, "done")
        await run(conninfo, plain)
        async with triojobs.open_client(conninfo) as client:
            info = await client.get(job_id)
    assert info is not None
    assert (info.status, info.metadata) == ("done", {})
