"""OpenTelemetry traces and metrics of the jobs and worker groups of this process (extra ``otel``).

Source: the semantic conventions for messaging, https://opentelemetry.io/docs/specs/semconv/messaging/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from ._instruments import (
    LAG_SECONDS,
    RUN_SECONDS,
    Installed,
    Instrument,
    by_name,
    group_numbers,
    install,
)
from ._model import Enqueued, Outcome
from ._version import VERSION

try:
    from opentelemetry import context, metrics, propagate, trace
    from opentelemetry.context import Context
except ImportError as _exc:
    raise ImportError('triojobs.otel needs opentelemetry-api; run: pip install "triojobs[otel]"') from _exc

__all__ = ["instrument"]

SYSTEM: Final = "triojobs"
BAD: Final = ("failed", "killed")  # outcomes that are errors; a cancelled or released job is none


def instrument(
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    continue_trace: bool = True,
) -> Installed:
    """Trace and measure all that triojobs does in this process from now on; return what removes it again.

    Traces: each call that enqueues is a span ``enqueue {queue}`` of kind PRODUCER. Its context travels in the
    jobs' metadata, written by the global propagator (``traceparent``, unless another one is configured);
    jobs whose metadata has no room for it go without, and a key that the caller set himself stays. Each
    attempt is a span ``process {queue}`` of kind CONSUMER with a link to the enqueue's; it is current in the
    handler, so that what the handler enqueues belongs to it. It is an error when the attempt failed or the
    job was killed; ``triojobs.outcome`` says what became of it.

    Metrics: ``messaging.client.sent.messages``, ``messaging.client.consumed.messages`` and
    ``messaging.process.duration`` as the conventions have them, ``triojobs.job.settled`` (by
    ``triojobs.outcome``), ``.released``, ``.rescued``, ``.stale``, ``triojobs.queue.latency``,
    ``triojobs.loop.lag``, ``triojobs.lease.age``, ``triojobs.handler.running``, ``triojobs.slot.free``.

    Args:
        tracer_provider, meter_provider: None: the global ones, also when they are set later.
        continue_trace: an attempt's span belongs to the trace of the enqueue, as its child. False: each
            attempt begins a trace of its own, and the link alone leads back.

    Threads: any.
    """
    return install(
        _Telemetry(
            trace.get_tracer("triojobs", VERSION, tracer_provider),
            metrics.get_meter("triojobs", VERSION, meter_provider),
            continue_trace=continue_trace,
        )
    )


class _Attempt(NamedTuple):
    """One handler's run: its span, and what puts the context back."""

    span: trace.Span
    before: Any


class _Telemetry(Instrument):
    def __init__(self, tracer: trace.Tracer, meter: metrics.Meter, *, continue_trace: bool) -> None:
        self._tracer = tracer
        self._continue = continue_trace
        self._removed = False
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Jobs created by this process."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Jobs claimed."
        )
        self._duration = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "How long handlers ran.",
            explicit_bucket_boundaries_advisory=RUN_SECONDS,
        )
        self._settled = meter.create_counter(
            "triojobs.job.settled", "{job}", "Attempts whose outcome was written."
        )
        self._released = meter.create_counter(
            "triojobs.job.released", "{job}", "Jobs given back, their attempts not counted."
        )
        self._latency = meter.create_histogram(
            "triojobs.queue.latency",
            "s",
            "From when a job was due until its handler started.",
            explicit_bucket_boundaries_advisory=RUN_SECONDS,
        )
        self._lag = meter.create_histogram(
            "triojobs.loop.lag",
            "s",
            "How late the event loop's timers were.",
            explicit_bucket_boundaries_advisory=LAG_SECONDS,
        )
        self._observe_groups(meter)

    def _observe_groups(self, meter: metrics.Meter) -> None:
        meter.create_observable_counter(
            "triojobs.job.rescued",
            [self._total("rescued")],
            "{job}",
            "Jobs taken from worker groups whose lease had ended.",
        )
        meter.create_observable_counter(
            "triojobs.job.stale",
            [self._total("stale")],
            "{job}",
            "Outcomes refused because the job had moved on.",
        )
        meter.create_observable_gauge(
            "triojobs.lease.age",
            [self._of_groups("lease_age")],
            "s",
            "Since the last confirmed heartbeat was sent.",
        )
        meter.create_observable_gauge(
            "triojobs.handler.running", [self._of_groups("running")], "{handler}", "Handlers that run now."
        )
        meter.create_observable_gauge(
            "triojobs.slot.free", [self._of_groups("free")], "{slot}", "Slots without a job."
        )

    # Enqueues.

    def before_enqueue(self, queue: str, jobs: int) -> trace.Span:
        attributes: dict[str, Any] = _attributes(queue, "enqueue", "send")
        if jobs > 1:
            attributes["messaging.batch.message_count"] = jobs
        return self._tracer.start_span(
            f"enqueue {queue}", kind=trace.SpanKind.PRODUCER, attributes=attributes
        )

    def metadata(self, token: trace.Span) -> dict[str, str]:
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(token))
        return carrier

    def after_enqueue(
        self, token: trace.Span, queue: str, entries: Sequence[Enqueued], error: BaseException | None
    ) -> None:
        if len(entries) == 1:
            token.set_attribute("messaging.message.id", str(entries[0].id))
        if error is not None:
            _note_error(token, error)
        token.end()
        created = sum(entry.created for entry in entries)
        if created:
            self._sent.add(created, _attributes(queue, "enqueue"))

    # Handlers.

    def before_handler(self, job: Any, waited: float) -> _Attempt:
        metadata = {key: value for key, value in job.metadata.items() if isinstance(value, str)}
        sender = propagate.extract(metadata, Context())
        origin = trace.get_current_span(sender).get_span_context()
        parent = sender if self._continue else trace.set_span_in_context(trace.INVALID_SPAN, sender)
        span = self._tracer.start_span(
            f"process {job.queue}",
            parent,
            kind=trace.SpanKind.CONSUMER,
            links=[trace.Link(origin)] if origin.is_valid else [],
            attributes=_attributes(job.queue, "process", "process")
            | {
                "messaging.message.id": str(job.id),
                "triojobs.attempt": job.attempt,
                "triojobs.max_attempts": job.max_attempts,
            },
        )
        self._latency.record(waited, _attributes(job.queue))
        return _Attempt(span, context.attach(trace.set_span_in_context(span, sender)))

    def after_handler(
        self, token: _Attempt, job: Any, seconds: float, outcome: str | None, error: BaseException | None
    ) -> None:
        attributes = _attributes(job.queue, "process") | {"triojobs.outcome": outcome or "stale"}
        token.span.set_attribute("triojobs.outcome", outcome or "stale")
        if outcome in BAD and error is not None:
            attributes["error.type"] = _note_error(token.span, error)
        self._duration.record(seconds, attributes)
        context.detach(token.before)
        token.span.end()

    # Counts.

    def claimed(self, queue: str, jobs: int) -> None:
        self._consumed.add(jobs, _attributes(queue, "claim"))

    def ended(self, queue: str, outcome: Outcome, jobs: int) -> None:
        if outcome is Outcome.RELEASED:
            self._released.add(jobs, _attributes(queue))
        else:
            self._settled.add(jobs, _attributes(queue) | {"triojobs.outcome": str(outcome)})

    def loop_was_late(self, group: str, seconds: float) -> None:
        self._lag.record(seconds, {"triojobs.group": group})

    def removed(self) -> None:
        self._removed = True  # a callback cannot be taken back

    def _total(self, field: str) -> Callable[[Any], Iterable[metrics.Observation]]:
        def observe(options: object) -> Iterable[metrics.Observation]:
            return [] if self._removed else [metrics.Observation(getattr(group_numbers()[0], field))]

        return observe

    def _of_groups(self, field: str) -> Callable[[Any], Iterable[metrics.Observation]]:
        def observe(options: object) -> Iterable[metrics.Observation]:
            values = {} if self._removed else by_name(group_numbers()[1], field)
            return [metrics.Observation(value, {"triojobs.group": name}) for name, value in values.items()]

        return observe


def _attributes(queue: str, operation: str | None = None, kind: str | None = None) -> dict[str, Any]:
    found = {"messaging.system": SYSTEM, "messaging.destination.name": queue}
    if operation is not None:
        found["messaging.operation.name"] = operation
    if kind is not None:
        found["messaging.operation.type"] = kind
    return found


def _note_error(span: trace.Span, error: BaseException) -> str:
    """Mark a span as failed; return the error's type."""
    kind = type(error).__qualname__
    span.set_attribute("error.type", kind)
    span.record_exception(error)
    span.set_status(trace.StatusCode.ERROR, str(error))
    return kind
