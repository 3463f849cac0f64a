"""What it costs a query to be counted, and a scrape to be answered.

Claim    counting adds about ten microseconds to a query, and a scrape keeps no query waiting for long.
Method   In this process, no server: all that a computed query of 64 samples does to `Metrics`, for 200 jobs in turn;
         then the page of /metrics, beside which the event loop is asked every millisecond whether it is free.
Machine  stated by the output.
n        QUERIES queries, PAGES pages; medians and 99th percentiles.

    python benchmarks/metering.py
"""

import asyncio
import os
import platform
import statistics
import time

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.metrics import MAX_JOBS, Metrics

QUERIES, PAGES = 100_000, 20
TEACHER = pb.TeacherDescription(flops_per_sample=1e9, price=pb.Price(nanos_per_sample=1000, currency="EUR"))
CALLERS = [Caller(f"tenant-{number % 5}", f"job-{number}") for number in range(MAX_JOBS)]


def count(metrics: Metrics, caller: Caller) -> None:
    """As service.py, cache.py, flights.py, settlement.py and grpc_calls.py do, one after another."""
    counters = metrics.of(caller)
    metrics.cache_hits.inc(0)
    metrics.cache_misses.inc(64)
    counters.asked.inc(64)
    metrics.batch(1, [(None, range(64))], 1_000_000, {})
    metrics.charged(caller, 64, 1_000_000, TEACHER)
    metrics.queue_seconds.observe(0.01)
    counters.sources["computed"].inc(64)
    metrics.query(caller, "answered")
    metrics.request("Label", "OK")


def two(values: list[float]) -> str:
    return f"median {statistics.median(values):.1f}, 99th percentile {statistics.quantiles(values, n=100)[98]:.1f}"


async def pages(metrics: Metrics) -> tuple[list[float], list[float]]:
    """Milliseconds for each page, and by how much the loop was late meanwhile."""
    took: list[float] = []
    late: list[float] = []

    async def watch() -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(1e3 * (time.perf_counter() - asked) - 1)

    watching = asyncio.create_task(watch())
    for _ in range(PAGES):
        began = time.perf_counter()
        size = len(await metrics.page())
        took.append(1e3 * (time.perf_counter() - began))
    watching.cancel()
    print(f"page of {size / 1e3:.0f} kB")
    return took, late


def main() -> None:
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
    metrics, took = Metrics(), []
    for number in range(QUERIES):
        began = time.perf_counter_ns()
        count(metrics, CALLERS[number % len(CALLERS)])
        took.append((time.perf_counter_ns() - began) / 1e3)
    print(f"counting a query, microseconds: {two(took)}")
    page, late = asyncio.run(pages(metrics))
    print(f"a page of {MAX_JOBS} jobs, milliseconds: {two(page)}; the loop was late by: {two(late)}")


if __name__ == "__main__":
    main()
