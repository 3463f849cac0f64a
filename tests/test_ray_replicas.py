"""`teacher-server serve-on-ray` on a real Ray: found through the registry, more under load, fewer without."""

import csv
import io
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass

import numpy as np
import pytest

from protos import teacher_pb2 as pb
from student_worker import TeacherClient
from tests.asking import asking, direct, page, pixels, stub_at
from tests.ray_cluster import RayCluster, ray_cluster
from tests.redis_servers import AOF, running
from tests.serving import ROOT, free_port, until
from tests.teachers import TINY, Unhurried, save

SAMPLES, JOB = 8, "students"
SEEDS = itertools.count()
# What Ray shows to whoever reaches its dashboard.
PAGES = (
    "/api/v0/actors?detail=true",
    "/api/v0/tasks?detail=true",
    "/api/v0/workers?detail=true",
    "/api/jobs/",
    "/logical/actors",
    "/nodes?view=summary",
)


@dataclass(frozen=True)
class Place:
    """A cluster whose nodes know a Redis, and its password."""

    cluster: RayCluster
    password: str
    redis_url: str
    settings: dict[str, object]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, password, port = tmp_path_factory.mktemp("ray-replicas"), secrets.token_hex(16), free_port()
    url = f"redis://:{password}@127.0.0.1:{port}"
    nodes = {"TEACHER_CACHE_REDIS_URL": url, "TEACHER_LEDGER_REDIS_URL": url}
    settings = {
        "model": "tests.teachers:Unhurried",
        "weights": save(Unhurried(), folder / "unhurried.safetensors", TINY),
        "state_directory": folder / "state",
        "max_batch_size": SAMPLES,
        "threads": 1,
    }
    with running(folder, *AOF, "--requirepass", password, "--port", str(port)):
        with ray_cluster(environment=nodes) as cluster:
            yield Place(cluster, password, url, settings)


class Command:
    """`teacher-server serve-on-ray` in a process of its own, and what it says."""

    def __init__(self, environment, **given):
        flags = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "teacher_server", "serve-on-ray", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self._reader.join(30)
        self.process.stdout.close()

    @property
    def said(self):
        return "".join(self.lines)

    def saying(self, pattern, count=1):
        """Waits for its count-th line like that; the groups of each."""
        until(lambda: self.process.poll() is not None or len(re.findall(pattern, self.said)) >= count)
        found = re.findall(pattern, self.said)
        assert len(found) >= count, self.said
        return found

    def ready(self, count=1):
        """(slot, gRPC address) of all that have ever been ready, once there are so many."""
        return self.saying(r"replica (\d+) ready, grpc (\S+),", count)


class Callers:
    """Students that ask, with a `pause` of so many seconds after each answer, for each sample once, and keep what went
    wrong."""

    def __init__(self, addresses, count, pause=0.0):
        self.failures, self.wrong, self.answered = [], 0, 0
        self._stop, self._lock, self._pause = threading.Event(), threading.Lock(), pause
        self._threads = [threading.Thread(target=self._ask, args=(addresses, i)) for i in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, addresses, number):
        with TeacherClient(addresses, job=JOB) as teacher:
            while not self._stop.is_set():
                seed = next(SEEDS)
                x = pixels(SAMPLES, seed=seed)
                try:
                    answer = teacher.label(x, request_id=f"query-{seed}")
                except Exception as error:
                    self.failures.append(error)
                    return
                right = np.allclose(answer.logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
                with self._lock:
                    self.answered += SAMPLES
                    self.wrong += not right
                self._stop.wait(self._pause)


def described(address):
    with stub_at(address) as stub:
        return stub.Describe(pb.DescribeRequest(), timeout=10)


def told(address):
    return {replica.address for replica in described(address).replicas}


def actors(cluster):
    """{pid: state} of all replicas that Ray has known."""
    with urllib.request.urlopen(f"{cluster.dashboard}/api/v0/actors?detail=true", timeout=10) as reply:
        found = json.load(reply)["data"]["result"]["result"]
    return {actor["pid"]: actor["state"] for actor in found if actor["class_name"] == "Replica"}


def alive(cluster):
    return [pid for pid, state in actors(cluster).items() if state == "ALIVE"]


def scraped(folder):
    """{gRPC address: HTTP address} of the replicas that Prometheus is told of."""
    (file,) = folder.glob("replicas-*.json")
    ((group),) = json.loads(file.read_text())
    told = {}
    for address in group["targets"]:
        assert "preceptor_ready 1.0" in page(address)
        told[json.loads(page(address, "/v1/teacher"))["address"]] = address
    return told


def test_replicas_come_with_load_and_go_without_and_no_query_is_lost(place, tmp_path):
    scaling = {"max_replicas": 2, "target_queue_milliseconds": 60, "scale_down_seconds": 4}
    scaling["metrics_targets"] = tmp_path / "targets"
    with Command(place.cluster.environment, **place.settings, **scaling) as command:
        ((slot, first),) = command.ready()
        assert [*scraped(tmp_path / "targets")] == [first]
        assert slot == "0"
        assert described(first).address == first
        assert told(first) == {first}
        (stays,) = alive(place.cluster)
        with Callers(first, 8) as crowd:  # 7 batches of 20 ms before each
            (_, (slot, second)) = command.ready(2)
            assert slot == "1"
            until(lambda: told(first) == told(second) == {first, second})
            assert {*scraped(tmp_path / "targets")} == {first, second}
            with Callers([second, first], 2) as pair:
                until(lambda: pair.answered > 10 * SAMPLES)
                (dies,) = {*alive(place.cluster)} - {stays}
                os.kill(dies, signal.SIGKILL)
                (*_, (slot, third)) = command.ready(3)
                assert slot == "1", "the place of the one that died, with what it left"
                until(lambda: told(first) == {first, third})
                assert {*scraped(tmp_path / "targets")} == {first, third}
        with Callers([third, first], 1, pause=0.04) as one:  # a third of what a single replica can bear
            command.saying("replica 1 drained")
            after = one.answered
            until(lambda: one.answered > after + 5 * SAMPLES)
            until(lambda: told(first) == {first})
        until(lambda: len(alive(place.cluster)) == 1)
        until(lambda: [*scraped(tmp_path / "targets")] == [first])
        everyone = (crowd, pair, one)
        assert [callers.failures for callers in everyone] == [[], [], []]
        assert sum(callers.wrong for callers in everyone) == 0
        assert_nothing_secret(place, command)
        late = late_answers(first, command)
        assert command.process.wait(60) == 0
        assert "replica 0 drained" in command.said
        assert place.password not in command.said
    assert not [*(tmp_path / "targets").iterdir()]
    until(lambda: not alive(place.cluster))
    spent = ledger(place, "export")
    charged = sum(int(line["computed"]) for line in csv.DictReader(io.StringIO(spent)) if line["job"] == JOB)
    assert charged == sum(callers.answered for callers in everyone) + late
    assert ledger(place, "verify").startswith("forwarded ")  # or its status would not be 0


def late_answers(address, command):
    """Samples of queries that waited when the command was told to stop; all are answered."""
    with stub_at(address) as stub:
        metadata = (("preceptor-job", JOB),)
        batches = [pixels(SAMPLES, seed=next(SEEDS)) for _ in range(20)]
        calls = [stub.Label.future(asking(x), timeout=60, metadata=metadata) for x in batches]
        calls[0].result()  # and so they have all arrived, or nearly so: they came by one connection
        command.process.send_signal(signal.SIGTERM)
        for x, call in zip(batches, calls, strict=True):
            answers = np.frombuffer(call.result().answers[0].values, np.float32).reshape(SAMPLES, -1)
            np.testing.assert_allclose(answers, direct(x), rtol=1e-4, atol=1e-4)
    return len(batches) * SAMPLES


def assert_nothing_secret(place, command):
    for path in PAGES:
        with urllib.request.urlopen(f"{place.cluster.dashboard}{path}", timeout=20) as reply:
            shown = reply.read().decode()
        assert place.password not in shown, path
        assert path != PAGES[0] or "Replica" in shown
    files = [file for file in place.cluster.folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if place.password.encode() in file.read_bytes()] == []


def ledger(place, *command):
    environment = os.environ | {"TEACHER_LEDGER_REDIS_URL": place.redis_url}
    run = [sys.executable, "-m", "teacher_server", "ledger", *command]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_what_cannot_serve_is_said_and_ends_the_command(place, tmp_path):
    broken = place.settings | {"weights": tmp_path / "none.safetensors"}
    with Command(place.cluster.environment, **broken) as command:
        assert command.process.wait(60) == 1
        assert "none.safetensors" in command.said.splitlines()[-1]
        assert "Traceback" not in command.said
    with Command(os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}, **place.settings) as command:
        assert command.process.wait(60) == 1
        assert re.search(r"ray_address: no Ray cluster at 127\.0\.0\.1:\d+ .*ray start --head", command.said)


def test_a_command_to_which_nobody_listens_any_more_ends(place):
    reading, writing = os.pipe()
    os.close(reading)
    flags = [part for key, value in place.settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "teacher_server", "serve-on-ray", *flags]
    environment = place.cluster.environment
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert ended.returncode
    assert b"Broken pipe" in ended.stderr
    until(lambda: not alive(place.cluster))
