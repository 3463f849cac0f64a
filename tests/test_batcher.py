"""Queries carry sample numbers; `compute` answers each with a function of its number, so that every mix-up shows.

Nothing here sleeps. Queries submitted before the batcher is entered form batches that can be foretold; a `Gate` lets
one batch through at a time; a delay of a thousand seconds never runs out.
"""

import gc
import itertools
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from teacher_server.batcher import Batcher, Computed
from teacher_server.config import BatcherConfig
from teacher_server.errors import (
    DeviceLost,
    Draining,
    ForwardFailed,
    InvalidQuery,
    PastDeadline,
    QueueFull,
)

PATIENCE = 20.0  # seconds until a test gives up; never waited for when all is well


def samples(start: int, stop: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"x": np.arange(start, stop).astype(dtype)[:, None]}


def square(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"logits": inputs["x"].astype(np.float32) ** 2}


def numbers(array: np.ndarray) -> list[int]:
    return array[:, 0].astype(int).tolist()


def logits(future: Future[Computed]) -> list[int]:
    return numbers(future.result(PATIENCE).outputs["logits"])


class Recorder:
    """A compute that keeps the sample numbers of each batch."""

    def __init__(self, compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = square) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self._compute = compute

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(numbers(inputs["x"]))
        self.threads.add(threading.get_ident())
        return self._compute(inputs)


class Gate(Recorder):
    """Holds each batch until it is let through."""

    def __init__(self, compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = square) -> None:
        super().__init__(compute)
        self.entered: queue.Queue[list[int]] = queue.Queue()
        self._go = threading.Semaphore(0)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.entered.put(numbers(inputs["x"]))
        assert self._go.acquire(timeout=PATIENCE)
        return super().__call__(inputs)

    def arrived(self) -> list[int]:
        """Waits for the next batch to stand at the gate."""
        return self.entered.get(timeout=PATIENCE)

    def let_through(self, batches: int = 1) -> None:
        self._go.release(batches)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class BusyClock:
    """Every batch takes `step` nanoseconds."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    def __call__(self) -> int:
        self.now += self.step
        return self.now


def batcher(compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], size: int = 4, **more: Any) -> Batcher:
    knobs = {name: more.pop(name) for name in list(more) if name in BatcherConfig.model_fields}
    return Batcher(BatcherConfig(max_batch_size=size, **knobs), compute, **more)


# ------------------------------------------------------------ batches


def test_queries_share_batches_and_are_split_to_fill_them() -> None:
    seen = Recorder()
    served = batcher(seen)
    futures = [served.submit("t", "j", samples(*span)) for span in ((0, 3), (3, 6), (6, 17))]
    with served:
        assert [logits(future) for future in futures] == [
            [n * n for n in range(*span)] for span in ((0, 3), (3, 6), (6, 17))
        ]
    assert seen.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16]]
    assert seen.threads.isdisjoint({threading.get_ident()})
    assert len(seen.threads) == 1


def test_an_idle_device_does_not_wait() -> None:
    seen = Recorder()
    with batcher(seen, size=1000) as served:
        for number in range(3):
            assert logits(served.submit("t", "j", samples(number, number + 1))) == [number**2]
    assert seen.batches == [[0], [1], [2]]


def test_with_a_delay_only_a_full_batch_goes_and_drain_does_not_wait() -> None:
    seen = Recorder()
    with batcher(seen, max_queue_delay_microseconds=10**9) as served:
        early = [served.submit("t", "j", samples(n, n + 1)) for n in range(6)]
        assert wait(early[:4], PATIENCE).not_done == set()
        assert not any(future.done() for future in early[4:])
    assert [logits(future) for future in early] == [[n * n] for n in range(6)]
    assert [len(batch) for batch in seen.batches] == [4, 2]


def test_a_delay_that_has_run_out_lets_a_partial_batch_go() -> None:
    seen, clock = Recorder(), Clock()
    served = batcher(seen, max_queue_delay_microseconds=10**9, clock=clock)
    first = served.submit("t", "j", samples(0, 1))
    clock.now = 999.0
    second = served.submit("t", "j", samples(1, 2))
    clock.now = 1000.0
    with served:
        assert (logits(first), logits(second)) == ([0], [1])
        assert seen.batches == [[0, 1]]


def test_only_samples_of_one_kind_share_a_batch_and_nobody_starves() -> None:
    seen = Recorder()
    served = batcher(seen, size=8)
    futures = [
        served.submit(
            tenant, "j", {name: array.reshape(-1, *shape) for name, array in samples(n, n + 1, dtype).items()}
        )
        for n, (tenant, dtype, shape) in enumerate(
            itertools.product("abc", ("float32", "uint8"), ((1,), (1, 1)), repeat=1)
        )
    ]
    with served:
        for n, future in enumerate(futures):
            assert future.result(PATIENCE).outputs["logits"].ravel().tolist() == [n * n]
    # Each tenant's queue keeps its order; the kinds come one after another, each with all three tenants in it.
    assert [sorted(np.ravel(batch).tolist()) for batch in seen.batches] == [
        [0, 4, 8],
        [1, 5, 9],
        [2, 6, 10],
        [3, 7, 11],
    ]


def test_inputs_may_be_named_in_any_order() -> None:
    def difference(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": inputs["a"] - inputs["b"]}

    served = batcher(difference)
    one = served.submit("t", "j", {"a": np.float32([[5]]), "b": np.float32([[3]])})
    two = served.submit("t", "j", {"b": np.float32([[1]]), "a": np.float32([[9]])})
    with served:
        assert (logits(one), logits(two)) == ([2], [8])


def test_a_query_alone_in_its_batch_is_not_copied() -> None:
    x = samples(0, 3)
    seen: list[np.ndarray] = []

    def keep(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs["x"])
        return square(inputs)

    with batcher(keep) as served:
        served.submit("t", "j", x).result(PATIENCE)
    assert np.shares_memory(seen[0], x["x"])


# ------------------------------------------------------------ fairness


def test_a_greedy_tenant_delays_another_by_about_a_turn() -> None:
    gate = Gate()
    with batcher(gate, size=64, max_queue_size=10**5) as served:
        greedy = [served.submit("greedy", f"job {n % 7}", samples(0, 1000)) for n in range(14)]
        gate.arrived()
        modest = served.submit("modest", "j", samples(5000, 5048))
        before = 0
        while not modest.done():
            gate.let_through()
            batch = gate.arrived()  # the one before it has been settled by now
            before += 64 - sum(number >= 5000 for number in batch)
        assert before <= 3 * 64, "one batch under way, one turn, and the rest of the modest tenant's batch"
        for future in greedy:
            future.cancel()
        gate.let_through()


def test_ten_jobs_get_no_more_than_one() -> None:
    seen = Recorder()
    served = batcher(seen, size=16, max_queue_size=10**4)
    for job in range(10):
        served.submit("many", f"job {job}", samples(job * 400, (job + 1) * 400))
    served.submit("one", "job", samples(10000, 10400))
    with served:
        pass
    served_to_one = np.cumsum([sum(number >= 10000 for number in batch) for batch in seen.batches])
    for batches in range(1, 50):
        assert abs(2 * served_to_one[batches - 1] - 16 * batches) <= 2 * 16
    # and among the ten jobs of one tenant, all have had a turn before one has a third
    jobs = [number // 400 for batch in seen.batches for number in batch if number < 10000]
    assert Counter(jobs[: 16 * 20]) == dict.fromkeys(range(10), 32)


def test_a_turn_cut_short_by_a_full_batch_goes_on_in_the_next() -> None:
    seen = Recorder()
    served = batcher(seen, size=8)
    served.submit("small", "j", samples(0, 3))
    served.submit("a", "j", samples(100, 200))
    served.submit("b", "j", samples(200, 300))
    with served:
        pass
    tenants = ["s" if n < 100 else "a" if n < 200 else "b" for batch in seen.batches[:4] for n in batch]
    assert [(name, len(list(run))) for name, run in itertools.groupby(tenants)] == [
        ("s", 3), ("a", 8), ("b", 8), ("a", 8), ("b", 5),
    ]  # fmt: skip


# ------------------------------------------------------------ bounds


@pytest.mark.parametrize(
    ("knobs", "job", "said"),
    [
        (
            {"max_queue_size": 10},
            "j",
            "queue of job 'j' of tenant 't' is full: 8 of 10 samples wait (--max-queue-size)",
        ),
        ({"max_queue_bytes": 40}, "j", "job 'j' of tenant 't' is full: 32 of 40 bytes wait (--max-queue-bytes)"),
        ({"max_tenant_queue_size": 10}, "k", "queue of tenant 't' is full: 8 of 10 samples wait (--max-tenant-queue"),
        ({"max_tenant_queue_bytes": 40}, "k", "tenant 't' is full: 32 of 40 bytes wait (--max-tenant-queue-bytes)"),
    ],
)
def test_full_queues_say_whose_how_full_and_which_knob(knobs: dict[str, int], job: str, said: str) -> None:
    served = batcher(square, **knobs)
    served.submit("t", "j", samples(0, 8))
    with pytest.raises(QueueFull) as caught:
        served.submit("t", job, samples(8, 11))
    assert said in str(caught.value)
    assert "this query has " in str(caught.value)
    assert caught.value.retry_after == 1.0, "nothing is known of the speed yet"
    served.submit("t", job, samples(8, 10))
    served.submit("other", "j", samples(8, 16))
    assert served.depth()["other", "j"] == 8
    with served:
        pass
    assert served.depth() == {}


def test_a_query_that_can_never_fit_is_not_to_be_retried() -> None:
    served = batcher(square, max_queue_size=10, max_tenant_queue_bytes=32)
    with pytest.raises(InvalidQuery, match=r"11 samples in one query, but job 'j' .* at most 10 .*--max-queue-size"):
        served.submit("t", "j", samples(0, 11))
    with pytest.raises(InvalidQuery, match=r"36 bytes in one query, but tenant 't' .*--max-tenant-queue-bytes"):
        served.submit("t", "j", samples(0, 9))


def test_the_hint_when_to_ask_again_follows_the_speed_and_the_neighbours() -> None:
    gate = Gate()
    served = batcher(gate, size=10, max_queue_size=20, busy_clock=BusyClock(10**9))  # ten samples a second
    with served:
        served.submit("t", "j", samples(0, 10))
        gate.arrived()
        gate.let_through()
        served.submit("t", "j", samples(10, 20))
        gate.arrived()
        served.submit("t", "j", samples(20, 40))
        served.submit("u", "j", samples(0, 1))
        with pytest.raises(QueueFull) as caught:
            served.submit("t", "j", samples(40, 50))
        assert caught.value.retry_after == pytest.approx(10 / (10 / 2))
        gate.let_through(4)


# ------------------------------------------------------------ leaving early


def test_cancelling_frees_the_queue_and_nothing_is_computed() -> None:
    seen = Recorder()
    served = batcher(seen, max_queue_size=4)
    gone, kept = served.submit("t", "j", samples(0, 3)), served.submit("t", "k", samples(3, 4))
    assert gone.cancel()
    assert served.depth() == {("t", "k"): 1}
    assert wait([gone], PATIENCE).done == {gone}
    served.submit("t", "j", samples(4, 8))
    with served:
        assert logits(kept) == [9]
    assert sorted(itertools.chain(*seen.batches)) == [3, 4, 5, 6, 7]


def test_cancelling_half_way_drops_what_was_not_dispatched() -> None:
    gate = Gate()
    with batcher(gate) as served:
        long = served.submit("t", "j", samples(0, 100))
        other = served.submit("t", "k", samples(100, 102))
        assert gate.arrived() == [0, 1, 2, 3]
        assert long.cancel()
        gate.let_through(2)
        assert logits(other) == [100**2, 101**2]
    assert gate.batches == [[0, 1, 2, 3], [100, 101]]
    with pytest.raises(CancelledError):
        long.result()


def test_past_its_deadline_a_query_is_not_computed() -> None:
    seen, clock = Recorder(), Clock()
    served = batcher(seen, clock=clock)
    late = served.submit("t", "j", samples(0, 2), deadline=5.0)
    in_time = served.submit("t", "j", samples(2, 4), deadline=5.1)
    clock.now = 5.0
    with served:
        with pytest.raises(PastDeadline, match="after 5 s of waiting"):
            late.result(PATIENCE)
        assert logits(in_time) == [4, 9]
    assert seen.batches == [[2, 3]]


def test_a_deadline_ends_even_a_long_wait_for_a_full_batch() -> None:
    clock_like_monotonic = itertools.count()  # every look at the clock takes a second
    with batcher(
        square, max_queue_delay_microseconds=10**10, clock=lambda: float(next(clock_like_monotonic))
    ) as served:
        with pytest.raises(PastDeadline):
            served.submit("t", "j", samples(0, 1), deadline=1.0).result(PATIENCE)
        with pytest.raises(PastDeadline):
            served.submit("t", "j", samples(0, 1), deadline=-1.0).result(PATIENCE)


def test_leaving_finishes_what_is_queued_and_takes_no_more() -> None:
    gate = Gate()
    served = batcher(gate)
    futures = [served.submit("t", "j", samples(n, n + 3)) for n in range(5)]
    with served:
        gate.arrived()
        served.drain()
        with pytest.raises(Draining, match="ask another"):
            served.submit("t", "j", samples(0, 1))
        gate.let_through(10)
    assert all(future.done() for future in futures)
    assert served.close(), "a second time is harmless"


def test_closing_gives_up_after_a_while() -> None:
    gate = Gate()
    with batcher(gate) as served:
        running, waiting = served.submit("t", "j", samples(0, 4)), served.submit("t", "j", samples(4, 8))
        gate.arrived()
        assert not served.close(timeout=0.0)
        with pytest.raises(Draining, match="before the query's turn"):
            waiting.result(PATIENCE)
        gate.let_through()
    assert logits(running) == [0, 1, 4, 9]
    assert gate.batches == [[0, 1, 2, 3]]


def test_queries_of_a_batcher_that_never_ran_are_not_left_pending() -> None:
    served = batcher(square)
    future = served.submit("t", "j", samples(0, 1))
    assert not served.close()
    with pytest.raises(Draining):
        future.result(0)


# ------------------------------------------------------------ failures


def picky(*bad: int) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def compute(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if found := set(numbers(inputs["x"])) & set(bad):
            raise ValueError(f"cannot stand {found}")
        return square(inputs)

    return compute


def test_only_the_guilty_query_of_a_failing_batch_fails() -> None:
    seen, reports = Recorder(picky(3)), []
    served = batcher(seen, size=6, on_batch=lambda n, ns: reports.append((n, ns)), busy_clock=BusyClock(600))
    futures = [served.submit("t", "j", samples(n, n + 2)) for n in (0, 2, 4, 6)]
    with served:
        assert [logits(futures[i]) for i in (0, 2, 3)] == [[0, 1], [16, 25], [36, 49]]
        with pytest.raises(ForwardFailed, match=r"raised ValueError: cannot stand \{3\}"):
            futures[1].result(PATIENCE)
    assert seen.batches == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3], [4, 5], [6, 7]]
    assert reports == [(0, 600), (2, 600), (0, 600), (2, 600), (2, 600)]


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


def test_the_thread_never_dies_silently() -> None:
    lost = threading.Event()

    def broken(samples: int, nanoseconds: int) -> None:
        raise ZeroDivisionError("a bug of ours")

    served = batcher(square, on_batch=broken, on_device_lost=lost.set)
    future = served.submit("t", "j", samples(0, 9))
    with served:
        with pytest.raises(DeviceLost, match="stopped on ZeroDivisionError: a bug of ours"):
            future.result(PATIENCE)
        assert lost.wait(PATIENCE)


# ------------------------------------------------------------ accounts


def test_device_time_is_shared_to_the_nanosecond() -> None:
    total: list[int] = []
    served = batcher(square, size=7, on_batch=lambda _, ns: total.append(ns), busy_clock=BusyClock(1000))
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
    served = batcher(seen, size, on_batch=lambda n, ns: total.append((n, ns)), busy_clock=BusyClock(nanoseconds))
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
        start = self.queries[-1][0].stop if self.queries else 0
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

    @precondition(lambda self: self.at_gate)
    @rule()
    def step(self) -> None:
        batch = set(self.at_gate)
        self.gate.let_through()
        for span, future in self.queries:
            if guilty := any(number % 20 == 7 for number in batch.intersection(span)):
                self.forget(span)
            if guilty or span[-1] in batch:
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
