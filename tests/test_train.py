"""From labels to a teacher, from the teacher to students: the loop, its checkpoints and its command line."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from student_worker import TeacherClient
from student_worker.__main__ import main
from student_worker.compare import compare
from student_worker.config import METHODS, CompareSettings, TrainSettings
from student_worker.data import UNLABELLED, labelled_subset, load
from student_worker.lessons import epoch_batches
from student_worker.models import build
from student_worker.train import Progress, train
from student_worker.weights import save_checkpoint
from teacher_server.tokens import add_token, new_token
from tests.asking import metric, put
from tests.certificates import Authority, served_with
from tests.serving import ROOT, process, serving

BUILD = {"name": "cnn-tiny", "channels": 1, "classes": 10, "size": 8}


def settings(**changes):
    return TrainSettings(**{"dataset": "digits", "student": "cnn-tiny", "epochs": 2, "depth": 0} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher's weights, from our own command line."""
    output = tmp_path_factory.mktemp("teacher")
    command = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "6"]
    assert main([*command, "--output", str(output)]) == 0
    return output / "epoch-0006.safetensors"


def serve(weights):
    return {
        "model": "student_worker.models:build",
        "model_arguments": json.dumps(BUILD),
        "weights": weights,
        "grpc_port": 0,
        "http_port": 0,
        "threads": 1,
    }


@pytest.fixture(scope="module")
def teacher(trained):
    with serving(**serve(trained) | {"model_arguments": BUILD}) as server:
        yield server


def run(teacher, job="job", **changes):
    with TeacherClient(teacher.grpc_address, job=job) as client:
        return train(settings(**changes), client)


# ---------------------------------------------------------------- the loop


def test_a_checkpoint_is_a_teacher_that_says_what_it_takes(trained, teacher):
    record = json.loads(trained.with_suffix(".json").read_text())
    described = teacher.description
    assert described.outputs[0].top1 == record["accuracy"] > 0.85
    assert list(described.outputs[0].class_names) == [str(digit) for digit in range(10)]
    assert list(described.inputs[0].shape) == [1, 8, 8]
    assert record["settings"]["method"] == "hard"
    assert record["steps"] == 6 * 23
    with safe_open(trained, "pt") as file:
        assert json.loads(file.metadata()["preceptor"])["inputs"][0]["normalisation"]["mean"]
    data = load("digits")
    student = build("cnn-tiny", channels=1, classes=10, size=8)
    student.load_state_dict(load_file(trained))
    with TeacherClient(teacher.grpc_address) as client:
        answered = client.label(data.test_x).logits.argmax(1).numpy()
    assert (answered == data.test_y).mean() == pytest.approx(record["accuracy"], abs=0.003)


def test_every_method_takes_the_same_steps_and_the_server_counts_what_it_asked(teacher):
    n, steps = len(load("digits").train_x), 2 * 23
    asked = {"hard": 0, "hard+mixup": 0, "kd": 2 * n, "kd+mixup": 2 * n, "unix": 2 * (22 * 48 + round(0.75 * (n % 64)))}
    for method in METHODS:
        progress = run(teacher, job=f"method-{method}", method=method)
        assert progress.steps == steps, method
        assert progress.asked == metric(teacher, "preceptor_asked_samples_total", job=f"method-{method}"), method
        assert progress.asked == asked[method], method
        assert progress.scored == (2 * n if method == "unix" else 0), method
        assert progress.taught == (0 if method.startswith("hard") else steps), method
        assert progress.computed + progress.cached + progress.coalesced == progress.asked, method
        assert progress.budget_spent == "", method
        assert progress.accuracy > 0.15, method


def test_a_seed_names_a_run_and_another_seed_another(teacher):
    first, again, other = (run(teacher, method="unix", epochs=1, seed=seed) for seed in (1, 1, 2))
    assert (first.loss, first.accuracy) == (again.loss, again.accuracy)
    assert first.loss != other.loss


def test_kd_uses_what_hard_labels_cannot(teacher):
    hard, kd = (run(teacher, method=method, labelled=20, epochs=4) for method in ("hard", "kd"))
    assert kd.accuracy > hard.accuracy + 0.1


def test_unlabelled_items_reach_a_teacher_only(teacher):
    seen = {}

    def collect(step, steps, loss, b):
        seen.setdefault("y", []).append(b.y)
        seen.setdefault("items", []).append(b.index)

    for method in ("hard", "kd"):
        seen.clear()
        with TeacherClient(teacher.grpc_address, job="unlabelled") as client:
            train(settings(method=method, labelled=50, epochs=1, label_weight=0.5), client, on_step=collect)
        labels, items = torch.cat(seen["y"]), torch.cat(seen["items"])
        assert len(labels) == 1437
        assert len(items.unique()) == (50 if method == "hard" else 1437)
        assert int((labels == UNLABELLED).sum()) == (0 if method == "hard" else 1387)


def test_views_repeat_in_turn_or_never():
    data, device = load("digits"), torch.device("cpu")

    def epoch(number, **changes):
        config = settings(method="kd", crop=2, erase=2, **changes)
        batches = list(epoch_batches(config, data, data.train_y, number, device))
        x, _, items = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return x[items.argsort()]

    assert torch.equal(epoch(0, views=2), epoch(2, views=2))
    assert torch.equal(epoch(0, views=2, seed=5), epoch(0, views=2, seed=6))  # apart from the training seed
    assert not torch.equal(epoch(0, views=2), epoch(1, views=2))
    assert not torch.equal(epoch(0), epoch(2))
    assert not torch.equal(epoch(0), epoch(0, view_seed=1))


def test_few_labelled_items_come_in_fresh_views_each_time():
    data = load("digits")
    labels = labelled_subset(data.train_y, 10, 0)
    config = settings(method="hard", crop=2)
    x, y, items = (
        torch.cat(parts) for parts in zip(*epoch_batches(config, data, labels, 0, torch.device("cpu")), strict=True)
    )
    assert len(x) == len(labels)
    assert (y >= 0).all()
    counts = np.bincount(items.numpy(), minlength=len(labels))[labels != UNLABELLED]
    assert counts.max() - counts.min() <= 1
    assert len(x[items == items[0]].unique(dim=0)) > 10  # of 25 crops, some of which look the same


# ---------------------------------------------------------------- the command line


def test_train_writes_checkpoints_metrics_and_events(teacher, tmp_path, capsys):
    command = ["train", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "2", "--job", "cli"]
    assert main([*command, "--teacher-address", teacher.grpc_address, "--output", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "cli (unix): test accuracy" in told.out
    assert "cli: epoch 2/2" in told.err
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("events"))
    epochs = [f"epoch-000{e}.{kind}" for e in (1, 2) for kind in ("json", "safetensors")]
    assert names == ["answers.log", *epochs, "state.pt"]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_check_says_that_the_teacher_understands(teacher, capsys):
    assert main(["check", "--dataset", "digits", "--teacher-address", teacher.grpc_address]) == 0
    assert "understands digits: top-1" in capsys.readouterr().out


def test_compare_reports_what_the_server_counted(teacher, tmp_path, capsys):
    command = [
        "compare", "--methods", "hard,kd,unix", "--seeds", "0,1", "--dataset", "digits", "--student", "cnn-tiny",
        "--epochs", "2", "--labelled", "50", "--teacher-address", teacher.grpc_address,
        "--metrics-url", f"http://{teacher.http_address}/metrics", "--output", str(tmp_path), "--job", "compared",
    ]  # fmt: skip
    assert main(command) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    by_method = {summary["method"]: summary for summary in report["summary"]}
    n = 1437
    # The digits' views are all the same, so KD's second epoch comes from its cache; mixed samples never do.
    kd, unix = by_method["kd"], by_method["unix"]
    assert (kd["asked"], kd["computed"], kd["cached"]) == (2 * n, n, n)
    assert kd["share_of_kd_beta1"] == pytest.approx((n + 2 * n * 2) / (2 * n * 3))
    assert unix["asked"] == unix["computed"] == 2 * (22 * 48 + 22)
    assert "computed  cached" in table
    assert f"{unix['share_of_kd_beta1']:.1%} | {unix['share_of_kd_beta2']:.1%}" in table
    # The paper's formula, on the batches as they were: here teacher and student are the same network.
    whole = 2 * n
    assert unix["share_of_kd_beta1"] == pytest.approx((whole + unix["asked"] * 3) / (whole * 3))
    assert by_method["hard"]["asked"] == 0
    assert by_method["hard"]["above_kd"] < 0
    assert {run["seed"] for run in report["runs"]} == {0, 1}
    # Each run has a namespace of its own: the second seed finds none of the first one's answers.
    assert {run["computed"] for run in report["runs"] if run["method"] == "kd"} == {n}
    assert main([*command, "--overwrite"]) == 0  # nor does a second comparison, under the same names
    again = json.loads((tmp_path / "report.json").read_text())
    assert {run["computed"] for run in again["runs"] if run["method"] == "kd"} == {n}
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_comparison_in_which_a_budget_was_spent_has_no_result(teacher, tmp_path):
    compared = CompareSettings(
        dataset="digits", methods=("kd",), metrics_url=f"http://{teacher.http_address}/metrics", output=tmp_path,
        job="poorer",
    )  # fmt: skip
    spaces = []

    def run(trial):
        spaces.append(trial.cache_namespace)
        counts = dict.fromkeys(("asked", "computed", "cached", "coalesced", "scored", "learnt"), 0)
        rest = counts | {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0}
        return Progress(epoch=1, steps=7, of_steps=46, taught=7, budget_spent="all gone", **rest)

    for _ in range(2):
        with pytest.raises(ValueError, match=r"spent in run poorer-kd-s0 after 7 of 46 steps, .*: all gone"):
            compare(compared, run, teacher.description)
    assert not (tmp_path / "report.json").exists()
    assert all(space.startswith("poorer-kd-s0/") for space in spaces)
    assert len(set(spaces)) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student", "resnet-9000"], "unknown model 'resnet-9000'; one of"),
        (["--student", "no.such:factory"], "no"),
        (["--labelled", "5000"], "5000 labelled"),
        (["--erase", "9"], "erase is 9 pixels"),
        (["--dataset", "fashion-mnist", "--data-directory", "/nowhere"], "/nowhere holds no train-images"),
        (["--teacher-address", "127.0.0.1:1", "--teacher-timeout", "0.2", "--method", "kd"], "UNAVAILABLE"),
        (["--token-file", "/nowhere", "--method", "kd"], "/nowhere"),
        (["--cache-namespace", "a b", "--method", "kd"], "cache_namespace: 'a b'"),
        (["--device", "cuda:99"], "device: cuda:99 is not there"),
        (["--device", "tpu9"], "device: 'tpu9' is none"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(arguments, words, tmp_path, capsys):
    command = ["train", "--method", "hard", "--dataset", "digits", "--output", str(tmp_path), "--epochs", "1"]
    assert main([*command, *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("student-worker: ")
    assert words in told
    assert "Traceback" not in told


def test_a_teacher_of_other_data_is_refused(teacher, tmp_path, capsys):
    command = ["train", "--dataset", "mnist5k", "--epochs", "1", "--teacher-address", teacher.grpc_address]
    assert main([*command, "--output", str(tmp_path)]) == 1
    assert "samples of [1, 28, 28], but the teacher takes [1, 8, 8]" in capsys.readouterr().err


def test_ctrl_c_keeps_the_last_checkpoint(trained, tmp_path):
    with process(**serve(trained)) as (_, address, _):
        command = [
            sys.executable, "-m", "student_worker", "train", "--dataset", "digits", "--student", "cnn-tiny",
            "--epochs", "1000", "--teacher-address", address, "--output", str(tmp_path),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as training:
            for line in training.stderr:
                if "epoch 2/1000" in line:
                    break
            training.send_signal(signal.SIGINT)
            rest = training.stderr.read()
            assert training.wait(30) == 130
        assert "checkpoints of epochs that ended stay" in rest
        assert "Traceback" not in rest
        for weights in sorted(tmp_path.glob("epoch-*.safetensors")):
            assert load_file(weights)
            assert json.loads(weights.with_suffix(".json").read_text())["epoch"] >= 1
        assert (tmp_path / "epoch-0002.safetensors").exists()
        assert not list(tmp_path.glob("*.part"))


class Tied(torch.nn.Module):
    """Two names, one weight."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(64, 64, bias=False)
        self.second = torch.nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def test_tied_weights_are_kept_once_and_served(tmp_path):
    command = [
        "train",
        "--method",
        "hard",
        "--dataset",
        "digits",
        "--student",
        "tests.test_train:Tied",
        "--epochs",
        "1",
    ]
    assert main([*command, "--output", str(tmp_path)]) == 0
    weights = tmp_path / "epoch-0001.safetensors"
    assert sorted(load_file(weights)) == ["first.weight", "head.bias", "head.weight"]
    with serving(model="tests.test_train:Tied", weights=weights, grpc_port=0, http_port=0, threads=1) as server:
        with TeacherClient(server.grpc_address) as client:
            logits = client.label(load("digits").test_x).logits
    record = json.loads(weights.with_suffix(".json").read_text())
    assert (logits.argmax(1).numpy() == load("digits").test_y).mean() == pytest.approx(record["accuracy"], abs=0.003)


def test_compare_does_not_believe_the_counters_of_another_server(teacher, tmp_path, capsys):
    with serving(**serve(tmp_path) | {"model_arguments": BUILD, "weights": save_other(tmp_path)}) as other:
        command = [
            "compare", "--methods", "kd", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "1",
            "--teacher-address", teacher.grpc_address, "--metrics-url", f"http://{other.http_address}/metrics",
            "--output", str(tmp_path), "--job", "believed",
        ]  # fmt: skip
        assert main(command) == 1
    assert "the server counts 0 samples asked by job believed-kd-s0, which asked 1437" in capsys.readouterr().err


def test_compare_takes_tokens_and_tls(trained, tmp_path, capsys, monkeypatch):
    authority = Authority(tmp_path, "ca")
    tokens, viewer = tmp_path / "tokens", tmp_path / "viewer"
    (student, line), (board, other) = new_token("red"), new_token("board", "viewer")
    add_token(tokens, line)
    add_token(tokens, other)
    viewer.write_text(f"{board}\n")
    monkeypatch.setenv("STUDENT_TOKEN", student)
    trust = served_with(authority.issue("127.0.0.1"))
    with serving(**serve(trained) | {"model_arguments": BUILD}, **trust, tokens_file=tokens) as server:
        command = [
            "compare", "--methods", "kd", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "1",
            "--teacher-address", server.grpc_address, "--metrics-url", f"https://{server.http_address}/metrics",
            "--tls-ca-file", str(authority.file), "--output", str(tmp_path / "out"), "--job", "guarded",
        ]  # fmt: skip
        assert main(command) == 1
        assert "HTTP Error 403: Forbidden); give a viewer's token as --metrics-token-file" in capsys.readouterr().err
        assert main([*command, "--metrics-token-file", str(viewer)]) == 0
    report = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(report)["runs"][0]["asked"] == 1437
    for secret in (student, board):
        assert secret not in report + capsys.readouterr().out
        assert not [path for path in (tmp_path / "out").rglob("*.json") if secret in path.read_text()]


def save_other(folder):
    data = load("digits")
    return save_checkpoint(folder, 1, build("cnn-tiny", channels=1, classes=10, size=8), data, {"accuracy": 0.1})


def test_another_runs_files_are_neither_mixed_nor_lost(tmp_path, capsys):
    command = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--output", str(tmp_path)]
    assert main([*command, "--epochs", "2"]) == 0
    assert main([*command, "--epochs", "1"]) == 1
    assert "holds another run's files" in capsys.readouterr().err
    assert (tmp_path / "epoch-0002.safetensors").exists()
    assert main([*command, "--epochs", "1", "--overwrite"]) == 0
    assert not (tmp_path / "epoch-0002.safetensors").exists()
    assert len(list(tmp_path.glob("events*"))) == 1


def test_a_repeated_seed_is_no_further_evidence(capsys):
    assert main(["compare", "--seeds", "0,0"]) == 2
    assert "seeds: Value error, give each once" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("student-worker 0.")


def test_a_run_stops_where_its_real_budget_ends(teacher, tmp_path, capsys):
    put(teacher, "/v1/budgets/default/jobs/bounded", unit="samples", limit=500)
    command = ["train", "--method", "unix", "--dataset", "digits", "--epochs", "2", "--job", "bounded", "--depth", "1"]
    address = ["--teacher-address", teacher.grpc_address, "--output", str(tmp_path)]
    assert main([*command, *address]) == 3
    told = capsys.readouterr().err
    assert "the budget of job 'bounded' of tenant 'default', 500 samples in all" in told
    record = json.loads((tmp_path / "epoch-0001.json").read_text())
    assert record["steps"] == 500 // 48
    assert metric(teacher, "preceptor_samples_total", job="bounded") == 48 * (500 // 48)
