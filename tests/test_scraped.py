"""Where a student's page is found, who is told of it, and that a run's last values are seen."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from protos.targets import Targets
from student_worker import Metrics
from student_worker.__main__ import main
from student_worker.config import TrainSettings
from student_worker.scraped import Page, local_host
from student_worker.sweep_settings import SweepSettings
from tests.serving import ROOT, until
from tests.test_student_metrics import DIGITS, fetched, told_in

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
