"""A ledger with spend that is known, for those who read it."""

import asyncio
from contextlib import contextmanager

from teacher_server.auth import Caller
from teacher_server.postings import Entry, booked, posting
from teacher_server.script import PLATFORM, run, this_hour
from teacher_server.store import LEDGER_PREFIX, Store
from tests.redis_servers import running

PRICE = 1_500_000  # nanos: 0.0015 EUR
FINGERPRINT = "f" * 32
FLOPS = 2e9
RED, BLUE = Caller("red", "sweep/a"), Caller("blue", "b")


@contextmanager
def a_redis(folder):
    """One that the ledger may use; its URL."""
    with running(folder, "--appendonly", "yes") as server:
        yield server.url


def using(url, use):
    """What `await use(store)` gives, for the store of that URL."""

    async def main():
        async with Store(url, "ledger") as store:
            return await use(store)

    return asyncio.run(main())


async def teacher(store, price=PRICE, currency="EUR"):
    given = {"name": "vit", "flops": repr(FLOPS), "price": price, "currency": currency, "who": "test"}
    await run(store, "teacher", fingerprint=FINGERPRINT, **given)


async def charge(
    store,
    caller,
    samples,
    when=None,
    *,
    price=PRICE,
    cached=0,
    coalesced=0,
    unasked=0,
    nanoseconds=None,
    currency="EUR",
):
    """One posting: so many samples charged to a caller (or to the platform's account of that name).

    `when` is a UTC hour, or a day, which stands for its noon.
    """
    nanoseconds = 1000 * samples if nanoseconds is None else nanoseconds
    counts = {} if caller.tenant == PLATFORM else {"asked": samples + cached + coalesced}
    counts |= {"cached": cached, "coalesced": coalesced, "unasked": unasked}
    hour = when or this_hour()
    hour = hour if "T" in hour else f"{hour}T12"
    line = booked(caller, hour, charges=[Entry("", samples, nanoseconds, "", "")] if samples else [], **counts)
    record = {"lines": [line], "totals": [samples, nanoseconds]}
    await post(store, [record], price, currency)


async def post(store, records, price=PRICE, currency="EUR", epoch="e", fingerprint=FINGERPRINT):
    number = int(await store.command("HGET", f"{LEDGER_PREFIX}epochs", epoch) or 0) + 1
    reply = await run(
        store,
        "apply",
        epoch=epoch,
        base=0,
        posting=number,
        **posting(records, fingerprint, price, currency),
        release=[],
        renew=[],
        lease_ms=10_000,
        request_ms=10_000,
        watch=[],
    )
    assert reply["applied"] == number


async def fill(store):
    """Two tenants, three days, two prices, and the platform's own."""
    await teacher(store)
    await charge(store, RED, 1000, "2026-01-30", cached=200, coalesced=50, unasked=350)
    await charge(store, RED, 500, "2026-01-31")
    await charge(store, RED, 70, "2026-01-31", price=2 * PRICE)
    await charge(store, Caller("red", "other"), 3, "2026-02-01")
    await charge(store, BLUE, 0, "2026-01-31", cached=12)
    await charge(store, BLUE, 40, "2026-02-01")
    await charge(store, Caller(PLATFORM, "own/warm-up"), 64, "2026-01-30")
    await charge(store, Caller(PLATFORM, "wasted/crash"), 7, "2026-02-01", nanoseconds=0)


def shown(ledger, *arguments):
    status, out, err = ledger(*arguments)
    assert (status, err) == (0, "")
    return out
