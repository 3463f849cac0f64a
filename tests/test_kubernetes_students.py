"""The manifests of deploy/kubernetes/students: whole by their schemas, confined, with commands and knobs of ours."""

import copy
import re
import shlex

import pytest

from student_worker.__main__ import COMMANDS as STUDENT
from student_worker.config import TrainSettings
from tests.manifests import FOLDER, KUBERNETES, complaints, invalid, of_kind, pods, read, selects
from tests.serving import ROOT

FILES = sorted((FOLDER / "students").glob("*.yaml"))
MANIFESTS = [pytest.param(manifest, id=f"{path.name}-{manifest['kind']}") for path in FILES for manifest in read(path)]
RAY = [param for param in MANIFESTS if param.values[0]["kind"].startswith("Ray")]


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_whole(manifest):
    if manifest["kind"].startswith("Ray"):
        assert manifest["apiVersion"] == "ray.io/v1"
        assert complaints(manifest, manifest["kind"]) == []
    else:
        assert [line for version in KUBERNETES for line in invalid(manifest, version)] == []


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
        for probe in ("readinessProbe", "livenessProbe"):  # or KubeRay gives it some that need wget
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
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


@pytest.mark.parametrize("manifest", RAY)
def test_all_run_the_same_ray_and_the_one_that_is_tested(manifest):
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert cluster_of(manifest)["rayVersion"] == pinned
    (user,) = re.findall(r"^USER (\d+:\d+)$", (ROOT / "deploy/docker/student.Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(manifest):
        for container in pod["containers"]:
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"] == "registry.example/preceptor-student:0.1.0" + gpu * "-cuda"
        assert "{runAsUser}:{runAsGroup}".format(**pod["securityContext"]) == user


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


def test_whoever_asks_may_reach_the_teacher():
    """Its NetworkPolicy goes by a label; a pod that Ray alone starts things in has it too."""
    for manifest in (param.values[0] for param in RAY):
        groups = [cluster_of(manifest)["headGroupSpec"], *cluster_of(manifest)["workerGroupSpecs"]]
        for group in groups:
            assert group["template"]["metadata"]["labels"]["preceptor/asks-the-teacher"] == "true"
    (job,) = of_kind(read("students/student-job.yaml"), "Job")
    assert job["spec"]["template"]["metadata"]["labels"]["preceptor/asks-the-teacher"] == "true"


def test_a_job_without_ray_is_scraped_confined_and_gives_up_when_its_budget_is_spent(monkeypatch):
    job, policy = read("students/student-job.yaml")
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    for one in container["env"]:
        if "value" in one:
            monkeypatch.setenv(one["name"], one["value"])
        assert one["name"].removeprefix("STUDENT_").lower() in TrainSettings.model_fields
    command, *options = container["args"]
    assert STUDENT[command][0] is TrainSettings
    settings = TrainSettings(_cli_parse_args=options)
    assert settings.resume
    assert settings.output.is_relative_to("/runs")
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [3]
    (port,) = container["ports"]
    (monitor,) = of_kind(read("components/monitoring/monitors.yaml"), "PodMonitor")
    assert selects(monitor["spec"]["selector"], pod["metadata"]["labels"])
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    assert settings.metrics_port == port["containerPort"]
    assert selects(policy["spec"]["podSelector"], pod["metadata"]["labels"])
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]
