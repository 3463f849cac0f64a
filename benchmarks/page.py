"""How soon the page at `/` shows a day of fifty jobs.

Claim    in under a second, and right to the sample.
Method   24 h of spend of 50 jobs, put into a Redis through the ledger's own postings; `teacher-server serve` in a
         process of its own on it; headless Chromium on the same machine, with an empty cache for each run. Measured is
         the time from the start of the navigation until the figures and both charts have been painted, by the browser's
         own clock; and, for itself, GET /v1/usage. Each time the page's total is compared with the ledger.
Machine  stated by the output; it needs Debian's chromium.
n        --runs, after one that does not count.

    python -m benchmarks.page --runs 30
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from teacher_server.accounts import snapshot
from teacher_server.script import PLATFORM
from tests.browsing import apart, chromium, tab
from tests.histories import fill
from tests.redis_servers import running
from tests.serving import arguments, free_port, process
from tests.spending import using


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    url = f"redis://127.0.0.1:{(port := free_port())}"
    redis = ("--port", str(port), "--appendonly", "yes")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser, running(Path(folder), *redis):
        apart(using, url, fill)
        given = arguments(Path(folder)) | {"ledger_redis_url": url}
        with process(**given) as (_, _, address):
            print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},", end=" ")
            print(f"Chromium {browser.version}; load {os.getloadavg()[0]:.1f}; {runs} runs")
            computed = sum(line.computed for line in apart(using, url, snapshot).lines() if line.tenant != PLATFORM)
            shown = []
            for _ in range(runs + 1):
                with tab(browser, address) as one:
                    page = one.open().shown()
                    page.wait_for_function("performance.getEntriesByName('shown').length")
                    shown.append(page.evaluate("performance.getEntriesByName('shown')[0].startTime"))
                    if one.exact("#total-computed") != str(computed):
                        raise SystemExit(f"the page says {one.exact('#total-computed')}, the ledger {computed}")
            asked = []
            for _ in range(runs + 1):
                began = time.perf_counter()
                with urllib.request.urlopen(f"http://{address}/v1/usage", timeout=10) as reply:
                    reply.read()
                asked.append(1000 * (time.perf_counter() - began))
    _say("from navigation to figures", shown[1:])
    _say("GET /v1/usage by itself", asked[1:])


def _say(what: str, milliseconds: list[float]) -> None:
    some = sorted(milliseconds)
    print(
        f"{what}: median {statistics.median(some):.0f} ms, fastest {some[0]:.0f}, slowest {some[-1]:.0f}, "
        f"standard deviation {statistics.stdev(some):.0f}"
    )


if __name__ == "__main__":
    main()
