"""deploy/prometheus: promtool's own tests of rules and alerts, and a real Prometheus that scrapes a real teacher."""

import json
import re

import pytest
import trustme
import yaml

from tests.asking import pixels
from tests.serving import ROOT, arguments, until
from tests.watching import FOLDER, configure, needs_prometheus, promtool, rules, watching

UNIT_TESTS = sorted((FOLDER / "tests").glob("*.yml"))


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
    scraped, *_ = yaml.safe_load(file.read_text())["scrape_configs"]
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


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    with watching(folder, **arguments(folder)) as watched:
        yield watched


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
    lines = json.loads(watched.told("/v1/spend?tenant=*"))["lines"]
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
    exported = set(re.findall(r"^(?:# TYPE )?(\w+)", watched.told("/metrics"), re.MULTILINE))
    recorded = rules("rules.yml").keys()
    for name, rule in {**rules("rules.yml"), **rules("alerts.yml")}.items():
        used = set(re.findall(r"[\w:]*preceptor_[\w:]+", rule["expr"]))
        unknown = used - recorded - exported
        assert not unknown, f"{name} uses {unknown}"
        assert used or name in ("PreceptorReplicaDown", "PreceptorAbsent")
