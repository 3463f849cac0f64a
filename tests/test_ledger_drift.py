"""forwarded = in the ledger + pending, to the sample and at every moment; where it is not, samples were lost."""

import asyncio
import random

from teacher_server.auth import Caller
from teacher_server.store import LEDGER_PREFIX
from tests.ledgers import compute, crash, eventually, ledger_store, pid_of, replica, stopped, waste, without_answer

FREE = Caller("free", "job")


def drift(state):
    return state.forwarded - state.taken - state.pending


async def total(store):
    return int(await store.command("HGET", f"{LEDGER_PREFIX}totals", "forwarded") or 0)


async def post(ledger):
    await ledger.post()
    return True


def test_a_replica_knows_how_far_the_ledger_is_behind(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await crash(ledger)  # posts only as told
            assert ledger.state()[1:] == (0, 0, 0, 0.0)
            ledger.forwarding(7)
            assert ledger.state()[1:] == (7, 0, 7, 0.0), "under way; no record waits yet"
            await compute(ledger, 10, FREE)
            waste(ledger, 3)
            state = ledger.state()
            assert state[1:4] == (20, 0, 20)
            assert state.pending_seconds > 0
            await ledger.post()
            assert ledger.state()[1:] == (20, 13, 7, 0.0)
            with stopped(await pid_of(store)):
                await without_answer(store)
                waste(ledger, 5)
                assert ledger.state()[1:4] == (25, 13, 12)
                assert ledger.state().pending_seconds > 0
            await eventually(lambda: post(ledger))
            assert ledger.state()[1:4] == (25, 18, 7), "the pass that nobody booked stays pending"

    asyncio.run(main())


def test_what_redis_lost_and_is_told_again_is_no_drift(tmp_path):
    """Whatever Redis forgets, and however much of it the replica repeats at a time."""
    draw = random.Random(4)

    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await crash(ledger)
            for _ in range(60):
                await compute(ledger, draw.randrange(1, 64), FREE)
                assert drift(ledger.state()) == 0
                await ledger.post()
                assert drift(ledger.state()) == ledger.state().pending == 0
                if draw.random() < 0.2:
                    await store.command("FLUSHALL")
                elif draw.random() < 0.2:
                    applied, forwarded = await ledger._of(ledger._epoch)
                    ledger._note(applied, forwarded)  # as it does before it forgets
                    assert drift(ledger.state()) == 0
            await ledger.post()
            assert ledger.state().taken == ledger.state().forwarded == await total(store)

    asyncio.run(main())


def test_a_posting_that_is_lost_for_good_is_drift_to_the_sample(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            await crash(ledger)
            await compute(ledger, 10, FREE)
            await ledger.post()
            ledger._forget(1, [])  # as if it had been on Redis's disk
            await store.command("FLUSHALL")
            for samples in (5, 6):
                await compute(ledger, samples, FREE)
                await ledger.post()
                assert (drift(ledger.state()), ledger.state().pending) == (10, 0)
            assert await total(store) == 11

    asyncio.run(main())


def test_every_process_has_its_own_count_and_what_one_left_is_counted_as_its(tmp_path):
    async def main():
        async with ledger_store(tmp_path) as store:
            doomed = replica(store, tmp_path)
            await doomed.__aenter__()
            await compute(doomed, 100, FREE)
            await doomed.post()
            await compute(doomed, 20, FREE)  # in its journal only
            doomed.forwarding(64)  # a pass that it did not survive
            await crash(doomed)
            async with replica(store, tmp_path) as ledger, replica(store, tmp_path, "another") as another:
                await compute(ledger, 5, FREE)
                await compute(another, 6, FREE)
                for each, samples in ((ledger, 5), (another, 6)):
                    await each.post()
                    assert each.state()[1:4] == (samples, samples, 0)
                counts = {}
                for each in (doomed, ledger, another):
                    _, counts[each] = await ledger._of(each.state().epoch)
                assert counts == {doomed: 184, ledger: 5, another: 6}
                assert sum(counts.values()) == await total(store)

    asyncio.run(main())
