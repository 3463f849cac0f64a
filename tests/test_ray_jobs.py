"""A student as a job of a real Ray cluster, submitted by Ray's command and by ours, against a teacher with tokens.

One cluster for the module, on loopback. Its nodes have a token in their environment, as a pod may have it from a
Secret, and another in a file; at the end neither is anywhere in what Ray shows or writes.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from student_worker.__main__ import main
from teacher_server.tokens import add_token, new_token
from tests.asking import get, metric
from tests.ray_cluster import ray_cluster
from tests.serving import ROOT, serving, until

pytestmark = pytest.mark.timeout(300)

N = 1437  # training items of the digits
SMALL = {"STUDENT_DATASET": "digits", "STUDENT_STUDENT": "cnn-tiny", "STUDENT_DEPTH": "0", "STUDENT_THREADS": "1"}
MINE = """\
from student_worker.models import build


def net(*, channels, classes, size):
    print("this is a student of my own", flush=True)
    return build("cnn-tiny", channels=channels, classes=classes, size=size)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def secrets(folder):
    """Tokens of one tenant, one for the nodes' environment and one in a file of theirs, a viewer's and an admin's."""
    names = ("environment", "file")
    made = {name: new_token("red", name=name) for name in names}
    made |= {"viewer": new_token("board", "viewer"), "admin": new_token("boss", "admin")}
    for _, line in made.values():
        add_token(folder / "tokens", line)
    path = folder / "student.token"
    path.write_text(f"{made['file'][0]}\n")
    return SimpleNamespace(path=path, **{name: token for name, (token, _) in made.items()})


@pytest.fixture(scope="module")
def teacher(folder, secrets):
    output = folder / "teacher"
    command = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "6"]
    assert main([*command, "--output", str(output)]) == 0
    with serving(
        model="student_worker.models:build",
        model_arguments={"name": "cnn-tiny", "channels": 1, "classes": 10, "size": 8},
        weights=output / "epoch-0006.safetensors",
        grpc_port=0,
        http_port=0,
        threads=1,
        tokens_file=folder / "tokens",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(secrets, teacher):
    with ray_cluster(environment={"STUDENT_TOKEN": secrets.environment, **SMALL}) as cluster:
        yield cluster


@pytest.fixture
def student(cluster, teacher, monkeypatch):
    """Starts `student-worker launch ...` as a user does; `run` waits for its end."""
    for name in [name for name in os.environ if name.startswith("STUDENT_")]:
        monkeypatch.delenv(name)

    def start(*arguments, **environment):
        command = [sys.executable, "-m", "student_worker", "launch", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=cluster.environment | environment, **pipes)

    def run(*arguments, **environment):
        with start(*arguments, **environment) as launched:
            out, err = launched.communicate(timeout=100)
        return launched.returncode, out, err

    return SimpleNamespace(start=start, run=run)


def spent(teacher, secrets, job):
    """(asked, computed) of a job, as the ledger has it."""
    reply = json.loads(get(teacher, f"/v1/spend?tenant=red&job={job}", authorization=f"Bearer {secrets.viewer}"))
    lines = reply.get("lines", [])
    return tuple(sum(int(line.get(kind, 0)) for line in lines) for kind in ("asked", "computed"))


def asked(teacher, secrets, job):
    return metric(teacher, "preceptor_asked_samples_total", token=secrets.viewer, job=job)


def test_plain_ray_job_submit_trains_and_its_spend_stands_in_the_ledger(cluster, teacher, secrets, folder):
    done = subprocess.run(
        [
            Path(sys.executable).parent / "ray", "job", "submit", "--submission-id", "plain", "--",
            "python", "-m", "student_worker", "train", "--job", "plain", "--method", "kd", "--epochs", "2",
            "--teacher-address", teacher.grpc_address, "--output", folder / "plain",
        ],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain (kd): test accuracy" in done.stdout
    assert spent(teacher, secrets, "plain") == (
        2 * N,
        N - 256,
    )  # 256 were asked about before, the second epoch's are cached
    assert (folder / "plain" / "epoch-0002.safetensors").is_file()


class Wire:
    """A TCP proxy in front of the cluster's dashboard, that can be cut: all connections of that moment are closed."""

    def __init__(self, target):
        self.target = target
        self.pairs, self.ends, self.threads = [], ExitStack(), []
        self.listener = self.ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.threads[0].join()
        self.cut()
        for thread in self.threads:
            thread.join()
        self.ends.close()

    def _start(self, *run):
        self.threads.append(threading.Thread(target=run[0], args=run[1:], daemon=True))
        self.threads[-1].start()

    def _accept(self):
        with suppress(OSError):
            while True:
                near = self.ends.enter_context(self.listener.accept()[0])
                far = self.ends.enter_context(socket.create_connection(self.target))
                self.pairs.append((near, far))
                self._start(self._pass, near, far)
                self._start(self._pass, far, near)

    def _pass(self, source, sink):
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        self._end(source, sink)

    def cut(self):
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            self._end(*pair)
        return len(pairs)

    def _end(self, *ends):
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_launch_trains_a_student_of_ones_own_and_a_lost_connection_shows_nothing_twice(
    cluster, teacher, secrets, folder, student
):
    code = folder / "code"
    code.mkdir()
    (code / "mine.py").write_text(MINE)
    config = folder / "run.toml"
    config.write_text(f'job = "launched"\nmethod = "unix"\nepochs = 12\noutput = "{folder / "launched"}"\n')
    dashboard = urllib.parse.urlsplit(cluster.dashboard)
    with Wire((dashboard.hostname, dashboard.port)) as wire:
        arguments = ["--config", config, "--student", "mine:net", "--working-dir", code, "--address", wire.url]
        arguments += ["--teacher-address", teacher.grpc_address, "--token-file", secrets.path]
        with student.start(*arguments) as launched:
            lines = []
            for line in launched.stdout:
                lines.append(line)
                if "epoch 2/12" in line:
                    assert wire.cut() >= 1
            said = launched.stderr.read()
    assert launched.returncode == 0, said + "".join(lines)
    text = "".join(lines)
    assert "this is a student of my own" in text
    assert re.findall(r"^launched: epoch (\d+)/12, ", text, re.MULTILINE) == [str(epoch) for epoch in range(1, 13)]
    assert text.count("launched (unix): test accuracy") == 1
    assert f": submitted to {wire.url}; Ctrl-C leaves it running\n" in said
    assert said.endswith(": succeeded\n")
    per_epoch = 22 * 48 + round(0.75 * 29)
    assert spent(teacher, secrets, "launched") == (12 * per_epoch, 12 * per_epoch)
    assert (folder / "launched" / "epoch-0012.safetensors").is_file()


def test_the_jobs_exit_status_is_launchs(teacher, secrets, folder, student):
    request = urllib.request.Request(
        f"http://{teacher.http_address}/v1/budgets/red/jobs/poor",
        json.dumps({"unit": "samples", "limit": 200}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {secrets.admin}"},
        method="PUT",
    )
    urllib.request.urlopen(request, timeout=10).close()
    arguments = ["--job", "poor", "--method", "kd+mixup", "--teacher-address", teacher.grpc_address]
    status, out, err = student.run(*arguments, "--output", folder / "poor", "--submission-id", "poor-1")
    assert status == 3, out + err
    assert "stopped after 3 of 230 steps" in out
    assert err.endswith("poor-1: failed with exit status 3\n")
    status, out, _ = student.run("status", "poor-1")
    assert status == 0
    assert re.fullmatch(r"poor-1: failed with exit status 3, since .* UTC, until .* UTC\nits spend: job poor\n", out)
    status, _, err = student.run(*arguments, "--output", folder / "poor", "--submission-id", "poor-1")
    assert status == 1
    assert "poor-1" in err


@contextmanager
def begun(student, teacher, secrets, job, *arguments):
    """A launch whose job has asked its teacher, and goes on for very long."""
    common = ["--method", "kd", "--epochs", 100_000, "--teacher-address", teacher.grpc_address]
    with student.start(*common, "--job", job, "--submission-id", job, *arguments) as launched:
        try:
            until(lambda: asked(teacher, secrets, job) > 0)
            yield launched
        finally:
            launched.kill()


def processes(cluster, words):
    """Command lines of the cluster's processes that have these words."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                line = (entry / "cmdline").read_bytes()
                found += [line] if words.encode() in line else []
    return found


def test_ctrl_c_leaves_the_job_and_stop_ends_it(cluster, teacher, secrets, folder, student):
    left, kept = folder / "left", folder / "kept"
    with (
        begun(student, teacher, secrets, "left", "--output", left, "--token-file", secrets.path) as first,
        begun(student, teacher, secrets, "kept", "--output", kept, "--token-file", secrets.path) as second,
    ):
        for line in processes(cluster, "student_worker"):
            assert secrets.file.encode() not in line
            assert secrets.environment.encode() not in line
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=20)
        assert first.returncode == 130
        assert err.endswith("left: goes on; to end it: student-worker launch stop left\n")
        before = asked(teacher, secrets, "left")
        until(lambda: asked(teacher, secrets, "left") > before)
        assert student.run("status", "left")[1].startswith("left: running, since ")
        for job in ("left", "kept", "kept"):  # a second time: it had ended before
            status, out, _ = student.run("stop", job)
            assert status == 0
            assert re.fullmatch(rf"{job}: stopped, since .* UTC, until .* UTC\n", out)
        _, err = second.communicate(timeout=20)
        assert second.returncode == 143
        assert err.endswith("kept: stopped\n")
    for job in ("left", "kept"):
        computed = asked(teacher, secrets, job)
        assert spent(teacher, secrets, job)[0] == computed


def test_no_wait_prints_the_id_alone_and_a_job_that_has_hardly_begun_is_stopped(teacher, folder, student):
    status, out, _ = student.run("--no-wait", "--output", folder / "brief", "--method", "hard", "--epochs", 100_000)
    assert status == 0
    assert re.fullmatch(r"raysubmit_\w+\n", out)
    status, said, err = student.run("stop", out.strip())
    assert status == 0, err
    assert said.startswith(f"{out.strip()}: stopped")


def test_what_is_not_there_is_said_in_a_line(cluster, folder, student):
    for word in ("status", "stop"):
        status, out, err = student.run(word, "nobodys")
        assert (status, out) == (1, "")
        assert err == f"student-worker: {cluster.dashboard}: knows no job 'nobodys'; `ray job list` names those that " \
                      "it has\n"  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    status, out, err = student.run("--output", folder / "x", "--address", url)
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"student-worker: {url}: .*; is a cluster there\? Give its dashboard's .*\n", err)


def test_a_job_whose_description_holds_a_token_does_not_start(cluster, teacher, folder):
    told = json.dumps({"env_vars": {"STUDENT_TOKEN": "a-token-of-nobody"}})
    done = subprocess.run(
        [
            Path(sys.executable).parent / "ray", "job", "submit", "--runtime-env-json", told, "--",
            "python", "-m", "student_worker", "train", "--output", folder / "told",
        ],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "revoke that token, and give --token-file" in done.stdout
    assert not (folder / "told").exists()


def shown(cluster):
    """All that the cluster shows over HTTP, and all that it wrote: {where: bytes}."""

    def fetch(url):
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.read()

    found = {}
    jobs = json.loads(fetch(f"{cluster.dashboard}/api/jobs/"))
    paths = ["/api/jobs/", "/api/v0/actors?detail=1&limit=1000", "/api/v0/tasks?detail=1&limit=1000"]
    paths += ["/api/v0/runtime_envs?detail=1&limit=1000", "/api/v0/workers?detail=1&limit=1000", "/nodes?view=summary"]
    paths += ["/api/v0/jobs", "/logical/actors", "/api/cluster_status"]
    for job in jobs:
        if job["submission_id"]:
            paths += [f"/api/jobs/{job['submission_id']}", f"/api/jobs/{job['submission_id']}/logs"]
    for path in paths:
        found[path] = fetch(cluster.dashboard + path)
    groups = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())
    for target in (target for group in groups for target in group["targets"]):
        found[f"metrics of {target}"] = fetch(f"http://{target}/metrics")
    for path in cluster.folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(cluster.folder))] = path.read_bytes()
    return found


def test_the_token_is_nowhere_in_what_ray_shows_or_writes(cluster, teacher, secrets, folder):
    """After all of the above. What went by environment variables is found by the same search, so it can find."""
    everything = shown(cluster)
    reference = str(secrets.path).encode()
    seen = {where for where, content in everything.items() if reference in content}
    assert "/api/jobs/" in seen
    assert any(re.search(r"job-driver-|launched|logs", where) for where in everything)
    assert any(where.startswith("metrics of") and b"ray_" in content for where, content in everything.items())
    assert any(b"launched: epoch 12/12" in content for content in everything.values())
    for run in folder.iterdir():
        if run.is_dir():
            everything |= {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    everything["teacher's metrics"] = get(teacher, "/metrics", authorization=f"Bearer {secrets.viewer}").encode()
    for token in (secrets.file, secrets.environment):
        assert [where for where, content in everything.items() if token.encode() in content] == []


def test_a_cluster_that_asks_for_a_token_of_its_own_is_told(folder, monkeypatch):
    """Ray's token, not a teacher's: RAY_AUTH_MODE=token."""
    key = "a" * 64
    guarded = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": key}
    with ray_cluster(cpus=1, environment=guarded) as cluster:

        def status(**environment):
            command = [sys.executable, "-m", "student_worker", "launch", "status", "nobodys"]
            return subprocess.run(
                command, cwd=ROOT, env=cluster.environment | environment, capture_output=True, text=True, timeout=60,
                check=False,
            )  # fmt: skip

        done = status()
        assert done.returncode == 1
        assert "Authentication" in done.stderr or "401" in done.stderr
        assert done.stderr.startswith(f"student-worker: {cluster.dashboard}: ")
        assert "knows no job 'nobodys'" in status(**guarded).stderr
