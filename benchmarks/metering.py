"""What it costs a query to be counted, a scrape to be answered, and a student's step to be watched.

Claim    counting adds about ten microseconds to a query, a scrape keeps no query waiting for long, and a student that
         exports its metrics is a tenth of a millisecond slower a step.
Method   In this process, no server: all that a computed query of 64 samples does to the teacher's `Metrics`, for 200
         jobs in turn; then the page of /metrics, beside which the event loop is asked every millisecond whether it is
         free. Then steps of UNIX on 64 samples with a teacher that answers at once, in pairs of one with the student's
         `Metrics` and one without, whichever first by chance; in CPU time of the loop's thread, which is all they take.
Machine  stated by the output.
n        QUERIES queries, PAGES pages, STEPS pairs of steps; medians, 99th percentiles and quartiles.

    python benchmarks/metering.py
"""

import asyncio
import os
import platform
import random
import statistics
import time

import torch
from torch import nn

from protos import teacher_pb2 as pb
from student_worker import Answer, Unix
from student_worker import Metrics as StudentMetrics
from teacher_server.auth import Caller
from teacher_server.metrics import MAX_JOBS, Metrics

QUERIES, PAGES, STEPS = 100_000, 20, 3000
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


class Quick:
    """A teacher that answers at once."""

    def __init__(self) -> None:
        self.logits = torch.randn(64, 10)

    def label(self, x: torch.Tensor, **_: object) -> Answer:
        return Answer(logits=self.logits[: len(x)], sources=("computed",) * len(x))


def watched_steps() -> tuple[list[float], list[float]]:
    """CPU microseconds of a step that nobody watches; how many more the other step of each pair took."""
    torch.set_num_threads(1)
    unix = Unix(Quick())
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    batch = torch.randn(64, 64)
    alone, more = [], []

    def step(metrics: StudentMetrics | None) -> float:
        began = time.thread_time_ns()
        unix.observer = metrics
        loss = unix.loss(student, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if metrics:
            metrics.step(loss)
        return (time.thread_time_ns() - began) / 1e3

    with StudentMetrics(None, None) as metrics:
        for _ in range(STEPS):
            pair = [metrics, None]
            random.shuffle(pair)
            took = {who: step(who) for who in pair}
            alone.append(took[None])
            more.append(took[metrics] - took[None])
    return alone, more


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
    alone, more = watched_steps()
    low, middle, high = statistics.quantiles(more, n=4)
    print(
        f"torch {torch.__version__}, 1 thread: a step, microseconds of CPU time: {two(alone)}; "
        f"more where it is watched: median {middle:.0f}, quartiles {low:.0f} and {high:.0f}"
    )


if __name__ == "__main__":
    main()
