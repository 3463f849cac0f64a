"""Budgets: set and listed, and as callers see them: messages and refusals."""

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from protos import teacher_pb2 as pb
from protos.conformance import check_job_name
from protos.wire import MalformedMessage
from teacher_server.auth import check_tenant_name
from teacher_server.errors import BudgetReserved, BudgetSpent, InvalidQuery
from teacher_server.script import run, today
from teacher_server.store import LEDGER_PREFIX, Store

Unit = Literal["samples", "money"]
Period = Literal["total", "day", "month"]

State = dict[str, Any]
"""tenant, job ("" for the tenant's own), unit, period, instance, limit, spent, held."""

UNITS = {"samples": pb.Budget.UNIT_SAMPLES, "money": pb.Budget.UNIT_MONEY_NANOS}
PERIODS = {"total": pb.Budget.PERIOD_TOTAL, "day": pb.Budget.PERIOD_DAY, "month": pb.Budget.PERIOD_MONTH}
LARGEST_LIMIT = 2**53 - 1  # what Lua counts exactly
_RETRY_SECONDS = 0.2  # what others hold is spent or given back about as fast


def as_state(described: dict[str, str]) -> State:
    """Of what ledger.lua says of a budget."""
    return {**described, **{count: int(described[count]) for count in ("limit", "spent", "held")}}


def budget_message(state: State, unsettled: int = 0) -> pb.Budget:
    """`unsettled`, in the budget's unit, is spent beyond what the state says."""
    budget = pb.Budget(
        owner=pb.Budget.OWNER_JOB if state["job"] else pb.Budget.OWNER_TENANT,
        name=state["job"] or state["tenant"],
        unit=UNITS[state["unit"]],
        period=PERIODS[state["period"]],
        limit=state["limit"],
        left=max(0, state["limit"] - state["spent"] - unsettled),
    )
    if (end := period_end(state["instance"])) is not None:
        budget.until.FromDatetime(end)
    return budget


def one_of(states: Iterable[State], job: str, unit: Unit, period: Period) -> State | None:
    """A tenant's budget of that job ("" for its own), unit and period, if it has one."""
    return next((s for s in states if (s["job"], s["unit"], s["period"]) == (job, unit, period)), None)


def money_text(nanos: int) -> str:
    """1e-9 of a currency as a decimal number of it, "12.5"."""
    text = f"{nanos // 10**9}.{nanos % 10**9:09}".rstrip("0")
    return text + "00" if text.endswith(".") else text


def period_end(instance: str) -> datetime | None:
    """When a day ("2026-01-31") or month ("2026-01") is over; None for "total"."""
    if instance == "total":
        return None
    if len(instance) == len("2026-01"):
        year, month = map(int, instance.split("-"))
        return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    return datetime.fromisoformat(instance).replace(tzinfo=UTC) + timedelta(days=1)


def refusal(reason: str, state: State, samples: int, price: pb.Price) -> BudgetSpent | BudgetReserved:
    """Why so many samples at that price do not fit: "spent" or "reserved"; whose budget, how much, until when."""
    money = state["unit"] == "money"
    needed = samples * (price.nanos_per_sample if money else 1)

    def amount(units: int) -> str:
        return f"{money_text(units)} {price.currency}" if money else f"{units} samples"

    job = f"job {state['job']!r} of " if state["job"] else ""
    during = "in all" if state["period"] == "total" else f"in {state['instance']} (UTC)"
    whose = f"the budget of {job}tenant {state['tenant']!r}, {amount(state['limit'])} {during}"
    left = max(0, state["limit"] - state["spent"])
    if reason == "reserved":
        return BudgetReserved(
            f"{whose}: {amount(left)} are left, of which {amount(state['held'])} are held for queries under way, and "
            f"this one needs {amount(needed)}; ask again in {_RETRY_SECONDS} s",
            _RETRY_SECONDS,
        )
    end = period_end(state["instance"])
    anew = f", until it begins anew on {end:%Y-%m-%d} at 00:00 UTC" if end else ""
    return BudgetSpent(
        f"{whose}: {amount(left)} are left{anew}, and this query needs {amount(needed)}; ask the platform's owner for "
        "more, or send a smaller query"
    )


class Change(NamedTuple):
    """A line of the audit."""

    at: datetime
    what: str
    details: dict[str, str]


async def budget_states(store: Store, tenant: str = "") -> list[State]:
    """All budgets, or those of one tenant and its jobs, as they stand today and in the order of their owners.

    Raises StoreUnavailable.
    """
    owners = [owner.decode().partition("\t") for owner in await store.command("SMEMBERS", f"{LEDGER_PREFIX}owners")]
    replies = await asyncio.gather(
        *(
            run(store, "budgets", tenant=its_tenant, job=job, day=today())
            for its_tenant, _, job in owners
            if tenant in ("", its_tenant)
        )
    )
    states = {
        (state["tenant"], state["job"], state["unit"], state["period"]): state
        for reply in replies
        for state in map(as_state, reply)
    }
    return [states[key] for key in sorted(states)]


async def currencies(store: Store) -> list[str]:
    """Those of the teachers' prices, in which budgets of money are counted. Raises StoreUnavailable."""
    teachers = [name.decode() for name in await store.command("SMEMBERS", f"{LEDGER_PREFIX}teachers")]
    found = [await store.command("HGET", f"{LEDGER_PREFIX}teacher:{name}", "currency") for name in teachers]
    return sorted({currency.decode() for currency in found})


async def set_budget(
    store: Store, tenant: str, job: str, unit: Unit, period: Period, *, limit: int | None, who: str
) -> bool:
    """Sets, changes or (limit None) removes a budget, and notes it in the audit; True where there was one.

    `job` "" is the tenant's own. `limit` is in samples or 1e-9 of the currency; what was spent before counts.
    Raises InvalidQuery for a name or a limit out of its range.
    """
    try:
        check_tenant_name(tenant)
        if job:
            check_job_name(job)
    except (ValueError, MalformedMessage) as error:
        raise InvalidQuery(str(error)) from error
    if limit is not None and not 0 <= limit <= LARGEST_LIMIT:
        raise InvalidQuery(f"limit: {limit} is outside 0..{LARGEST_LIMIT}, of samples or 1e-9 of the currency")
    given: dict[str, Any] = {"tenant": tenant, "job": job, "unit": unit, "period": period, "day": today(), "who": who}
    return await run(store, "budget", limit=False if limit is None else limit, **given) is not False


async def audit(store: Store, count: int = 1000) -> list[Change]:
    """The last changes of budgets and prices, oldest first."""
    entries = await store.command("XREVRANGE", f"{LEDGER_PREFIX}audit", "+", "-", "COUNT", count)
    changes = []
    for key, values in reversed(entries):
        text = [value.decode() for value in values]
        details = dict(zip(text[::2], text[1::2], strict=True))
        at = datetime.fromtimestamp(int(key.split(b"-")[0]) / 1000, UTC)
        changes.append(Change(at, details.pop("what"), details))
    return changes
