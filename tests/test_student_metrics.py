"""What a student tells Prometheus: the numbers of its run, where they are found, and that the last ones are seen."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from protos.targets import Targets
from student_worker import Metrics, TeacherClient, Unix
from student_worker.__main__ import main
from student_worker.config import TrainSettings
from student_worker.scraped import Page, local_host
from student_worker.sweep_settings import SweepSettings
from teacher_server.tokens import digest_of
from tests.asking import metric, pixels
from tests.serving import ROOT, serving, until
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


HOLDS = """
import sys
from pathlib import Path
from protos.targets import Targets

with Targets(Path(sys.argv[1]), "mortal-0") as targets:
    targets.write(["127.0.0.1:1"])
    print("there", flush=True)
    sys.stdin.read()
"""


def test_a_killed_run_leaves_its_file_to_the_next(tmp_path):
    targets = tmp_path / "targets"
    run = [*DIGITS, "--method", "hard", "--epochs", "1", "--job", "mortal", "--metrics-targets", str(targets)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(targets)], cwd=ROOT, **pipes) as mortal:
        assert mortal.stdout.readline() == "there\n"
        (alive,) = told_in(targets)
        # While it lives, others of its name leave its file alone; theirs go with them, also where they fail.
        with Targets(targets, "mortal-0"):
            assert len(told_in(targets)) == 2
        assert main([*run, "--output", str(tmp_path / "a"), "--device", "cuda:99"]) == 1
        assert [*told_in(targets)] == [alive]
        mortal.kill()
    with Targets(targets, "mortal"), Targets(targets, "mortal-0-0"):
        assert alive in told_in(targets), "these are of other names"
    assert main([*run, "--output", str(tmp_path / "b")]) == 0
    assert list(targets.iterdir()) == []


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


# ---------------------------------------------------------------- where it is found


def test_a_port_that_is_taken_is_named_with_the_fix(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = [*DIGITS, "--method", "hard", "--output", str(tmp_path), "--metrics-port", str(port)]
        assert main(given) == 1
    said = f"metrics_port: {port} of 127.0.0.1 is taken; give another --metrics-port, or 0 for a free one"
    assert capsys.readouterr().err == f"student-worker: {said}\n"
    for wrong, settings in (({"num_workers": 2}, TrainSettings), ({"space": {"seed": [1]}}, SweepSettings)):
        with pytest.raises(ValueError, match=r"metrics_port: 9101 can be one .*; give --metrics-targets, or 0"):
            settings(**wrong, metrics_port=9101)


def test_a_folder_that_cannot_be_written_is_named_with_the_fix(tmp_path, capsys):
    (tmp_path / "file").touch()
    given = [*DIGITS, "--method", "hard", "--output", str(tmp_path), "--metrics-targets", str(tmp_path / "file/in")]
    assert main(given) == 1
    assert f"metrics_targets: {tmp_path}/file/in cannot be written (Not a directory); give" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["a/../../b", "..", ".hidden", "*?[a]", "ü" * 100, "a" * 300, "a\nb"])
def test_no_name_leads_out_of_the_folder(job, tmp_path):
    folder = tmp_path / "in/here"
    old = os.umask(0o077)
    try:
        with Targets(folder, job) as targets:
            targets.write(["[::1]:1", "b:2"])
            (path,) = tmp_path.rglob("*.json")
            assert path.parent == folder
            assert path.stat().st_mode & 0o777 == 0o644, "Prometheus is another user"
            assert told_in(folder) == {path.name: ["[::1]:1", "b:2"]}
            with Targets(folder, job + "x"), Targets(folder, job) as second:
                assert len(told_in(folder)) == 3
                second.write(["c:3"])
            assert told_in(folder) == {path.name: ["[::1]:1", "b:2"]}
    finally:
        os.umask(old)
    assert list(folder.iterdir()) == []


def test_the_page_is_where_the_teacher_is_reached_from():
    assert local_host([]) == "127.0.0.1"
    assert local_host(["127.0.0.1:8001"]) == local_host(["localhost:8001"]) == "127.0.0.1"
    assert local_host(["no.such.host.invalid:1", "127.0.0.1:8001"]) == "127.0.0.1"
    assert local_host(["dns:///127.0.0.1:8001"]) == "127.0.0.1"
    assert local_host(["[::1]:8001"]) == local_host(["dns:///[::1]:8001"]) == "::1"
    with pytest.raises(OSError, match=r"metrics_port: no way from here to no\.such\.host\.invalid:1"):
        local_host(["no.such.host.invalid:1"])
    with Page("::1", 0, lambda: b"page", "text/plain; version=0.0.4") as page:
        assert re.fullmatch(r"\[::1\]:\d+", page.address)
        assert fetched(page.url) == "page"


# ---------------------------------------------------------------- the end


@pytest.fixture
def page():
    with Page("127.0.0.1", 0, lambda: b"page", "text/plain; version=0.0.4") as page:
        yield page


def test_how_long_another_scrape_is_waited_for(page):
    assert page.patience() == 0
    began = time.monotonic()
    fetched(page.url)
    assert page.patience() == 15
    time.sleep(0.5)
    fetched(page.url)
    fetched(page.url)  # a second Prometheus, which tells nothing of the interval of either
    assert 0 < page.patience() <= 2 * (time.monotonic() - began)
    until(lambda: page.patience() == 0)  # they do not come any more
    for _ in range(5):
        fetched(page.url)
    assert page.patience() < 0.5, "it is of the last scrapes"


def test_only_a_scrape_that_begins_afterwards_has_the_last_values():
    began, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def content():
        began.release()
        assert go_on.acquire(timeout=30)
        return b"page"

    with Page("127.0.0.1", 0, content, "text/plain; version=0.0.4") as page:
        early, late = (threading.Thread(target=fetched, args=(page.url,)) for _ in range(2))
        early.start()
        assert began.acquire(timeout=30)
        waited = []
        waiting = threading.Thread(target=lambda: waited.append(page.wait(time.monotonic(), 60)))
        waiting.start()
        time.sleep(0.1)
        go_on.release()
        early.join()
        assert not page.wait(time.monotonic(), 0.1)
        assert not waited
        late.start()
        assert began.acquire(timeout=30)
        assert not waited, "it has no answer yet"
        go_on.release()
        late.join()
        waiting.join(30)
        assert waited == [True]


def test_nobody_is_waited_for_after_an_error():
    said = []
    with suppress(ZeroDivisionError), Metrics(None, None, say=said.append) as metrics:
        fetched(metrics.url)
        raise ZeroDivisionError
    assert len(said) == 1, "where its metrics are"
