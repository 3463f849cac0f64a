"""What Prometheus scrapes: process-local, monotone counters that sum over replicas."""

from collections.abc import Callable, Iterable, Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from teacher_server.auth import Caller

MAX_JOBS = 200
# A second series for each counter, which nobody asks for.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SAMPLES = tuple(2**i for i in range(13))


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        job = ("tenant", "job")
        self.asked = Counter(
            "preceptor_asked_samples",
            "Samples admitted for an answer; refused attempts do not count.",
            job,
            registry=self.registry,
        )
        self.samples = Counter(
            "preceptor_samples", "Samples answered, by source.", (*job, "source"), registry=self.registry
        )
        self.flops = Counter("preceptor_flops", "Teacher FLOPs of computed answers.", job, registry=self.registry)
        self.device_seconds = Counter(
            "preceptor_device_seconds", "Device time of computed answers.", job, registry=self.registry
        )
        self.requests = Counter(
            "preceptor_requests", "Calls by their gRPC status code.", ("call", "code"), registry=self.registry
        )
        self.queue_seconds = Histogram(
            "preceptor_queue_seconds", "From queued to computing.", registry=self.registry, buckets=_SECONDS
        )
        self.compute_seconds = Histogram(
            "preceptor_compute_seconds",
            "Device time of one batch that was answered.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.batch_size = Histogram(
            "preceptor_batch_size", "Samples in one batch.", registry=self.registry, buckets=_SAMPLES
        )
        self._jobs: set[Caller] = set()

    def job(self, caller: Caller) -> Caller:
        """The caller as a label: beyond MAX_JOBS jobs a later one counts under `other`, so that labels stay bounded."""
        if caller not in self._jobs:
            if len(self._jobs) >= MAX_JOBS:
                return Caller(caller.tenant, "other")
            self._jobs.add(caller)
        return caller

    def batch(self, samples: int, nanoseconds: int) -> None:
        """After each batch: the samples that it answered, 0 if it failed, and its busy time."""
        if samples:
            self.batch_size.observe(samples)
            self.compute_seconds.observe(nanoseconds / 1e9)

    def watch_queue(self, depth: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Exports `depth()`, samples waiting by (tenant, job), as it stands when scraped."""
        self.registry.register(_QueueDepth(self, depth))


class _QueueDepth(Collector):
    def __init__(self, metrics: Metrics, depth: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._metrics, self._depth = metrics, depth

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauge = GaugeMetricFamily("preceptor_queue_samples", "Samples waiting.", labels=("tenant", "job"))
        waiting: dict[Caller, int] = {}
        for (tenant, job), samples in self._depth().items():
            label = self._metrics.job(Caller(tenant, job))
            waiting[label] = waiting.get(label, 0) + samples
        for label, samples in waiting.items():
            gauge.add_metric(label, samples)
        yield gauge
