"""What happened, as records of the journal and as postings to Redis.

A record is what became of one forward pass or of one query. A posting is the sum of some records, and the unit in which
Redis takes them (ledger.lua, `apply`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from teacher_server.auth import Caller
from teacher_server.config import LedgerConfig
from teacher_server.journal import LeftBehind, Record
from teacher_server.purses import Hold
from teacher_server.script import PLATFORM, forgotten_at, run, this_hour
from teacher_server.store import Store


class Request(NamedTuple):
    """A query with a request id."""

    id: str
    digest: bytes
    """Of the content that the id stands for."""
    replayed: bool
    """It was answered and paid for before: what is computed for it now is wasted."""


class Charge(NamedTuple):
    """Samples of one forward pass that a caller is charged for."""

    caller: Caller
    request: Request | None
    samples: int
    nanoseconds: int
    hold: Hold
    positions: str = ""
    """Those of the samples in a query with a request id, as `runs` tells them: each is paid for once."""


class Entry(NamedTuple):
    """A charge as records and postings carry it."""

    request_id: str
    samples: int
    nanoseconds: int
    lease: str
    positions: str


class Waste(NamedTuple):
    """Samples of one forward pass that nobody is charged for."""

    account: str  # own/REASON or wasted/REASON
    samples: int
    nanoseconds: int


def runs(positions: Iterable[int]) -> str:
    """Rising positions as the ledger keeps them: 0, 1, 2, 5 -> "0-2,5-5"."""
    found: list[list[int]] = []
    for position in positions:
        if found and position == found[-1][1] + 1:
            found[-1][1] = position
        else:
            found.append([position, position])
    return ",".join(f"{first}-{last}" for first, last in found)


def booked(
    caller: Caller,
    hour: str,
    *,
    charges: Sequence[Entry] = (),
    asked: int = 0,
    cached: int = 0,
    coalesced: int = 0,
    unasked: int = 0,
    finished: Sequence[str] = (),
) -> dict[str, Any]:
    """What one caller did in one hour, as `this_hour` gives it. `unasked` are candidates that he did not ask about."""
    return {
        "tenant": caller.tenant,
        "job": caller.job,
        "hour": hour,
        "charges": charges,
        "asked": asked,
        "cached": cached,
        "coalesced": coalesced,
        "unasked": unasked,
        "finished": finished,
    }


def posting(records: Iterable[Record], fingerprint: str, price: int, currency: str) -> dict[str, Any]:
    """The sum of some records: a line per caller and hour, a charge per request id and lease."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    charges: dict[tuple[str, str, str], dict[tuple[str, str], tuple[list[int], list[str]]]] = {}
    totals = [0, 0]
    for record in records:
        totals = [total + more for total, more in zip(totals, record["totals"], strict=True)]
        for part in record["lines"]:
            # A journal of a version without hours has days, and nothing of what was not asked about.
            hour = part["hour"] if "hour" in part else f"{part['day']}T00"
            key = (part["tenant"], part["job"], hour)
            line = lines.setdefault(key, booked(Caller(part["tenant"], part["job"]), hour, finished=[]))
            for column in ("asked", "cached", "coalesced", "unasked"):
                line[column] += part.get(column, 0)
            line["finished"] = [*line["finished"], *part["finished"]]
            for entry in (Entry(*charge) for charge in part["charges"]):
                sums, places = charges.setdefault(key, {}).setdefault((entry.request_id, entry.lease), ([0, 0], []))
                sums[0] += entry.samples
                sums[1] += entry.nanoseconds
                if entry.positions:
                    places.append(entry.positions)
    for (tenant, job, hour), line in lines.items():
        own = tenant == PLATFORM
        day = hour[: len("2026-01-31")]
        line |= {"day": day, "hour": hour[-2:], "forget": forgotten_at(day)}
        line |= {"fingerprint": fingerprint, "price": 0 if own else price, "currency": currency}
        line["charges"] = [
            Entry(request_id, sums[0], sums[1], lease, ",".join(places))
            for (request_id, lease), (sums, places) in charges.get((tenant, job, hour), {}).items()
        ]
    return {"lines": list(lines.values()), "totals": totals}


def charged(records: Iterable[Record]) -> Counter[Caller]:
    samples: Counter[Caller] = Counter()
    for record in records:
        for line in record["lines"]:
            if line["tenant"] != PLATFORM:
                samples[Caller(line["tenant"], line["job"])] += sum(
                    Entry(*charge).samples for charge in line["charges"]
                )
    return samples


async def settle(store: Store, left: LeftBehind, config: LedgerConfig) -> None:
    """Applies what a process that has ended left in its journal; what it began and did not finish was wasted.

    What Redis has already is not applied again. Raises StoreUnavailable.
    """
    if left.wasted:
        part = Entry("", left.wasted, 0, "", "")
        lines = [booked(Caller(PLATFORM, "wasted/crash"), this_hour(), charges=[part])]
        left.postings[max(left.postings)].append({"lines": lines, "totals": [left.wasted, 0]})
    teacher, applied = left.header, -1
    while applied < max(left.postings):
        number = max(applied + 1, min(left.postings))
        reply = await run(
            store,
            "apply",
            epoch=left.epoch,
            base=min(left.postings) - 1,
            posting=number,
            **posting(left.postings.get(number, []), teacher["fingerprint"], teacher["price"], teacher["currency"]),
            release=[],
            renew=[],
            lease_ms=1000 * config.lease_seconds,
            request_ms=1000 * config.request_record_seconds,
            watch=[],
        )
        applied = reply["applied"]
