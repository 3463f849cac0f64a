"""docker-compose.yml, the images and Prometheus's part of them, without an engine: whole, pinned, confined, no secret.

tests/cluster runs them for real (make cluster-test).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from student_worker.config import LaunchSettings
from teacher_server.config import ServeSettings
from tests.cluster.engine import compose_of_the_environment
from tests.serving import ROOT

PROFILES = ["", "gpu", "demo", "*"]
PORTS = {"teacher": [8001, 8000], "ray-head": [8265], "prometheus": [9090], "grafana": [3000]}
DOCKERFILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
TEXT = (ROOT / "docker-compose.yml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
FOLDER = ROOT / "deploy/prometheus"


def compose(*arguments, check=True, **environment):
    """`docker-compose ...`, as where nothing is set but what is given."""
    command = [
        compose_of_the_environment(),
        "--file",
        ROOT / "docker-compose.yml",
        "--env-file",
        os.devnull,
        *arguments,
    ]
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT, env=variables)


def configured(profile="*", **environment):
    """{service: what Compose makes of it}."""
    profiles = ["--profile", profile] if profile else []
    environment = {"REDIS_PASSWORD": "only-a-test"} | environment
    return json.loads(compose(*profiles, "config", "--format", "json", **environment).stdout)["services"]


@pytest.fixture(scope="module")
def services():
    return configured()


def stages(dockerfile):
    """{name: text}; the last one's name is ""."""
    parts = re.split(r"^(?=FROM )", dockerfile.read_text(), flags=re.MULTILINE)[1:]
    return {(re.search(r"^FROM \S+ AS (\w+)", part) or ["", ""])[1]: part for part in parts}


# ---------------------------------------------------------------- docker-compose.yml


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_understood(profile):
    default = {"tokens", "demo-teacher", "redis-cache", "redis-ledger", "teacher", "ray-head", "ray-worker"}
    default |= {"prometheus", "grafana"}
    more = {"": set(), "gpu": {"teacher-gpu"}, "demo": {"demo"}, "*": {"teacher-gpu", "demo"}}
    assert configured(profile).keys() == default | more[profile]


def test_without_a_password_nothing_starts_and_the_fix_is_said():
    refused = compose("config", check=False)
    assert refused.returncode != 0
    assert "make up writes one into .env" in refused.stderr


def test_every_service_is_confined(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "userns_mode"} & service.keys(), name
        user, _, group = service["user"].partition(":")
        assert user.isdigit(), name
        assert int(user) > 0, name
        assert group.isdigit(), name
        assert "docker.sock" not in str(service.get("volumes")), name


def test_ports_are_this_machines_alone(services):
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
    found = {
        name: [port["target"] for port in service["ports"]] for name, service in services.items() if "ports" in service
    }
    assert found == PORTS | {"teacher-gpu": [8001, 8000]}
    for name, ports in PORTS.items():
        assert [port["published"] for port in services[name]["ports"]] == list(map(str, ports))


def test_images_have_versions(services):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.search(r"\d+\.\d+\.\d+", tag), name
        if image.startswith("preceptor-"):
            assert tag.removesuffix("-cuda") == version, name


def test_each_image_of_ours_is_built_once(services):
    """Docker's builder exports them at the same time, and of two by the same name one fails, at the first build."""
    built = sorted(service["image"] for service in services.values() if "build" in service)
    assert built == sorted({service["image"] for service in services.values() if "preceptor-" in service["image"]})


def test_all_that_stay_say_how_they_are_and_come_back(services):
    for name, service in services.items():
        if name in {"tokens", "demo-teacher", "demo"}:
            assert service["restart"] == "no", name
        else:
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"], name
            assert service["pids_limit"] > 0, name
        for dependency, how in service.get("depends_on", {}).items():
            once = dependency in {"tokens", "demo-teacher"}
            expected = {"service_completed_successfully"} if once else {"service_healthy", "service_started"}
            assert how["condition"] in expected, (name, dependency)


def test_students_code_and_the_stores_have_no_network_in_common(services):
    networks = {name: set(service.get("networks") or {}) for name, service in services.items()}
    assert networks["redis-cache"] == networks["redis-ledger"] == {"stores"}
    assert {name for name, joined in networks.items() if "stores" in joined} == {
        "redis-cache", "redis-ledger", "teacher", "teacher-gpu",
    }  # fmt: skip


def test_who_has_which_token(services):
    def having(volume):
        mounts = {name: service.get("volumes", []) for name, service in services.items()}
        return {
            name: bool(mount.get("read_only"))
            for name, mounted in mounts.items()
            for mount in mounted
            if mount["source"] == volume
        }

    assert having("tokens") == {"tokens": False, "teacher": True, "teacher-gpu": True}
    assert having("student-token") == {"tokens": False, "ray-head": True, "ray-worker": True}
    assert having("viewer-token") == {"tokens": False, "prometheus": True}
    assert having("admin-token") == {"tokens": False}


def test_no_secret_is_written_down(services):
    files = [ROOT / "docker-compose.yml", ROOT / ".env.example", *DOCKERFILES]
    for path in files:
        assert not re.search(r"preceptor_[\w-]{20,}|[0-9a-f]{32}", path.read_text()), path
    assert re.search(r"^REDIS_PASSWORD=$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    for name, service in services.items():
        assert "only-a-test" not in str(service.get("command")) + str(service.get("entrypoint")), name
        has = {
            variable for variable, value in (service.get("environment") or {}).items() if "only-a-test" in str(value)
        }
        expected = {
            "redis-cache": {"REDISCLI_AUTH"},
            "redis-ledger": {"REDISCLI_AUTH"},
            "teacher": {"TEACHER_CACHE_REDIS_URL", "TEACHER_LEDGER_REDIS_URL"},
            "teacher-gpu": {"TEACHER_CACHE_REDIS_URL", "TEACHER_LEDGER_REDIS_URL"},
        }
        assert has == expected.get(name, set())
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored


def test_every_variable_of_ours_is_a_knob(services):
    for name, service in services.items():
        for variable in service.get("environment") or {}:
            prefix, _, knob = variable.partition("_")
            if prefix in {"TEACHER", "STUDENT"}:
                settings = {"TEACHER": ServeSettings, "STUDENT": LaunchSettings}[prefix]
                assert knob.lower() in settings.model_fields, (name, variable)


def test_what_the_demo_is_told_is_understood(services, monkeypatch):
    for name in [name for name in os.environ if name.startswith("STUDENT_")]:
        monkeypatch.delenv(name)
    for variable, value in services["demo"]["environment"].items():
        if variable.startswith("STUDENT_"):
            monkeypatch.setenv(variable, value)
    command, *options = services["demo"]["command"]
    assert command == "launch"
    settings = LaunchSettings(_cli_parse_args=options)
    assert settings.address == "http://ray-head:8265"
    assert settings.output.is_relative_to("/runs")
    assert settings.entrypoint_num_cpus > 0  # or it would run on the head
    assert (settings.job, settings.method, settings.labelled) == ("demo", "unix", 100)


def test_a_teacher_of_ones_own_takes_the_demos_place():
    own = {"TEACHER_MODEL": "my_models:net", "TEACHER_WEIGHTS": "/models/net.safetensors"}
    teacher, before = configured(**own)["teacher"], configured()["teacher"]
    assert {name: teacher["environment"][name] for name in own} == own
    assert all(before["environment"][name] is None for name in own)  # not given at all
    assert teacher["environment"]["PYTHONPATH"] == "/models"
    (mount,) = (mount for mount in teacher["volumes"] if mount["target"] == "/models")
    assert (Path(mount["source"]), mount["read_only"]) == (ROOT / "models", True)
    assert (ROOT / "models").is_dir()  # or the engine would make it, as root's


@pytest.mark.parametrize(("given", "lacking"), [("MODEL", "WEIGHTS"), ("WEIGHTS", "MODEL")])
def test_half_a_teacher_is_refused(services, given, lacking):
    (script,) = services["demo-teacher"]["command"]
    refused = subprocess.run(
        ["/bin/sh", "-euc", script.replace("$$", "$")],
        capture_output=True, text=True, check=False, env={f"TEACHER_{given}": "x"},
    )  # fmt: skip
    assert refused.returncode != 0
    assert f"TEACHER_{lacking}: is to be set where TEACHER_{given} is" in refused.stderr


def test_the_example_names_every_variable():
    example = (ROOT / ".env.example").read_text()
    offered = dict(re.findall(r"^#?(\w+)=(.*)$", example, re.MULTILINE))
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT)) | set(re.findall(r"^ +(\w+):(?: #.*)?$", TEXT, re.MULTILINE))
    asked = {name for name in asked if name.isupper()}
    assert offered.keys() == asked
    for name, default in re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", TEXT):
        assert offered[name] in {default, ""} or name == "STUDENT_TEACHER_ADDRESS", name


def test_the_demo_teacher_is_that_of_the_benchmark(services):
    (script,) = services["demo-teacher"]["command"]
    benchmark = (ROOT / "benchmarks/demo.py").read_text()
    teacher = re.search(r"^TEACHER = (\{.*\})$", benchmark, re.MULTILINE)[1]
    config = tomllib.loads(script.replace("$$", "$").partition("<<END\n")[2].partition("\nEND")[0])
    assert config["model_arguments"] == json.loads(teacher)
    (run,) = re.findall(r"^run=(\S+)", script.replace("$$", "$"), re.MULTILINE)
    assert run == f"/demo/mnist5k-{config['model_arguments']['name']}-{config['model_arguments']['width']}"
    assert ServeSettings.model_fields.keys() >= config.keys()
    width = json.dumps({"width": config["model_arguments"]["width"]})
    assert f"--student-arguments '{width}'" in script


def test_the_commands_of_the_docs_are_understood(services):
    text = (ROOT / "docs/cluster.md").read_text()
    lines = re.findall(r"^\$ (.*?)(?: +#.*)?$", text, re.MULTILINE)
    started = [shlex.split(line)[2:] for line in lines if line.startswith("docker compose ")]
    assert len(started) >= 7
    for words in started:
        named = [word for word in words if word.partition("=")[0] in services]
        if words[0] in {"run", "exec"}:
            assert named, words
        for option, value in pairwise(words):
            if option == "--profile":
                assert value in PROFILES
            if option == "--env":
                assert value.partition("=")[0].removeprefix("STUDENT_").lower() in LaunchSettings.model_fields
    makes = {line.split()[1] for line in lines if line.startswith("make ")}
    assert makes == {"up", "down", "cluster-test"} <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    (launch,) = (line.partition("student-worker launch ")[2] for line in lines if "student-worker" in line)
    LaunchSettings(_cli_parse_args=shlex.split(launch))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_built_of_what_is_there(path):
    parts = stages(path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"^ARG EXTRAS=(\S+)$", parts["requirements"], re.MULTILINE)[1].split(",")) <= extras.keys()
    last = parts[""]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert re.search(r"^ENTRYPOINT \[", last, re.MULTILINE)  # exec form: SIGTERM reaches the program
    assert "pip" not in last
    text = path.read_text()
    assert not re.search(r"^# *syntax|--mount|^ADD ", text, re.MULTILINE)  # Docker's own builder takes it, offline too
    base = re.search(r"^ARG PYTHON_IMAGE=python:(\S+)$", text, re.MULTILINE)[1]
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", base)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in last


def test_both_images_share_the_layer_with_torch():
    student, teacher = (stages(path) for path in DOCKERFILES)
    assert student["torch"] == teacher["torch"]
    shared = [stage[""].splitlines()[:2] for stage in (student, teacher)]
    assert shared[0] == shared[1] == ["FROM ${PYTHON_IMAGE}", "COPY --from=torch /opt/torch /opt/torch"]


def test_what_is_sent_to_the_engine_holds_what_the_wheel_is_made_of_and_no_more():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    sent = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert sent == packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


# ---------------------------------------------------------------- Prometheus and Grafana


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool; apt-get install prometheus")
def test_prometheus_understands_its_configuration(tmp_path):
    text = (FOLDER / "compose.yml").read_text().replace("/tokens/viewer", str(tmp_path))
    (tmp_path / "token").write_text("a token\n")
    for name in ("rules.yml", "alerts.yml"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "compose.yml").write_text(text)
    done = subprocess.run(
        ["promtool", "check", "config", tmp_path / "compose.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_prometheus_scrapes_is_what_runs(services):
    scrapes = {one["job_name"]: one for one in yaml.safe_load((FOLDER / "compose.yml").read_text())["scrape_configs"]}
    assert scrapes.keys() == {"preceptor", "preceptor-students", "ray"}
    alerts = (FOLDER / "alerts.yml").read_text()
    assert set(re.findall(r'up\{job="([\w-]+)"\}', alerts)) == {"preceptor"}
    assert scrapes["preceptor"]["honor_labels"] is scrapes["preceptor-students"]["honor_labels"] is True
    assert scrapes["preceptor"]["static_configs"] == [{"targets": ["teacher:8000"]}]  # also while it does not run
    awaited = {"tokens", "demo-teacher"}  # by the teacher; who looked for it before would raise an alarm
    assert awaited == services["teacher"]["depends_on"].keys() & services["prometheus"]["depends_on"].keys()
    names = [name for one in scrapes.values() for dns in one.get("dns_sd_configs", []) for name in dns["names"]]
    assert set(names) == {"teacher-gpu", "ray-head", "ray-worker"} <= services.keys()
    for node in ("ray-head", "ray-worker"):
        (port,) = scrapes["ray"]["dns_sd_configs"]
        assert f"--metrics-export-port={port['port']}" in services[node]["entrypoint"]
        folder = services[node]["environment"]["STUDENT_METRICS_TARGETS"]
        assert scrapes["preceptor-students"]["file_sd_configs"][0]["files"] == [f"{folder}/*.json"]
    token = scrapes["preceptor"]["authorization"]["credentials_file"]
    assert str(Path(token).parent) in {mount["target"] for mount in services["prometheus"]["volumes"]}


def test_grafana_lets_anybody_look_and_nobody_in(services):
    settings = services["grafana"]["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    for name in ("GF_AUTH_DISABLE_LOGIN_FORM", "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"):
        assert settings[name] == "true"
    assert settings["GF_AUTH_BASIC_ENABLED"] == "false"
    mounts = {mount["target"]: mount["source"] for mount in services["grafana"]["volumes"]}
    assert mounts["/etc/grafana/provisioning"] == str(ROOT / "deploy/grafana/provisioning")
    assert mounts["/var/lib/grafana/dashboards"] == str(ROOT / "deploy/grafana/dashboards")
