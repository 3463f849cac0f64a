"""Budgets and queues that refuse, passes that fail, a cache that goes away. tests/flying.py says by what means."""

import asyncio
import itertools

import pytest

from teacher_server.auth import Caller
from teacher_server.errors import BudgetSpent, Draining, ForwardFailed, QueueFull
from teacher_server.postings import Request
from tests.batching import Gate, square
from tests.flying import DictStore, check, flying, plane, settled, valkey, wait
from tests.test_batcher_failures import picky

FOUR = range(4)

# ------------------------------------------------------------ refusals


@flying
async def test_a_host_who_cannot_pay_fails_whole_and_the_next_one_pays():
    async with plane() as p:
        p.books.left = {Caller("poor", "job"): 3}
        p.store.gate.clear()
        poor, rich, other = p.ask(FOUR, "poor"), p.ask(range(2, 6), "rich"), p.ask([0], "other")
        await settled()
        p.store.gate.set()
        with pytest.raises(BudgetSpent):
            await wait(poor)
        check(await wait(rich), range(2, 6), "computed")
        check(await wait(other), [0], "computed")
        assert p.charged() == {"rich": 4, "other": 1}
        assert p.books.left == {Caller("poor", "job"): 3}
        assert sorted(itertools.chain(*p.compute.batches)) == [0, 2, 3, 4, 5]


@flying
async def test_one_who_cannot_pay_for_what_he_joined_gives_up_what_he_began():
    gate = Gate()
    async with plane(gate) as p:
        p.books.left = {Caller("b", "job"): 2}
        blocker = p.ask([99], "x", mode="bypass")
        await p.arrived()
        host = p.ask(FOUR)
        await settled()
        joiner = p.ask(range(3, 6), "b")  # 4 and 5 at his own charge, and 3 where the host pays
        await settled()
        host.cancel()
        with pytest.raises(BudgetSpent):
            await wait(joiner)
        await settled()
        assert p.batcher.depth() == {}
        gate.let_through(10)
        await wait(blocker)
        assert p.books.left == {Caller("b", "job"): 2}
        assert gate.batches == [[99]]


@flying
async def test_a_full_queue_refuses_its_own_job_and_another_flies():
    gate = Gate()
    accepted = []
    async with plane(gate, max_queue_size=5) as p:
        blocker = p.ask([99], "x", mode="bypass")
        await p.arrived()
        waiting = p.ask(range(10, 14), "full", mode="bypass")
        await settled()
        p.store.gate.clear()
        refused = p.ask(FOUR, "full", accepted=lambda: accepted.append("refused"))
        heir = p.ask(FOUR, "b", accepted=lambda: accepted.append("heir"))
        await settled()
        p.store.gate.set()
        with pytest.raises(QueueFull) as error:
            await wait(refused)
        assert error.value.retry_after == 1.0
        assert accepted == ["heir"]
        gate.let_through(10)
        check(await wait(heir), FOUR, "computed")
        await wait(asyncio.gather(blocker, waiting))


@flying
async def test_a_query_that_is_refused_was_not_asked_though_it_found_and_joined_others():
    gate = Gate()
    accepted = []
    async with plane(gate) as p:
        p.books.left = {Caller("poor", "job"): 0}
        gate.let_through()
        check(await wait(p.ask([1, 2])), [1, 2], "computed")
        await settled()
        host = p.ask([3, 4])
        assert [await p.arrived(), await p.arrived()] == [[1, 2], [3, 4]]
        for numbers in ([1, 2, 5], [3, 4, 5], [1, 3, 5]):
            with pytest.raises(BudgetSpent):
                await wait(p.ask(numbers, "poor", accepted=lambda: accepted.append("refused")))
        found = p.ask([1, 2], "poor", accepted=lambda: accepted.append("found"))
        check(await wait(found), [1, 2], "cached")
        assert accepted == ["found"]
        joined = p.ask([3, 4, 3], "poor", accepted=lambda: accepted.append("joined"))
        await settled()
        assert accepted == ["found", "joined"], "as soon as it waits"
        gate.let_through()
        await wait(host)
        check(await wait(joined), [3, 4, 3], "coalesced")


@flying
async def test_a_chain_of_many_who_are_refused_ends():
    gate = Gate()
    async with plane(gate) as p:
        p.store.gate.clear()
        chain = [p.ask([n, n + 1], str(n)) for n in range(1500)]
        await settled()
        p.batcher.drain()
        p.store.gate.set()
        for error in await wait(asyncio.gather(*chain, return_exceptions=True)):
            assert isinstance(error, Draining)


@flying
async def test_a_replayed_query_pays_nothing_and_holds_nothing():
    async with plane() as p:
        p.books.left = {Caller("a", "job"): 0}
        request = Request("r", b"r", replayed=True)
        outcome = await p.ask(FOUR, request=request)
        check(outcome, FOUR, "computed")
        assert outcome.charged == 0
        assert p.books.wasted == {"replay": 4}
        await p.ask([7], "b", request=Request("s", b"s", replayed=False))
        assert +p.books.requests == {Request("s", b"s", replayed=False): 1}


# ------------------------------------------------------------ failures


@flying
async def test_a_failing_pass_fails_those_who_want_its_rows_and_nobody_else():
    gate = Gate(picky(2))
    async with plane(gate) as p:
        guilty, joiner, other, apart = p.ask([1, 2]), p.ask([2, 5], "b"), p.ask([5, 6], "c"), p.ask([7], "d")
        await p.arrived()
        gate.let_through(100)
        for task in (guilty, joiner):
            with pytest.raises(ForwardFailed, match="cannot stand"):
                await wait(task)
        check(await wait(other), [5, 6])
        check(await wait(apart), [7])
        assert p.books.wasted["failed"] >= 2
        assert p.charged().get("a", 0) == 0
        assert sum(p.charged().values()) + p.books.wasted.total() == sum(map(len, gate.batches))


@flying
async def test_one_bad_sample_fails_no_query_that_has_not_asked_for_it():
    gate = Gate(picky(2))
    async with plane(gate) as p:
        guilty = p.ask([0, 1, 2])
        await p.arrived()
        twin, innocent = p.ask([2, 1, 0], "twin"), p.ask([0, 1, 5], "b")
        await settled()
        gate.let_through(100)
        for task in (guilty, twin):
            with pytest.raises(ForwardFailed, match="cannot stand"):
                await wait(task)
        check(await wait(innocent), [0, 1, 5], "computed")
        assert [*itertools.chain(*gate.batches)].count(2) == 1, "whoever asks for all of it need not try again"
        assert p.charged() == {"b": 3}


@flying
async def test_what_is_not_finite_fails_who_wants_it_is_not_charged_and_not_cached():
    def compute(inputs):
        outputs = square(inputs)
        outputs["logits"][inputs["x"] == 2] = float("nan")
        return outputs

    async with plane(Gate(compute)) as p:
        bad, good = p.ask([1, 0, 2]), p.ask([1, 3], "b")
        await p.arrived()
        p.compute.let_through(10)
        with pytest.raises(ForwardFailed, match="NaN or infinity for sample 2"):
            await wait(bad)
        check(await wait(good), [1, 3], "computed")
        assert p.charged() == {"b": 2}
        assert p.books.wasted == {"failed": 2}
        await settled()
        assert len(p.store.entries) == 3


@flying
async def test_a_fault_of_ours_leaves_nobody_waiting():
    class Broken(DictStore):
        async def command(self, *_):
            raise ZeroDivisionError("a bug")

    async with plane(store=Broken()) as p:
        with pytest.raises(Exception, match="a fault of the server: ZeroDivisionError: a bug"):
            await wait(p.ask(FOUR))


# ------------------------------------------------------------ with a real Valkey


@flying
async def test_the_cache_goes_away_in_the_middle(tmp_path):
    async with valkey(tmp_path) as store:
        async with plane(store=store) as p:
            check(await wait(p.ask(FOUR)), FOUR, "computed")
            while p.cache._writing:
                await asyncio.wait(p.cache._writing)
            check(await wait(p.ask(FOUR, "b")), FOUR, "cached")
            # It ends, and for a while, until it is there again, everything is computed.
            await asyncio.gather(store.command("SHUTDOWN", "NOSAVE"), return_exceptions=True)
            outcome = await wait(p.ask(FOUR, "c"))
            check(outcome, FOUR, "computed")
            assert p.count("preceptor_cache_errors_total", kind="unavailable") >= 4
            assert p.charged() == {"a": 4, "c": 4}


@flying
async def test_corrupt_and_foreign_entries_are_computed_anew_and_overwritten(tmp_path):
    async with valkey(tmp_path) as store, plane(store=store) as p:
        check(await wait(p.ask(range(6))), range(6), "computed")
        while p.cache._writing:
            await asyncio.wait(p.cache._writing)
        keys = p.query(range(6)).keys
        good = await store.command("MGET", *keys)
        await store.command("SET", keys[1], good[2])  # another sample's
        await store.command("SET", keys[2], good[2][:-1])
        await store.command("SET", keys[3], b"\x02" + good[3][1:])
        await store.command("SET", keys[4], good[4][:3] + bytes([good[4][3] ^ 1]) + good[4][4:])
        check(await wait(p.ask(range(6), "b")), range(6), "cached", *["computed"] * 4, "cached")
        while p.cache._writing:
            await asyncio.wait(p.cache._writing)
        assert await store.command("MGET", *keys) == good
        check(await wait(p.ask(range(6), "c")), range(6), "cached")
        assert p.count("preceptor_cache_errors_total", kind="corrupt") == 4
        assert p.count("preceptor_duplicate_samples_total") == 0
