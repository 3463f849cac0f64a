"""What is counted as it happens: process-local, monotone counters that sum over replicas.

gauges.py has what is read when Prometheus scrapes. docs/metrics.md lists both, prometheus/ under deploy/ uses them.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.errors import DeviceLost

MAX_JOBS = 200
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # what every Prometheus knows by name
Read = Callable[[], Iterable[Metric]]
"""What is read when Prometheus scrapes, on the event loop's thread: quick, and not waiting for anything."""

_IDLE_SECONDS = 3600.0  # after which a job's place may go to another, long after its last counts were scraped
_OTHER = "other"
# A second series for each counter, which nobody asks for.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SAMPLES = tuple(2**i for i in range(13))


class JobCounters:
    """One job's own series, found once: looking them up costs more than counting."""

    def __init__(self, metrics: "Metrics", label: Caller) -> None:
        self.label = label
        self.heard = 0.0
        self.asked = metrics.asked.labels(*label)
        self.unasked = metrics.unasked.labels(*label)
        self.sources = {name: metrics.samples.labels(*label, name) for name in ("computed", "cached", "coalesced")}
        self.charged = metrics.charged_samples.labels(*label)
        self.flops = metrics.flops.labels(*label)
        self.device_seconds = metrics.device_seconds.labels(*label)
        self._metrics = metrics
        self._cost: dict[str, Counter] = {}
        self._queries: dict[str, Counter] = {}

    def cost(self, currency: str) -> Counter:
        return _child(self._cost, self._metrics.cost, self.label, currency)

    def queries(self, outcome: str) -> Counter:
        return _child(self._queries, self._metrics.queries, self.label, outcome)

    def remove(self) -> None:
        """Its series end."""
        metrics = self._metrics
        for counter in (
            metrics.asked,
            metrics.unasked,
            metrics.charged_samples,
            metrics.flops,
            metrics.device_seconds,
        ):
            counter.remove(*self.label)
        for counter, kinds in (
            (metrics.samples, self.sources),
            (metrics.cost, self._cost),
            (metrics.queries, self._queries),
        ):
            for kind in kinds:
                counter.remove(*self.label, kind)


class Metrics:
    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"preceptor_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"preceptor_{name}", what, registry=registry, buckets=buckets)

        job = ("tenant", "job")
        self.asked = counter("asked_samples", "Samples admitted for an answer; refused attempts do not count.", *job)
        self.unasked = counter(
            "unasked_samples",
            "Samples that students had to choose from and did not ask about, as they say; counted with the answers.",
            *job,
        )
        self.samples = counter("samples", "Samples answered, by source.", *job, "source")
        self.charged_samples = counter("charged_samples", "Samples forwarded that the job was charged for.", *job)
        self.flops = counter("flops", "Teacher FLOPs of charged samples.", *job)
        self.device_seconds = counter("device_seconds", "Device time of charged samples.", *job)
        self.cost = counter("cost", "Price of charged samples, in the currency.", *job, "currency")
        self.queries = counter(
            "queries",
            "Label calls with a known caller, by outcome: answered, or the reason of the refusal in lower case.",
            *job,
            "outcome",
        )
        self.platform = counter(
            "platform_samples", "Samples forwarded and charged to nobody, by why.", "account", "reason"
        )
        self.cache_hits = counter("cache_hits", "Samples looked up and found.")
        self.cache_misses = counter("cache_misses", "Samples looked up in vain.")
        self.cache_errors = counter(
            "cache_errors",
            "Samples whose entry was corrupt, whose lookup or write found no Redis (unavailable) or an error of it "
            "(refused), or whose answer was not written since too many were waiting for it (dropped).",
            "kind",
        )
        self.cache_declined = counter(
            "cache_declined", "Answers not cached, since their job writes many and uses few (--cache-job-share)."
        )
        self.duplicates = counter(
            "duplicate_samples", "Samples computed that were cached by another replica meanwhile."
        )
        self.requests = counter("requests", "Calls by their gRPC status code.", "call", "code")
        self.device_errors = counter(
            "device_errors",
            "Forward passes for which memory ran out (out_of_memory; half the batch may have fitted), that failed "
            "otherwise or in the end (failed), or in which the device was lost (lost).",
            "kind",
        )
        self.authentication_failures = counter(
            "authentication_failures",
            "Attempts without a token (missing), with one that is not known (unknown), or at what its role does not "
            "allow (role).",
            "reason",
        )
        self.reload_failed = Gauge(
            "preceptor_reload_failed",
            "1 where a file (tokens, certificates) changed and could not be read: what was read before is in force.",
            ("file",),
            registry=registry,
        )
        self.http_dropped = counter(
            "http_connections_dropped",
            "HTTP connections refused since there were too many, in all (full) or of one address (address), or cut "
            "since a request did not arrive (slow_request) or a reply was not taken (slow_reader).",
            "reason",
        )
        self.queue_seconds = histogram("queue_seconds", "From queued to computing.", _SECONDS)
        self.compute_seconds = histogram("compute_seconds", "Device time of one batch that was answered.", _SECONDS)
        self.batch_size = histogram("batch_size", "Samples in one batch.", _SAMPLES)
        # An increase is seen from the second value of a series on, so these begin with 0.
        for kind in ("corrupt", "unavailable", "refused", "dropped"):
            self.cache_errors.labels(kind)
        for kind in ("out_of_memory", "failed", "lost"):
            self.device_errors.labels(kind)
        for reason in ("full", "address", "slow_request", "slow_reader"):
            self.http_dropped.labels(reason)
        for reason in ("missing", "unknown", "role"):
            self.authentication_failures.labels(reason)
        for file in ("tokens", "certificates"):
            self.reload_failed.labels(file)
        self._clock = clock
        self._jobs: OrderedDict[Caller, JobCounters] = OrderedDict()  # the one heard of least lately comes first
        self._others: dict[str, JobCounters] = {}
        self._requests: dict[tuple[str, str], Counter] = {}
        self._reads: list[Read] = []

    # ------------------------------------------------------------ counting

    def of(self, caller: Caller) -> JobCounters:
        """The caller's counters. Beyond MAX_JOBS jobs a later one counts under `other`, so that labels stay bounded;
        one that has been silent for an hour makes room."""
        if caller.job == _OTHER:
            return self._other(caller.tenant)
        counters = self._jobs.get(caller)
        if counters is None:
            if len(self._jobs) >= MAX_JOBS and not self._make_room():
                return self._other(caller.tenant)
            counters = self._jobs[caller] = JobCounters(self, caller)
        counters.heard = self._clock()
        self._jobs.move_to_end(caller)
        return counters

    def label(self, caller: Caller) -> Caller:
        """What the caller is called in labels, as things stand."""
        return caller if caller in self._jobs else Caller(caller.tenant, _OTHER)

    def query(self, caller: Caller, outcome: str) -> None:
        """One query has ended. One that was never admitted makes no series for its job."""
        counters = self._jobs.get(caller) or self._other(caller.tenant)
        counters.queries(outcome.lower()).inc()

    def request(self, call: str, code: str) -> None:
        """One call has ended with that status code."""
        counter = self._requests.get((call, code))
        if counter is None:
            counter = self._requests[call, code] = self.requests.labels(call, code)
        counter.inc()

    def batch(self, _number: int, parts: list[tuple[object, range]], nanoseconds: int, outcome: object) -> None:
        """The batcher's on_batch: sizes and times of those batches that were answered, and the failures of others."""
        if isinstance(outcome, Exception):
            self.device_errors.labels("lost" if isinstance(outcome, DeviceLost) else "failed").inc()
            return
        self.batch_size.observe(sum(len(span) for _, span in parts))
        self.compute_seconds.observe(nanoseconds / 1e9)

    def charged(self, caller: Caller, samples: int, nanoseconds: int, teacher: pb.TeacherDescription) -> None:
        """Samples of one forward pass that the caller pays for."""
        counters = self.of(caller)
        counters.charged.inc(samples)
        counters.flops.inc(samples * teacher.flops_per_sample)
        counters.device_seconds.inc(nanoseconds / 1e9)
        counters.cost(teacher.price.currency).inc(samples * teacher.price.nanos_per_sample / 1e9)

    def _make_room(self) -> bool:
        silent = next(iter(self._jobs.values()))
        if self._clock() - silent.heard < _IDLE_SECONDS:
            return False
        silent.remove()
        del self._jobs[silent.label]
        return True

    def _other(self, tenant: str) -> JobCounters:
        if tenant not in self._others:
            self._others[tenant] = JobCounters(self, Caller(tenant, _OTHER))
        return self._others[tenant]

    def queued(self) -> tuple[int, float]:
        """Queries that have left the queue, and the seconds for which they waited, in all."""
        (family,) = self.queue_seconds.collect()
        found = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
        return int(found["count"]), found["sum"]

    # ------------------------------------------------------------ being scraped

    def watch(self, read: Read) -> None:
        """Exports what `read()` gives at each scrape."""
        self._reads.append(read)

    def families(self) -> Iterator[Metric]:
        """Everything, as it stands."""
        return chain(self.registry.collect(), *(read() for read in self._reads))

    async def page(self) -> bytes:
        """What Prometheus is answered, of CONTENT_TYPE."""
        read = [family for read in self._reads for family in read()]
        # Tens of milliseconds for 200 jobs, in which queries go on.
        return await asyncio.to_thread(generate_latest, _Page(self.registry, read))


class _Page(Collector):
    """Counters, and what was read beforehand."""

    def __init__(self, registry: CollectorRegistry, read: Iterable[Metric]) -> None:
        self._counted, self._read = registry, read

    def collect(self) -> Iterator[Metric]:
        return chain(self._counted.collect(), self._read)


def _child(known: dict[str, Counter], counter: Counter, label: Caller, last: str) -> Counter:
    if (child := known.get(last)) is None:
        child = known[last] = counter.labels(*label, last)
    return child
