"""How batches form, who is next, how much may wait, and who leaves early. tests/batching.py says by what means."""

import itertools
import threading
from collections import Counter
from concurrent.futures import CancelledError, Future, wait

import numpy as np
import pytest

from teacher_server.errors import (
    Draining,
    InvalidQuery,
    PastDeadline,
    QueueFull,
)
from tests.batching import PATIENCE, BusyClock, Clock, Gate, Recorder, batcher, logits, samples, square

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


@pytest.mark.parametrize(
    ("bounds", "fullest"),
    [
        ({"max_queue_size": 20}, 8 / 20),  # a job's samples
        ({"max_queue_bytes": 40}, 32 / 40),  # a job's bytes, of samples of 4
        ({"max_tenant_queue_size": 16}, 11 / 16),  # a tenant's samples
        ({"max_tenant_queue_bytes": 100}, 44 / 100),  # a tenant's bytes
        ({}, 8 / 4096),
    ],
    ids=str,
)
def test_the_fullest_queue_is_told_against_its_bound(bounds, fullest):
    served = batcher(square, **bounds)
    assert served.fullest() == 0
    for tenant, job, samples_of in (("t", "j", 8), ("t", "k", 3), ("u", "j", 5)):
        served.submit(tenant, job, samples(0, samples_of))
    assert served.fullest() == fullest


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


# ------------------------------------------------------------ withdrawing


def test_what_is_withdrawn_is_not_computed_and_what_was_dispatched_is_answered() -> None:
    gate, batches = Gate(), []
    with batcher(gate, max_queue_size=10, on_batch=lambda *batch: batches.append(batch[1])) as served:
        long = served.submit("t", "j", samples(0, 10), tag="long")
        assert gate.arrived() == [0, 1, 2, 3]
        assert served.withdraw(long) == 4
        assert served.depth() == {}
        assert served.withdraw(long) == 4
        other = served.submit("t", "j", samples(10, 12), tag="other")
        gate.let_through(2)
        assert logits(long) == [0, 1, 4, 9]
        assert logits(other) == [100, 121]
    assert gate.batches == [[0, 1, 2, 3], [10, 11]]
    assert batches == [[("long", range(4))], [("other", range(2))]]


def test_withdrawn_between_two_batches_the_answers_come_at_once() -> None:
    gate = Gate()
    served = batcher(gate)
    long, one = served.submit("t", "j", samples(0, 10)), served.submit("u", "j", samples(10, 14))
    with served:
        gate.arrived()
        gate.let_through()
        assert gate.arrived() == [10, 11, 12, 13]  # another tenant's turn: of `long` nothing is being computed
        assert served.withdraw(long) == 4
        assert logits(long) == [0, 1, 4, 9]
        gate.let_through()
        assert logits(one) == [n * n for n in range(10, 14)]
    assert len(gate.batches) == 2


def test_withdrawn_in_its_second_batch() -> None:
    gate = Gate()
    with batcher(gate) as served:
        long = served.submit("t", "j", samples(0, 10))
        gate.arrived()
        gate.let_through()
        gate.arrived()
        assert served.withdraw(long) == 8
        gate.let_through()
        assert logits(long) == [n * n for n in range(8)]


def test_withdrawn_before_its_turn_a_query_is_cancelled_and_a_done_one_stays_done() -> None:
    seen = Recorder()
    served = batcher(seen)
    gone, kept = served.submit("t", "j", samples(0, 3)), served.submit("t", "j", samples(3, 5))
    assert served.withdraw(gone) == 0
    assert gone.cancelled()
    assert served.depth() == {("t", "j"): 2}
    with served:
        assert logits(kept) == [9, 16]
    assert served.withdraw(kept) == 2
    assert seen.batches == [[3, 4]]
    with pytest.raises(TypeError, match="submit"):
        served.withdraw(Future())


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
