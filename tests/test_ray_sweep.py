"""Sweeps on a Ray of the tests' own: many students, one teacher, what they share and what they cannot."""

import json
import subprocess
import sys

import pytest

from student_worker import TeacherClient
from student_worker.__main__ import main
from student_worker.data import load
from teacher_server.tokens import add_token, new_token
from tests.asking import put
from tests.ray_cluster import ROOT, ray_cluster
from tests.serving import serving

N = len(load("digits").train_x)
pytestmark = pytest.mark.timeout(300)
VIEWS = ["--dataset", "digits", "--crop", "1", "--erase", "2"]


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """(the token itself, its file for students, the tokens file of the server, an admin's token)."""
    folder = tmp_path_factory.mktemp("tokens")
    (secret, line), (admin, other) = new_token("red"), new_token("boss", "admin")
    add_token(folder / "tokens", line)
    add_token(folder / "tokens", other)
    (folder / "token").write_text(f"{secret}\n")
    return secret, folder / "token", folder / "tokens", admin


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, token):
    """A teacher that was trained on views like its students', and asks for tokens."""
    output = tmp_path_factory.mktemp("teacher")
    command = ["train", "--method", "hard", *VIEWS, "--student", "cnn-tiny", "--epochs", "5", "--output", str(output)]
    assert main(command) == 0
    build = {"name": "cnn-tiny", "channels": 1, "classes": 10, "size": 8}
    served = {"model": "student_worker.models:build", "model_arguments": build, "threads": 1}
    weights = output / "epoch-0005.safetensors"
    with serving(**served, weights=weights, grpc_port=0, http_port=0, tokens_file=token[2]) as server:
        yield server


@pytest.fixture
def sweep(cluster, teacher, token, tmp_path):
    """Runs `student-worker sweep`; (exit status, standard output, standard error, report.json)."""

    def run(job, space, *options):
        output = tmp_path / "out"
        command = [sys.executable, "-m", "student_worker", "sweep", *VIEWS, "--job", job, "--space", json.dumps(space)]
        command += ["--teacher-address", teacher.grpc_address, "--token-file", token[1], "--output", output, *options]
        done = subprocess.run(
            command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False, timeout=240
        )
        report = output / "report.json"
        assert report.exists(), done.stderr
        return done.returncode, done.stdout, done.stderr, json.loads(report.read_text())

    return run


def spend(teacher, token, job):
    """The job's line in the ledger."""
    with TeacherClient(teacher.grpc_address, token=token[0]) as client:
        (line,) = client.spend(job).lines
        return line


def content(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:  # Ray has files of its own that come and go
        return b""


def test_four_students_together_have_each_view_computed_once(sweep, teacher, token, cluster, tmp_path):
    """Other seeds, so other weights and data orders, and other architectures; UNIX's selection, nothing mixed."""
    (tmp_path / "line").mkdir()
    space = [
        {
            "seed": seed,
            "student": "tests.sweeping:together",
            "student_arguments": {"inner": name, "folder": str(tmp_path / "line"), "of": 4},
        }
        for seed, name in enumerate(["mlp", "cnn-tiny", "cnn-small", "resnet8"])
    ]
    views = 4
    options = ["--mixing", "none", "--strategy", "entropy", "--views", str(views), "--epochs", "8", "--depth", "1"]
    status, out, err, report = sweep("four", space, *options)
    assert status == 0, err
    assert [trial["status"] for trial in report["trials"]] == ["finished"] * 4
    lines = [spend(teacher, token, f"four-{number:04d}") for number in range(4)]
    asked, computed = (sum(getattr(line, name) for line in lines) for name in ("asked", "computed"))
    sys.stdout.write(f"{asked} asked, {computed} computed, n * V = {N * views}: {computed / (N * views):.3f}\n")
    assert asked == 4 * 8 * (22 * 48 + 22)
    assert computed <= 1.1 * N * views
    # What the report says is what the ledger says, and what a student alone would need is told apart from it.
    for trial, line in zip(report["trials"], lines, strict=True):
        for name in ("asked", "computed", "cached", "coalesced"):
            assert trial[name] == getattr(line, name)
        assert 0.9 * trial["asked"] / 2 < trial["alone"] <= min(trial["asked"], N * views)
        assert trial["computed"] < trial["alone"]
        assert trial["test"] > 0.6
    alone = sum(trial["alone"] for trial in report["trials"])
    assert report["total"]["computed"] == computed
    assert report["total"]["saved_by_sharing"] == alone - computed > N * views
    assert f"Sharing saved {alone - computed:,} answers" in out
    assert "All at equal steps, 184." in out
    assert "four-0003: epoch 8/8, validation accuracy 0." in err
    folder = tmp_path / "out"
    assert (folder / "plot.png").stat().st_size > 10_000
    assert len(list(folder.glob("trial-*/epoch-0008.safetensors"))) == 4
    for place in (cluster.folder, folder):
        contents = {path: content(path) for path in place.rglob("*") if path.is_file()}
        assert len(contents) > 10
        assert not [path for path, text in contents.items() if token[0].encode() in text]
    assert token[0] not in out + err


def test_what_is_mixed_afresh_is_not_shared_and_no_trial_ends_another(sweep, teacher, token, tmp_path):
    """UNIX as published: as it is; what cannot be; a process that is killed and goes on; a budget that is too small."""
    put(teacher, "/v1/budgets/red/jobs/mixed-0003", token=token[3], unit="samples", limit=500)
    killed = {"marker": str(tmp_path / "killed"), "at": 60}  # in the second of three epochs: two passes a step
    space = [
        {"seed": 0},
        {"student": "tests.sweeping:nobody"},
        {"student": "tests.sweeping:Killed", "student_arguments": killed},
        {"seed": 1},
    ]
    status, out, err, report = sweep("mixed", space, "--epochs", "3", "--depth", "0", "--max-failures", "1")
    assert status == 1
    assert [trial["status"] for trial in report["trials"]] == ["finished", "failed", "finished", "budget spent"], err
    assert (tmp_path / "killed").exists()
    assert "nobody" in report["trials"][1]["error"]
    assert "Trial 1 failed:" in out
    for number in (0, 2):  # of the killed one nothing is charged twice
        line = spend(teacher, token, f"mixed-{number:04d}")
        assert line.computed == line.asked == 3 * (22 * 48 + 22)
        assert report["trials"][number]["epochs"] == 3
    assert spend(teacher, token, "mixed-0003").computed == report["trials"][3]["steps"] * 48 == 480
    assert "500 samples in all" in report["trials"][3]["budget_spent"]
    assert report["total"]["saved_by_sharing"] == 0
    assert "Sharing saved 0 answers: a mixed sample is drawn afresh, partner and share" in out


def test_asha_ends_those_that_lag_and_says_by_what(sweep, tmp_path):
    """One after another, so that it is known who is there to compare with; labels alone need no teacher."""
    options = ["--method", "hard", "--asha", "--epochs", "3", "--concurrent-trials", "1"]
    options += ["--metrics-targets", tmp_path / "targets"]
    status, out, err, report = sweep("pruned", {"learning_rate": [0.2, 1e-7]}, *options)
    assert status == 0, err
    assert [trial["status"] for trial in report["trials"]] == ["finished", "pruned"]
    assert [trial["epochs"] for trial in report["trials"]] == [3, 1]
    assert [*(tmp_path / "targets").iterdir()] == [], "also the one that was ended is told of no more"
    assert "ASHA ended 1 trials early, by validation" in out
    assert "NOT at equal steps: from 23 to 69." in out
    assert report["trials"][0]["test"] > report["trials"][1]["test"]
