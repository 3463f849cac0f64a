"""What a student tells Prometheus: the numbers of its run."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from student_worker import Metrics, TeacherClient, Unix
from student_worker.__main__ import main
from teacher_server.tokens import digest_of
from tests.asking import metric, pixels
from tests.serving import ROOT, serving
from tests.students import LocalTeacher, data, generator, net, train
from tests.test_system import small_student, to_student
from tests.test_train import BUILD, serve

N = 1437  # training digits
ASKED = 22 * 48 + 22  # of them in an epoch


def fetched(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        return reply.read().decode()


class Seen:
    """One page of a student's."""

    def __init__(self, text):
        families = text_string_to_metric_families(text)
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name, **labels):
        """The sum of a metric's samples with these labels; None where there are none."""
        found = [
            sample.value
            for sample in self.samples
            if sample.name == f"preceptor_student_{name}" and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    @property
    def labels(self):
        (info,) = [sample.labels for sample in self.samples if sample.name == "preceptor_student_info"]
        return info


def told_in(folder):
    """{file's name: its targets} of all files in a folder that Prometheus would read."""
    told = {}
    for path in folder.glob("*.json"):
        ((group),) = json.loads(path.read_text())
        assert group.keys() == {"targets", "labels"}
        assert group["labels"] == {}
        told[path.name] = group["targets"]
    return told


# ---------------------------------------------------------------- a run of `train`


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "tokens").write_text(f"{digest_of('r3d')} red\n{digest_of('0ps')} ops viewer\n")
    (folder / "red.token").write_text("r3d\n")
    assert main([*DIGITS, "--method", "hard", "--epochs", "1", "--output", str(folder / "run")]) == 0
    given = serve(folder / "run/epoch-0001.safetensors") | {"model_arguments": BUILD, "tokens_file": folder / "tokens"}
    with serving(**given) as server:
        yield server


DIGITS = ["train", "--dataset", "digits", "--student", "cnn-tiny"]


def student(teacher, folder, *given):
    """A run in a process of its own, whose standard error is to be read."""
    token = next(folder.parent.glob("teacher*/red.token"))
    command = [sys.executable, "-m", "student_worker", *DIGITS, "--teacher-address", teacher.grpc_address]
    command += ["--token-file", str(token), *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_run_of_train_as_prometheus_sees_it(teacher, tmp_path):
    targets = tmp_path / "not/there/yet"
    given = ["--epochs", 2, "--job", "seen/../it", "--output", tmp_path / "run", "--metrics-targets", targets]
    pages = []
    with student(teacher, tmp_path, *given) as training:
        for line in training.stderr:
            if "epoch 1/2" in line:
                ((name, (address,)),) = told_in(targets).items()
                pages.append(Seen(fetched(f"http://{address}/metrics")))
            elif "waits up to 15 s" in line:
                pages.append(Seen(fetched(f"http://{address}/metrics")))
        assert training.wait(30) == 0
    assert re.fullmatch(r"seen%2F..%2Fit-0-[0-9a-f]{16}\.json", name)
    assert address.startswith("127.0.0.1:")
    assert list(targets.iterdir()) == []
    first, last = pages
    assert first.labels == last.labels == {
        "tenant": "red", "job": "seen/../it", "rank": "0", "method": "unix", "dataset": "digits",
        "student": "cnn-tiny", "strategy": "entropy", "mixing": "adaptive",
        "fingerprint": teacher.description.fingerprint,
    }  # fmt: skip
    assert 23 <= first("steps_total") < last("steps_total") == last("reached_steps") == last("planned_steps") == 46
    assert first("asked_samples_total") < last("asked_samples_total")

    told = [json.loads((tmp_path / f"run/epoch-000{epoch}.json").read_text()) for epoch in (1, 2)]
    end = told[-1]
    assert last("accuracy_ratio") == end["accuracy"]
    assert last("loss_count") == last("teacher_wait_seconds_count") == 46
    assert last("loss_sum") == pytest.approx(23 * sum(record["loss"] for record in told))
    assert last("candidate_samples_total") == end["scored"] == 2 * N
    assert last("asked_samples_total") == end["asked"] == 2 * ASKED
    for source in ("computed", "cached", "coalesced"):
        assert last("answers_total", source=source) == end[source]
        labels = {"tenant": "red", "job": "seen/../it", "source": source}
        assert metric(teacher, "preceptor_samples_total", token="0ps", **labels) == end[source]
    asked = metric(teacher, "preceptor_asked_samples_total", token="0ps", tenant="red", job="seen/../it")
    assert asked == last("asked_samples_total")

    kept, dropped = "kept", "dropped"
    assert last("uncertainty_ratio_count", decision=kept) == 2 * ASKED
    assert last("uncertainty_ratio_count", decision=dropped) == 2 * (N - ASKED)
    of_kept = last("uncertainty_ratio_sum", decision=kept) / (2 * ASKED)
    assert 1 > of_kept > last("uncertainty_ratio_sum", decision=dropped) / (2 * (N - ASKED)) > 0
    assert last("uncertainty_ratio_bucket", decision=kept, le="1.0") == 2 * ASKED
    assert 0 < last("teacher_wait_seconds_sum") < last("step_seconds_sum") < end["seconds"]
    assert last("step_seconds_count") == 46, "the first one began when the state before it was written"


RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from student_worker.config import TrainSettings
from student_worker.ranks import joined
from student_worker.run import run

folder, rank, address, token = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
settings = TrainSettings(dataset="digits", epochs=2, batch_size=359, job="pair", threads=1, device="cpu",
                         output=Path(folder) / "run", teacher_address=address, token_file=token,
                         metrics_targets=Path(folder) / "targets")
with joined() as ranks:
    print(run(settings, ranks=ranks).asked, flush=True)
"""


def test_each_rank_exports_its_part(teacher, tmp_path):
    """Of a last batch of one sample, rank 1 has none."""
    token = next(tmp_path.parent.glob("teacher*/red.token"))
    command, more = [sys.executable, "-c", RANK, str(tmp_path)], [teacher.grpc_address, str(token)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank), *more], cwd=ROOT, **pipes) for rank in range(2)]
    try:
        pages = [[], []]
        for process, found in zip(processes, pages, strict=True):  # an early page, that the end is waited with
            line = next(line for line in process.stderr if "metrics at" in line)
            found.append(re.search(r"http\S+", line)[0])
            fetched(found[0])
        assert sorted(told_in(tmp_path / "targets").values()) == sorted([url[7:-8]] for (url,) in pages)
        last = []
        for process, (url,) in zip(processes, pages, strict=True):
            assert any("waits up to" in line for line in process.stderr)
            last.append(Seen(fetched(url)))
        assert [process.wait(30) for process in processes] == [0, 0]
        asked = int(processes[0].stdout.read())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    first, second = last
    assert [page.labels["rank"] for page in last] == ["0", "1"]
    assert {page.labels["tenant"] for page in last} == {"red"}
    assert first("steps_total") == second("steps_total") == first("loss_count") == second("loss_count") == 10
    told = [json.loads((tmp_path / f"run/epoch-000{epoch}.json").read_text()) for epoch in (1, 2)]
    assert first("loss_sum") + second("loss_sum") == pytest.approx(2 * 5 * sum(record["loss"] for record in told))
    assert [page("teacher_wait_seconds_count") for page in last] == [10, 8]
    assert first("asked_samples_total") + second("asked_samples_total") == asked
    assert first("candidate_samples_total") + second("candidate_samples_total") == 2 * N
    assert 0 < first("accuracy_ratio") < 1
    assert second("accuracy_ratio") is None
    assert not list((tmp_path / "targets").iterdir())


# ---------------------------------------------------------------- in a loop of one's own


def test_a_loop_of_ones_own(server):
    with TeacherClient(server.grpc_address, job="own-loop") as client:
        unix = Unix(client, keep=0.5, to_student=to_student, generator=generator())
        loader = [torch.from_numpy(pixels(64, seed=i)) for i in range(4)]
        network = small_student()
        with Metrics(unix, client, about={"dataset": "noise"}, planned_steps=4) as metrics:
            for b in unix.batches(loader, network):
                metrics.step(unix.criterion(network(b.x), b))
            metrics.accuracy(0.25)
            page = Seen(metrics.page().decode())
            assert unix.observer is metrics
            with pytest.raises(ValueError, match="leave its other Metrics first"):
                Metrics(unix, client).__enter__()
            with pytest.raises(urllib.error.HTTPError, match="404"):
                fetched(metrics.url[:-1])
    assert unix.observer is None
    with pytest.raises(urllib.error.URLError):
        fetched(metrics.url)
    assert page.labels["tenant"] == "default"
    assert page.labels["job"] == "own-loop"
    assert page("asked_samples_total") == metric(server, "preceptor_asked_samples_total", job="own-loop") == 4 * 32
    assert page("candidate_samples_total") == 2 * page("asked_samples_total"), "half is kept"
    assert page("steps_total") == page("loss_count") == page("planned_steps") == 4
    assert page("step_seconds_count") == page("teacher_wait_seconds_count") == 4
    assert page("teacher_wait_seconds_sum") < page("step_seconds_sum")
    assert page("accuracy_ratio") == 0.25
    assert (page.labels["method"], page.labels["dataset"], page.labels["student"]) == ("unix", "noise", "")


@pytest.mark.parametrize("strategy", ["random", "confidence", "margin", "entropy"])
@pytest.mark.parametrize("mixing", ["adaptive", "none"])
def test_being_watched_changes_no_bit(strategy, mixing):
    losses = []
    for watched in (False, True):
        unix = Unix(LocalTeacher(), strategy=strategy, mixing=mixing, generator=generator())
        if watched:
            with Metrics(unix, None) as metrics:
                losses.append(train(unix, data(5), net(1), after=lambda _, metrics=metrics: metrics.step()))
                page = Seen(metrics.page().decode())
        else:
            losses.append(train(unix, data(5), net(1)))
    assert losses[0] == losses[1]
    kept, dropped = (page("uncertainty_ratio_sum", decision=d) for d in ("kept", "dropped"))
    assert kept / (5 * 12) > dropped / (5 * 4)
    assert page("steps_total") == 5
    assert page("loss_count") == 0, "it was not told"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_loss_on_a_gpu_is_fetched_by_the_scrape_alone():
    losses = torch.arange(5.0, device="cuda").unbind()
    with Metrics(None, None) as metrics:
        for so_far in (10, 20):
            torch.cuda.set_sync_debug_mode("error")
            try:
                for loss in losses:
                    metrics.step(loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for _ in range(2):
                page = Seen(metrics.page().decode())
                assert (page("loss_sum"), page("loss_count")) == (so_far, so_far / 2)


def test_a_run_that_goes_on_says_how_far_it_is():
    unix = Unix(LocalTeacher(), generator=generator())
    train(unix, data(5), net(1))
    again = Unix(LocalTeacher(), generator=generator())
    again.load_state_dict(unix.state_dict())
    with Metrics(again, None, planned_steps=8) as metrics:
        train(again, data(3), net(1), after=lambda _: metrics.step(1.5))
        page = Seen(metrics.page().decode())
    assert [page(f"{name}_steps") for name in ("reached", "planned")] == [8, 8]
    assert [page(name) for name in ("steps_total", "loss_sum")] == [3, 4.5]
    assert page("asked_samples_total") == 3 * 12


def test_a_label_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"about: \['lr'\] are no labels; there are method, dataset"):
        Metrics(None, None, about={"lr": "0.1"})
