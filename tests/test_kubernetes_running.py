"""What deploy/kubernetes hands to other programs, given to those: Redis's settings, the adapter's queries."""

import asyncio
import re
import subprocess
import time

import pytest
import yaml
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, ResponseError
from redis.retry import Retry

from teacher_server.store import Store, capacity, check_ledger
from tests.manifests import built, kustomize, of_kind, read
from tests.redis_servers import RedisServer, needs_debian
from tests.serving import ROOT, free_port, until
from tests.test_prometheus import needs_prometheus, promtool

needs_kustomize = pytest.mark.skipif(kustomize() is None, reason="needs kustomize (Debian has it since 13) or kubectl")


@needs_debian
@needs_kustomize
@pytest.mark.parametrize(("kind", "name"), [("StatefulSet", "redis-ledger"), ("Deployment", "redis-cache")])
def test_a_store_starts_by_its_command_as_the_server_wants_it_and_ends_when_it_is_told(tmp_path, kind, name, caplog):
    (workload,) = of_kind(built("base"), kind, name)
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    (config,) = of_kind(
        built("base"), "ConfigMap", workload["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
    )
    (file,) = [one["value"] for one in container["env"] if one["name"] == "CONFIG"]
    port, here = free_port(), tmp_path / "redis.conf"
    settings = config["data"][file.removeprefix("/etc/redis/")]
    here.write_text(settings.replace("dir /data", f"dir {tmp_path}\nport {port}\nbind 127.0.0.1"))
    environment = [f"CONFIG={here}", "REDISCLI_AUTH=a-password"]
    url = f"redis://:a-password@127.0.0.1:{port}/0"
    server = RedisServer(url, tmp_path, ["env", *environment, *container["command"]])

    async def look():
        async with Store(url, name) as store:
            if name == "redis-ledger":
                return await check_ledger(store)
            return await capacity(store)

    def says(probe):
        (*shell, line) = container[probe]["exec"]["command"]
        asked = ["env", *environment, *shell, line.replace("redis-cli", f"redis-cli -p {port}")]
        return subprocess.run(asked, check=False, stderr=subprocess.DEVNULL).returncode == 0

    try:
        assert says("readinessProbe")
        with Redis(port=port, retry=Retry(NoBackoff(), 0)) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        assert asyncio.run(look()) == (None if name == "redis-ledger" else 2**30)
        assert not caplog.records, "the server has nothing to say against it"
        limit = container["resources"]["limits"]["memory"]
        most = int(re.search(r"maxmemory (\d+)mb", settings.replace("1gb", "1024mb"))[1])
        assert most <= 0.75 * int(limit.removesuffix("Mi") if limit.endswith("Mi") else 1024 * int(limit[0]))
        (tmp_path / "dump.rdb").mkdir()  # a snapshot cannot be put in its place, which is as a full disk is
        with Redis.from_url(url) as client:
            client.config_set("save", "3600 1")
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            with pytest.raises(ResponseError, match="MISCONF"):
                client.ping()
        assert says("livenessProbe"), "or it would be started again and again"
        assert says("readinessProbe"), "or nobody would find what can still be read"
        with Redis.from_url(url) as client:
            client.config_set("save", "")  # with a snapshot to take it would not end
    finally:
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10, "SIGTERM reaches Redis, and no shell that waits for it"
    assert not says("livenessProbe")


@needs_prometheus
def test_the_adapter_has_the_autoscalers_metrics_and_none_while_a_pod_keeps_a_journal(tmp_path):
    (values,) = read("adapter-values.yaml")
    queries = {rule["name"]["as"]: rule["metricsQuery"] for rule in values["rules"]["custom"]}
    (autoscaler,) = read("components/autoscaling/autoscaler.yaml")
    assert queries.keys() == {one["pods"]["metric"]["name"] for one in autoscaler["spec"]["metrics"]}
    known = (ROOT / "docs/metrics.md").read_text()
    for query in queries.values():
        for metric in re.findall(r"preceptor_\w+", query):
            assert f"`{re.sub('_(sum|count)$', '', metric)}`" in known
    rules = []
    for suffix, pods in (("", "busy|idle"), ("_with_one_apart", "busy|idle|apart")):
        fill = {"<<.LabelMatchers>>": f'namespace="preceptor",pod=~"{pods}"', "<<.GroupBy>>": "pod"}
        rules += [
            {"record": name + suffix, "expr": re.sub("<<.*?>>", lambda part, fill=fill: fill[part[0]], query)}
            for name, query in queries.items()
        ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": rules}]}))

    def series(metric, pod, values, extra=""):
        return {"series": f'{metric}{{namespace="preceptor",pod="{pod}",job="preceptor"{extra}}}', "values": values}

    counts = ("preceptor_device_busy_seconds_total", "preceptor_queue_seconds_sum", "preceptor_queue_seconds_count")
    growth = {"busy": ("0+6x40", "0+1.5x40", "0+30x40"), "idle": ("3x40", "1x40", "7x40")}
    growth["apart"] = growth["busy"]
    up = {"busy": 1, "idle": 1, "apart": 0}
    given = [
        series(metric, pod, values) for pod, all_ in growth.items() for metric, values in zip(counts, all_, strict=True)
    ]
    given += [series("preceptor_store_up", pod, f"{value}x40", ',store="ledger"') for pod, value in up.items()]
    expected = {"preceptor_device_busy_ratio": (0.4, 0), "preceptor_queue_mean_seconds": (0.05, 0)}
    checks = [
        {
            "expr": f"round({name}, 0.001)",
            "eval_time": "8m",
            "exp_samples": [
                {"labels": f'{{pod="{pod}"}}', "value": v} for pod, v in zip(("busy", "idle"), values, strict=True)
            ],
        }
        for name, values in expected.items()
    ]
    checks += [{"expr": f"{name}_with_one_apart", "eval_time": "8m", "exp_samples": []} for name in expected]
    test = {"interval": "15s", "input_series": given, "promql_expr_test": checks}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))
    promtool("test", "rules", tmp_path / "test.yml")


def test_the_adapters_metrics_are_of_pods():
    (values,) = read("adapter-values.yaml")
    for rule in values["rules"]["custom"]:
        assert {"namespace", "pod"} == rule["resources"]["overrides"].keys()
        assert 'namespace!="",pod!=""' in rule["seriesQuery"]
