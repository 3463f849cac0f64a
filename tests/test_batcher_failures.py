"""What fails and what does not, device time to the nanosecond, and what holds for every history of queries."""

import gc
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from teacher_server.batcher import Batcher, Computed
from teacher_server.config import BatcherConfig
from teacher_server.errors import (
    DeviceLost,
    ForwardFailed,
    QueueFull,
)
from tests.batching import PATIENCE, BusyClock, Clock, Gate, Recorder, batcher, logits, numbers, samples, square

# ------------------------------------------------------------ failures


def picky(*bad: int) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def compute(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if found := set(numbers(inputs["x"])) & set(bad):
            raise ValueError(f"cannot stand {found}")
        return square(inputs)

    return compute


def test_only_the_guilty_query_of_a_failing_batch_fails() -> None:
    seen, reports = Recorder(picky(3)), []
    numbers = itertools.count(1)
    served = batcher(
        seen,
        size=6,
        forwarding=lambda samples: next(numbers) * 100 + samples,
        on_batch=lambda number, parts, ns, outcome: reports.append((number, parts, ns, type(outcome))),
        busy_clock=BusyClock(600),
    )
    futures = [served.submit("t", "j", samples(n, n + 2), tag=n) for n in (0, 2, 4, 6)]
    with served:
        assert [logits(futures[i]) for i in (0, 2, 3)] == [[0, 1], [16, 25], [36, 49]]
        with pytest.raises(ForwardFailed, match=r"raised ValueError: cannot stand \{3\}"):
            futures[1].result(PATIENCE)
    assert seen.batches == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3], [4, 5], [6, 7]]
    two = range(2)
    assert reports == [
        (106, [(0, two), (2, two), (4, two)], 600, ForwardFailed),
        (202, [(0, two)], 600, dict),
        (302, [(2, two)], 600, ForwardFailed),
        (402, [(4, two)], 600, dict),
        (502, [(6, two)], 600, dict),
    ]


def test_whoever_left_is_not_computed_again() -> None:
    gate = Gate(picky(2))
    served = batcher(gate)
    gone, guilty = served.submit("t", "j", samples(0, 2)), served.submit("t", "j", samples(2, 4))
    with served:
        gate.arrived()
        assert gone.cancel()
        gate.let_through(2)
        with pytest.raises(ForwardFailed):
            guilty.result(PATIENCE)
    assert gate.batches == [[0, 1, 2, 3], [2, 3]]


def test_a_part_that_fails_fails_its_query_and_the_rest_is_dropped() -> None:
    seen = Recorder(picky(5))
    served = batcher(seen)
    long, other = served.submit("t", "j", samples(0, 100)), served.submit("t", "k", samples(100, 101))
    with served:
        with pytest.raises(ForwardFailed):
            long.result(PATIENCE)
        assert logits(other) == [10000]
    assert len(seen.batches) <= 4


def test_even_a_network_that_exits_or_loses_rows_fails_only_its_query() -> None:
    def leave(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if 1 in numbers(inputs["x"]):
            raise SystemExit("goodbye")
        return {"logits": square(inputs)["logits"][:2]}

    with batcher(leave) as served:
        with pytest.raises(ForwardFailed, match="SystemExit: goodbye"):
            served.submit("t", "j", samples(1, 2)).result(PATIENCE)
        with pytest.raises(ForwardFailed, match="answered 3 samples with 2 rows"):
            served.submit("t", "j", samples(2, 5)).result(PATIENCE)
        assert logits(served.submit("t", "j", samples(2, 4))) == [4, 9]


def lose_device(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    raise DeviceLost("gone")


def test_a_lost_device_fails_everything_and_is_reported_once() -> None:
    lost = threading.Event()
    served = batcher(lose_device, on_device_lost=lost.set)
    futures = [served.submit(tenant, "j", samples(0, 3)) for tenant in "abc"]
    futures[2].cancel()
    with served:
        for future in futures[:2]:
            with pytest.raises(DeviceLost, match="gone"):
                future.result(PATIENCE)
        assert lost.wait(PATIENCE)
        with pytest.raises(DeviceLost, match="gone"):
            served.submit("a", "j", samples(0, 1))
    assert served.depth() == {}


def test_a_device_lost_while_the_guilty_is_sought_leaves_nobody_waiting() -> None:
    def compute(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(inputs["x"]) > 2:
            raise ValueError("too many")
        return lose_device(inputs) if 2 in numbers(inputs["x"]) else square(inputs)

    served = batcher(compute)
    futures = [served.submit("t", "j", samples(n, n + 2)) for n in (0, 2, 4)]
    with served:
        assert logits(futures[0]) == [0, 1]
        for future in futures[1:]:
            with pytest.raises(DeviceLost):
                future.result(PATIENCE)


@pytest.mark.parametrize("callback", ["forwarding", "on_batch"])
def test_the_thread_never_dies_silently(callback: str) -> None:
    lost = threading.Event()

    def broken(*_: object) -> int:
        raise ZeroDivisionError("a bug of ours")

    served = batcher(square, on_device_lost=lost.set, **{callback: broken})
    future = served.submit("t", "j", samples(0, 9))
    with served:
        with pytest.raises(DeviceLost, match="stopped on ZeroDivisionError: a bug of ours"):
            future.result(PATIENCE)
        assert lost.wait(PATIENCE)


# ------------------------------------------------------------ accounts


def test_device_time_is_shared_to_the_nanosecond() -> None:
    total: list[int] = []
    served = batcher(square, size=7, on_batch=lambda *batch: total.append(batch[2]), busy_clock=BusyClock(1000))
    futures = [served.submit("t", f"{n}", samples(0, n)) for n in (1, 2, 3, 5, 11)]
    with served:
        shares = [future.result(PATIENCE).device_nanoseconds for future in futures]
    assert sum(shares) == sum(total) == 4 * 1000
    assert [abs(share - n * sum(total) / 22) <= 1000 for share, n in zip(shares, (1, 2, 3, 5, 11), strict=True)]


def test_waiting_and_computing_add_up_to_the_whole() -> None:
    clock = Clock()

    def slow(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        clock.now += 10.0
        return square(inputs)

    served = batcher(slow, clock=clock)
    first, second = served.submit("t", "j", samples(0, 4)), served.submit("t", "j", samples(4, 10))
    clock.now = 3.0
    with served:
        for future, queued, computed in ((first, 3.0, 10.0), (second, 13.0, 20.0)):
            times = future.result(PATIENCE)
            assert (times.queue_seconds, times.compute_seconds) == (queued, computed)


# ------------------------------------------------------------ properties

Submitted = tuple[str, str, int, str, bool]
submissions = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.sampled_from("jk"), st.integers(1, 20), st.sampled_from(("f4", "u2")), st.booleans()
    ),
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(submissions, st.integers(1, 9), st.integers(0, 10**6))
def test_every_sample_is_answered_exactly_once_with_its_own_value(
    submitted: Sequence[Submitted], size: int, nanoseconds: int
) -> None:
    seen, total = Recorder(), []
    served = batcher(
        seen,
        size,
        on_batch=lambda _, parts, ns, __: total.append((sum(len(span) for _, span in parts), ns)),
        busy_clock=BusyClock(nanoseconds),
    )
    spans, futures, start = [], [], 0
    for tenant, job, n, dtype, cancelled in submitted:
        futures.append(served.submit(tenant, job, samples(start, start + n, dtype)))
        spans.append(range(start, start + n))
        start += n
        if cancelled:
            assert futures[-1].cancel()
    kept = [(*entry, *what) for *entry, what in zip(spans, futures, submitted, strict=True) if not what[4]]
    waiting = Counter({(tenant, job): 0 for _, _, tenant, job, *_ in kept})
    for span, _, tenant, job, *_ in kept:
        waiting[tenant, job] += len(span)
    assert served.depth() == waiting
    with served:
        for span, future, *_ in kept:
            assert logits(future) == [n * n for n in span]
    assert sorted(itertools.chain(*seen.batches)) == sorted(n for span, *_ in kept for n in span)
    assert all(0 < len(batch) <= size for batch in seen.batches)
    assert sum(n for n, _ in total) == sum(map(len, seen.batches))
    assert sum(future.result().device_nanoseconds for _, future, *_ in kept) == sum(ns for _, ns in total)

    # Fair: of two tenants that both still wait, neither is ahead of the other by more than two turns. (One kind only:
    # kinds share the device by batches.)
    if len({dtype for *_, dtype, _ in kept}) == 1:
        owner = {n: tenant for span, _, tenant, *_ in kept for n in span}
        left, had = Counter(owner.values()), Counter(dict.fromkeys(owner.values(), 0))
        for n in itertools.chain(*seen.batches):
            left[owner[n]] -= 1
            had[owner[n]] += 1
            backlogged = [had[tenant] for tenant in had if left[tenant]]
            if backlogged:
                assert max(backlogged) - min(backlogged) <= 2 * size


class Batching(RuleBasedStateMachine):
    """Submitting, cancelling and computing interleaved, one batch at a time, against a model of what waits.

    Between two rules the batcher stands still: its thread is held at the gate, or has nothing to do.
    """

    SIZE, BOUND = 4, 12

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(picky(*range(7, 10**4, 20)))
        self.served = batcher(self.compute, self.SIZE, max_queue_size=self.BOUND)
        self.served.__enter__()
        self.numbers = 0
        self.queries: list[tuple[range, Future[Computed]]] = []
        self.waiting: dict[int, str] = {}  # sample -> its job
        self.dispatched: set[int] = set()
        self.at_gate: list[int] = []

    def compute(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The gate is for new batches; when one has failed, its queries are computed again at once.
        rerun = self.dispatched.issuperset(numbers(inputs["x"]))
        return picky(*range(7, 10**4, 20))(inputs) if rerun else self.gate(inputs)

    def next_batch(self) -> None:
        """A device that could work does: if anything waits, a batch comes to the gate."""
        self.at_gate = self.gate.arrived() if self.waiting else []
        assert len(self.at_gate) <= self.SIZE
        for number in self.at_gate:
            del self.waiting[number]  # fails for what was cancelled, or computed before
        self.dispatched.update(self.at_gate)

    def forget(self, span: range) -> None:
        self.waiting = {number: job for number, job in self.waiting.items() if number not in span}

    @rule(job=st.sampled_from("jkl"), n=st.integers(1, 9))
    def submit(self, job: str, n: int) -> None:
        start, self.numbers = self.numbers, self.numbers + n
        if list(self.waiting.values()).count(job) + n > self.BOUND:
            with pytest.raises(QueueFull):
                self.served.submit("t", job, samples(start, start + n))
            return
        self.queries.append((range(start, start + n), self.served.submit("t", job, samples(start, start + n))))
        self.waiting.update(dict.fromkeys(range(start, start + n), job))
        if not self.at_gate:
            self.next_batch()

    @precondition(lambda self: self.queries)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        span, future = self.queries[data.draw(st.integers(0, len(self.queries) - 1))]
        if future.cancel():
            self.forget(span)

    @precondition(lambda self: self.queries)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.queries) - 1))
        span, future = self.queries[number]
        done = future.done()
        kept = self.served.withdraw(future)
        self.forget(span)
        if not done:
            assert kept == len(self.dispatched.intersection(span))
            self.queries[number] = (range(span.start, span.start + kept), future)
            assert kept or future.cancelled()
            if set(self.at_gate).isdisjoint(span):
                assert future.done()

    @precondition(lambda self: self.at_gate)
    @rule()
    def step(self) -> None:
        batch = set(self.at_gate)
        self.gate.let_through()
        for span, future in self.queries:
            if guilty := any(number % 20 == 7 for number in batch.intersection(span)):
                self.forget(span)
            if guilty or (span and span[-1] in batch):
                assert wait([future], PATIENCE).done
        self.next_batch()

    @invariant()
    def depth(self) -> None:
        assert self.served.depth() == Counter(("t", job) for job in self.waiting.values())

    def teardown(self) -> None:
        self.gate.let_through(10**4)
        assert self.served.close(PATIENCE)
        for span, future in self.queries:
            if future.cancelled():
                continue
            if any(number % 20 == 7 for number in span):
                assert isinstance(future.exception(0), ForwardFailed)
            else:
                assert logits(future) == [number**2 for number in span]


Batching.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestBatching = Batching.TestCase


def test_an_answered_querys_samples_are_let_go_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        with Batcher(BatcherConfig(max_batch_size=8), lambda inputs: {"logits": inputs["x"][:, :1]}) as batcher:
            alive = []
            for _ in range(20):
                x = np.zeros((4, 1000), np.float32)
                alive.append(weakref.ref(x))
                batcher.submit("t", "j", {"x": x}).result(30)
                del x
            assert sum(ref() is not None for ref in alive) <= 2
    finally:
        gc.enable()
