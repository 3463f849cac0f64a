"""Real ledgers for the tests: replicas on one embedded Valkey, and what its books say in the end."""

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager, contextmanager, suppress

from protos import teacher_pb2 as pb
from teacher_server.accounts import snapshot
from teacher_server.auth import Caller
from teacher_server.config import LedgerConfig, StoreConfig
from teacher_server.ledger import Ledger
from teacher_server.postings import Charge, Waste, runs
from teacher_server.store import StoreUnavailable, open_stores

TEACHER = pb.TeacherDescription(
    name="teacher",
    fingerprint="f" * 32,
    flops_per_sample=1e6,
    price=pb.Price(nanos_per_sample=1000, currency="EUR"),
)
CALLER = Caller("team", "job")
LEASE_SECONDS = 1.0


@asynccontextmanager
async def ledger_store(folder):
    async with open_stores(StoreConfig(state_directory=folder / "state"), 2**20) as stores:
        yield stores.ledger


def replica(store, folder, name="replica", *, lease_seconds=LEASE_SECONDS, teacher=TEACHER):
    """A Ledger with a journal of its own; enter it with `async with`."""
    return Ledger(store, LedgerConfig(lease_seconds=lease_seconds), folder / name, teacher, who="test")


async def crash(ledger):
    """What SIGKILL does to a replica, but for its journal's file, which stays."""
    for task in ledger._tasks:
        task.cancel()
    await asyncio.gather(*ledger._tasks, return_exceptions=True)


async def compute(ledger, samples, caller=CALLER, request=None, nanoseconds=1000, first=0):
    """So many samples forwarded and charged; of a query with a request id those from position `first` on."""
    hold = await ledger.hold(caller, samples)
    number = ledger.forwarding(samples)
    hold.pay(samples)
    positions = runs(range(first, first + samples)) if request else ""
    ledger.book(number, [Charge(caller, request, samples, nanoseconds, hold, positions)], [])


def waste(ledger, samples, account="wasted/failed"):
    ledger.book(ledger.forwarding(samples), [], [Waste(account, samples, 10)])


async def books(store):
    """{(tenant, job): samples}, once the books have been found to be in order."""
    whole = await snapshot(store, everything=True)
    _, problems = whole.verify()
    assert problems == []
    sums = {}
    for line in whole.lines():
        key = (line.tenant, line.job)
        sums[key] = sums.get(key, 0) + line.computed
    return {key: samples for key, samples in sums.items() if samples}


async def held(store):
    """All that budgets say is held."""
    whole = await snapshot(store, everything=True)
    return sum(
        int(value)
        for name, kind, values in whole.keys
        if name.startswith("budget:")
        for field, value in zip(values[::2], values[1::2], strict=True)
        if field.startswith("held:")
    )


async def eventually(condition):
    """Waits for `await condition()`, which is false while Redis does not answer; ten seconds, then TimeoutError."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(StoreUnavailable):
            if await condition():
                return
        await asyncio.sleep(0.02)
    raise TimeoutError("the condition did not come true")


async def without_answer(store):
    """Until the store knows that Redis does not answer."""

    async def gone():
        return not store.available

    await eventually(gone)


async def posted(ledger):
    return ledger._applied == ledger._number and not ledger._pending


async def pid_of(store):
    return int((await store.info())["process_id"])


@contextmanager
def stopped(pid):
    """SIGSTOP: a Redis that hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
