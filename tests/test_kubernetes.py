"""The manifests of deploy/kubernetes: whole by their schemas, offline; confined; no secret in them; commands of ours.

tests/reference/kuberay.json has the fields of each type that they touch, and what each holds: ray.io/v1 by KubeRay's
API reference, the others by version 37 of Kubernetes' Python client. "!" is required, "[]" a list, "{}" a map, "a|b" a
choice.
"""

import copy
import json
import re
import shlex

import pytest
import yaml

from student_worker.__main__ import COMMANDS as STUDENT
from student_worker.config import TrainSettings
from tests.serving import ROOT

SCHEMA = json.loads((ROOT / "tests/reference/kuberay.json").read_text())
VERSIONS = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "PersistentVolumeClaim": "v1"}
VERSIONS |= {"NetworkPolicy": "networking.k8s.io/v1"}
PLAIN = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "any": object}
FILES = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
MANIFESTS = [
    pytest.param(manifest, id=f"{path.name}-{manifest['kind']}")
    for path in FILES
    for manifest in yaml.safe_load_all(path.read_text())
]
RAY = [param for param in MANIFESTS if param.values[0]["kind"].startswith("Ray")]


def complaints(value, kind, where=""):
    """What the schema says against a value, as lines."""
    kind = kind.removesuffix("!")
    fields = SCHEMA.get(kind)
    if not (fields or kind.startswith(("[]", "{}"))):
        return [] if _fits(value, kind) else [f"{where}: {value!r} is no {kind}"]
    if not isinstance(value, list if kind[0] == "[" else dict):
        return [f"{where}: {value!r} is no {kind}"]
    if not fields:
        items = enumerate(value) if kind[0] == "[" else value.items()
        return [line for key, item in items for line in complaints(item, kind[2:], f"{where}.{key}")]
    lines = [f"{where}: no {name}" for name, of in fields.items() if of.endswith("!") and name not in value]
    for name, item in value.items():
        lines += complaints(item, fields[name], f"{where}.{name}") if name in fields else [f"{where}: what is {name}?"]
    return lines


def _fits(value, kind):
    """A kind of no fields. One that the schema has not fits nothing: tests/reference/kuberay.json is to say it then."""
    if kind in PLAIN:
        return isinstance(value, PLAIN[kind]) and not (isinstance(value, bool) and kind in {"integer", "number"})
    return value in kind.split("|")


def pods(manifest):
    """Pod specs of a manifest, wherever."""
    found = []
    if isinstance(manifest, dict):
        found += [manifest] if "containers" in manifest else []
        manifest = list(manifest.values())
    if isinstance(manifest, list):
        found += [pod for item in manifest for pod in pods(item)]
    return found


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_whole(manifest):
    assert manifest["apiVersion"] == VERSIONS[manifest["kind"]]
    assert complaints(manifest, manifest["kind"]) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda spec: spec.update(rayVersion=2.6), ".spec.rayVersion: 2.6 is no string"),
        (lambda spec: spec["headGroupSpec"].pop("template"), ".spec.headGroupSpec: no template"),
        (lambda spec: spec["workerGroupSpecs"][0].update(replica=1), ".spec.workerGroupSpecs.0: what is replica?"),
        (lambda spec: spec["workerGroupSpecs"][0].update(replicas=True), "True is no integer"),
        (lambda spec: pods(spec)[0]["containers"][0].pop("name"), "containers.0: no name"),
        (lambda spec: pods(spec)[0]["containers"][0]["env"][0].update(value=1), "env.0.value: 1 is no string"),
        (lambda spec: pods(spec)[0].update(containers={}), "containers: {} is no []Container"),
        (lambda spec: spec["autoscalerOptions"].update(version="v3"), "'v3' is no v1|v2"),
        (lambda spec: pods(spec)[0].update(affinity={}), ".affinity: {} is no Affinity"),
    ],
)
def test_what_is_wrong_in_one_is_found(spoil, words):
    manifest = copy.deepcopy(RAY[0].values[0])
    spoil(manifest["spec"])
    assert words in "\n".join(complaints(manifest, manifest["kind"]))


@pytest.mark.parametrize("manifest", RAY)
def test_pods_are_confined_and_have_limits(manifest):
    """As the Pod Security Standard "restricted" demands."""
    assert pods(manifest)
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("manifest", RAY)
def test_a_token_is_a_mounted_file_and_nothing_else(manifest):
    nodes = [pod for pod in pods(cluster_of(manifest)) if pod["containers"][0]["name"].startswith("ray-")]
    assert len(nodes) == 1 + len(cluster_of(manifest)["workerGroupSpecs"])
    for pod in nodes:
        (container,) = pod["containers"]
        environment = {one["name"]: one["value"] for one in container["env"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys()
        folder, _, key = environment["STUDENT_TOKEN_FILE"].rpartition("/")
        assert key == "token"  # as `kubectl create secret ... --from-file=token=` files it
        assert mounts[folder]["readOnly"] is True
        assert volumes[mounts[folder]["name"]]["secret"] == {"secretName": "preceptor-student", "defaultMode": 0o440}
        assert volumes[mounts["/runs"]["name"]]["persistentVolumeClaim"] == {"claimName": "preceptor-runs"}
        assert "STUDENT_TOKEN" not in environment


def test_no_file_holds_a_secret():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"preceptor_[\w-]{20,}|^kind: Secret|stringData|password", text, re.MULTILINE), path


@pytest.mark.parametrize("manifest", RAY)
def test_all_run_the_same_ray_and_the_one_that_is_tested(manifest):
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert cluster_of(manifest)["rayVersion"] == pinned
    assert len({container["image"] for pod in pods(manifest) for container in pod["containers"]}) == 1


@pytest.mark.parametrize("manifest", [param for param in RAY if param.values[0]["kind"] == "RayJob"])
def test_a_jobs_command_is_understood_and_finds_what_it_needs(manifest, monkeypatch):
    python, m, module, command, *options = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, m, module) == ("python", "-m", "student_worker")
    (worker,) = cluster_of(manifest)["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    for one in container["env"]:
        monkeypatch.setenv(one["name"], one["value"])
    assert STUDENT[command][0] is TrainSettings
    settings = TrainSettings(_cli_parse_args=options)
    assert settings.teacher_address != TrainSettings.model_fields["teacher_address"].default
    assert settings.output.is_relative_to("/runs")
    assert settings.resume
    assert manifest["spec"]["backoffLimit"] > 0
    cpus = int(container["resources"]["requests"]["cpu"]) * worker["replicas"]
    assert settings.num_workers * settings.cpus_per_worker <= cpus


@pytest.mark.parametrize("manifest", RAY)
def test_every_variable_is_a_knob(manifest):
    for pod in pods(manifest):
        for container in pod["containers"]:
            for one in container.get("env", []):
                assert one["name"].removeprefix("STUDENT_").lower() in TrainSettings.model_fields
