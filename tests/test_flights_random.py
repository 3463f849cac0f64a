"""Every history: queries that overlap, of all modes, that leave at any moment, with budgets, failures, a slow cache.

A seed fixes what is asked and when anyone leaves, in turns of the loop; how the batcher's thread falls in between is
left to chance. What must hold is asserted of each (tests/flying.py): right answers, every sample forwarded either
charged or wasted, nothing held, nothing registered, nothing kept.
"""

import asyncio
import gc
import random
import weakref

import numpy as np
import pytest

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.errors import BudgetSpent, ForwardFailed, TeacherServerError
from teacher_server.postings import Request
from tests.batching import Recorder, square
from tests.flying import DictStore, check, flying, plane, settled, wait
from tests.test_batcher_failures import picky

NAN, RAISES = 38, 39


def compute(inputs):
    outputs = picky(RAISES)(inputs)
    outputs["logits"][inputs["x"] == NAN] = np.nan
    return outputs


class SlowStore(DictStore):
    """Takes as many turns of the loop as chance will have it."""

    def __init__(self, chance):
        super().__init__()
        self.chance = chance

    async def command(self, *parts):
        reply = await super().command(*parts)
        await settled(self.chance.choice((0, 1, 5)))
        return reply

    async def script(self, *parts):
        await settled(self.chance.choice((0, 1, 5)))
        return await super().script(*parts)


@pytest.mark.parametrize("seed", range(60))
@flying
async def test_every_history(seed):
    chance = random.Random(seed)
    # Half of the histories have failures; their numbers are in few queries, or little else would happen.
    numbers = range(40) if seed % 2 else range(NAN)
    async with plane(Recorder(compute), chance.choice((1, 3, 8)), store=SlowStore(chance)) as p:
        p.books.left = {Caller("poor", "job"): 10, Caller("slow", "job"): 60}
        p.books.slow = {Caller("slow", "job")}
        p.books.granted.set()
        tasks = []
        for turn in range(60):
            who = chance.choice(("a", "b", "c", "poor", "slow"))
            asked = [min(numbers[-1], int(chance.expovariate(0.08))) for _ in range(chance.randint(1, 12))]
            mode = chance.choice(("use", "use", "use", "read_only", "bypass"))
            request = Request(str(turn), b"", chance.random() < 0.3) if chance.random() < 0.3 else None
            tasks.append((p.ask(asked, who, mode=mode, request=request), asked, who, request, mode))
            if chance.random() < 0.4:
                chance.choice(tasks)[0].cancel()
            await settled(chance.choice((0, 0, 1, 2, 8)))
        charged = 0
        for task, asked, who, request, mode in tasks:
            try:
                outcome = await wait(task)
            except asyncio.CancelledError:
                continue
            except ForwardFailed:
                assert {NAN, RAISES} & set(asked)
                continue
            except BudgetSpent:
                assert who in {"poor", "slow"}
                continue
            check(outcome, asked)
            sources = outcome.sources.tolist()
            assert set(sources) <= {pb.SOURCE_COMPUTED, pb.SOURCE_CACHED, pb.SOURCE_COALESCED}
            computed = outcome.count(pb.SOURCE_COMPUTED)
            assert outcome.charged == (0 if request and request.replayed else computed)
            if mode == "bypass":
                assert computed == len(asked)
            charged += outcome.charged
        assert charged <= sum(p.books.charged.values()), "the rest was paid for by some who left"
        await settled()
        for caller, limit in (("poor", 10), ("slow", 60)):
            assert p.books.left[Caller(caller, "job")] == limit - p.books.charged[Caller(caller, "job")]


@flying
async def test_samples_are_let_go_without_the_collector(caplog):
    caplog.set_level("CRITICAL")  # a record that pytest keeps holds the traceback of a failed pass, and so its samples
    gc.collect()
    gc.disable()
    try:
        alive = []

        def failing(inputs):
            if (inputs["x"] == RAISES).any():
                raise ValueError("no")
            return square(inputs)

        async with plane(Recorder(failing), 4) as p:
            p.books.left = {Caller("poor", "job"): 0}

            async def ask(numbers, who, **options):
                query = p.query(numbers, who, **options)
                alive.append(weakref.ref(query.inputs["x"]))
                try:
                    await p.flights.answer(query)
                except TeacherServerError as error:
                    return str(error)  # as both transports do: not the error itself, whose traceback holds the request
                return None

            for turn in range(10):
                numbers = range(10 * turn, 10 * turn + 6)
                for options in ({}, {"mode": "bypass"}, {"mode": "read_only"}):
                    tasks = [asyncio.create_task(ask(numbers, who, **options)) for who in ("a", "b", "poor")]
                    await settled(turn % 4)
                    tasks[0].cancel()
                    await asyncio.wait(tasks)
                assert "raised ValueError" in await ask([RAISES, turn], "a", mode="bypass")
                del tasks
            await settled()
            assert sum(ref() is not None for ref in alive) <= 2, "the batcher's thread may still hold the last one"
    finally:
        gc.enable()
