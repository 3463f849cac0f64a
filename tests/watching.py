"""A real Prometheus, with the files of deploy/prometheus, that watches a real teacher and the students that say where
they are."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest
import yaml

from student_worker import TeacherClient
from tests.asking import page
from tests.redis_servers import running
from tests.serving import ROOT, free_port, process, until

FOLDER = ROOT / "deploy/prometheus"
TOKENS = {"red": "r3d", "blue": "b1ue", "ops": "0ps"}
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus and promtool; apt-get install prometheus",
)


def rules(file):
    """{name: rule} of a file of rules."""
    groups = yaml.safe_load((FOLDER / file).read_text())["groups"]
    return {rule.get("record") or rule["alert"]: rule for group in groups for rule in group["rules"]}


def promtool(*arguments, **options):
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr


class Watched:
    """A teacher with tokens, a cache's Redis that can be killed, and the Prometheus that scrapes it each second."""

    def __init__(self, folder, http, grpc, cache, port):
        self.folder, self.http, self.grpc, self.cache = folder, http, grpc, cache
        self.targets = folder / "targets"
        """Where students say where they are."""
        self._url = f"http://127.0.0.1:{port}"

    def student(self, tenant, job):
        return TeacherClient(self.grpc, job=job, token=TOKENS[tenant])

    def set_budget(self, tenant, job, samples):
        """The tenant's own, without a job."""
        whose = f"{tenant}/jobs/{job}" if job else tenant
        request = urllib.request.Request(
            f"http://{self.http}/v1/budgets/{whose}",
            json.dumps({"unit": "samples", "limit": samples}).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {TOKENS['ops']}"},
            method="PUT",
        )
        urllib.request.urlopen(request, timeout=10).close()

    def told(self, path):
        """What the teacher says, over HTTP, to a viewer."""
        return page(self.http, path, authorization=f"Bearer {TOKENS['ops']}")

    def api(self, path, method="GET", **parameters):
        path += f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        request = urllib.request.Request(self._url + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{urllib.parse.unquote_plus(path)}: {error.read().decode()}") from error

    def ask(self, query, **at):
        """{labels but those of the scrape: value} of an instant query, now or at `time`."""
        found = self.api("/api/v1/query", query=query, **at)["data"]["result"]
        return {
            tuple(sorted((k, v) for k, v in one["metric"].items() if k not in ("__name__", "instance"))): float(
                one["value"][1]
            )
            for one in found
        }

    def value(self, query, **at):
        (value,) = self.ask(query, **at).values() or (None,)
        return value

    def firing(self):
        return {dict(labels)["alertname"] for labels in self.ask('ALERTS{alertstate="firing"}')}

    def hurry(self):
        """Loads the alerts anew, with a second where they wait for minutes."""
        file = self.folder / "alerts.yml"
        file.write_text(re.sub(r"for: \d+m", "for: 1s", file.read_text()))
        self.api("/-/reload", "POST")


def configure(folder, http):
    """The shipped files, with another address and a second where they have a minute's quarter."""
    for name in ("rules.yml", "alerts.yml", "prometheus.yml"):
        shutil.copy(FOLDER / name, folder)
    (folder / "token").write_text(TOKENS["ops"])
    (folder / "targets").mkdir()
    config = folder / "prometheus.yml"
    config.write_text(config.read_text().replace("15s", "1s").replace("127.0.0.1:8000", http))
    # Drift is told from a minute of the past; here, from two seconds.
    recording = folder / "rules.yml"
    recording.write_text(recording.read_text().replace("offset 1m", "offset 2s"))
    promtool("check", "config", config)


@contextmanager
def prometheus(folder, port):
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--web.enable-lifecycle",
    ]
    log = folder / "log"
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as server:

        def ready():
            assert server.poll() is None, log.read_text()
            try:
                return page(f"127.0.0.1:{port}", "/-/ready")
            except urllib.error.URLError:
                return None

        try:
            until(ready)
            yield
        finally:
            server.terminate()


@contextmanager
def watching(folder, **settings):
    """All of it, in `folder`; the teacher has a price, and these settings."""
    roles = {"ops": " admin"}
    lines = [
        f"{hashlib.sha256(token.encode()).hexdigest()} {tenant}{roles.get(tenant, '')}\n"
        for tenant, token in TOKENS.items()
    ]
    tokens = folder / "tokens"
    tokens.write_text("".join(lines))
    tokens.chmod(0o600)
    stored = folder / "cache"
    stored.mkdir()
    with running(stored, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as cache:
        url = cache.url.replace("/self/", f"/{os.getpid()}/")  # its socket, as another process sees it
        priced = {"price_nanos": 10**6, "currency": "EUR"}
        with process(cache_redis_url=url, tokens_file=tokens, **(priced | settings)) as (_, grpc, http):
            port = free_port()
            configure(folder, http)
            with prometheus(folder, port):
                yield Watched(folder, http, grpc, cache, port)
