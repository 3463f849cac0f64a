"""A real Chromium for the tests of pages: Debian's, by way of Playwright, with a fresh profile, told to call nobody."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="no chromium; apt-get install chromium")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def apart(work, *arguments):
    """What work(*arguments) gives, in a thread: Playwright keeps an event loop in this one, so there is no other."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments).result()


@contextmanager
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """One page in a context of its own."""

    def __init__(self, browser, address, **options):
        given = {"viewport": DESKTOP, "locale": "en-GB", "reduced_motion": "reduce", **options}
        self.address = address
        self.context = browser.new_context(**given)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path="/"):
        self.page.goto(f"http://{self.address}{path}")
        return self

    def shown(self):
        """Waits for the figures."""
        self.page.wait_for_selector("body[data-shown] #figures:not([hidden])", timeout=30_000)
        return self.page

    def refreshed(self):
        """Waits for figures that were asked for from here on."""
        before = self.page.get_attribute("body", "data-shown")
        self.page.wait_for_function("before => document.body.dataset.shown !== before", arg=before, timeout=30_000)
        return self.page

    def exact(self, selector):
        return self.page.get_attribute(selector, "data-exact")

    def check_quiet(self, *refusals):
        """Nothing was complained of but the refusals of these statuses, and no other host was asked."""
        expected = [f"error: Failed to load resource: the server responded with a status of {it}" for it in refusals]
        assert [text for text in self.said if not text.startswith("verbose:")] == expected
        assert {url.split("/")[2] for url in self.asked if not url.startswith("blob:")} == {self.address}

    def check_accessible(self):
        self.page.evaluate(_AXE)
        found = self.page.evaluate("axe.run()")
        assert found["passes"]
        problems = [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in found["violations"]]
        assert problems == [], json.dumps(problems, indent=1)


@contextmanager
def tab(browser, address, **options):
    one = Tab(browser, address, **options)
    try:
        yield one
    finally:
        one.context.close()
