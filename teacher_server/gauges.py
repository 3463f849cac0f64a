"""What is read when Prometheus scrapes: how things stand, from the parts that know.

Each function gives a `Read` for `Metrics.watch`. docs/metrics.md lists what they export.
"""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.batcher import Batcher
from teacher_server.budgets import State
from teacher_server.config import ServeSettings
from teacher_server.engine import Engine
from teacher_server.ledger import LedgerState
from teacher_server.metrics import Metrics, Read
from teacher_server.store import Stores


def readiness(not_ready: Callable[[], str | None]) -> Read:
    """`not_ready()`: why none should come."""
    return lambda: [_gauge("ready", "1 where queries should come, as /readyz says.", not not_ready())]


def replicas(known: Callable[[], int]) -> Read:
    """`known()`: how many replicas students are told of."""
    return lambda: [
        _gauge(
            "replicas",
            "Live replicas of this fingerprint that students are told of, this one included; 0 where it is alone, "
            "without a --ledger-redis-url or an address to be told of.",
            known(),
        )
    ]


def stores(stores: Stores) -> Read:
    def read() -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "preceptor_store_up", "1 where this Redis, cache or ledger, answered when last asked.", labels=("store",)
        )
        for store in (stores.cache, stores.ledger):
            up.add_metric((store.what,), store.available)
        yield up

    return read


def teacher(description: pb.TeacherDescription, settings: ServeSettings, engine: Engine) -> Read:
    """The teacher served, and its device."""
    about = {
        "teacher": description.name,
        "fingerprint": description.fingerprint,
        "precision": settings.precision,
        "device": engine.device.type,
    }

    def read() -> Iterable[Metric]:
        yield InfoMetricFamily("preceptor_teacher", "The teacher served; always 1.", value=about)
        yield CounterMetricFamily(
            "preceptor_device_busy_seconds",
            "Time that the device spent on forward passes, whoever paid, warm-up included.",
            value=engine.busy_nanoseconds / 1e9,
        )
        yield _gauge(
            "max_batch_size_samples", "Samples that one batch may have (--max-batch-size).", settings.max_batch_size
        )
        yield _gauge(
            "largest_batch_samples",
            "Samples that fit the device's memory at once, as far as is known.",
            engine.largest_batch,
        )

    return read


def queue(batcher: Batcher, metrics: Metrics) -> Read:
    def read() -> Iterable[Metric]:
        waiting: dict[Caller, int] = {}
        for (tenant, job), samples in batcher.depth().items():
            label = metrics.label(Caller(tenant, job))
            waiting[label] = waiting.get(label, 0) + samples
        depth = GaugeMetricFamily("preceptor_queue_samples", "Samples waiting.", labels=("tenant", "job"))
        for label, samples in waiting.items():
            depth.add_metric(label, samples)
        yield depth
        yield _gauge(
            "queue_used_ratio",
            "The fullest queue of a job or tenant: which part of its bound in samples or bytes is taken, 0 to 1.",
            batcher.fullest(),
        )

    return read


def budgets(states: Callable[[], Iterable[State]]) -> Read:
    """Of the budgets that were drawn on here, as last heard from the ledger. Their number is what an admin has set."""

    def read() -> Iterable[Metric]:
        labels = ("tenant", "job", "unit", "period")
        left = GaugeMetricFamily(
            "preceptor_budget_left",
            "What is left of a budget: samples, or the currency. No job: the tenant's own.",
            labels=labels,
        )
        limit = GaugeMetricFamily(
            "preceptor_budget_limit", "What the budget is in all, as preceptor_budget_left counts it.", labels=labels
        )
        for state in states():
            label = tuple(str(state[name]) for name in labels)
            unit = 1 if state["unit"] == "samples" else 1e9
            left.add_metric(label, max(0, state["limit"] - state["spent"]) / unit)
            limit.add_metric(label, state["limit"] / unit)
        yield left
        yield limit

    return read


def ledger(state: Callable[[], LedgerState]) -> Read:
    """This replica's own counts and the ledger's, of one moment: forwarded = in the ledger + pending, or some are lost.

    They begin anew with each process, whose epoch is a label, so that no two processes' are compared.
    """

    def read() -> Iterable[Metric]:
        now = state()
        for family, value in (
            (
                CounterMetricFamily(
                    "preceptor_forwarded_samples",
                    "Samples of forward passes that began, whoever paid. Padding is no sample.",
                    labels=("epoch",),
                ),
                now.forwarded,
            ),
            (
                GaugeMetricFamily(
                    "preceptor_ledger_forwarded_samples",
                    "Samples forwarded by this process that the ledger has booked, as it says itself.",
                    labels=("epoch",),
                ),
                now.taken,
            ),
            (
                GaugeMetricFamily(
                    "preceptor_ledger_pending_samples",
                    "Samples under way, or booked here and not known to be in the ledger yet.",
                    labels=("epoch",),
                ),
                now.pending,
            ),
        ):
            family.add_metric((now.epoch,), value)
            yield family
        yield _gauge(
            "ledger_pending_seconds",
            "For how long the oldest record here has been waiting for the ledger; 0 where none does.",
            now.pending_seconds,
        )

    return read


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"preceptor_{name}", what, value=value)
