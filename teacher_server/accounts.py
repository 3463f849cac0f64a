"""The ledger as it is read: by HTTP, by the Spend call and by `teacher-server ledger`.

Redis serves nobody while a script of ours reads, so days that are over are read one by one before it: a year of many
jobs would take longer than replicas wait for an answer.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Literal

from google.protobuf.timestamp_pb2 import Timestamp

from protos import teacher_pb2 as pb
from protos.conformance import check_job_name
from protos.wire import MalformedMessage
from teacher_server.auth import Caller
from teacher_server.budgets import budget_message, budget_states
from teacher_server.errors import InvalidQuery, LedgerUnavailable
from teacher_server.script import PLATFORM, forgotten_at, run
from teacher_server.store import LEDGER_PREFIX, Store, StoreUnavailable

COLUMNS = ("asked", "computed", "cached", "coalesced", "device_nanoseconds", "money_nanos")
"""What the ledger counts; FLOPs follow from the computed samples and their teacher."""
_FIRST_DAY, _LAST_DAY = "0001-01-01", "9999-12-31"
_ATTEMPTS = 3
_LATE_SECONDS = 600.0  # hours that are forgotten so soon may be gone while we look
_VALUES_AT_ONCE = 20_000  # some ten milliseconds of Redis
_Line = tuple[str, str, str, str, str, str]  # tenant, job, day, fingerprint, price, currency


async def _nothing() -> None:
    pass


@dataclass
class Books:
    """The ledger's Redis, and what brings it up to date with this replica first: `Ledger.post`, while one runs."""

    store: Store
    post: Callable[[], Awaitable[None]] = _nothing

    async def spend(self, caller: Caller, request: pb.SpendRequest) -> pb.SpendResponse:
        """As `spend`, with this replica's own last answers."""
        try:
            await self.post()
        except StoreUnavailable as error:
            raise _unreadable(error) from error
        return await spend(self.store, caller, request)


async def spend(store: Store, caller: Caller, request: pb.SpendRequest) -> pb.SpendResponse:
    """The lines of the caller's tenant, of one job or of all, and what is left of its budgets.

    Raises InvalidQuery for a job or a time that is none, LedgerUnavailable.
    """
    first, last = _days(request)
    try:
        found = await snapshot(store, tenant=caller.tenant, since=first, until=last)
        states = await budget_states(store, caller.tenant)
    except StoreUnavailable as error:
        raise _unreadable(error) from error
    budgets = [budget_message(state) for state in states if state["job"] in ("", request.job) or not request.job]
    lines = await asyncio.to_thread(found.lines, request.job)  # there may be years of them
    return pb.SpendResponse(lines=lines, budgets=budgets)


class Snapshot:
    """The ledger at one moment."""

    def __init__(self, keys: list[list[Any]]) -> None:
        self.keys = [[name, kind, list(values)] for name, kind, values in keys]  # Lua's empty list is an empty object
        self._hashes = {
            name: dict(zip(values[::2], values[1::2], strict=True))
            for name, kind, values in self.keys
            if kind == "hash"
        }
        self._strings = {name: str(values[0]) for name, kind, values in self.keys if kind == "string" and values}

    def lines(self, job: str = "") -> list[pb.SpendLine]:
        """What was spent, by tenant, job, day, fingerprint and price, in that order.

        Of _platform the jobs are `own/REASON` and `wasted/REASON`, and `computed` is what was forwarded at nobody's
        charge.
        """
        return [line for line in self._lines if job in ("", line.job)]

    def verify(self) -> tuple[str, list[str]]:
        """The books' own sums: one line that states them, and the contradictions found. Of a whole snapshot."""
        lines = self.lines()
        totals = self._hashes.get("totals", {})
        accounts = {"charged": 0, "wasted": 0, "own": 0}
        problems = []
        for line in lines:
            where = f"{line.tenant} {line.job} {line.day}"
            account = line.job.partition("/")[0] if line.tenant == PLATFORM else "charged"
            if account in accounts:
                accounts[account] += line.computed
            else:
                problems.append(f"{where}: the platform's accounts are own/... and wasted/..., not this one")
            if line.money_nanos != line.computed * line.nanos_per_sample:
                problems.append(
                    f"{where}: {line.money_nanos} nanos for {line.computed} samples at {line.nanos_per_sample}"
                )
            problems += [f"{where}: {column} is negative" for column in COLUMNS if getattr(line, column) < 0]
        forwarded, busy = int(totals.get("forwarded", 0)), int(totals.get("device_nanoseconds", 0))
        nanoseconds = sum(line.device_nanoseconds for line in lines)
        if forwarded != sum(accounts.values()):
            problems.append(f"forwarded {forwarded} samples, but the accounts hold {sum(accounts.values())}")
        if busy != nanoseconds:
            problems.append(f"the device was busy for {busy} ns, but the accounts hold {nanoseconds} ns")
        if (since := self._strings.get("hours_since")) is not None:
            problems += [
                f"{totals.get(name, 0)} samples {name}, but the lines hold {count}"
                for name, count in accounts.items()
                if int(totals.get(name, 0)) != count
            ]
            problems += self._hours_astray(since)
        held = self._held()
        for name, fields in self._hashes.items():
            if name.startswith("budget:"):
                problems += self._contradictions(name.removeprefix("budget:"), fields, lines, held)
        summary = f"forwarded {forwarded} = " + " + ".join(f"{name} {count}" for name, count in accounts.items())
        return summary, problems

    @cached_property
    def _lines(self) -> list[pb.SpendLine]:
        lines: dict[_Line, pb.SpendLine] = {}
        for key, column, count in self._counts():
            line = lines.setdefault(key, _line(key))
            if column in {"asked", "unasked"}:
                line.candidates += count
            if column != "unasked":
                setattr(line, column, count)
        for line in lines.values():
            line.flops = line.computed * float(self._hashes.get(f"teacher:{line.fingerprint}", {}).get("flops", 0))
        return [lines[key] for key in sorted(lines)]

    def _counts(self) -> Iterator[tuple[_Line, str, int]]:
        for name, fields in self._hashes.items():
            if name.startswith("lines:"):
                _, tenant, day = name.split(":")
                for field, count in fields.items():
                    job, fingerprint, price, currency, column = field.split("\t")
                    yield (tenant, job, day, fingerprint, price, currency), column, int(count)

    def _hours_astray(self, since: str) -> Iterator[str]:
        """Days after `since` whose hours are still kept, and do not sum to their lines."""
        soon = time.time() + _LATE_SECONDS
        for name, fields in self._hashes.items():
            kind, _, place = name.partition(":")
            tenant, _, day = place.partition(":")
            if kind != "lines" or day <= since or forgotten_at(day) < soon:
                continue
            sums: Counter[str] = Counter()
            for field, count in self._hashes.get(f"hours:{place}", {}).items():
                sums[field.partition("\t")[2]] += int(count)
            for field in sorted(fields.keys() | sums.keys()):
                if sums[field] != int(fields.get(field, 0)):
                    job, *_, column = field.split("\t")
                    yield f"{tenant} {job} {day}: {fields.get(field, 0)} {column}, but its hours sum to {sums[field]}"

    def _held(self) -> Counter[tuple[str, str]]:
        """What leases hold, by a budget's key and instance."""
        held: Counter[tuple[str, str]] = Counter()
        for name, fields in self._hashes.items():
            if name.startswith("lease:"):
                for key, instance, each in json.loads(fields["budgets"]):
                    held[key.removeprefix(LEDGER_PREFIX), instance] += int(fields["samples"]) * int(each)
        return held

    @staticmethod
    def _contradictions(
        name: str, fields: dict[str, str], lines: list[pb.SpendLine], held: Counter[tuple[str, str]]
    ) -> Iterator[str]:
        tenant, job, unit, period = name.split("\t")
        whose = f"budget of {tenant}{job and ' '}{job} ({unit}, {period})"
        sums: Counter[str] = Counter()
        for line in lines:
            if line.tenant == tenant and job in ("", line.job):
                instance = {"total": "total", "day": line.day, "month": line.day[:7]}[period]
                sums[instance] += line.computed if unit == "samples" else line.money_nanos
        for instance in sorted({*sums, *(field.partition(":")[2] for field in fields if ":" in field)}):
            spent, holding = (int(fields.get(f"{what}:{instance}", 0)) for what in ("spent", "held"))
            if spent != sums[instance]:
                yield f"{whose}: {spent} spent in {instance}, but its lines sum to {sums[instance]}"
            if holding != (leased := held[f"budget:{name}", instance]):
                yield f"{whose}: {holding} held in {instance}, but leases hold {leased}"


async def snapshot(
    store: Store, *, tenant: str = "", since: str = "", until: str = "", everything: bool = False
) -> Snapshot:
    """The lines of some days, each day's of one moment. Or, with `everything`, the whole ledger but its records of
    request ids, as it was at one moment.

    Days are UTC, "2026-01-31", both included; "" stands for all. Raises StoreUnavailable.
    """
    if not everything:
        return Snapshot(await lines_by_day(store, tenant, since or _FIRST_DAY, until or _LAST_DAY))
    recent = datetime.now(UTC).date() - timedelta(days=1)
    over = (recent - timedelta(days=1)).isoformat()
    for attempt in range(_ATTEMPTS):
        keys = await lines_by_day(store, "", _FIRST_DAY, over, ("lines", "hours"))
        rest = await run(store, "snapshot", tenant="", since=recent.isoformat(), until=_LAST_DAY, all=True)
        whole = Snapshot(
            [*(key for key in keys if key[0].startswith(("lines:", "hours:"))), *rest]
        )  # Lua's empty list is a dict
        # Contradictions may also mean that a replica which had been away has just posted something of days long over.
        if attempt + 1 == _ATTEMPTS or not whole.verify()[1]:
            break
    return whole


async def lines_by_day(
    store: Store, tenant: str, since: str, until: str, kinds: Sequence[str] = ("lines",)
) -> list[list[Any]]:
    """Keys as a snapshot has them: lines (or hours, or both), and the teachers that they are of."""

    async def members(name: str) -> list[str]:
        return sorted(member.decode() for member in await store.command("SMEMBERS", LEDGER_PREFIX + name))

    async def key(name: str) -> list[Any]:
        values = await store.command("HGETALL", LEDGER_PREFIX + name)
        return [name, "hash", [value.decode() for value in values]]

    teachers = await members("teachers")
    names = [f"teacher:{teacher}" for teacher in teachers]
    for whose in [tenant] if tenant else await members("tenants"):
        days = [day for day in await members(f"days:{whose}") if since <= day <= until]
        names += [f"{kind}:{whose}:{day}" for day in days for kind in kinds]
    return [["teachers", "set", teachers], *await asyncio.gather(*map(key, names))]


async def restore(store: Store, keys: list[list[Any]], who: str) -> None:
    """Puts a whole snapshot's `keys` into an empty ledger. Raises InvalidQuery where it is not empty.

    The lines, which may be of years, are brought there first, in parts, and all of it takes effect in one step.
    """
    soon = time.time() + _LATE_SECONDS
    lines = [[*key[:3], forgets] for key in keys if key[2] and (forgets := _staged(key[0], soon)) is not None]
    part: list[list[Any]] = []
    for key in lines:
        part.append(key)
        if key is lines[-1] or sum(len(values) for _, _, values, _ in part) >= _VALUES_AT_ONCE:
            await run(store, "stage", keys=part)
            part = []
    rest = [key for key in keys if not key[0].startswith(("lines:", "hours:"))]
    if not await run(store, "restore", staged=[key[0] for key in lines], keys=rest, who=who):
        raise InvalidQuery(
            "the ledger is not empty: restore into a new one that no server has used yet, lest spend be counted twice"
        )


def _staged(name: str, soon: float) -> int | Literal[False] | None:
    """When a key of lines or hours is forgotten, False for never; None for another key, or one that is late already."""
    kind, _, place = name.partition(":")
    if kind == "lines":
        return False
    forgets = forgotten_at(place.partition(":")[2]) if kind == "hours" else 0
    return forgets if forgets > soon else None


def _unreadable(error: StoreUnavailable) -> LedgerUnavailable:
    return LedgerUnavailable(f"the ledger cannot be read ({error}); ask again, or another replica")


def _days(request: pb.SpendRequest) -> tuple[str, str]:
    if request.job:
        try:
            check_job_name(request.job)
        except MalformedMessage as error:
            raise InvalidQuery(str(error)) from error
    first = _day("since", request.since) if request.HasField("since") else _FIRST_DAY
    last = _day("until", request.until) if request.HasField("until") else _LAST_DAY
    if first > last:
        raise InvalidQuery(f"since: {first} is after until, {last}; days are UTC and both are counted")
    return first, last


def _day(field: str, time: Timestamp) -> str:
    try:
        return time.ToDatetime(UTC).date().isoformat()
    except (ValueError, OverflowError) as error:
        raise InvalidQuery(f"{field}: no time from the year 1 to 9999 ({error})") from error


def _line(key: _Line) -> pb.SpendLine:
    tenant, job, day, fingerprint, price, currency = key
    return pb.SpendLine(
        tenant=tenant, job=job, day=day, fingerprint=fingerprint, nanos_per_sample=int(price), currency=currency
    )
