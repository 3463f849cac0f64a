"""Where the compute went, by the hour or by the day: what GET /v1/usage gives and the page at `/` shows."""

import asyncio
import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from teacher_server.accounts import lines_by_day
from teacher_server.budgets import State, budget_states, period_end
from teacher_server.script import PLATFORM
from teacher_server.store import LEDGER_PREFIX, Store

_Place = tuple[str, str, str, str, int]
"""period, tenant, job, currency, price of a sample"""
_COLUMNS = ("candidates", "asked", "computed", "cached", "coalesced", "flops", "device_nanoseconds", "money_nanos")
_TEXTS = {"device_nanoseconds", "money_nanos"}  # as protobuf's JSON has them: JavaScript's numbers end at 2^53
_LATELY = timedelta(hours=24)
_TOTALS = ("forwarded", "charged", "wasted", "own")


@dataclass
class Usage:
    now: datetime
    by: Literal["hour", "day"]
    periods: list[str]
    """UTC hours, "2026-01-31T21", or days; the last one is not over."""
    rows: dict[_Place, dict[str, Any]]
    teachers: dict[str, dict[str, str]]
    """By fingerprint: name, flops, price, currency."""
    totals: dict[str, str]
    """Samples forwarded, charged, wasted and own, since the ledger began."""
    budgets: list[dict[str, Any]]

    def json(self, served: Collection[str]) -> bytes:
        """`served`: the fingerprints of the teachers that this replica serves."""
        charged = {place: row for place, row in sorted(self.rows.items()) if place[1] != PLATFORM}
        jobs = {place[1:]: number for number, place in enumerate({place[1:]: place for place in charged}.values())}
        numbers = {period: number for number, period in enumerate(self.periods)}
        columns: dict[str, list[Any]] = {
            "period": [numbers[place[0]] for place in charged],
            "job": [jobs[place[1:]] for place in charged],
        }
        for column in _COLUMNS:
            values = [row[column] for row in charged.values()]
            columns[column] = list(map(str, values)) if column in _TEXTS else values
        return _dumped(
            {
                "now": self.now.isoformat().replace("+00:00", "Z"),
                "by": self.by,
                "periods": self.periods,
                "jobs": [[tenant, job, currency, str(price)] for tenant, job, currency, price in jobs],
                "rows": columns,
                "platform": {**{name: self.totals.get(name, "0") for name in _TOTALS}, "accounts": self._accounts()},
                "budgets": self.budgets,
                "teachers": [
                    {
                        "name": teacher["name"],
                        "fingerprint": fingerprint,
                        "flops_per_sample": float(teacher["flops"]),
                        "nanos_per_sample": teacher["price"],
                        "currency": teacher["currency"],
                        "served": fingerprint in served,
                    }
                    for fingerprint, teacher in self.teachers.items()
                ],
            }
        )

    def csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([self.by, "tenant", "job", *_COLUMNS, "currency", "nanos_per_sample"])
        for (period, tenant, job, currency, price), row in sorted(self.rows.items()):
            writer.writerow([period, tenant, job, *(row[column] for column in _COLUMNS), currency, price])
        return text.getvalue().encode()

    def _accounts(self) -> list[dict[str, Any]]:
        """What nobody was charged for, by reason."""
        found: dict[str, dict[str, Any]] = {}
        for (_, tenant, account, _, _), row in sorted(self.rows.items()):
            if tenant == PLATFORM:
                sums = found.setdefault(
                    account, {"account": account, "samples": 0, "flops": 0.0, "device_nanoseconds": 0}
                )
                sums["samples"] += row["computed"]
                sums["flops"] += row["flops"]
                sums["device_nanoseconds"] += row["device_nanoseconds"]
        return [sums | {"device_nanoseconds": str(sums["device_nanoseconds"])} for sums in found.values()]


async def usage(store: Store, by: Literal["hour", "day"], count: int) -> Usage:
    """Of the last `count` hours or days, the present one included. Raises StoreUnavailable."""
    now = datetime.now(UTC)
    lately = _hours(now, _LATELY // timedelta(hours=1))
    if by == "hour":
        periods = _hours(now, count)
    else:
        periods = [(now.date() - timedelta(days=back)).isoformat() for back in reversed(range(count))]
    first = min(periods[0], lately[0])[: len("2026-01-31")]
    hours = await lines_by_day(store, "", first if by == "hour" else lately[0][:10], "9999-12-31", ("hours",))
    days = await lines_by_day(store, "", periods[0], "9999-12-31") if by == "day" else []
    totals = await store.command("HGETALL", f"{LEDGER_PREFIX}totals")
    text = [value.decode() for value in totals]
    teachers = {
        name.removeprefix("teacher:"): dict(zip(values[::2], values[1::2], strict=True))
        for name, kind, values in hours
        if name.startswith("teacher:") and values
    }
    states = await budget_states(store)
    # Of thousands of jobs these take a second, and students are answered meanwhile.
    recent = await asyncio.to_thread(_rows, hours, teachers, set(lately))
    rows = await asyncio.to_thread(_rows, hours if by == "hour" else days, teachers, set(periods))
    budgets = await asyncio.to_thread(_budgets, states, recent, lately[0])
    return Usage(now, by, periods, rows, teachers, dict(zip(text[::2], text[1::2], strict=True)), budgets)


def _hours(now: datetime, count: int) -> list[str]:
    return [(now - timedelta(hours=back)).strftime("%Y-%m-%dT%H") for back in reversed(range(count))]


def _rows(
    keys: Iterable[list[Any]], teachers: dict[str, dict[str, str]], periods: Collection[str]
) -> dict[_Place, dict[str, Any]]:
    """The counts of keys of hours or of lines, as the ledger has them, summed over teachers of the same price."""
    rows: dict[_Place, dict[str, Any]] = {}
    flops = {fingerprint: float(teacher["flops"]) for fingerprint, teacher in teachers.items()}
    for period, tenant, field, count in _counts(keys):
        if period not in periods:
            continue
        job, fingerprint, price, currency, column = field
        place = (period, tenant, job, currency, int(price))
        row = rows.get(place)
        if row is None:
            row = rows[place] = dict.fromkeys(_COLUMNS, 0)
        if column in {"asked", "unasked"}:
            row["candidates"] += count
        if column != "unasked":
            row[column] += count
        if column == "computed":
            row["flops"] += count * flops.get(fingerprint, 0.0)
    return rows


def _counts(keys: Iterable[list[Any]]) -> Iterator[tuple[str, str, list[str], int]]:
    for name, _, values in keys:
        kind, _, place = name.partition(":")
        if kind not in {"hours", "lines"}:
            continue
        tenant, _, day = place.partition(":")
        for key, count in zip(values[::2], values[1::2], strict=True):
            field = key.split("\t")
            period = f"{day}T{field.pop(0)}" if kind == "hours" else day
            yield period, tenant, field, int(count)


def _budgets(states: Iterable[State], rows: dict[_Place, dict[str, Any]], since: str) -> list[dict[str, Any]]:
    return [_budget(state, rows, since) for state in states]


def _budget(state: State, rows: dict[_Place, dict[str, Any]], since: str) -> dict[str, Any]:
    """A budget as it stands, and what was spent of it lately: its owner's, since the hour `recent_since`."""
    column = "computed" if state["unit"] == "samples" else "money_nanos"
    spends = {
        place: row[column]
        for place, row in rows.items()
        if place[1] == state["tenant"] and state["job"] in {"", place[2]} and row[column]
    }
    recent, spent = sum(spends.values()), int(state["spent"])
    begins = {"total": "", "month": f"{state['instance']}-01", "day": "~"}[state["period"]]
    if recent and recent == spent and begins < since:  # it is younger than these hours, and its rate is since then
        since = min(place[0] for place in spends)
    end = period_end(state["instance"])
    return {
        "tenant": state["tenant"],
        "job": state["job"],
        "unit": state["unit"],
        "period": state["period"],
        "limit": str(int(state["limit"])),
        "spent": str(spent),
        "left": str(max(0, int(state["limit"]) - spent)),
        "until": end.isoformat().replace("+00:00", "Z") if end else None,
        "recent": str(recent),
        "recent_since": f"{since}:00:00Z",
    }


def _dumped(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
