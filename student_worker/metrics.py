"""What a student tells Prometheus while it trains (docs/metrics.md, "A student's own metrics").

A step adds to plain numbers; what Prometheus is given is made of them when it asks.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import copy, deepcopy
from pathlib import Path
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from torch import Tensor

from protos.targets import Targets
from student_worker.answer import SOURCES
from student_worker.client import TeacherClient
from student_worker.scraped import Page, local_host
from student_worker.unix import Unix

_ABOUT = ("method", "dataset", "student", "strategy", "mixing")
_TENTHS = np.arange(1, 11) / 10  # upper bounds of the buckets of uncertainty


class _Sum:
    """Of what was observed, and how often."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1


class _Uncertainty:
    """Of the samples for which one thing was decided."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(_TENTHS) + 1, np.int64)  # the last are those above 1, of which there are none
        self.total = 0.0

    def add(self, counts: "np.ndarray[Any, np.dtype[np.int64]]", total: float) -> None:
        self.counts += counts
        self.total += total


class Metrics(Collector):
    """Serves the metrics of one run while it is entered:

        with Metrics(unix, teacher, port=9101) as metrics:
            for b in unix.batches(loader, student):
                ...
                metrics.step(loss)

    `unix` and `teacher` are None where there is none; `job`, by default the teacher client's, is the run's. `port` 0
    takes a free one, of the address from which the teacher is reached (loopback without a teacher); `url` says where.
    `targets` is a folder where Prometheus is told of it. `about` are the labels method, dataset, student, strategy and
    mixing of the run, the last two by default those of `unix`. `rank` is for several processes that train one student.
    `planned_steps`, also an attribute, is of the whole run, where that is known; `steps_before`, by default those that
    `unix` has taken, are those before it was resumed.

    Left without an error, it waits until the last values have been scraped, if anybody ever came: at most twice the
    time between two scrapes and at most a minute, or 15 s where there was one only; `say` is given a line about it.
    Raises OSError for a port that is taken and a folder that cannot be written; what `teacher.describe()` raises.
    """

    def __init__(
        self,
        unix: Unix | None,
        teacher: TeacherClient | None,
        *,
        job: str = "",
        rank: int = 0,
        port: int = 0,
        targets: str | Path | None = None,
        about: Mapping[str, str] | None = None,
        planned_steps: int | None = None,
        steps_before: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        about = dict(about or {})
        if unknown := about.keys() - set(_ABOUT):
            raise ValueError(f"about: {sorted(unknown)} are no labels; there are {', '.join(_ABOUT)}")
        if unix is not None:
            about = {"method": "unix", "strategy": unix.strategy, "mixing": unix.mixing} | about
        self._about = {name: about.get(name, "") for name in _ABOUT}
        self._unix, self._teacher, self._say = unix, teacher, say
        self.job = job or (teacher.job if teacher else "default")
        self._rank, self._port = str(rank), port
        self._targets = None if targets is None else Path(targets)
        self.planned_steps = planned_steps
        self._before = steps_before if steps_before is not None else unix.steps if unix else 0
        self._asks = unix is not None or teacher is not None
        self._labels: dict[str, str] = {}
        self._fingerprint = ""
        self._stack = ExitStack()
        self._registry = CollectorRegistry()
        self._registry.register(self)

        self._lock = threading.Lock()  # held by a step for its few additions, and while they are copied for a page
        self._reading = threading.Lock()  # one page at a time
        self._steps = self._candidates = self._asked = 0
        self._accuracy: float | None = None
        self._sources = Counter(dict.fromkeys(SOURCES.values(), 0))
        self._loss, self._wait, self._step = _Sum(), _Sum(), _Sum()
        self._on_device: Tensor | None = None  # a sum of losses that nobody has fetched yet
        self._uncertainty = {"kept": _Uncertainty(), "dropped": _Uncertainty()}
        self._since: float | None = None

    def __enter__(self) -> Self:
        if self._unix is not None and self._unix.observer is not None:
            raise ValueError("this Unix has an observer: leave its other Metrics first")
        tenant = ""
        if self._teacher is not None:
            self._fingerprint = self._teacher.describe().fingerprint
            tenant = self._teacher.tenant
        self._labels = {"tenant": tenant, "job": self.job, "rank": self._rank}
        host = local_host(self._teacher.addresses if self._teacher else ())
        with ExitStack() as stack:
            page = Page(host, self._port, self.page, CONTENT_TYPE_PLAIN_0_0_4)
            self._page = stack.enter_context(page)
            if self._targets is not None:
                targets = stack.enter_context(Targets(self._targets, f"{self.job}-{self._rank}"))
                targets.write([page.address])
            if self._unix is not None:
                self._unix.observer = self
            self._stack = stack.pop_all()
        self._say(f"{self.job}: metrics at {self.url}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = monotonic()
        with self._stack:
            if self._unix is not None:
                self._unix.observer = None
            if kind is None and (patience := self._page.patience()):
                self._say(f"{self.job}: waits up to {patience:.0f} s for Prometheus to fetch its last metrics")
                self._page.wait(ended, patience)

    @property
    def url(self) -> str:
        """Where Prometheus finds it."""
        return self._page.url

    # ------------------------------------------------------------ a step

    def step(self, loss: Tensor | float | None = None) -> None:
        """One step of the optimiser has been taken. No GPU is waited for: where `loss` is on one it is added there."""
        now = perf_counter()
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        on_device = loss.float() if isinstance(loss, Tensor) and loss.device.type != "cpu" else None
        with self._lock:
            self._steps += 1
            if on_device is not None:
                self._on_device = on_device if self._on_device is None else self._on_device + on_device
                self._loss.count += 1
            elif loss is not None:
                self._loss.add(float(loss))
            if self._since is not None:  # else nobody has said when it began
                self._step.add(now - self._since)
            self._since = now

    def restart_clock(self) -> None:
        """What was done since the last step, such as evaluating, is no part of the next one's time."""
        self._since = perf_counter()

    def accuracy(self, ratio: float) -> None:
        """On the test set, 0..1, as of now."""
        self._accuracy = ratio
        self.restart_clock()

    def selected(self, uncertainty: Tensor, kept: Tensor) -> None:
        """As unix.Observer has it; so has `answered`."""
        ratios, places = uncertainty.numpy(), kept.numpy()
        buckets = _TENTHS.searchsorted(ratios)
        counts = np.bincount(buckets, minlength=len(_TENTHS) + 1)
        kept_counts = np.bincount(buckets[places], minlength=len(_TENTHS) + 1)
        total, kept_total = float(ratios.sum()), float(ratios[places].sum())
        with self._lock:
            self._candidates += len(ratios)
            self._asked += len(kept)
            self._uncertainty["kept"].add(kept_counts, kept_total)
            self._uncertainty["dropped"].add(counts - kept_counts, total - kept_total)

    def answered(self, sources: tuple[str, ...], seconds: float) -> None:
        if self._since is None:  # the first step: it began with its wait at the latest
            self._since = perf_counter() - seconds
        with self._lock:
            self._sources.update(sources)
            self._wait.add(seconds)

    # ------------------------------------------------------------ a scrape

    def page(self) -> bytes:
        """What Prometheus is answered."""
        return generate_latest(self._registry)

    def collect(self) -> list[Metric]:
        """Everything, as it stands."""
        with self._reading:
            return list(self._collected())

    def _collected(self) -> Iterator[Metric]:
        with self._lock:
            waiting, self._on_device = self._on_device, None
            steps, candidates, asked, sources = self._steps, self._candidates, self._asked, dict(self._sources)
            loss, wait, step = copy(self._loss), copy(self._wait), copy(self._step)
            uncertainty = deepcopy(self._uncertainty)
        if waiting is not None:  # nobody else waits for the device meanwhile
            torch.accelerator.synchronize(waiting.device)
            fetched = waiting.item()
            loss.total += fetched
            with self._lock:
                self._loss.total += fetched

        labels = self._labels
        yield self._gauge("info", "The run; always 1.", 1, self._about | {"fingerprint": self._fingerprint})
        yield self._counter("steps", "Steps that the optimiser has taken in this process.", steps)
        reached = self._before + steps
        yield self._gauge("reached_steps", "Steps of the whole run so far, with those before it was resumed.", reached)
        if self.planned_steps is not None:
            yield self._gauge("planned_steps", "Steps of the whole run.", self.planned_steps)
        yield self._summary("loss", "Loss of each step.", loss)
        yield self._summary("step_seconds", "A whole step, its wait included.", step)
        if self._accuracy is not None:
            yield self._gauge("accuracy_ratio", "On the test set, after the last epoch, 0 to 1.", self._accuracy)
        if not self._asks:
            return
        yield self._counter("candidate_samples", "Samples of which some are asked about.", candidates)
        yield self._counter("asked_samples", "Samples that the teacher was asked about.", asked)
        answers = CounterMetricFamily(_named("answers"), "Answers that came, by source.", labels=[*labels, "source"])
        for source, count in sources.items():
            answers.add_metric([*labels.values(), source], count)
        yield answers
        how_sure = HistogramMetricFamily(
            _named("uncertainty_ratio"),
            "How unsure the student was of each candidate, 0 to 1, by whether it was kept and asked about.",
            labels=[*labels, "decision"],
        )
        for decision, seen in uncertainty.items():
            bounds = [*(f"{bound:.1f}" for bound in _TENTHS), "+Inf"]
            counts = seen.counts.cumsum().tolist()
            how_sure.add_metric([*labels.values(), decision], list(zip(bounds, counts, strict=True)), seen.total)
        yield how_sure
        yield self._summary("teacher_wait_seconds", "How long a step waited for its answers.", wait)

    def _gauge(self, name: str, what: str, value: float, more: Mapping[str, str] | None = None) -> Metric:
        labels = self._labels | dict(more or {})
        family = GaugeMetricFamily(_named(name), what, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counter(self, name: str, what: str, value: int) -> Metric:
        family = CounterMetricFamily(_named(name), what, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _summary(self, name: str, what: str, of: _Sum) -> Metric:
        family = SummaryMetricFamily(_named(name), what, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), of.count, of.total)
        return family


def _named(name: str) -> str:
    return f"preceptor_student_{name}"
