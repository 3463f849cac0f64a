"""Serving: does the teacher answer, how fast, and what holds it up?"""

from frame import board
from grafana_foundation_sdk.models import dashboard as models
from panels import RUN, figure, heat, lines, rows, states
from queries import mean, of, quantile, rate, share, summed, total

QUEUE = "preceptor_queue_seconds"
COMPUTE = "preceptor_compute_seconds"
QUERIES = 'tenant=~"$tenant", job=~"$job|other"'  # what was never admitted counts as job `other`
REFUSED = QUERIES + ', outcome!~"answered|cancelled"'
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def hits(by: str = "") -> str:
    """Of the samples that were looked up, those that were there."""
    found, missed = (rate(f"preceptor_cache_{what}_total", by, "") for what in ("hits", "misses"))
    return share(found, f"{found} + {missed}")


def built() -> models.Dashboard:
    first = [
        figure(
            "Replicas ready",
            "sum(preceptor_ready)",
            "short",
            "Of those that are scraped. The table of replicas has the others.",
            steps=((None, "red"), (1, "green")),
            width=3,
        ),
        figure("Answered", rate("preceptor_samples_total"), "short", "Samples a second.", width=3, decimals=0),
        figure(
            "Queries refused",
            share(
                f"({rate('preceptor_queries_total', labels=REFUSED)} or vector(0))",
                rate("preceptor_queries_total", labels=QUERIES),
            ),
            "percentunit",
            "Of all that ended; those that their student gave up are not refused. Spent budgets count.",
            steps=((None, "green"), (0.01, "orange"), (0.2, "red")),
            empty="no queries",
            width=3,
        ),
        figure(
            "In the queue, p95",
            quantile(0.95, QUEUE, labels=""),
            "s",
            "From queued to computing.",
            steps=((None, "green"), (0.5, "orange"), (2, "red")),
            empty="idle",
            width=3,
        ),
        figure(
            "Fullest queue",
            "max(preceptor_queue_used_ratio)",
            "percentunit",
            "Of any job or tenant on any replica, against its bound in samples or bytes; at 100 % queries are refused.",
            steps=((None, "green"), (0.5, "orange"), (0.8, "red")),
            width=3,
        ),
        figure(
            "Device busy",
            "avg(rate(preceptor_device_busy_seconds_total[$__rate_interval]))",
            "percentunit",
            "Mean over replicas.",
            width=3,
        ),
        figure("Cache hits", hits(), "percentunit", "Of the samples looked up.", empty="no lookups", width=3),
        figure(
            "Drift",
            "sum(job:preceptor_ledger_drift_samples:sum)",
            "short",
            "Samples that were computed and are neither in the ledger nor on their way. Anything but 0 is a fault.",
            steps=((None, "green"), (1, "red")),
            width=3,
        ),
    ]
    calls = [
        lines(
            "Requests by code",
            {"{{call}} {{code}}": rate("preceptor_requests_total", "call, code", "")},
            "reqps",
            "All calls, by their gRPC status code.",
            stacked=True,
        ),
        lines(
            "Queries refused, by reason",
            {"{{tenant}}: {{outcome}}": rate("preceptor_queries_total", "tenant, outcome", REFUSED)},
            "reqps",
            "Of those that were refused before they were admitted, the job is `other`.",
            stacked=True,
        ),
    ]
    queue = [
        lines(
            "Waiting, by job",
            {
                RUN: summed(of("preceptor_queue_samples"), "tenant, job"),
                "all": "sum(instance:preceptor_queue_samples:sum)",
            },
            "short",
            width=8,
            axis="samples",
        ),
        lines(
            "Fullest queue, by replica",
            {"{{instance}}": "max by (instance) (preceptor_queue_used_ratio)"},
            "percentunit",
            "Against its bound in samples or bytes. At 80 % PreceptorQueueSaturated fires; at 100 % it is full.",
            width=8,
            top=1,
            steps=((None, "transparent"), (0.8, "red")),
        ),
        lines(
            "In the queue",
            {name: quantile(q, QUEUE, labels="") for name, q in QUANTILES.items()},
            "s",
            "From queued to computing.",
            width=8,
        ),
    ]
    device = [
        lines(
            "Batch size",
            {
                "{{instance}}": mean("preceptor_batch_size", "instance", ""),
                "may have": "max(preceptor_max_batch_size_samples)",
                "fits the memory": "min(preceptor_largest_batch_samples)",
            },
            "short",
            "Mean by replica, against what a batch may have. Small ones while others wait: PreceptorNoBatchForming.",
            width=8,
            axis="samples",
        ),
        lines(
            "Device time of a batch",
            {name: quantile(q, COMPUTE, labels="") for name, q in QUANTILES.items()},
            "s",
            width=8,
        ),
        lines(
            "Device busy, by replica",
            {"{{instance}}": rate("preceptor_device_busy_seconds_total", "instance", "")},
            "percentunit",
            width=8,
            top=1,
        ),
        heat(
            "Batch sizes",
            rate("preceptor_batch_size_bucket", "le", ""),
            "short",
            "How many batches a second had that many samples.",
            decimals=0,
        ),
        heat("Seconds in the queue", rate(f"{QUEUE}_bucket", "le", ""), "s"),
    ]
    stores = [
        lines(
            "Cache hits, by replica",
            {"{{instance}}": hits("instance")},
            "percentunit",
            "Of the samples looked up.",
            width=8,
            top=1,
        ),
        lines(
            "Cache: errors, answers not kept, computed twice",
            {
                "{{kind}}": rate("preceptor_cache_errors_total", "kind", ""),
                "declined": rate("preceptor_cache_declined_total", labels=""),
                "computed twice": rate("preceptor_duplicate_samples_total", labels=""),
            },
            "short",
            "declined: their job writes many and uses few. computed twice: by two replicas at the same time.",
            width=8,
            axis="samples / s",
        ),
        lines(
            "Not in the ledger yet",
            {
                "{{instance}}": "sum by (instance) (preceptor_ledger_pending_samples)",
                "drift": "sum(job:preceptor_ledger_drift_samples:sum)",
            },
            "short",
            "Pending samples are booked, or about to be. Drift: samples that nobody is billed for.",
            width=8,
            axis="samples",
        ),
        states(
            "Redis: cache and ledger",
            {"{{instance}} {{store}}": "min by (instance, store) (preceptor_store_up)"},
            "Whether it answered this replica when last asked.",
            good="answers",
            bad="down",
        ),
        states(
            "Ready, over time",
            {"{{instance}}": "min by (instance) (preceptor_ready)"},
            "As their /readyz says.",
            good="ready",
            bad="takes no queries",
        ),
    ]
    replicas = rows(
        "Replicas",
        {
            "ready": ("min by (instance) (preceptor_ready)", "bool_yes_no"),
            "of": ("max by (instance, teacher, fingerprint, precision, device) (preceptor_teacher_info)", "short"),
            "started": (
                "1000 * min by (instance) (process_start_time_seconds and on (instance) preceptor_ready)",
                "dateTimeFromNow",
            ),
            "known replicas": ("max by (instance) (preceptor_replicas)", "short"),
            "samples forwarded": (total("preceptor_forwarded_samples_total", "instance", ""), "locale"),
            "device errors": (total("preceptor_device_errors_total", "instance", ""), "locale"),
        },
        "Known replicas: of this teacher, as it tells students; 0 where it is alone.",
        labels=("instance", "teacher", "fingerprint", "precision", "device"),
        order_by="samples forwarded",
        hidden=("Value #B",),
        height=8,
    )
    process = [
        lines(
            "Memory of the process",
            {"{{instance}}": "process_resident_memory_bytes and on (instance) preceptor_ready"},
            "bytes",
            width=8,
        ),
        lines(
            "Processor",
            {"{{instance}}": "rate(process_cpu_seconds_total[$__rate_interval]) and on (instance) preceptor_ready"},
            "short",
            "Cores in use.",
            width=8,
            axis="cores",
        ),
        lines(
            "Turned away at the door",
            {
                "token {{reason}}": rate("preceptor_authentication_failures_total", "reason", ""),
                "HTTP {{reason}}": rate("preceptor_http_connections_dropped_total", "reason", ""),
            },
            "reqps",
            "Tokens: missing, unknown, or of a role that may not. HTTP connections: too many, or too slow.",
            width=8,
        ),
    ]
    return board(
        "preceptor-serving",
        "Whether the teacher answers, how fast, and what holds it up. Tenant and job choose queries and what waits; "
        "all the rest is of the whole teacher.",
        "1h",
        "15s",
        {
            "": first,
            "Queries": calls,
            "Queue": queue,
            "Batches and the device": device,
            "Cache and ledger": stores,
            "Replicas": [replicas, *process],
        },
    )
