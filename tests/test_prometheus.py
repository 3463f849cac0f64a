"""deploy/prometheus: promtool's own tests of rules and alerts, and a real Prometheus that scrapes a real teacher."""

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
import trustme
import yaml

from student_worker import TeacherClient
from tests.asking import page, pixels
from tests.redis_servers import running
from tests.serving import ROOT, arguments, free_port, process, until

FOLDER = ROOT / "deploy/prometheus"
UNIT_TESTS = sorted((FOLDER / "tests").glob("*.yml"))
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


# ---------------------------------------------------------------- without a server


@needs_prometheus
def test_rules_are_understood():
    promtool("check", "rules", FOLDER / "rules.yml", FOLDER / "alerts.yml")


@needs_prometheus
def test_the_lines_for_a_teacher_with_a_certificate_are_understood(tmp_path):
    configure(tmp_path, "teacher.example:8000")
    file = tmp_path / "prometheus.yml"
    file.write_text(re.sub(r"# (scheme|tls_config):", r"\1:", file.read_text()))
    (tmp_path / "ca.pem").write_bytes(trustme.CA().cert_pem.bytes())
    promtool("check", "config", file)
    (scraped,) = yaml.safe_load(file.read_text())["scrape_configs"]
    assert (scraped["scheme"], scraped["tls_config"]) == ("https", {"ca_file": "ca.pem"})


@needs_prometheus
@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_rules_say_what_they_should(file):
    promtool("test", "rules", file)


def test_each_alert_is_provoked_and_silent_somewhere():
    provoked = set()
    for file in UNIT_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            tests = case.get("alert_rule_test", [])
            provoked |= {test["alertname"] for test in tests if test.get("exp_alerts")}
            if file.stem == "healthy":
                assert {test["alertname"] for test in tests} == rules("alerts.yml").keys()
                assert not any(test.get("exp_alerts") for test in tests)
    assert provoked == rules("alerts.yml").keys()


def test_each_alert_says_what_it_means_and_what_to_do():
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert headings == [*rules("alerts.yml")]
    for name, rule in rules("alerts.yml").items():
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


# ---------------------------------------------------------------- a real Prometheus and a real teacher

TOKENS = {"red": "r3d", "blue": "b1ue", "ops": "0ps"}


class Watched:
    """A teacher with tokens, a cache's Redis that can be killed, and the Prometheus that scrapes it each second."""

    def __init__(self, folder, http, grpc, cache, port):
        self.folder, self.http, self.grpc, self.cache = folder, http, grpc, cache
        self._url = f"http://127.0.0.1:{port}"

    def student(self, tenant, job):
        return TeacherClient(self.grpc, job=job, token=TOKENS[tenant])

    def set_budget(self, tenant, job, samples):
        request = urllib.request.Request(
            f"http://{self.http}/v1/budgets/{tenant}/jobs/{job}",
            json.dumps({"unit": "samples", "limit": samples}).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {TOKENS['ops']}"},
            method="PUT",
        )
        urllib.request.urlopen(request, timeout=10).close()

    def api(self, path, method="GET"):
        with urllib.request.urlopen(urllib.request.Request(self._url + path, method=method), timeout=10) as reply:
            return json.loads(reply.read() or b"null")

    def ask(self, query):
        """{labels but those of the scrape: value} of an instant query."""
        found = self.api("/api/v1/query?" + urllib.parse.urlencode({"query": query}))["data"]["result"]
        return {
            tuple(sorted((k, v) for k, v in one["metric"].items() if k not in ("__name__", "instance"))): float(
                one["value"][1]
            )
            for one in found
        }

    def value(self, query):
        (value,) = self.ask(query).values() or (None,)
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


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder, cache_folder = tmp_path_factory.mktemp("prometheus"), tmp_path_factory.mktemp("cache")
    roles = {"ops": " admin"}
    lines = [
        f"{hashlib.sha256(token.encode()).hexdigest()} {tenant}{roles.get(tenant, '')}\n"
        for tenant, token in TOKENS.items()
    ]
    tokens = folder / "tokens"
    tokens.write_text("".join(lines))
    tokens.chmod(0o600)
    with running(cache_folder, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as cache:
        settings = arguments(folder) | {
            "cache_redis_url": cache.url.replace(
                "/self/", f"/{os.getpid()}/"
            ),  # its socket, as another process sees it
            "tokens_file": tokens,
            "price_nanos": 10**6,
            "currency": "EUR",
        }
        with process(**settings) as (_, grpc, http):
            port = free_port()
            configure(folder, http)
            with prometheus(folder, port):
                yield Watched(folder, http, grpc, cache, port)


CHARGED = {("red", "run-1"): 320, ("red", "run-2"): 74, ("blue", "run-1"): 228}
FIRST = 10


def spend(watched):
    """Three jobs of two tenants ask, once Prometheus has seen that they begin."""
    jobs = [watched.student(*who) for who in CHARGED]
    for seed, (who, student) in enumerate(zip(CHARGED, jobs, strict=True)):
        student.label(pixels(FIRST, seed=seed))
        until(lambda who=who: watched.ask("preceptor_charged_samples_total").get((("job", who[1]), ("tenant", who[0]))))
    for seed, (student, samples) in enumerate(zip(jobs, CHARGED.values(), strict=True)):
        x = pixels(samples - FIRST, seed=100 + seed)
        for start in range(0, len(x), 40):
            student.label(x[start : start + 40])
        student.label(x)  # all of it is cached
        student.close()


@needs_prometheus
@pytest.mark.timeout(180)
def test_a_healthy_run_is_told_to_the_sample_and_alarms_nobody(watched):
    watched.set_budget("blue", "run-1", 1000)
    spend(watched)
    expected = {(("job", job), ("tenant", tenant)): samples for (tenant, job), samples in CHARGED.items()}
    until(lambda: watched.ask("preceptor_charged_samples_total") == expected)
    until(lambda: watched.value("preceptor_ledger_pending_samples") == 0)
    names = rules("rules.yml")
    until(lambda: all(watched.ask(name) for name in names))
    moment = watched.value("vector(time())")
    until(lambda: all(watched.value(f"min(timestamp({name}))") > moment for name in names))  # all have seen it

    # The ledger says the same.
    lines = json.loads(page(watched.http, "/v1/spend?tenant=*", authorization=f"Bearer {TOKENS['ops']}"))["lines"]
    booked = {(line["tenant"], line["job"]): int(line["computed"]) for line in lines if line["tenant"] != "_platform"}
    assert booked == CHARGED
    assert watched.value("sum(preceptor_forwarded_samples_total)") == sum(int(line["computed"]) for line in lines)
    assert watched.value("sum(preceptor_cost_total)") == pytest.approx(sum(CHARGED.values()) / 1000)
    cached = watched.ask('sum by (tenant, job) (preceptor_samples_total{source="cached"})')
    assert cached == {who: samples - FIRST for who, samples in expected.items()}

    # A rate is that of the scrapes in its window, made longer by 1.1 scrapes at most at either end.
    scrapes = watched.ask("count_over_time(preceptor_charged_samples_total[5m])")
    rates = watched.ask("tenant_job:preceptor_charged_samples:rate5m")
    assert rates.keys() == expected.keys()
    for who, rate in rates.items():
        increase = expected[who] - FIRST
        assert increase <= round(300 * rate, 3) <= increase * (1 + 2.2 / (scrapes[who] - 2))
    money, samples = (
        watched.value(f"sum({name})")
        for name in ("tenant_currency:preceptor_cost:rate5m", "tenant:preceptor_charged_samples:rate5m")
    )
    assert money == pytest.approx(samples / 1000, rel=0.01)
    assert watched.value("job:preceptor_cache_hits_per_lookup:ratio_rate5m") == pytest.approx(0.5, abs=0.05)
    assert watched.value("job:preceptor_batch_size:mean5m") == pytest.approx(34, abs=7)
    assert 0 < watched.value("job:preceptor_device_busy:ratio_rate5m") < 1
    assert watched.value("job:preceptor_ledger_drift_samples:sum") == 0
    assert watched.value("job:preceptor_queue_used:max") == 0
    left = "tenant_job_unit_period:preceptor_budget_left"
    assert watched.value(f"{left}:min") == 1000 - 228
    assert watched.value(f"{left}_per_limit:min") == pytest.approx(0.772)

    groups = watched.api("/api/v1/rules")["data"]["groups"]
    assert [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"] == []
    assert watched.ask("ALERTS") == {}, "nothing fires, nothing is about to"
    assert watched.ask("up") == {(("job", "preceptor"),): 1}


@needs_prometheus
@pytest.mark.timeout(180)
def test_a_cache_that_is_killed_and_a_budget_nearly_spent_are_told(watched):
    watched.hurry()
    watched.cache.kill()
    with watched.student("red", "nearly") as student:
        watched.set_budget("red", "nearly", 100)
        student.label(pixels(95, seed=9))
        expected = {"PreceptorCacheDown", "PreceptorBudgetNearlySpent"}
        until(lambda: watched.firing() >= expected)
        assert watched.firing() == expected
        (alert,) = [
            alert
            for alert in watched.api("/api/v1/alerts")["data"]["alerts"]
            if alert["labels"]["alertname"] == "PreceptorBudgetNearlySpent"
        ]
        assert alert["annotations"]["summary"] == "red / nearly has 5% of its budget left"
        watched.cache.start()
        until(lambda: watched.firing() == {"PreceptorBudgetNearlySpent"})


@needs_prometheus
def test_rules_name_only_what_is_exported(watched):
    exported = set(
        re.findall(r"^(?:# TYPE )?(\w+)", page(watched.http, authorization=f"Bearer {TOKENS['ops']}"), re.MULTILINE)
    )
    recorded = rules("rules.yml").keys()
    for name, rule in {**rules("rules.yml"), **rules("alerts.yml")}.items():
        used = set(re.findall(r"[\w:]*preceptor_[\w:]+", rule["expr"]))
        unknown = used - recorded - exported
        assert not unknown, f"{name} uses {unknown}"
        assert used or name in ("PreceptorReplicaDown", "PreceptorAbsent")
