"""`teacher-server ledger budget`."""

import re

import pytest

from teacher_server.auth import Caller
from teacher_server.budgets import budget_message, budget_states
from teacher_server.store import LEDGER_PREFIX
from tests.spending import RED, charge, shown, teacher, using


def budgets(text):
    """{(tenant, job, period, samples or the currency): (limit, spent, left, until)} of a table of budgets."""
    lines = [
        re.split(r"  +", line)
        for line in text.splitlines()
        if " in all " in line or re.search(r" a (day|month) ", line)
    ]
    found = {}
    for tenant, job, limit, spent, left, until in lines:
        number, unit, *period = limit.split()
        numbers = [float(cell.split()[0].replace(",", "")) for cell in (number, spent, left)]
        found[tenant, job, " ".join(period), unit] = (*numbers, until)
    return found


def test_a_budget_counts_what_was_spent_before_it(ledger, url):
    async def spent(store):
        await teacher(store)
        await charge(store, RED, 1000, "2020-01-31")
        await charge(store, RED, 20)
        await charge(store, Caller("red", "other"), 3)

    using(url, spent)
    for owner in (["red"], ["red", "sweep/a"]):
        for per in ("total", "day", "month"):
            shown(ledger, "budget", *owner, "--samples", "5000", "--per", per)
            shown(ledger, "budget", *owner, "--money", "9.5", "--per", per)
    found = budgets(shown(ledger, "budget"))
    assert len(found) == 12
    for (_, job, period, unit), (limit, spent, left, until) in found.items():
        samples = 20 + 3 * (job == "all jobs") + 1000 * (period == "in all")
        assert limit == (5000 if unit == "samples" else 9.5)
        assert spent == pytest.approx(samples if unit == "samples" else samples * 0.0015)
        assert left == pytest.approx(limit - spent)
        assert (until == "for ever") == (period == "in all")
    assert "contradiction" not in shown(ledger, "verify")


def test_a_budget_is_raised_lowered_and_removed(full):
    of_red = ("red", "all jobs", "in all", "samples")
    for limit, word, left in ((2000, "set", 427), (3000, "changed", 1427), (100, "changed", 0)):
        out = shown(full, "budget", "red", "--samples", limit)
        assert out.startswith(f"{word} the budget of tenant red\n\n")
        assert budgets(out) == budgets(shown(full, "budget")) == {of_red: (limit, 1573, left, "for ever")}
    out = shown(full, "budget", "red", "sweep/a", "--samples", "0")
    assert budgets(out) == {("red", "sweep/a", "in all", "samples"): (0, 1570, 0, "for ever")}
    assert len(budgets(shown(full, "budget", "red"))) == 2
    assert shown(full, "budget", "blue") == "there are no budgets\n"
    assert shown(full, "budget", "red", "--remove", "samples").startswith("removed the budget of tenant red\n\n")
    assert of_red not in budgets(shown(full, "budget"))
    for arguments, words in (
        (["red", "--remove", "samples"], "there is no budget of tenant red in samples, per total; without --remove"),
        (
            ["red", "sweep/a", "--remove", "samples", "--per", "day"],
            "there is no budget of job sweep/a of tenant red in samples, per day",
        ),
    ):
        status, _, err = full("budget", *arguments)
        assert status == 1
        assert words in err


@pytest.mark.parametrize(
    ("given", "nanos"),
    [
        ("12.50", 12_500_000_000),
        ("0", 0),
        ("0.000000001", 1),
        ("3", 3_000_000_000),
        ("9007199.254740991", 2**53 - 1),
        ("1e3", 10**12),
    ],
)
def test_money_is_counted_to_its_last_place(full, url, given, nanos):
    shown(full, "budget", "red", "--money", given, "--per", "month")
    key = f"{LEDGER_PREFIX}budget:red\t\tmoney\tmonth"
    assert int(using(url, lambda store: store.command("HGET", key, "limit"))) == nanos
    (state,) = using(url, budget_states)
    assert budget_message(state).limit == nanos
    assert budget_message(state).left == max(0, nanos - state["spent"])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["red", "--money", "12.5000000001"], 2, "money: Decimal input should have no more than 9 decimal places"),
        (["red", "--money", "12,50"], 2, "money: Input should be a valid decimal, got '12,50' (--money)"),
        (["red", "--money", "nan"], 2, "money: Input should be a finite number"),
        (["red", "--money", "-1"], 2, "money"),
        (["red", "--money", "9007199.254740992"], 1, "outside 0..9007199254740991, of samples or 1e-9 of the currency"),
        (["red", "--samples", "many"], 2, "samples: Input should be a valid integer"),
        (["red", "--samples=-1"], 2, "samples: Input should be greater than or equal to 0, got '-1' (--samples)"),
        (["red", "--samples", "9007199254740992"], 1, "limit: 9007199254740992 is outside"),
        (["red", "--samples", "1", "--money", "1"], 2, "samples and money: give one of them"),
        (["red", "--samples", "1", "--remove", "samples"], 2, "samples and remove: give one of them"),
        (["red", "--samples", "1", "--per", "week"], 2, "per: Input should be 'total', 'day' or 'month', got 'week'"),
        (["--samples", "1"], 2, "samples: whose budget? give TENANT, or TENANT JOB"),
        (["red", "--per", "day"], 2, "per: give --samples, --money or --remove with it"),
        (["_platform", "--samples", "1"], 1, "tenant '_platform': a name is"),
        (["r d", "--samples", "1"], 1, "tenant 'r d': a name is"),
        (["red", "a job", "--samples", "1"], 1, "job 'a job': a name is"),
    ],
)
def test_a_budget_that_is_none_is_refused_and_says_why(full, arguments, status, words):
    given, out, err = full("budget", *arguments)
    assert (given, out) == (status, "")
    assert words in err
    assert shown(full, "budget") == "there are no budgets\n"
