"""The page at `/` in a real browser, beside real servers: what it shows is what the ledger holds."""

import csv
import io
import os
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from student_worker import TeacherClient, Unix
from teacher_server.accounts import snapshot
from teacher_server.auth import Caller
from teacher_server.budgets import set_budget
from teacher_server.script import PLATFORM
from tests.asking import pixels
from tests.browsing import DESKTOP, PHONE, apart, chromium, needs_chromium, tab
from tests.histories import PRICE, fill
from tests.serving import arguments, serving
from tests.spending import a_redis, charge, teacher, using
from tests.test_http import http

pytestmark = needs_chromium
DOCS = Path(__file__).parent.parent / "docs"
SCREENSHOTS = os.environ.get("PRECEPTOR_SCREENSHOTS")  # any text: those in docs/ are taken anew
UNKNOWN = "401 (Unauthorized)"  # as the page comes to know that a token is wanted
COUNTS = ("candidates", "asked", "computed", "cached", "coalesced", "device_nanoseconds", "money_nanos")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def books(url):
    """What the ledger holds, by (tenant, job), once it has been found to be in order."""
    whole = apart(using, url, lambda store: snapshot(store, everything=True))
    assert whole.verify()[1] == []
    sums = {}
    for line in whole.lines():
        if line.tenant != PLATFORM:
            sums[line.tenant, line.job] = [
                before + getattr(line, column)
                for before, column in zip(sums.get((line.tenant, line.job), [0] * 7), COUNTS, strict=True)
            ]
    return sums


def on_page(page):
    """The same, as the table of jobs has it."""
    rows = page.eval_on_selector_all(
        "#jobs-rows tr",
        "rows => rows.map(r => [r.dataset.tenant, r.dataset.job, ...[...r.cells].map(c => c.dataset.exact)])",
    )
    found = {}
    for tenant, job, _, _, money, computed, cached, coalesced, asked, candidates, _, _, device, _ in rows:
        counts = [candidates, asked, computed, cached, coalesced, device.split()[0], money.split()[0]]
        found[tenant, job] = list(map(int, counts))
    return found


def total(sums, column):
    return sum(counts[COUNTS.index(column)] for counts in sums.values())


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    def forward(self, x):
        return self.net(x.float())


def learn(address, token, job, seed, *, batches=3, n=32, **how):
    """A real student, which chooses 24 of every 32 unless told otherwise."""
    student = Student()
    with TeacherClient(address, job=job, token=token) as teacher:
        unix = Unix(teacher, **how)
        for at in range(batches):
            x = torch.from_numpy(pixels(n, seed=seed + at))
            unix.loss(student, x).backward()
        return unix


def tokens(folder):
    file = folder / "tokens"
    who = {"red-token": "red", "blue-token": "blue", "boss-token": "platform viewer"}
    file.write_text("".join(f"{sha256(token.encode()).hexdigest()} {words}\n" for token, words in who.items()))
    return file


@pytest.fixture(scope="module")
def platform(browser, tmp_path_factory):
    """A server with tokens and budgets, after two tenants' students: (server, the ledger's URL)."""
    folder = tmp_path_factory.mktemp("platform")
    with ExitStack() as stack:
        url = stack.enter_context(a_redis(tmp_path_factory.mktemp("redis")))
        given = {"ledger_redis_url": url, "tokens_file": tokens(folder), "price_nanos": 1_500_001, "currency": "EUR"}
        server = apart(stack.enter_context, serving(**arguments(folder), **given))

        async def budgets(store):
            await set_budget(store, "red", "", "samples", "total", limit=10_000, who="test")
            await set_budget(store, "blue", "sweep/a", "money", "month", limit=10**9, who="test")

        apart(using, url, budgets)
        for token, job, seed, how in (
            ("red-token", "unix", 0, {}),
            ("red-token", "kd/0", 100, {"keep": 1.0, "strategy": "random", "mixing": "none"}),
            ("red-token", "kd/1", 100, {"keep": 1.0, "strategy": "random", "mixing": "none"}),  # the same views
            ("blue-token", "sweep/a", 200, {"keep": 0.5}),
        ):
            apart(lambda t=token, j=job, s=seed, h=how: learn(server.grpc_address, t, j, s, **h))
        yield server, url


def signed_in(one):
    one.open()
    one.page.fill("#token", "boss-token")
    one.page.press("#token", "Enter")
    return one.shown()


def test_figures_are_the_ledgers_to_the_sample_and_follow_the_next_query(browser, platform):
    server, url = platform
    with tab(browser, server.http_address) as one:
        page = signed_in(one)
        sums = books(url)
        assert on_page(page) == sums
        assert sums["red", "unix"][:2] == [96, 72]
        assert sums["red", "kd/1"][:4] == [96, 96, 0, 96]
        assert sums["blue", "sweep/a"][:2] == [96, 48]
        assert one.exact("#total-computed") == str(total(sums, "computed"))
        assert one.exact("#total-money") == f"{total(sums, 'money_nanos')} EUR"
        assert one.exact("#total-device") == f"{total(sums, 'device_nanoseconds')} ns"
        saved = page.eval_on_selector_all("#savings-rows td:nth-child(2)", "cells => cells.map(c => c.dataset.exact)")
        hits = total(sums, "cached") + total(sums, "coalesced")
        unasked = total(sums, "candidates") - total(sums, "asked")
        assert list(map(int, saved)) == [total(sums, "computed"), hits, unasked, total(sums, "candidates")]
        left = page.get_attribute("#budget-rows tr[data-tenant=red] .left", "data-exact")
        assert int(left) == 10_000 - sum(counts[2] for (tenant, _), counts in sums.items() if tenant == "red")
        assert "✓ The books balance" in page.inner_text("#balance")

        apart(lambda: learn(server.grpc_address, "blue-token", "late", 300, batches=1))
        one.refreshed()
        page.wait_for_selector("tr[data-job=late]")
        assert on_page(page) == books(url)
        assert on_page(page)["blue", "late"][:2] == [32, 24]
        one.check_quiet(UNKNOWN)


def test_what_a_tenant_chose_is_told_by_job(browser, platform):
    server, url = platform
    with tab(browser, server.http_address) as one:
        page = signed_in(one)
        page.select_option("#tenant", "red")
        assert page.inner_text("#spend-title") == "Spend over time, by job"
        assert on_page(page) == {who: counts for who, counts in books(url).items() if who[0] == "red"}
        page.click("#spend-details summary")
        page.wait_for_selector("#spend-table thead th")
        heads = page.eval_on_selector_all("#spend-table thead th", "cells => cells.map(c => c.textContent)")
        assert heads == ["Hour (UTC)", "kd/0", "kd/1", "unix"]
        for days in ("days=7", "days=30"):
            page.check(f"input[value='{days}']", force=True)
            one.refreshed()
            page.select_option("#tenant", "")
            assert on_page(page) == books(url)
        one.check_quiet(UNKNOWN)


def test_who_may_not_see_is_told_why(browser, platform):
    server, _ = platform
    with tab(browser, server.http_address) as one:
        page = one.open().page
        page.wait_for_selector("#sign-in:not([hidden])")
        assert page.inner_text("#refused") == ""
        one.check_accessible()
        for token, words in (
            ("Grüße von mir", "This is no token"),
            ("nonsense", "not known here"),
            ("red-token", "This token may not see"),
        ):
            page.fill("#token", token)
            page.press("#token", "Enter")
            page.wait_for_function("words => refused.textContent.includes(words)", arg=words)
            assert page.is_hidden("#figures")
        page.fill("#token", "boss-token")
        page.press("#token", "Enter")
        one.shown()
        assert page.evaluate("localStorage.length") == 0
        assert "boss-token" not in page.content()
        page.reload()
        one.shown()  # the tab keeps it
        page.click("#sign-out")
        assert page.is_hidden("#figures")
        page.reload()
        page.wait_for_selector("#sign-in:not([hidden])")
        one.check_quiet(UNKNOWN, UNKNOWN, "403 (Forbidden)", UNKNOWN)


@pytest.fixture(scope="module")
def busy(browser, tmp_path_factory):
    """24 hours of 50 jobs, without a teacher: what HTTP gives."""
    with a_redis(tmp_path_factory.mktemp("busy")) as url:
        apart(using, url, fill)
        with http(url) as api:
            yield api, url


def test_a_day_of_fifty_jobs_is_right_to_the_sample(browser, busy):
    api, url = busy
    with tab(browser, api.address) as one:
        page = one.open().shown()
        sums = books(url)
        assert len(sums) == 50
        assert on_page(page) == sums
        assert one.exact("#total-money") == f"{total(sums, 'money_nanos')} EUR"
        footer = page.eval_on_selector_all("#jobs-sum td", "cells => cells.map(c => c.dataset.exact)")
        assert footer[1:7] == [
            f"{total(sums, 'money_nanos')} EUR",
            *(str(total(sums, name)) for name in ("computed", "cached", "coalesced", "asked", "candidates")),
        ]
        with page.expect_download() as download:
            page.click("#csv")
        lines = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
        assert len({line["hour"] for line in lines}) == 24
        charged = [line for line in lines if line["tenant"] != PLATFORM]
        for column in COUNTS:
            assert sum(int(line[column]) for line in charged) == total(sums, column)
        one.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [None, PHONE], ids=["desktop", "phone"])
def test_nothing_keeps_anybody_out(browser, busy, scheme, size):
    api, url = busy

    async def budgets(store):
        await set_budget(store, "vision", "", "money", "month", limit=600 * 10**9, who="test")
        await set_budget(store, "speech", "", "samples", "day", limit=1000, who="test")

    apart(using, url, budgets)
    options = {"viewport": size} if size else {}
    with tab(browser, api.address, color_scheme=scheme, **options) as one:
        page = one.open().shown()
        for details in ("#spend-details", "#sources-details"):
            page.click(f"{details} summary")
            page.wait_for_selector(f"{details} thead th")
        one.check_accessible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def colours(page):
    """Of the spend's legend, by name."""
    page.wait_for_function("document.querySelectorAll('#spend-legend .key').length")
    return dict(
        page.eval_on_selector_all(
            "#spend-legend li", "items => items.map(i => [i.textContent, i.firstChild.style.backgroundColor])"
        )
    )


def test_no_two_of_a_chart_have_the_same_colour(browser, tmp_path):
    """Also when others have come to the top while the page was open; who is still there keeps his own."""

    async def spend(store, first, last, samples):
        for number in range(first, last):
            await charge(store, Caller(f"team-{number:02}", "job"), samples + number)

    with a_redis(tmp_path) as url, http(url) as api, tab(browser, api.address) as one:
        apart(using, url, lambda store: spend(store, 0, 8, 100))
        before = colours(one.open().shown())
        assert list(before) == [*(f"team-{number:02}" for number in range(2, 8)), "2 others"]
        assert len(set(before.values())) == 7
        apart(using, url, lambda store: spend(store, 8, 12, 1000))
        page = one.refreshed()
        page.wait_for_selector("#spend-legend li:has-text('team-11')")
        after = colours(page)
        assert list(after) == [*(f"team-{number:02}" for number in range(5, 12)), "5 others"]
        assert len(set(after.values())) == 8
        assert all(after[name] == before[name] for name in ("team-05", "team-06", "team-07"))


def test_a_budget_of_several_currencies_is_given_none_of_them(browser, tmp_path):
    """The ledger adds the nanos of every price in it: as `teacher-server ledger budget` says it."""

    async def spend(store):
        await teacher(store)
        await charge(store, Caller("red", "job"), 100)
        await set_budget(store, "red", "", "money", "month", limit=10 * 10**9, who="test")

    async def dollars(store):
        await teacher(store, currency="USD")
        await charge(store, Caller("red", "job"), 100, currency="USD")

    with a_redis(tmp_path) as url, http(url) as api, tab(browser, api.address) as one:
        apart(using, url, spend)
        page = one.open().shown()
        assert "€0.15 of €10.00 a month, 1.5%" in page.inner_text("#budget-rows")
        apart(using, url, dollars)
        one.refreshed()
        page.wait_for_function("document.querySelector('#total-money').textContent.includes('US$')")
        assert "0.30 EUR/USD of 10.00 EUR/USD a month, 3.0%" in page.inner_text("#budget-rows")
        assert "9.70 EUR/USD left" in page.inner_text("#budget-rows")
        assert page.eval_on_selector_all("#total-money small", "units => units.map(u => u.textContent)") == []


@pytest.mark.parametrize("size", [DESKTOP, {"width": 320, "height": 640}], ids=["desktop", "narrow"])
def test_the_longest_names_leave_room_for_figures(browser, tmp_path, size):
    longest = Caller("t" * 64, "j" * 128)

    async def spend(store):
        for caller in (longest, Caller("red", "job")):
            await charge(store, caller, 100)
        for job in ("", longest.job):
            await set_budget(store, longest.tenant, job, "samples", "total", limit=200, who="test")

    with a_redis(tmp_path) as url, http(url) as api, tab(browser, api.address, viewport=size) as one:
        apart(using, url, spend)
        page = one.open().shown()
        page.select_option("#tenant", longest.tenant)
        page.wait_for_selector(f"#spend-legend li:has-text('{longest.job}')")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        for row, share in (("#jobs-rows tr", 0.6), ("#budget-rows tr", 0.6)):
            name = page.locator(f"{row} > :first-child").first.bounding_box()["width"]
            assert name < share * page.locator(".scroll", has=page.locator(row)).bounding_box()["width"]
        if size is DESKTOP:
            scroll = page.locator(".scroll", has=page.locator("#jobs-rows"))
            assert scroll.evaluate("it => it.scrollWidth <= it.clientWidth"), "figures are out of sight"
        one.check_accessible()


def test_the_keyboard_reaches_everything_and_sorts(browser, busy):
    api, _ = busy
    with tab(browser, api.address) as one:
        page = one.open().shown()
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            at = page.evaluate("""() => { const e = document.activeElement;
                return e === document.body ? '' : e.id || e.ariaLabel || e.textContent.trim() || e.value; }""")
            if not at:
                break
            reached.append(at)
        heads = ["Tenant", "Job", "Spend", "Computed", "Cached", "Coalesced", "Asked", "Candidates"]
        for wanted in (
            "Skip to the figures",
            "tenant",
            "csv",
            "measure",
            "Show as a table",
            "filter",
            *heads,
            "HTTP API",
        ):
            assert wanted in reached
        page.focus("#jobs-heads th:nth-child(2) button")
        for order, press in (("ascending", "Enter"), ("descending", "Space")):
            page.keyboard.press(press)
            assert page.get_attribute("#jobs-heads th:nth-child(2)", "aria-sort") == order
            names = [job for _, job in on_page(page)]
            assert names == sorted(names, reverse=order == "descending")
        page.fill("#filter", "VISION")
        assert {tenant for tenant, _ in on_page(page)} == {"vision"}
        assert page.inner_text("#jobs-count").endswith(" of 50 jobs")
        one.check_quiet()


def test_an_empty_ledger_says_what_to_do_next(browser, tmp_path):
    with a_redis(tmp_path) as url, http(url) as api, tab(browser, api.address) as one:
        page = one.open().shown()
        assert page.inner_text("#empty-title") == "Nothing was spent in this range"
        assert 'TeacherClient("127.0.0.1:8001", job="my-run")' in page.inner_text("#first-lines")
        assert page.is_hidden("#filled")
        assert page.inner_text("#tenant") == "All tenants"
        one.check_accessible()
        one.check_quiet()


def test_a_server_that_is_gone_is_said_and_its_return_too(browser, busy):
    api, _ = busy
    with tab(browser, api.address) as one:
        page = one.open().shown()
        one.context.set_offline(True)
        page.wait_for_selector("#trouble:not([hidden])", timeout=30_000)
        assert "The server cannot be reached. The figures are of" in page.inner_text("#trouble")
        assert page.is_visible("#figures")
        page.check("input[value='days=7']", force=True)
        page.wait_for_function("trouble.textContent.includes(', and still those of 24 hours.')")
        assert page.inner_text("#said") == ""
        one.context.set_offline(False)
        page.wait_for_selector("#trouble", state="hidden", timeout=30_000)
        assert page.inner_text("#said") == "The server can be reached again."


def test_the_docs_of_the_api_come_from_here_too(browser, busy):
    api, _ = busy
    with tab(browser, api.address) as one:
        page = one.open("/docs").page
        page.wait_for_selector("text=Where the teacher's compute went, by hour or by day")
        one.check_quiet()


def test_screenshots(browser, tmp_path):
    """A day of many tenants' jobs, and students that ask right now."""
    folder = DOCS if SCREENSHOTS else tmp_path
    for name in ("redis", "server"):
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        url = stack.enter_context(a_redis(tmp_path / "redis"))
        apart(using, url, lambda store: fill(store, count=22))
        given = {"ledger_redis_url": url, "price_nanos": PRICE, "currency": "EUR", "name": "digits-cnn"}
        server = apart(stack.enter_context, serving(**arguments(tmp_path / "server"), **given))

        async def budgets(store):
            for tenant, job, unit, period, limit in (
                ("vision", "", "money", "month", 450 * 10**9),
                ("speech", "", "samples", "day", 210_000),
                ("search", "", "samples", "total", 90_000),
                ("default", "digits/unix", "samples", "total", 2_000),
            ):
                await set_budget(store, tenant, job, unit, period, limit=limit, who="test")

        apart(using, url, budgets)
        apart(lambda: learn(server.grpc_address, None, "digits/unix", 0, batches=20, n=64))
        for name, options in (
            ("desktop", {}),
            ("dark", {"color_scheme": "dark"}),
            ("phone", {"viewport": PHONE, "device_scale_factor": 1.5}),
        ):
            with tab(browser, server.http_address, **options) as one:
                page = one.open().shown()
                assert on_page(page) == books(url)
                page.screenshot(path=folder / f"page-{name}.png", full_page=True)
                one.check_quiet()
