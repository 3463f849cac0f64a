"""The ledger by the hour: kept, checked, restored, forgotten; and GET /v1/usage, which gives it."""

import asyncio
import csv
import gzip
import io
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from teacher_server import usage as usages
from teacher_server.accounts import snapshot
from teacher_server.auth import Caller
from teacher_server.budgets import set_budget
from teacher_server.postings import Charge
from teacher_server.script import PLATFORM, this_hour, today
from teacher_server.store import LEDGER_PREFIX
from teacher_server.usage import usage
from tests.histories import fill
from tests.ledgers import CALLER, books, ledger_store, replica
from tests.spending import BLUE, FINGERPRINT, PRICE, RED, charge, shown, using
from tests.test_http import api, server  # noqa: F401 - fixtures

DAY_SECONDS = 86400


def hours_ago(count):
    return (datetime.now(UTC) - timedelta(hours=count)).strftime("%Y-%m-%dT%H")


async def some(store):
    await charge(store, RED, 100, hours_ago(5), cached=20, coalesced=3, unasked=41)
    await charge(store, RED, 7, hours_ago(5))
    await charge(store, RED, 11, hours_ago(0))
    await charge(store, BLUE, 13, hours_ago(23))
    await charge(store, BLUE, 10**6, hours_ago(24))  # one hour too long ago
    await charge(store, Caller(PLATFORM, "own/warm-up"), 65, hours_ago(2))
    await charge(store, Caller(PLATFORM, "wasted/crash"), 4, hours_ago(0))


# ------------------------------------------------------------ in the ledger


def test_hours_are_kept_beside_days_for_forty_of_them(ledger, url):
    using(url, some)
    hour = hours_ago(5)
    field = f"{hour[-2:]}\tsweep/a\t{FINGERPRINT}\t{PRICE}\tEUR\tcomputed"
    key = f"{LEDGER_PREFIX}hours:red:{hour[:10]}"
    assert using(url, lambda store: store.command("HGET", key, field)) == b"107"
    forgets = using(url, lambda store: store.command("EXPIRETIME", key))
    midnight = datetime.fromisoformat(hour[:10]).replace(tzinfo=UTC).timestamp()
    assert forgets == midnight + 41 * DAY_SECONDS
    assert "contradiction" not in shown(ledger, "verify")


@pytest.mark.parametrize("column", ["computed", "unasked"])
def test_verify_finds_hours_that_do_not_sum_to_their_day(ledger, url, column):
    using(url, some)
    hour = hours_ago(5)
    field = f"{hour[-2:]}\tsweep/a\t{FINGERPRINT}\t{PRICE}\tEUR\t{column}"
    key = f"{LEDGER_PREFIX}hours:red:{hour[:10]}"
    right = int(using(url, lambda store: store.command("HINCRBY", key, field, 0)))
    there = sum(
        count
        for at, count in ((hours_ago(5), right), (hours_ago(0), 11 * (column == "computed")))
        if at[:10] == hour[:10]
    )
    using(url, lambda store: store.command("HINCRBY", key, field, 1))
    status, out, _ = ledger("verify")
    assert status == 1
    assert out.splitlines()[1:] == [
        f"contradiction: red sweep/a {hour[:10]}: {there} {column}, but its hours sum to {there + 1}"
    ]


def test_verify_takes_no_budget_for_lines_whatever_its_job_is_called(ledger, url):
    job = "deadlines:eu:v2"
    using(url, lambda store: charge(store, Caller("red", job), 5))
    using(url, lambda store: set_budget(store, "red", job, "samples", "total", limit=9, who="test"))
    assert shown(ledger, "verify") == "forwarded 5 = charged 5 + wasted 0 + own 0\n"


def test_a_backup_holds_hours_and_when_they_are_forgotten(ledger, url, tmp_path):
    file = tmp_path / "backup.json"
    using(url, some)
    using(url, lambda store: charge(store, RED, 5, "2026-01-30"))  # of which no hours are kept
    key = f"{LEDGER_PREFIX}hours:red:{hours_ago(5)[:10]}"

    async def kept(store):
        return await store.command("HGETALL", key), await store.command("EXPIRETIME", key), await usage_rows(store)

    before = using(url, kept)
    shown(ledger, "export", "--format", "backup", "--output", file)
    using(url, lambda store: store.command("FLUSHALL"))
    assert "contradiction" not in shown(ledger, "restore", file)
    fields, forgets, rows = using(url, kept)
    assert (sorted(fields), forgets, rows) == (sorted(before[0]), before[1], before[2])
    assert "contradiction" not in shown(ledger, "verify")


async def usage_rows(store):
    return (await usage(store, "hour", 24)).rows


@pytest.mark.parametrize("by", ["hour", "day"])
def test_sums_are_not_made_where_students_are_answered(ledger, url, monkeypatch, by):
    """Of 2,000 jobs they kept the event loop for a second, every five seconds for each page that is open."""
    threads = set()

    def watched(made, *arguments):
        threads.add(threading.current_thread())
        return made(*arguments)

    for name in ("_rows", "_budget"):
        monkeypatch.setattr(usages, name, partial(watched, getattr(usages, name)))
    using(url, some)
    using(url, lambda store: set_budget(store, "red", "", "samples", "total", limit=1000, who="test"))
    assert using(url, lambda store: usage(store, by, 7)).budgets[0]["recent"] == "118"
    assert threads
    assert threading.current_thread() not in threads


def test_a_ledger_of_before_there_were_hours_goes_on(ledger, url):
    async def older(store):
        await charge(store, RED, 100, hours_ago(0))
        await charge(store, Caller(PLATFORM, "wasted/crash"), 4, hours_ago(48))
        for name in ("hours_since", f"hours:red:{today()}", f"hours:{PLATFORM}:{hours_ago(48)[:10]}"):
            assert await store.command("DEL", LEDGER_PREFIX + name) == 1
        await store.command("HDEL", f"{LEDGER_PREFIX}totals", "charged", "wasted", "own")
        await charge(store, RED, 10)
        await charge(store, Caller(PLATFORM, "own/load"), 1)

    using(url, older)
    assert shown(ledger, "verify") == "forwarded 115 = charged 110 + wasted 4 + own 1\n"
    totals = using(url, lambda store: usage(store, "hour", 24)).totals
    assert [totals[name] for name in ("forwarded", "charged", "wasted", "own")] == ["115", "110", "4", "1"]


def test_what_is_computed_after_midnight_from_a_hold_of_before_is_the_last_hours(tmp_path, monkeypatch):
    async def main():
        async with ledger_store(tmp_path) as store, replica(store, tmp_path) as ledger:
            hold = await ledger.hold(CALLER, 10)
            monkeypatch.setattr(hold, "day", hours_ago(48)[:10])
            hold.pay(10)
            ledger.book(ledger.forwarding(10), [Charge(CALLER, None, 10, 10, hold)], [])
            await ledger.post()
            assert (await books(store))[CALLER] == 10
            found = await usage(store, "hour", 72)
            assert [place[0] for place in found.rows] == [f"{hours_ago(48)[:10]}T23"]

    asyncio.run(main())


# ------------------------------------------------------------ GET /v1/usage


@pytest.fixture
def spent(api):  # noqa: F811
    using(api.url, some)
    return api


def rows(reply):
    """By (period, tenant, job): the columns."""
    columns = reply["rows"]
    names = [name for name in columns if name not in {"period", "job"}]
    found = {}
    for row, (period, job) in enumerate(zip(columns["period"], columns["job"], strict=True)):
        tenant, name, _, _ = reply["jobs"][job]
        found[reply["periods"][period], tenant, name] = {column: columns[column][row] for column in names}
    return found


def test_usage_by_the_hour(spent):
    reply = spent.get("/v1/usage")
    assert reply["periods"] == [hours_ago(back) for back in reversed(range(24))]
    found = rows(reply)
    assert found.keys() == {
        (hours_ago(5), "red", "sweep/a"),
        (hours_ago(0), "red", "sweep/a"),
        (hours_ago(23), "blue", "b"),
    }
    assert found[hours_ago(5), "red", "sweep/a"] == {
        "candidates": 171,
        "asked": 130,
        "computed": 107,
        "cached": 20,
        "coalesced": 3,
        "flops": 0.0,  # no teacher of that fingerprint was announced
        "device_nanoseconds": "107000",
        "money_nanos": str(107 * PRICE),
    }
    assert reply["platform"] == {
        "forwarded": "1000200",
        "charged": "1000131",
        "wasted": "4",
        "own": "65",
        "accounts": [
            {"account": "own/warm-up", "samples": 65, "flops": 0.0, "device_nanoseconds": "65000"},
            {"account": "wasted/crash", "samples": 4, "flops": 0.0, "device_nanoseconds": "4000"},
        ],
    }


def test_usage_by_the_day_is_the_ledgers_lines(spent):
    found = rows(spent.get("/v1/usage?days=3"))
    for line in using(spent.url, snapshot).lines():
        if line.tenant != PLATFORM:
            row = found.pop((line.day, line.tenant, line.job))
            assert row["computed"] == line.computed
            assert (row["candidates"], row["asked"]) == (line.candidates, line.asked)
    assert found == {}


def test_csv_has_every_line_and_the_platforms_own(spent):
    request = urllib.request.Request(
        f"http://{spent.address}/v1/usage.csv?hours=25", headers={"authorization": "Bearer root"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.headers["content-type"] == "text/csv; charset=utf-8"
        assert reply.headers["cache-control"] == "no-store"
        lines = list(csv.DictReader(io.TextIOWrapper(reply)))
    assert sum(int(line["computed"]) for line in lines) == 1_000_200
    assert {(line["tenant"], line["job"]) for line in lines if line["hour"] == this_hour()} == {
        ("red", "sweep/a"),
        (PLATFORM, "wasted/crash"),
    }


def test_a_budgets_rate_is_of_a_day_or_since_it_began(spent):
    async def budgets(store):
        await set_budget(store, "red", "", "samples", "total", limit=1000, who="test")
        await set_budget(store, "blue", "b", "money", "total", limit=2**53 - 1, who="test")

    using(spent.url, budgets)
    blue, red = spent.get("/v1/usage?days=7")["budgets"]
    assert (red["spent"], red["left"], red["recent"]) == ("118", "882", "118")
    assert red["recent_since"] == f"{hours_ago(5)}:00:00Z"
    spend = (10**6 + 13) * PRICE
    assert (blue["spent"], blue["left"]) == (str(spend), str(2**53 - 1 - spend))
    assert blue["recent"] == str(13 * PRICE)
    assert blue["recent_since"] == f"{hours_ago(23)}:00:00Z"


def test_usage_is_for_those_who_see_all(spent):
    for path in ("/v1/usage", "/v1/usage.csv"):
        assert spent("GET", path, token=None)[0] == 401
        status, reply = spent("GET", path, token="red")
        assert (status, reply["reason"]) == (403, "NOT_ALLOWED")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("hours=0", "query hours: Input should be greater than or equal to 1, got '0'"),
        ("hours=169", "query hours: Input should be less than or equal to 168"),
        ("days=401", "query days: Input should be less than or equal to 400"),
        ("hours=24&days=7", "hours: 24, and days: 7; give one of them"),
    ],
)
def test_ranges_that_are_none_are_refused(spent, query, words):
    status, reply = spent("GET", f"/v1/usage?{query}")
    assert (status, reply["reason"]) == (400, "INVALID_QUERY")
    assert words in reply["detail"]


def test_everything_forbids_what_a_page_of_figures_must_not_do(api):  # noqa: F811
    for path, cached in (
        ("/", "no-cache"),
        ("/page/page.js", "no-cache"),
        ("/docs", "no-cache"),
        ("/livez", "no-store"),
    ):
        with urllib.request.urlopen(f"http://{api.address}{path}", timeout=10) as reply:
            assert reply.headers["content-security-policy"].startswith("default-src 'self'; ")
            assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
            assert "unsafe" not in reply.headers["content-security-policy"]
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            assert reply.headers["cache-control"] == cached


def test_files_of_the_page_are_not_sent_again_while_they_are_the_same(api):  # noqa: F811
    address = f"http://{api.address}/page/page.css"
    with urllib.request.urlopen(address, timeout=10) as reply:
        body, etag = reply.read(), reply.headers["etag"]
    with urllib.request.urlopen(
        urllib.request.Request(address, headers={"accept-encoding": "gzip"}), timeout=10
    ) as reply:
        assert reply.headers["content-encoding"] == "gzip"
        assert gzip.decompress(reply.read()) == body
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"if-none-match": etag}), timeout=10)
    for name in ("missing.js", "../http_page.py", "%2e%2e/http_page.py", "vendor"):
        status, reply = api("GET", f"/page/{name}")
        assert (status, reply["reason"]) == (404, "NOT_FOUND")


def test_a_day_of_fifty_jobs_is_small_on_its_way(api):  # noqa: F811
    using(api.url, fill)
    request = urllib.request.Request(
        f"http://{api.address}/v1/usage", headers={"authorization": "Bearer root", "accept-encoding": "gzip"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert len(reply.read()) < 60_000
