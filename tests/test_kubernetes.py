"""The teacher's manifests: each overlay builds, is whole by its schemas, confined, and hangs together."""

import copy
import json
import os
import re
import runpy

import pytest
import yaml

from student_worker.__main__ import COMMANDS as STUDENT
from student_worker.config import TrainSettings
from teacher_server import grpc_app
from teacher_server.config import ServeSettings
from teacher_server.pipeline import SILENCE_SECONDS
from tests.manifests import (
    FOLDER,
    HERE,
    KUBERNETES,
    allowed,
    built,
    complaints,
    containers,
    invalid,
    kustomize,
    of_kind,
    pods,
    read,
    selects,
)
from tests.serving import ROOT

OVERLAYS = ["base", *sorted(f"overlays/{folder.name}" for folder in (FOLDER / "overlays").iterdir())]
BESIDE = {"overlays/gpu-second": "overlays/gpu"}
"""What only has a place beside another, and which that is."""
pytestmark = pytest.mark.skipif(kustomize() is None, reason="needs kustomize (Debian has it since 13) or kubectl")
overlays = pytest.mark.parametrize("overlay", OVERLAYS)
REDIS = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-redis"]["image"]
"""The same in both."""
HANDS = read("models-pod.yaml") + read("ledger-pod.yaml")
ELSEWHERE = {"kubernetes.io/metadata.name": "elsewhere"}


def all_with(overlay):
    return built(overlay) + (built(BESIDE[overlay]) if overlay in BESIDE else [])


def workloads(overlay):
    return [one for kind in ("Deployment", "StatefulSet") for one in of_kind(all_with(overlay), kind)]


def teacher(overlay):
    (deployment,) = (one for one in of_kind(built(overlay), "Deployment") if one["metadata"]["name"] != "redis-cache")
    return deployment["spec"]


def environment(overlay):
    """What the teacher's container is given; of what the pod alone knows, something in its place."""
    (container,) = teacher(overlay)["template"]["spec"]["containers"]
    given = {}
    for source in container["envFrom"]:
        (data,) = of_kind(built(overlay), "ConfigMap", source["configMapRef"]["name"])
        given |= data["data"]
    here = {"TEACHER_ADVERTISE_ADDRESS": "10.0.0.7", "TEACHER_THREADS": "4"}
    return given | {one["name"]: one.get("value", here.get(one["name"], "secret")) for one in container["env"]}


# ---------------------------------------------------------------- by the book


@overlays
def test_what_is_built_is_whole(overlay):
    kinds = {one["kind"] for one in all_with(overlay)}
    assert {"Deployment", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"} <= kinds
    for manifest in [*built(overlay), *HANDS]:
        if manifest["apiVersion"] == "monitoring.coreos.com/v1":
            assert complaints(manifest, manifest["kind"]) == []
        else:
            assert [line for version in KUBERNETES for line in invalid(manifest, version)] == []


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("Deployment", lambda spec: spec.update(replica=3), "'replica' was unexpected"),
        ("Deployment", lambda spec: pods(spec)[0]["containers"][0].pop("name"), "'name' is a required property"),
        ("Deployment", lambda spec: spec["template"]["spec"].update(terminationGracePeriodSeconds="90"), "'90' is not"),
        ("HorizontalPodAutoscaler", lambda spec: spec.pop("maxReplicas"), "'maxReplicas' is a required property"),
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(honor_labels=True), "what is honor_labels?"),
        ("PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].pop("expr"), "no expr"),
    ],
)
def test_what_is_wrong_in_one_is_found(kind, spoil, words):
    manifest = copy.deepcopy(of_kind(built("overlays/gpu"), kind)[-1])
    spoil(manifest["spec"])
    custom = manifest["apiVersion"].startswith("monitoring")
    assert words in "\n".join(complaints(manifest, kind) if custom else invalid(manifest, KUBERNETES[-1]))


@overlays
def test_pods_may_do_nothing_special(overlay):
    """The Pod Security Standard "restricted", a root that cannot be written, and no token of Kubernetes."""
    found = [(pod, manifest) for manifest in [*built(overlay), *HANDS] for pod in pods(manifest)]
    assert len(found) == (3 if overlay in BESIDE else 5)
    for pod, manifest in found:
        claimed = [claim["metadata"] for claim in manifest["spec"].get("volumeClaimTemplates", [])]
        volumes = {volume["name"] for volume in pod["volumes"] + claimed}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "TEACHER_PORT would be taken for a knob"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert not container["image"].endswith(("latest", "redis")), "a version is pinned"
    for namespace in of_kind(built(overlay), "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_images_are_those_that_the_page_has_built():
    tags = re.findall(r"^\$ docker build .*-t (\S+)", (ROOT / "docs/kubernetes.md").read_text(), re.MULTILINE)
    given = [manifest for overlay in OVERLAYS for manifest in built(overlay)]
    given += HANDS + [manifest for path in (FOLDER / "students").glob("*.yaml") for manifest in read(path)]
    used = {container["image"] for pod in pods(given) for container in containers(pod)} - {REDIS}
    assert {image.removesuffix("-cuda") for image in used} == set(tags)


def test_no_file_holds_a_secret():
    for path in filter(lambda path: path.is_file(), FOLDER.rglob("*")):
        text = path.read_text()
        assert not re.search(
            r"preceptor_[\w-]{40,}|^kind: Secret|stringData|password: |:[^$/@]*@", text, re.MULTILINE
        ), path
    words = (ROOT / "docs/kubernetes.md").read_text()
    for overlay in OVERLAYS:
        for manifest in built(overlay):
            assert manifest["kind"] != "Secret"
            for name in re.findall(
                r"'(?:secretName|secretKeyRef|credentials)': (?:{[^}]*'name': )?'([\w-]+)'", str(manifest)
            ):
                assert f"secret generic {name} " in words, "how it is made is said"


# ---------------------------------------------------------------- the teacher


@overlays
def test_the_teacher_takes_what_it_is_given(overlay, monkeypatch, tmp_path):
    given = environment(overlay)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
        if name.startswith("TEACHER_"):
            assert name.removeprefix("TEACHER_").lower() in ServeSettings.model_fields
    (container,) = teacher(overlay)["template"]["spec"]["containers"]
    assert container["args"] == ["serve"]
    settings = ServeSettings(_cli_parse_args=[])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.grpc_port, "http": settings.http_port}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert not mounts[str(settings.state_directory)].get("readOnly")
    assert mounts[str(settings.tokens_file.parent)]["readOnly"] is True
    assert str(settings.weights.parents[-2]) in mounts
    assert settings.ledger_redis_url.get_secret_value() == "redis://:$(REDIS_LEDGER_PASSWORD)@redis-ledger:6379/0"
    names = [one["name"] for one in container["env"]]
    assert names.index("REDIS_LEDGER_PASSWORD") < names.index("TEACHER_LEDGER_REDIS_URL"), "or it is not filled in"


@overlays
def test_a_pod_has_the_time_to_look_away_drain_and_close(overlay):
    given, pod = environment(overlay), teacher(overlay)["template"]["spec"]
    delay, drain = float(given["TEACHER_SHUTDOWN_DELAY_SECONDS"]), float(given["TEACHER_DRAIN_SECONDS"])
    (container,) = pod["containers"]
    probe = container["readinessProbe"]
    assert delay > probe["periodSeconds"] * probe["failureThreshold"], "whoever goes by readiness has seen it"
    closing = grpc_app._GRACE_SECONDS + 1 + 3 * SILENCE_SECONDS  # gRPC, uvicorn; registry, ledger, cache without Redis
    assert pod["terminationGracePeriodSeconds"] >= delay + drain + 2 * closing
    assert {one["httpGet"]["path"] for one in (probe, container["startupProbe"])} == {"/readyz"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert teacher(overlay)["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_demo_trains_what_it_serves(monkeypatch):
    pod = teacher("overlays/cpu-demo")["template"]["spec"]
    (training,) = pod["initContainers"]
    command, *options = training["args"]
    assert STUDENT[command][0] is TrainSettings
    settings = TrainSettings(_cli_parse_args=options)
    given = environment("overlays/cpu-demo")
    assert given["TEACHER_WEIGHTS"] == str(settings.output / f"epoch-{settings.epochs:04d}.safetensors")
    served = json.loads(given["TEACHER_MODEL_ARGUMENTS"])
    assert served == {"name": settings.student, "channels": 1, "classes": 10, "size": 28} | settings.student_arguments
    assert next(volume for volume in pod["volumes"] if volume["name"] == "models").keys() == {"name", "emptyDir"}
    assert not of_kind(built("overlays/cpu-demo"), "PersistentVolumeClaim")


def test_the_gpu_overlay_asks_for_one_each():
    (container,) = teacher("overlays/gpu")["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"] == "registry.example/preceptor-teacher:0.1.0-cuda"
    assert environment("overlays/gpu")["TEACHER_DEVICE"] == "cuda"
    assert "replicas" not in teacher("overlays/gpu"), "or each apply would undo what the autoscaler did"


@pytest.mark.parametrize("with_", [[], ["monitoring"]])
def test_with_a_certificate_all_who_ask_ask_by_it(with_, tmp_path):
    parts = {"resources": ["base"], "components": [f"components/{name}" for name in [*with_, "tls"]]}
    paths = {key: [os.path.relpath(FOLDER / one, tmp_path) for one in value] for key, value in parts.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(paths))
    manifests = built(tmp_path)
    (deployment,) = of_kind(manifests, "Deployment", "teacher")
    assert invalid(deployment, KUBERNETES[0]) == invalid(deployment, KUBERNETES[1]) == []
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert "TEACHER_ADVERTISE_ADDRESS" not in given, "no certificate names the addresses of pods"
    assert "TEACHER_LEDGER_REDIS_URL" in given
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    for name, key in (("TEACHER_TLS_CERTIFICATE_FILE", "tls.crt"), ("TEACHER_TLS_KEY_FILE", "tls.key")):
        assert name.removeprefix("TEACHER_").lower() in ServeSettings.model_fields
        folder, _, file = given[name].rpartition("/")
        assert (mounted[folder], file) == ("tls", key)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"].keys() == {"path", "port", "scheme"}
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    for monitor in of_kind(manifests, "ServiceMonitor"):
        assert complaints(monitor, "ServiceMonitor") == []
        assert monitor["spec"]["endpoints"][0]["scheme"] == "https"


# ---------------------------------------------------------------- who finds whom, and may


@overlays
def test_selectors_find_one_workload_each_and_ports_meet(overlay):
    manifests = all_with(overlay)
    templates = {one["metadata"]["name"]: one["spec"]["template"] for one in workloads(overlay)}

    def found(selector):
        return [name for name, pod in templates.items() if selects(selector, pod["metadata"]["labels"])]

    for workload in workloads(overlay):
        name = workload["metadata"]["name"]
        assert found(workload["spec"]["selector"]) == [name]
        for spread in templates[name]["spec"].get("topologySpreadConstraints", []):
            assert found(spread["labelSelector"]) == [name]
    for service in of_kind(manifests, "Service"):
        (name,) = found({"matchLabels": service["spec"]["selector"]})
        ports = {
            port["name"]: port["containerPort"]
            for one in containers(templates[name]["spec"])
            for port in one.get("ports", [])
        }
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], "who asks the Service and who asks a pod use one number"
        headless = "headless" in service["metadata"]["name"] or name == "redis-ledger"
        assert (service["spec"].get("clusterIP") == "None") is headless
        # The only ledger says by itself that it is not ready; of a teacher's pods only the ready ones are meant.
        assert service["spec"].get("publishNotReadyAddresses", False) is (name == "redis-ledger")
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert found(budget["spec"]["selector"]) == [budget["metadata"]["name"]]
    for autoscaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        assert autoscaler["spec"]["scaleTargetRef"]["name"] == autoscaler["metadata"]["name"]
        assert autoscaler["metadata"]["name"] in templates


def test_a_hand_on_the_books_reaches_them_and_is_no_teacher():
    manifests, (hand,) = built("base"), of_kind(HANDS, "Pod", "ledger")
    me = hand["metadata"]["labels"]
    (books,) = (one["spec"]["template"]["metadata"]["labels"] for one in of_kind(manifests, "StatefulSet"))
    policies = of_kind(manifests, "NetworkPolicy")
    assert allowed(policies, "Egress", me, (books, HERE), 6379)
    assert allowed(policies, "Ingress", books, (me, HERE), 6379)
    assert not [one for one in of_kind(manifests, "Service") if selects({"matchLabels": one["spec"]["selector"]}, me)]
    url = {"name": "TEACHER_LEDGER_REDIS_URL", "value": environment("base")["TEACHER_LEDGER_REDIS_URL"]}
    assert hand["spec"]["containers"][0]["env"][-1] == url


@pytest.mark.parametrize(("second", "first"), BESIDE.items())
def test_a_second_teacher_has_its_own_pods_and_shares_the_rest(second, first):
    def names(overlay):
        return {(one["kind"], one["metadata"]["name"]) for one in built(overlay)}

    assert not names(second) & names(first), "an apply of one leaves the other as it is"
    kinds = {"ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service", "ServiceAccount"}
    assert {kind for kind, _ in names(second)} == kinds, "kubectl delete -k takes no book, volume or rule along"
    needed = re.findall(r"'(claimName|serviceAccountName)': '([\w-]+)'", str(teacher(second)))
    owners = {"claimName": "PersistentVolumeClaim", "serviceAccountName": "ServiceAccount"}
    assert {(owners[key], name) for key, name in needed} <= names(first) | names(second)
    theirs = environment(first).items()
    assert dict(environment(second).items() - theirs).keys() == {"TEACHER_NAME", "TEACHER_WEIGHTS"}
    services = [one for overlay in (first, second) for one in of_kind(built(overlay), "Service")]
    (monitor,) = of_kind(built(first), "ServiceMonitor")
    scraped = [one for one in services if selects(monitor["spec"]["selector"], one["metadata"].get("labels", {}))]
    assert [one["metadata"]["name"] for one in scraped] == ["teacher", "teacher-second"]
    words = [(ROOT / "docs" / page).read_text() for page in ("kubernetes.md", "operations.md")]
    for one in scraped:
        assert all(re.search(rf"deployment/{one['metadata']['name']}\b(?!-)", text) for text in words)
    assert f"dns:///{services[-2]['metadata']['name']}.preceptor.svc:8001" in words[0]


@overlays
def test_network_policies_allow_what_is_needed_and_nothing_else(overlay):
    policies = of_kind(all_with(overlay), "NetworkPolicy")
    ours = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in workloads(overlay)}
    teachers = ours.keys() - {"redis-ledger", "redis-cache"}
    (job, _) = read("students/student-job.yaml")
    names = {name: (labels, HERE) for name, labels in ours.items()} | {
        "student": (job["spec"]["template"]["metadata"]["labels"], ELSEWHERE),
        "prometheus": ({"app.kubernetes.io/name": "prometheus"}, ELSEWHERE),
        "reader": ({"preceptor/reads-the-books": "true"}, HERE),
        "anybody": ({}, HERE),
        "dns": ({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}),
        "internet": ({}, {}),
    }
    into = {
        (name, target, port)
        for target, labels in ours.items()
        for name, other in names.items()
        for port in (8000, 8001, 6379, 22)
        if allowed(policies, "Ingress", labels, other, port)
    }
    out = {
        (source, name, port)
        for source, labels in ours.items()
        for name, other in names.items()
        for port in (8000, 8001, 6379, 53, 443)
        if allowed(policies, "Egress", labels, other, port)
    }
    stores = {(one, store, 6379) for one in teachers for store in ("redis-ledger", "redis-cache")}
    asked = {("student", 8001), ("prometheus", 8000), ("reader", 8000)}
    assert into == stores | {(name, one, port) for one in teachers for name, port in asked}
    assert out == stores | {(one, "dns", 53) for one in teachers}


# ---------------------------------------------------------------- seen


def test_what_is_generated_is_not_stale():
    made = runpy.run_path(str(FOLDER / "generate.py"))
    for file, text in ((made["RULES"], made["rules"]()), (made["BOARDS"], made["boards"]())):
        assert file.read_text() == text, f"{file.name}: python deploy/kubernetes/generate.py"


def test_rules_alerts_and_boards_are_those_of_the_other_folders():
    manifests = built("overlays/gpu")
    (rule,) = of_kind(manifests, "PrometheusRule")
    groups = [
        group
        for name in ("rules.yml", "alerts.yml")
        for group in yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())["groups"]
    ]
    assert rule["spec"]["groups"] == groups
    boards = {
        file: text
        for one in of_kind(manifests, "ConfigMap")
        if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
        for file, text in one["data"].items()
    }
    assert boards == {path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert all(len(text.encode()) < 250_000 for text in boards.values()), "kubectl keeps a copy in an annotation"


def test_the_monitor_scrapes_as_the_alerts_expect():
    manifests = built("overlays/gpu")
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    (service,) = [
        one
        for one in of_kind(manifests, "Service")
        if selects(monitor["spec"]["selector"], one["metadata"].get("labels", {}))
    ]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["honorLabels"] is True
    (relabelling,) = endpoint["relabelings"]
    alerts = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    assert relabelling["targetLabel"] == "job"
    assert f'up{{job="{relabelling["replacement"]}"}}' in alerts
