"""Who computes, who waits, who pays: single flight. tests/flying.py says by what means, and what always holds."""

import asyncio
import itertools

import pytest

from teacher_server.auth import Caller
from tests.batching import Gate
from tests.flying import check, flying, plane, settled, wait

FOUR = range(4)


# ------------------------------------------------------------ one computation for all


@flying
async def test_computed_then_cached():
    async with plane() as p:
        check(await p.ask(range(6)), range(6), "computed")
        await settled()
        check(await p.ask(range(4, 8), "b"), range(4, 8), "cached", "cached", "computed", "computed")
        assert p.charged() == {"a": 6, "b": 2}
        assert p.books.replies == [(Caller("a", "job"), 6, 0, 0), (Caller("b", "job"), 4, 2, 0)]
        assert p.count("preceptor_cost_total", tenant="a", job="job", currency="EUR") == pytest.approx(6 * 5e-9)
        assert p.count("preceptor_flops_total", tenant="b", job="job") == 20
        assert (p.count("preceptor_cache_hits_total"), p.count("preceptor_cache_misses_total")) == (2, 8)


@flying
async def test_of_32_identical_queries_the_first_leaves_and_one_forward_answers_the_rest():
    gate = Gate()
    async with plane(gate) as p:
        blocker = p.ask([99], "blocker", mode="bypass")
        await p.arrived()
        first = p.ask(FOUR, "0")
        await settled()
        others = [p.ask(FOUR, str(n)) for n in range(1, 32)]
        await settled()
        assert p.batcher.depth() == {("0", "job"): 4}
        first.cancel()
        await settled()
        assert p.batcher.depth() == {("1", "job"): 4}
        gate.let_through(2)
        outcomes = await wait(asyncio.gather(*others))
        check(outcomes[0], FOUR, "computed")
        for outcome in outcomes[1:]:
            check(outcome, FOUR, "coalesced")
        await wait(blocker)
        assert gate.batches == [[99], [0, 1, 2, 3]]
        assert p.charged() == {"blocker": 1, "1": 4}
        assert [outcome.charged for outcome in outcomes] == [4, *[0] * 30]
        assert outcomes[0].device_nanoseconds == 1000
        assert p.store.lookups == 1


@flying
async def test_a_host_who_leaves_during_the_forward_leaves_the_charge_to_the_next():
    gate = Gate()
    async with plane(gate) as p:
        host = p.ask(FOUR)
        await p.arrived()
        second, third = p.ask(FOUR, "b"), p.ask(range(2), "c")
        await settled()
        host.cancel()
        await settled()
        gate.let_through()
        check(await wait(second), FOUR, "computed")
        check(await wait(third), range(2), "coalesced")
        assert gate.batches == [[0, 1, 2, 3]]
        assert p.charged() == {"b": 4}


@flying
async def test_the_charge_goes_row_by_row_to_the_oldest_who_wants_it_and_can_pay():
    gate = Gate()
    async with plane(gate, 6) as p:
        p.books.left = {Caller("poor", "job"): 0}
        host = p.ask(range(6))
        await p.arrived()
        poor, b, c = p.ask([0, 1, 5], "poor"), p.ask([1, 2], "b"), p.ask([2, 3], "c")
        await settled()
        host.cancel()
        await settled()
        gate.let_through()
        check(await wait(poor), [0, 1, 5], "coalesced")
        check(await wait(b), [1, 2], "computed")
        check(await wait(c), [2, 3], "coalesced", "computed")
        assert p.charged() == {"b": 2, "c": 1}
        assert p.books.wasted == {"unpaid": 2, "abandoned": 1}
        assert p.count("preceptor_platform_samples_total", account="wasted", reason="unpaid") == 2


@flying
async def test_nobody_left_means_wasted_if_dispatched_and_nothing_if_not():
    gate = Gate()
    async with plane(gate) as p:
        alone = p.ask(range(6))
        assert await p.arrived() == [0, 1, 2, 3]
        alone.cancel()
        await settled()
        assert p.batcher.depth() == {}
        late = p.ask([3], "late")  # what is in the forward pass can still be joined
        await settled()
        gate.let_through()
        check(await wait(late), [3], "computed")
        assert p.books.wasted == {"abandoned": 3}
        await settled()
        check(await wait(p.ask(FOUR, "b")), FOUR, "cached")
    assert gate.batches == [[0, 1, 2, 3]]


@flying
async def test_what_is_paid_for_was_asked_also_by_who_leaves_half_way():
    gate = Gate()
    async with plane(gate) as p:
        leaver = p.ask(range(12))
        await p.arrived()
        gate.let_through()
        await p.arrived()
        await settled()
        leaver.cancel()
        await settled()
        assert p.books.replies == [(Caller("a", "job"), 4, 0, 0)]
        gate.let_through(10)
        check(await wait(p.ask(range(3))), range(3), "cached")
        assert p.charged() == {"a": 4}


@flying
async def test_half_dispatched_the_rest_flies_for_the_next_and_nothing_twice():
    gate = Gate()
    async with plane(gate) as p:
        host = p.ask(range(10))
        assert await p.arrived() == [0, 1, 2, 3]
        other = p.ask(range(2, 9), "b")
        await settled()
        host.cancel()
        await settled()
        assert p.batcher.depth() == {("b", "job"): 5}
        gate.let_through(10)
        check(await wait(other), range(2, 9), "computed")
        assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        assert p.charged() == {"b": 7}
        assert p.books.wasted == {"abandoned": 2}


@flying
async def test_rows_that_different_waiters_want_fly_again_for_each():
    gate = Gate()
    async with plane(gate) as p:
        blocker = p.ask([99], "x", mode="bypass")
        await p.arrived()
        host = p.ask(range(6))
        await settled()
        b, c = p.ask([4, 0, 1], "b"), p.ask([1, 2], "c")
        await settled()
        host.cancel()
        await settled()
        assert p.batcher.depth() == {("b", "job"): 3, ("c", "job"): 1}
        gate.let_through(10)
        check(await wait(b), [4, 0, 1], "computed")
        check(await wait(c), [1, 2], "coalesced", "computed")
        await wait(blocker)
        assert p.charged() == {"x": 1, "b": 3, "c": 1}


@flying
async def test_who_joins_and_leaves_harms_nobody():
    gate = Gate()
    async with plane(gate) as p:
        host = p.ask(FOUR)
        await p.arrived()
        leaver = p.ask(range(2, 6), "b")
        await settled()
        leaver.cancel()
        await settled()
        gate.let_through(10)
        check(await wait(host), FOUR, "computed")
        assert p.charged() == {"a": 4}
        assert sorted(itertools.chain(*gate.batches)) == [0, 1, 2, 3]


@flying
async def test_the_same_sample_twice_in_one_query_is_computed_once():
    async with plane() as p:
        check(await p.ask([3, 1, 3, 3, 2]), [3, 1, 3, 3, 2], *["computed"] * 2, *["coalesced"] * 2, "computed")
        await settled()
        check(await p.ask([3, 3, 7, 7], "b"), [3, 3, 7, 7], "cached", "cached", "computed", "coalesced")
        assert p.charged() == {"a": 3, "b": 1}


@flying
async def test_bypass_shares_nothing_and_read_only_writes_nothing():
    gate = Gate()
    async with plane(gate, 8) as p:
        first, second = p.ask([1, 1, 2], mode="bypass"), p.ask([1, 2], "b", mode="bypass")
        third, fourth = p.ask([1, 2], "c", mode="read_only"), p.ask([2, 3], "d", mode="read_only")
        await p.arrived()
        gate.let_through(10)
        check(await wait(first), [1, 1, 2], "computed")
        check(await wait(second), [1, 2], "computed")
        check(await wait(third), [1, 2], "computed")
        check(await wait(fourth), [2, 3], "coalesced", "computed")
        assert p.store.entries == {}
        check(await wait(p.ask([1])), [1], "computed")
        await settled()
        check(await wait(p.ask([1], mode="read_only")), [1], "cached")


@flying
async def test_an_answer_is_cached_if_any_who_waits_for_it_writes():
    gate = Gate()
    async with plane(gate) as p:
        reader = p.ask([1, 2, 3], mode="read_only")
        await p.arrived()
        writer = p.ask([1, 2], "b")
        await settled()
        gate.let_through()
        check(await wait(reader), [1, 2, 3], "computed")
        check(await wait(writer), [1, 2], "coalesced")
        await settled()
        assert set(p.store.entries) == set(p.query([1, 2]).keys), "and no other"


@flying
async def test_between_its_answer_and_its_place_in_the_cache_a_sample_is_not_computed_again():
    async with plane() as p:
        p.store.write_gate.clear()
        check(await p.ask(FOUR), FOUR, "computed")
        check(await p.ask([2, 3, 4, 3], "b"), [2, 3, 4, 3], "coalesced", "coalesced", "computed", "coalesced")
        p.store.write_gate.set()
        await settled()
        check(await p.ask([2, 4], "c"), [2, 4], "cached")
        assert p.charged() == {"a": 4, "b": 1}


# ------------------------------------------------------------ leaving, at every stage


@pytest.mark.parametrize("who", ["host", "other", "both"])
@pytest.mark.parametrize("stage", ["lookup", "hold", "queued", "dispatched"])
@flying
async def test_overlapping_queries_and_cancels_at_each_stage(stage, who):
    gate = Gate()
    async with plane(gate) as p:
        if stage == "lookup":
            p.store.gate.clear()
        if stage == "hold":
            p.books.slow = {Caller("a", "job"), Caller("b", "job")}
        if stage == "queued":
            blocker = p.ask([99], "x", mode="bypass")
            await p.arrived()
        host, other = p.ask(range(4)), p.ask(range(2, 6), "b")
        if stage == "lookup":
            await p.store.looking.wait()
        if stage == "dispatched":
            await p.arrived()
        await settled()
        for task, name in ((host, "host"), (other, "other")):
            if who in (name, "both"):
                task.cancel()
        await settled()
        p.store.gate.set()
        p.books.granted.set()
        gate.let_through(100)
        if stage == "queued":
            await wait(blocker)
        if who == "other":
            check(await wait(host), range(4), "computed")
        if who == "host":
            check(await wait(other), range(2, 6), "computed")
        await settled()
    computed = [number for batch in gate.batches for number in batch if number != 99]
    assert len(computed) == len(set(computed)), "nothing is computed twice"
    if stage != "dispatched":
        assert p.books.wasted.total() == 0
        assert sorted(computed) == {"host": [2, 3, 4, 5], "other": [0, 1, 2, 3], "both": []}[who]


@flying
async def test_who_comes_while_the_last_one_has_left_before_the_hold_takes_over():
    async with plane() as p:
        p.books.slow = {Caller("a", "job")}
        host = p.ask(FOUR)
        await p.books.asked_for.wait()
        host.cancel()
        await settled()
        heir = p.ask([1], "b")
        await settled()
        p.books.granted.set()
        check(await wait(heir), [1], "computed")
        assert p.charged() == {"b": 1}
