"""A day of a busy platform, put into the ledger through its own postings: for the page, and for its benchmark."""

import random
from datetime import UTC, datetime, timedelta

from teacher_server.auth import Caller
from teacher_server.postings import Entry, booked
from teacher_server.script import PLATFORM, run
from tests.spending import post

FINGERPRINT = "5c1e94b7a0d2486fb3e1d7f2096c8a41"
PRICE = 1_500_000  # 0.0015 EUR
FLOPS = 334.8e9
NANOSECONDS = 2_137_411  # of the device, a sample
TENANTS = ("vision", "speech", "search", "robotics", "health", "maps", "drones", "archive")
RUNS = ("resnet18-kd", "mobilenet", "distil-small", "sweep/lr", "ablation", "nightly", "tiny-vit")


def jobs(count):
    """Tenants and jobs, the first tenants with more of them."""
    draw = random.Random(count)
    found = []
    while len(found) < count:
        tenant = TENANTS[min(len(TENANTS) - 1, int(draw.expovariate(0.55)))]
        caller = Caller(tenant, f"{draw.choice(RUNS)}/seed-{draw.randrange(40)}")
        if caller not in found:
            found.append(caller)
    return found


def _of_an_hour(draw, caller, hour, busy):
    """(line, samples, nanoseconds) of a job that chooses three of four, and of whose views some are known."""
    batches = int(busy * draw.uniform(8, 60))
    candidates = 64 * batches
    chooses = draw.random() < 0.8
    asked = 48 * batches if chooses else candidates
    cached = int(asked * draw.uniform(0.05, 0.5)) if "sweep" in caller.job or not chooses else 0
    coalesced = int(asked * draw.uniform(0.0, 0.08))
    computed = asked - cached - coalesced
    nanoseconds = computed * NANOSECONDS + draw.randrange(10**6)
    counts = {"asked": asked, "cached": cached, "coalesced": coalesced, "unasked": candidates - asked}
    charges = [Entry("", computed, nanoseconds, "", "")]
    return booked(caller, hour, charges=charges, **counts), computed, nanoseconds


async def fill(store, *, count=50, hours=24, seed=0):
    """So many jobs in the last so many hours, the present one included."""
    draw, now = random.Random(seed), datetime.now(UTC)
    teacher = {"name": "vit-h-14", "flops": repr(FLOPS), "price": PRICE, "currency": "EUR", "who": "test"}
    await run(store, "teacher", fingerprint=FINGERPRINT, **teacher)
    callers = jobs(count)
    spans = {caller: sorted(draw.sample(range(hours + 1), 2)) for caller in callers}
    spans |= {caller: [0, hours] for caller in callers[::4]}
    for back in reversed(range(hours)):
        hour = (now - timedelta(hours=back)).strftime("%Y-%m-%dT%H")
        at = hours - 1 - back
        busy = 0.35 + 0.65 * (8 <= int(hour[-2:]) <= 19)  # most people work by day
        parts = [
            _of_an_hour(draw, caller, hour, busy if back else busy / 3)
            for caller in callers
            if spans[caller][0] <= at <= spans[caller][1]
        ]
        wasted = draw.randrange(40)
        for account, samples in (("wasted/abandoned", wasted), ("own/warm-up", 65 * (at % 12 == 3))):
            if samples:
                charges = [Entry("", samples, samples * NANOSECONDS, "", "")]
                line = booked(Caller(PLATFORM, account), hour, charges=charges)
                parts.append((line, samples, samples * NANOSECONDS))
        records = [{"lines": [line], "totals": [samples, busy_ns]} for line, samples, busy_ns in parts]
        await post(store, records, PRICE, "EUR", fingerprint=FINGERPRINT)
