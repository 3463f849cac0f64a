"""The ledger as people read it: aligned tables."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from protos import teacher_pb2 as pb
from teacher_server.budgets import Change, State, period_end

_PER = {"total": "in all", "day": "a day", "month": "a month"}


@dataclass
class _Sum:
    """Of some lines."""

    candidates: int = 0
    asked: int = 0
    computed: int = 0
    cached: int = 0
    coalesced: int = 0
    flops: float = 0.0
    device_nanoseconds: int = 0
    money: dict[str, int] = field(default_factory=dict)
    """1e-9 of each currency."""

    def add(self, line: pb.SpendLine) -> None:
        for column in ("candidates", "asked", "computed", "cached", "coalesced", "flops", "device_nanoseconds"):
            setattr(self, column, getattr(self, column) + getattr(line, column))
        self.money[line.currency] = self.money.get(line.currency, 0) + line.money_nanos


def spend_table(lines: Iterable[pb.SpendLine]) -> str:
    """What tenants spent: a row for each tenant, job and day, and sums below."""
    heads = [
        "tenant",
        "job",
        "day",
        "candidates",
        "asked",
        "computed",
        "cached",
        "coalesced",
        "GFLOPs",
        "device s",
        "money",
    ]
    lines = list(lines)
    rows = _sums(lines, lambda line: (line.tenant, line.job, line.day))
    totals = {(tenant, "", "all days"): total for (tenant,), total in _sums(lines, lambda line: (line.tenant,)).items()}
    if len(totals) > 1:
        totals["all tenants", "", "all days"] = _sum(lines)
    numbers = _numbers([*rows.values(), *totals.values()])
    names = _without_repetitions(rows)
    return _table(heads, [[*name, *next(numbers)] for name in names], [[*name, *next(numbers)] for name in totals], 3)


def platform_table(lines: Iterable[pb.SpendLine]) -> str:
    """What nobody is charged for, by reason."""
    accounts = _sums(lines, lambda line: (line.job,))
    numbers = _numbers(accounts.values())
    rows = []
    for (account,) in accounts:
        _, _, samples, _, _, gflops, seconds, _ = next(numbers)
        rows.append([account, samples, gflops, seconds])
    return _table(["not charged", "samples", "GFLOPs", "device s"], rows, [], 1)


def budget_table(states: Iterable[State], currency: str) -> str:
    """Budgets as they stand now. `currency` is that of all prices."""
    heads = ["tenant", "job", "budget", "spent", "held", "left", "until"]
    rows = []
    for state in states:
        limit, spent, held = (state[key] for key in ("limit", "spent", "held"))
        until = period_end(state["instance"])
        rows.append(
            [
                state["tenant"],
                state["job"] or "all jobs",
                f"{amount(limit, state['unit'], currency)} {_PER[state['period']]}",
                *(amount(count, state["unit"], currency) for count in (spent, held, max(0, limit - spent))),
                f"{until:%Y-%m-%d %H:%M} UTC" if until else "for ever",
            ]
        )
    if not any(state["held"] for state in states):  # for queries under way
        heads.remove("held")
        rows = [[*row[:4], *row[5:]] for row in rows]
    return _table(heads, rows, [], 3)


def audit_table(changes: Iterable[Change], currency: str) -> str:
    rows = []
    for at, what, details in changes:
        about = details.copy()
        who = about.pop("who", "")
        said = {"budget": _budget_change, "price": _price_change}.get(what, _other_change)(what, about, currency)
        rows.append([f"{at:%Y-%m-%d %H:%M:%S}", who, said])
    return _table(["time (UTC)", "who", "what"], rows, [], 3)


def amount(count: int, unit: str, currency: str) -> str:
    """Samples, or money of so many 1e-9."""
    return _money(count, currency) if unit == "money" else f"{count:,} sample{'' if count == 1 else 's'}"


def _budget_change(_: str, about: dict[str, str], currency: str) -> str:
    old, new = (amount(int(about[key]), about["unit"], currency) if about[key] else "" for key in ("old", "new"))
    whose = f"budget of {about['tenant']}{about['job'] and ' '}{about['job']}, {about['unit']} {_PER[about['period']]}"
    return f"{whose}: {old or 'none'} -> {new or 'none'}"


def _price_change(_: str, about: dict[str, str], __: str) -> str:
    def price(text: str) -> str:
        nanos, _, currency = text.partition(" ")
        return _money(int(nanos), currency) if text else "none"

    whose = f"price of {about['teacher']} ({about['fingerprint']}), a sample"
    return f"{whose}: {price(about['old'])} -> {price(about['new'])}"


def _other_change(what: str, about: dict[str, str], _: str) -> str:
    return " ".join([what, *(f"{key}={value}" for key, value in about.items())])


def _sums(lines: Iterable[pb.SpendLine], key: Callable[[pb.SpendLine], tuple[str, ...]]) -> dict[tuple[str, ...], _Sum]:
    sums: dict[tuple[str, ...], _Sum] = {}
    for line in lines:
        sums.setdefault(key(line), _Sum()).add(line)
    return dict(sorted(sums.items()))


def _sum(lines: Iterable[pb.SpendLine]) -> _Sum:
    total = _Sum()
    for line in lines:
        total.add(line)
    return total


def _numbers(sums: Iterable[_Sum]) -> Iterator[list[str]]:
    """The cells of each row; within a column all have the same number of decimals."""
    sums = list(sums)
    gflops, seconds = ([getattr(s, name) / 1e9 for s in sums] for name in ("flops", "device_nanoseconds"))
    places = max((_places(nanos) for s in sums for nanos in s.money.values()), default=2)
    for s, g, t in zip(sums, gflops, seconds, strict=True):
        money = " + ".join(_money(nanos, currency, places) for currency, nanos in sorted(s.money.items()))
        counts = [f"{count:,}" for count in (s.candidates, s.asked, s.computed, s.cached, s.coalesced)]
        yield [*counts, f"{g:,.{_decimals(gflops)}f}", f"{t:,.{_decimals(seconds)}f}", money]


def _decimals(column: Sequence[float]) -> int:
    """So many that the largest has four digits or more; at most six decimals."""
    largest = max(column)
    return min(6, max(0, 3 - math.floor(math.log10(largest)))) if largest > 0 else 0


def _money(nanos: int, currency: str, places: int | None = None) -> str:
    text = f"{Decimal(nanos).scaleb(-9):,.{_places(nanos) if places is None else places}f}"
    return f"{text} {currency}".rstrip()


def _places(nanos: int) -> int:
    """Decimals that say it exactly; as with cents, at least two."""
    return max(2, len(f"{abs(nanos) % 10**9:09}".rstrip("0")))


def _without_repetitions(names: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Tenant and job stand in the first of their rows only."""
    before: tuple[str, ...] = ("", "", "")
    for name in names:
        tenant, job, day = name
        same_tenant = tenant == before[0]
        yield "" if same_tenant else tenant, "" if same_tenant and job == before[1] else job, day
        before = name


def _table(heads: list[str], rows: list[list[str]], totals: list[list[str]], names: int) -> str:
    """The first `names` columns hold words and stand to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, *totals, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            f"{cell:{'<' if place < names else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip() + "\n"

    rule = "-" * (sum(widths) + 2 * len(widths) - 2) + "\n"
    return line(heads) + "".join(map(line, rows)) + (rule + "".join(map(line, totals)) if totals else "")
