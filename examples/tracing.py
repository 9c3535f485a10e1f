"""One trace from a request to its job and on to the job's own job, printed as its spans end.

    pip install "triojobs[binary,embedded,otel]" opentelemetry-sdk
    python examples/tracing.py [postgresql://localhost/shop]

Without a database of yours it starts one for itself. A real program exports to a collector instead:
opentelemetry-exporter-otlp in place of the console.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass

import psycopg
import trio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

import triojobs
import triojobs.otel


@dataclass(frozen=True)
class Order:
    customer: str


orders = triojobs.Queue("orders", Order)
receipts = triojobs.Queue("receipts", str)


async def pack(job: triojobs.Job[Order]) -> None:
    def work(conn: psycopg.Connection) -> None:
        triojobs.enqueue_on(conn, receipts, job.payload.customer)

    await job.commit(work)  # what it enqueues belongs to its span


async def send_receipt(job: triojobs.Job[str]) -> None:
    print(f"a receipt for {job.payload}", flush=True)


def one_line(span: ReadableSpan) -> str:
    origin = span.parent.span_id if span.parent else 0
    own = span.get_span_context()
    return f"{own.trace_id:032x} {own.span_id:016x} from {origin:016x}: {span.kind.name} {span.name}\n"


async def main(conninfo: str | None) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=one_line)))
    tracer = provider.get_tracer("shop")
    async with AsyncExitStack() as stack:
        stack.enter_context(triojobs.otel.instrument(tracer_provider=provider))
        if conninfo is None:
            conninfo = await stack.enter_async_context(triojobs.open_embedded_postgres())
        triojobs.migrate(conninfo)
        workers = [triojobs.Worker(orders, pack), triojobs.Worker(receipts, send_receipt)]
        group = await stack.enter_async_context(triojobs.open_worker_group(conninfo, workers))
        with tracer.start_as_current_span("request"):
            await group.client.enqueue(orders, Order("ada@example.com"))
        await group.wait_idle()


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if sys.argv[1:] else None)
