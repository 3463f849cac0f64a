"""Flights over a real batcher and a real Valkey, with books that count, so that after every test it is asserted that
nothing was lost: every sample forwarded is charged or wasted, every nanosecond too, and nothing is held or registered.

`async with plane() as flights` waits for what is under way and asserts all that. tests/batching.py says how queries
carry their numbers: sample n is answered with n * n.
"""

import asyncio
import functools
import itertools
from collections import Counter
from contextlib import asynccontextmanager

import numpy as np

from protos import teacher_pb2 as pb
from teacher_server.auth import Caller
from teacher_server.batcher import Batcher
from teacher_server.cache import AnswerCache
from teacher_server.config import BatcherConfig, CacheConfig, StoreConfig
from teacher_server.errors import BudgetSpent
from teacher_server.flights import Flights, Query
from teacher_server.metrics import Metrics
from teacher_server.postings import Request
from teacher_server.purses import Hold
from teacher_server.store import open_stores
from tests.batching import PATIENCE, BusyClock, Gate, Recorder

TEACHER = pb.TeacherDescription(
    name="t",
    fingerprint="f" * 32,
    inputs=[pb.InputDescription(name="x", dtypes=[pb.DATA_TYPE_FLOAT32], shape=[1])],
    outputs=[pb.OutputDescription(name="logits", shape=[1])],
    flops_per_sample=10.0,
    price=pb.Price(nanos_per_sample=5, currency="EUR"),
    limits=pb.Limits(max_message_bytes=2**20, max_samples_per_query=5000, max_batch_size=4),
)


def flying(scenario):
    """Runs an async test."""

    @functools.wraps(scenario)
    def run(*args, **kwargs):
        asyncio.run(scenario(*args, **kwargs))

    return run


class CountedHold(Hold):
    def __init__(self, books, caller, samples):
        super().__init__(None, samples)
        self.books, self.caller = books, caller
        books.open.append(self)

    def pay(self, samples):
        super().pay(samples)
        self.books.paid[self.caller] += samples
        self._end()

    def release(self, samples):
        super().release(samples)
        if self.caller in self.books.left:
            self.books.left[self.caller] += samples
        self._end()

    def _end(self):
        if not self.samples:
            self.books.open.remove(self)


class CountingBooks:
    """A ledger in memory. `left` bounds callers; `slow` callers wait in `hold` until `granted` is set."""

    def __init__(self):
        self.open, self.left, self.slow = [], {}, set()
        self.granted, self.asked_for = asyncio.Event(), asyncio.Event()
        self.paid, self.charged, self.wasted = Counter(), Counter(), Counter()
        self.finished = set()
        self.begun, self.booked, self.nanoseconds, self.replies = {}, Counter(), 0, []
        self.requests = Counter()
        self._numbers = itertools.count(1)

    def forwarding(self, samples):
        number = next(self._numbers)
        self.begun[number] = samples
        return number

    async def begin(self, caller, request_id, digest):
        return Request(request_id, digest, request_id in self.finished)

    async def hold(self, caller, samples):
        self.asked_for.set()
        if caller in self.slow:
            await self.granted.wait()
        if self.left.get(caller, samples) < samples:
            raise BudgetSpent(f"{caller} has spent it")
        return self._take(caller, samples)

    def hold_now(self, caller, samples):
        if caller in self.slow or self.left.get(caller, samples) < samples:
            return None
        return self._take(caller, samples)

    def _take(self, caller, samples):
        if caller in self.left:
            self.left[caller] -= samples
        return CountedHold(self, caller, samples)

    def book(self, number, charges, wasted):
        assert number not in self.booked
        for part in charges:
            self.charged[part.caller] += part.samples
            self.requests[part.request] += part.samples
        for part in wasted:
            assert part.account.startswith("wasted/")
            self.wasted[part.account.removeprefix("wasted/")] += part.samples
        self.booked[number] = sum(part.samples for part in (*charges, *wasted))
        self.nanoseconds += sum(part.nanoseconds for part in (*charges, *wasted))

    def answered(self, caller, *, asked, cached, coalesced, unasked=0, request=None):
        self.replies.append((caller, asked, cached, coalesced))

    def budgets(self, caller):
        return []

    def check(self, forwarded, nanoseconds):
        assert self.open == [], "a hold has leaked"
        assert dict(self.booked) == self.begun, "a forward pass is not in the books"
        assert sum(self.booked.values()) == forwarded
        assert self.charged.total() + self.wasted.total() == forwarded
        assert +self.paid == +self.charged
        assert self.nanoseconds == nanoseconds


class DictStore:
    """Where Redis itself is not the point: the two commands that a cache sends. `gate` holds lookups while shut."""

    def __init__(self):
        self.entries, self.gate, self.looking = {}, asyncio.Event(), asyncio.Event()
        self.write_gate, self.writing = asyncio.Event(), asyncio.Event()
        self.lookups = 0
        self.gate.set()
        self.write_gate.set()

    async def command(self, name, *keys):
        assert name == "MGET"
        self.lookups += 1
        self.looking.set()
        await self.gate.wait()
        return [self.entries.get(key) for key in keys]

    async def script(self, _, how, seconds, *parts):
        self.writing.set()
        await self.write_gate.wait()
        refused = 0
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            if how == "NX" and key in self.entries:
                refused += 1
            else:
                self.entries[key] = value
        return refused


class Plane:
    def __init__(self, flights, batcher, cache, books, store, metrics, compute):
        self.flights, self.batcher, self.cache, self.books = flights, batcher, cache, books
        self.store, self.metrics, self.compute = store, metrics, compute

    def query(self, numbers, who="a", *, mode="use", request=None, accepted=lambda: None):
        caller = Caller(who, "job")
        numbers = list(numbers)
        inputs = {"x": np.array(numbers, np.float32)[:, None]}
        keys = None
        if mode != "bypass":
            keys = self.cache.keys(caller, "", [b"%016d" % number for number in numbers])
        return Query(caller, inputs, keys, mode == "use", request, accepted)

    def ask(self, numbers, who="a", **options):
        return asyncio.create_task(self.flights.answer(self.query(numbers, who, **options)), name=who)

    async def arrived(self):
        return await asyncio.to_thread(self.compute.arrived)

    def charged(self):
        return {caller.tenant: samples for caller, samples in (+self.books.charged).items()}

    def count(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels or None) or 0


async def settled(turns=20):
    """Lets everything run that is not held at a gate: for what has no event of its own to wait for."""
    for _ in range(turns):
        await asyncio.sleep(0)


def wait(what):
    return asyncio.wait_for(what, PATIENCE)


def check(outcome, numbers, *sources):
    """Right answers; and their sources: one for all, or one a sample."""
    assert outcome.logits[:, 0].tolist() == [number**2 for number in numbers]
    expected = list(sources) * (len(numbers) if len(sources) == 1 else 1)
    if expected:
        assert [pb.Source.Name(int(source)).removeprefix("SOURCE_").lower() for source in outcome.sources] == expected


@asynccontextmanager
async def plane(compute=None, size=4, *, store=None, step=1000, capacity=None, **knobs):
    compute = compute or Recorder()
    books, metrics, clock = CountingBooks(), Metrics(), BusyClock(step)
    store = DictStore() if store is None else store
    loop = asyncio.get_running_loop()
    errors = []
    loop.set_exception_handler(lambda _, context: errors.append(context))

    def on_batch(*batch):
        flights.on_batch(*batch)

    batcher = Batcher(
        BatcherConfig(max_batch_size=size, **knobs),
        compute,
        forwarding=books.forwarding,
        on_batch=on_batch,
        busy_clock=clock,
    )
    with batcher:
        async with AnswerCache(store, CacheConfig(), 1, metrics, capacity=capacity) as cache:
            async with Flights(batcher, cache, books, metrics, TEACHER) as flights:
                try:
                    yield Plane(flights, batcher, cache, books, store, metrics, compute)
                finally:
                    if isinstance(compute, Gate):
                        compute.let_through(10**6)
                    batcher.drain()
                    await asyncio.to_thread(batcher.close, PATIENCE)
                    await settled()
    books.check(sum(len(batch) for batch in compute.batches), step * len(compute.batches))
    assert flights._flying == {}, "a key is still registered"
    assert cache._backlog == 0
    assert errors == []


@asynccontextmanager
async def valkey(folder, max_bytes=64 * 2**20):
    """The cache's store of a server that has its state in `folder`."""
    async with open_stores(StoreConfig(state_directory=folder / "state"), max_bytes) as stores:
        yield stores.cache
