"""Prometheus metrics of the jobs and worker groups of this process (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as _exc:
    raise ImportError(
        'triojobs.prometheus needs prometheus-client; run: pip install "triojobs[metrics]"'
    ) from _exc

__all__ = ["instrument"]


def instrument(registry: CollectorRegistry) -> Installed:
    """Measure all that triojobs does in this process from now on; return what removes it again.

    The registry is yours: expose it as you expose the rest, with `prometheus_client.start_http_server`
    or `make_asgi_app`, or `push_to_gateway`. Counters of jobs have the label ``queue``:

    * ``triojobs_jobs_enqueued_total``: created here; in a transaction of the caller's when they are
      written, whether or not it commits.
    * ``triojobs_jobs_claimed_total``, ``triojobs_jobs_settled_total`` (and ``outcome``: done, failed, killed,
      cancelled, snoozed), ``triojobs_jobs_released_total``.
    * ``triojobs_jobs_rescued_total``, ``triojobs_jobs_stale_total``, ``triojobs_loop_blocked_total``: over all
      queues; as in `GroupStatistics`.

    Histograms, in seconds: ``triojobs_handler_duration_seconds`` (``queue``, ``outcome``; "stale" when the job had
    moved on), ``triojobs_queue_latency_seconds`` (``queue``: from when a job was due until its handler
    started), ``triojobs_loop_lag_seconds`` (``group``: how late the event loop's timers are, four times a
    second while jobs are in hand).

    Gauges, by ``group``: ``triojobs_lease_age_seconds``, ``triojobs_handlers_running``, ``triojobs_slots_free``,
    ``triojobs_jobs_unsettled``.

    Args:
        registry: not the global one by default, so that nobody's metrics appear twice.

    Raises:
        ValueError: the registry has them already.

    Threads: any, at any time; collecting never waits for the event loop.
    """
    return install(_Metrics(registry))


class _Metrics(Instrument):
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            found = Counter(f"triojobs_{name}", text, labels, registry=registry)
            self._collectors.append(found)
            return found

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            found = Histogram(f"triojobs_{name}", text, labels, buckets=buckets, registry=registry)
            self._collectors.append(found)
            return found

        self._registry = registry
        self._collectors: list[Collector] = []
        self._enqueued = counter("jobs_enqueued", "Jobs created by this process.", "queue")
        self._claimed = counter("jobs_claimed", "Jobs claimed.", "queue")
        self._settled = counter("jobs_settled", "Attempts whose outcome was written.", "queue", "outcome")
        self._released = counter("jobs_released", "Jobs given back, their attempts not counted.", "queue")
        self._duration = histogram(
            "handler_duration_seconds", "How long handlers ran.", RUN_SECONDS, "queue", "outcome"
        )
        self._latency = histogram(
            "queue_latency_seconds",
            "From when a job was due until its handler started.",
            RUN_SECONDS,
            "queue",
        )
        self._lag = histogram(
            "loop_lag_seconds", "How late the event loop's timers were.", LAG_SECONDS, "group"
        )
        groups = _Groups()
        registry.register(groups)
        self._collectors.append(groups)

    def after_enqueue(
        self, token: Any, queue: str, entries: Sequence[Enqueued], error: BaseException | None
    ) -> None:
        created = sum(entry.created for entry in entries)
        if created:
            self._enqueued.labels(queue).inc(created)

    def claimed(self, queue: str, jobs: int) -> None:
        self._claimed.labels(queue).inc(jobs)

    def ended(self, queue: str, outcome: Outcome, jobs: int) -> None:
        if outcome is Outcome.RELEASED:
            self._released.labels(queue).inc(jobs)
        else:
            self._settled.labels(queue, str(outcome)).inc(jobs)

    def before_handler(self, job: Any, waited: float) -> None:
        self._latency.labels(job.queue).observe(waited)

    def after_handler(
        self, token: Any, job: Any, seconds: float, outcome: str | None, error: BaseException | None
    ) -> None:
        self._duration.labels(job.queue, outcome or "stale").observe(seconds)

    def loop_was_late(self, group: str, seconds: float) -> None:
        self._lag.labels(group).observe(seconds)

    def removed(self) -> None:
        for collector in self._collectors:
            self._registry.unregister(collector)


class _Groups(Collector):
    """What the open groups say when they are asked."""

    def collect(self) -> Iterator[Metric]:
        totals, groups = group_numbers()
        for name, text, count in (
            ("jobs_rescued", "Jobs taken from worker groups whose lease had ended.", totals.rescued),
            ("jobs_stale", "Outcomes refused because the job had moved on.", totals.stale),
            ("loop_blocked", "How often the event loop was blocked for about a second.", totals.loop_blocked),
        ):
            yield CounterMetricFamily(f"triojobs_{name}", text, value=count)
        for name, text, field in (
            ("lease_age_seconds", "Since the last confirmed heartbeat was sent.", "lease_age"),
            ("handlers_running", "Handlers that run now.", "running"),
            ("slots_free", "Slots without a job.", "free"),
            ("jobs_unsettled", "Ended attempts whose outcome is not written yet.", "unsettled"),
        ):
            gauge = GaugeMetricFamily(f"triojobs_{name}", text, labels=["group"])
            for group, value in by_name(groups, field).items():
                gauge.add_metric([group], value)
            yield gauge
