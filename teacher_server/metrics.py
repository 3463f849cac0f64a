"""What Prometheus scrapes: process-local, monotone counters that sum over replicas."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from protos import teacher_pb2 as pb
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
        self.flops = Counter("preceptor_flops", "Teacher FLOPs of charged samples.", job, registry=self.registry)
        self.device_seconds = Counter(
            "preceptor_device_seconds", "Device time of charged samples.", job, registry=self.registry
        )
        self.cost = Counter(
            "preceptor_cost", "Price of charged samples, in the currency.", (*job, "currency"), registry=self.registry
        )
        self.platform = Counter(
            "preceptor_platform_samples",
            "Samples forwarded and charged to nobody, by why.",
            ("account", "reason"),
            registry=self.registry,
        )
        self.cache_hits = Counter("preceptor_cache_hits", "Samples looked up and found.", registry=self.registry)
        self.cache_misses = Counter("preceptor_cache_misses", "Samples looked up in vain.", registry=self.registry)
        self.cache_errors = Counter(
            "preceptor_cache_errors",
            "Samples whose entry was corrupt, whose lookup or write found no Redis (unavailable) or an error of it "
            "(refused), or whose answer was not written since too many were waiting for it (dropped).",
            ("kind",),
            registry=self.registry,
        )
        self.cache_declined = Counter(
            "preceptor_cache_declined",
            "Answers not cached, since their job writes many and uses few (--cache-job-share).",
            registry=self.registry,
        )
        self.duplicates = Counter(
            "preceptor_duplicate_samples",
            "Samples computed that were cached by another replica meanwhile.",
            registry=self.registry,
        )
        self.requests = Counter(
            "preceptor_requests", "Calls by their gRPC status code.", ("call", "code"), registry=self.registry
        )
        self.authentication_failures = Counter(
            "preceptor_authentication_failures",
            "Attempts without a token (missing), with one that is not known (unknown), or at what its role does not "
            "allow (role).",
            ("reason",),
            registry=self.registry,
        )
        self.reload_failures = Counter(
            "preceptor_reload_failures",
            "Changes of a file (tokens, certificates) that could not be read: what was read before is in force.",
            ("file",),
            registry=self.registry,
        )
        self.http_dropped = Counter(
            "preceptor_http_connections_dropped",
            "HTTP connections refused since there were too many, in all (full) or of one address (address), or cut "
            "since a request did not arrive (slow_request) or a reply was not taken (slow_reader).",
            ("reason",),
            registry=self.registry,
        )
        for reason in ("full", "address", "slow_request", "slow_reader"):
            self.http_dropped.labels(reason)
        for reason in ("missing", "unknown", "role"):
            self.authentication_failures.labels(reason)
        for file in ("tokens", "certificates"):
            self.reload_failures.labels(file)
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
        self._charged: dict[Caller, tuple[Counter, Counter, Counter]] = {}

    def job(self, caller: Caller) -> Caller:
        """The caller as a label: beyond MAX_JOBS jobs a later one counts under `other`, so that labels stay bounded."""
        if caller not in self._jobs:
            if len(self._jobs) >= MAX_JOBS:
                return Caller(caller.tenant, "other")
            self._jobs.add(caller)
        return caller

    def batch(self, _number: int, parts: list[tuple[object, range]], nanoseconds: int, outcome: object) -> None:
        """The batcher's on_batch: sizes and times of those batches that were answered."""
        if not isinstance(outcome, Exception):
            self.batch_size.observe(sum(len(span) for _, span in parts))
            self.compute_seconds.observe(nanoseconds / 1e9)

    def charged(self, caller: Caller, samples: int, nanoseconds: int, teacher: pb.TeacherDescription) -> None:
        """Samples of one forward pass that the caller pays for."""
        label = self.job(caller)
        if (counters := self._charged.get(label)) is None:  # looking them up costs more than all the rest
            counters = self._charged[label] = (
                self.flops.labels(*label),
                self.device_seconds.labels(*label),
                self.cost.labels(*label, teacher.price.currency),
            )
        flops, device_seconds, cost = counters
        flops.inc(samples * teacher.flops_per_sample)
        device_seconds.inc(nanoseconds / 1e9)
        cost.inc(samples * teacher.price.nanos_per_sample / 1e9)

    def watch_queue(self, depth: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Exports `depth()`, samples waiting by (tenant, job), as it stands when scraped."""
        self.registry.register(_QueueDepth(self, depth))

    def watch_budgets(self, states: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Exports what is left of the budgets that were drawn on here, as last heard from the ledger."""
        self.registry.register(_BudgetsLeft(self, states))


class _BudgetsLeft(Collector):
    def __init__(self, metrics: "Metrics", states: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self._metrics, self._states = metrics, states

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauge = GaugeMetricFamily(
            "preceptor_budget_left",
            "What is left of a budget: samples, or the currency. No job: the tenant's own.",
            labels=("tenant", "job", "unit", "period"),
        )
        for state in self._states():
            left = max(0.0, state["limit"] - state["spent"]) / (1 if state["unit"] == "samples" else 1e9)
            gauge.add_metric((state["tenant"], state["job"], state["unit"], state["period"]), left)
        yield gauge


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
