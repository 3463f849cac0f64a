"""`train --num-workers` on a real Ray: workers that are killed, budgets that end, and no token where it can be seen."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file

from teacher_server.tokens import add_token, new_token
from tests.asking import metric
from tests.ray_cluster import ray_cluster
from tests.ray_training import save_exact
from tests.serving import ROOT, process

pytestmark = pytest.mark.timeout(300)

EPOCHS, STEPS = 4, 23
# Parts of 32 and 32, 22 times, and of 15 and 14; three quarters of each are asked about.
ASKED = EPOCHS * (22 * 48 + 11 + 11)
RUN = {"dataset": "digits", "student": "cnn-tiny", "epochs": EPOCHS, "threads": 1, "checkpoint_steps": 5}


@pytest.fixture(scope="module")
def cluster():
    # Its own knob: how often the controller looks after its workers, 2 s otherwise.
    with ray_cluster(environment={"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    admin, line = new_token("boss", "admin")
    add_token(folder / "tokens", line)
    token, line = new_token("team", "student")
    add_token(folder / "tokens", line)
    (folder / "student-token").write_text(token)
    settings = {"model": "tests.ray_training:Exact", "weights": save_exact(folder), "tokens_file": folder / "tokens"}
    settings |= {"grpc_port": 0, "http_port": 0, "threads": 1}
    files = {"settings": settings, "token_file": folder / "student-token"}
    with process(**settings) as (_, address, http_address):
        yield SimpleNamespace(address=address, http_address=http_address, admin=admin, token=token, **files)


def count(teacher, name, **labels):
    return metric(teacher, f"preceptor_{name}", token=teacher.admin, **labels)


@contextmanager
def training(cluster, teacher, output, job, here=ROOT, **changes):
    """(process, what it said so far as a list of lines) of `train` with two workers. Waited for when left."""
    settings = RUN | {"output": output, "job": job, "num_workers": 2, "teacher_address": teacher.address} | changes
    options = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "student_worker", "train", *options, "--token-file", str(teacher.token_file)]
    environment = cluster.environment | {"RAY_DEDUP_LOGS": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=here, env=environment, **pipes) as train:
        said = []
        reader = threading.Thread(target=lambda: said.extend(iter(train.stdout.readline, "")))
        reader.start()
        try:
            yield train, said
            train.wait(200)
        finally:
            train.kill()
            reader.join()


def two_processes(teacher, folder, job, dies=(0, 0)):
    """Exit codes of the same run by two processes without Ray; each may die where it waits for the `dies`th time."""
    settings = RUN | {"output": str(folder / job), "job": job, "num_workers": 2}
    settings |= {"teacher_address": teacher.address, "token_file": str(teacher.token_file)}
    program = "import sys; from tests.ray_training import main; main(*sys.argv[1:])"
    meeting = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-c", program, json.dumps(settings), meeting]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [
        subprocess.Popen([*command, str(rank), "2", str(number)], cwd=ROOT, **pipes) for rank, number in enumerate(dies)
    ]
    try:
        return [worker.wait(200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def weights(folder):
    return load_file(folder / f"epoch-000{EPOCHS}.safetensors")


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    """The weights of the same run by two processes that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert two_processes(teacher, folder, "undisturbed") == [0, 0]
    assert count(teacher, "samples_total", job="undisturbed", source="computed") == ASKED
    return weights(folder / "undisturbed")


# A state is saved before the first step, every five and at each epoch's end; for each the ranks wait twice, before and
# after rank 0 writes what makes it the run's.
@pytest.mark.parametrize(
    ("job", "dies"),
    [
        ("part-written", (0, 7)),  # rank 1, with its part of step 15 in its place and rank 0's not
        ("unrotated", (12, 0)),  # rank 0, with the first epoch's state in its place and all answers still there
    ],
)
def test_whichever_rank_dies_while_a_state_is_saved(teacher, undisturbed, tmp_path, job, dies):
    codes = two_processes(teacher, tmp_path, job, dies)
    assert codes[dies.index(max(dies))] == -signal.SIGKILL
    assert 0 not in codes  # the other did not wait for ever, nor go on alone
    assert two_processes(teacher, tmp_path, job) == [0, 0]
    ended = weights(tmp_path / job)
    assert all(torch.equal(ended[name], value) for name, value in undisturbed.items())
    assert count(teacher, "samples_total", job=job, source="computed") == ASKED
    assert {path.name for path in (tmp_path / job).glob("state*")} == {
        "state.pt",
        f"state-rank1-{EPOCHS}-{EPOCHS * STEPS}.pt",
    }


def test_a_killed_worker_costs_nothing(cluster, teacher, undisturbed, tmp_path):
    """SIGKILL in an epoch's midst: the run ends as one that nobody disturbed, bit for bit, and was charged as much."""
    job, targets = "killed", tmp_path / "targets"
    with training(cluster, teacher, tmp_path / "out", job, metrics_targets=targets) as (train, said):
        # The second epoch's first five steps are behind it.
        while not list((tmp_path / "out").glob("state-rank1-1-3?.pt")):
            assert train.poll() is None, said
            time.sleep(0.01)
        told = sorted(path.name.rpartition("-")[0] for path in targets.glob("*.json"))
        assert told == ["killed-0", "killed-1"]
        (pid,) = re.findall(r"worker 1 of 2, process (\d+) on \S+, begins", "".join(said))
        os.kill(int(pid), signal.SIGKILL)
    text = "".join(said)
    assert train.returncode == 0, text
    assert not list(targets.iterdir()), "those of the dead were removed by those that took their places"
    resumed = re.findall(r"worker (\d) of 2, process \d+ on \S+, goes on after step (\d+)", text)
    assert [rank for rank, _ in sorted(resumed)] == ["0", "1"], text
    ((_, first), (_, second)) = resumed
    assert STEPS < int(first) == int(second) < 2 * STEPS
    assert f"after {EPOCHS * STEPS} steps, {ASKED} samples asked" in text
    # What was on its way to a worker that died is computed for it again, and charged once.
    again = count(teacher, "samples_total", job=job, source="computed") - ASKED
    assert 0 <= again <= 48  # a batch: of each rank a part
    assert count(teacher, "charged_samples_total", job=job) == ASKED
    spent = json.loads(_http(teacher, "GET", "/v1/spend?tenant=team&job=killed"))
    assert sum(int(line["computed"]) for line in spent["lines"] if line["job"] == job) == ASKED
    ended = weights(tmp_path / "out")
    assert all(torch.equal(ended[name], value) for name, value in undisturbed.items())
    # Ray has the state too, of all ranks.
    copied = {path.name for path in (tmp_path / "out" / "ray-train").glob("checkpoint_*/*")}
    assert copied >= {"state.pt", f"state-rank1-{EPOCHS}-{EPOCHS * STEPS}.pt"}
    _assert_hidden(teacher.token, cluster.folder, tmp_path / "out", text)


def test_a_budget_that_ends_stops_all_workers(cluster, teacher, tmp_path):
    limit = int(1.5 * ASKED / EPOCHS)
    _http(teacher, "PUT", "/v1/budgets/team/jobs/poor", unit="samples", limit=limit)
    # A student of one's own, found where the command is given.
    (tmp_path / "mine.py").write_text("from student_worker.models import MODELS\n\nnet = MODELS['cnn-tiny']\n")
    own = {"depth": 0, "student": "mine:net"}
    with training(cluster, teacher, "out", "poor", here=tmp_path, **own) as (train, said):
        pass
    text = "".join(said)
    assert train.returncode == 3, text
    assert "goes on after" not in text  # nobody was started again
    steps, asked = map(int, re.search(r"after (\d+) steps, (\d+) samples asked", text).groups())
    assert STEPS < steps < 2 * STEPS
    assert limit - 48 < count(teacher, "samples_total", job="poor", source="computed") <= limit < asked <= limit + 48
    assert (tmp_path / "out" / "epoch-0002.safetensors").exists()


def test_a_teacher_that_is_gone_ends_the_run_at_once(cluster, teacher, tmp_path):
    with process(**teacher.settings, state_directory=tmp_path / "state") as (server, address, _):
        gone = {"teacher_address": address, "teacher_timeout": 1}
        with training(cluster, teacher, tmp_path / "out", "gone", **gone) as (train, said):
            while not list((tmp_path / "out").glob("state-rank1-0-5.pt")):
                assert train.poll() is None, said
                time.sleep(0.01)
            server.kill()
    text = "".join(said)
    assert train.returncode == 1, text
    assert re.search(r"^student-worker: .*UNAVAILABLE.* \(rank \d of 2\)$", text, re.MULTILINE), text
    assert "goes on after" not in text  # nobody was started again for it
    assert (tmp_path / "out" / "state.pt").exists()


def test_what_workers_cannot_do_is_said_before_they_are_asked(tmp_path):
    """In a process of its own, for ours is to stay without Ray."""
    runs = [
        ({"num_workers": 3, "batch_size": 2}, "num_workers: 3 workers cannot share batches of 2"),
        ({"device": "cuda:1"}, "device: cuda:1: Ray gives each worker its GPU"),
        ({"student": "none"}, "unknown model 'none'"),
        ({"config": tmp_path / "hushed.toml"}, "give that as --token-file"),
    ]
    (tmp_path / "hushed.toml").write_text("token = 'hush-hush'")
    lines = []
    for changes, _ in runs:
        settings = {"dataset": "digits", "output": tmp_path / "out", "num_workers": 2} | changes
        lines.append([f"--{key.replace('_', '-')}={value}" for key, value in settings.items()])
    program = (
        "import json, sys; from student_worker.__main__ import main\n"
        "statuses = [main(['train', *line]) for line in json.loads(sys.argv[1])]\n"
        # The extra is missing: what an import of it then raises.
        "del sys.modules['student_worker.ray_train']; sys.modules['ray'] = None\n"
        "sys.exit(f'{statuses} {main([\"train\", *json.loads(sys.argv[1])[0]])}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stderr.splitlines()
    assert all(words in line for (_, words), line in zip(runs, said, strict=False)), done.stderr
    assert "[ray] extra" in said[4]
    assert said[5] == "[1, 1, 1, 1] 1"
    assert "hush-hush" not in done.stdout + done.stderr


def _http(teacher, method, path, **body):
    headers = {"content-type": "application/json", "authorization": f"Bearer {teacher.admin}"}
    content = json.dumps(body).encode() if body else None
    with urlopen(Request(f"http://{teacher.http_address}{path}", content, headers, method=method), timeout=10) as reply:
        return reply.read()


def _assert_hidden(token, *places):
    """In no file of these folders, and in none of these texts."""
    for place in places:
        if isinstance(place, str):
            assert token not in place
            continue
        for path in place.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert token.encode() not in path.read_bytes(), path
