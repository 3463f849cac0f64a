"""What can be resumed, and what not: by whom, with which settings, from which file."""

import io
import re
import shutil
import subprocess
import sys

import pytest
import torch
from blake3 import blake3

from student_worker.checkpoints import held
from student_worker.config import TrainSettings
from student_worker.state import load_state
from tests.dying import mortals
from tests.serving import ROOT


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    with mortals(tmp_path_factory.mktemp("mortals")) as student:
        yield student


@pytest.fixture(scope="module")
def finished(student, tmp_path_factory):
    """A run from labels that has ended, whose files are not to be changed, and its command."""
    output = tmp_path_factory.mktemp("finished")
    life = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", 2, "--seed", 3]
    life = [*life, "--output", output]
    status, said = student(*life)
    assert status == 0, said
    return output, life


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_has_ended_says_so(student, finished):
    output, life = finished
    before = files(output)
    status, said = student(*life, "--resume", "--teacher-address", "nobody:1")
    assert status == 0
    assert "train: had ended already, with 46 steps" in said
    assert re.search(r"train \(hard\): test accuracy \d\d\.\d\d% after 46 steps", said)
    assert files(output) == before
    status, said = student(*life)
    assert status == 1
    assert "or --resume to go on with that run" in said
    assert files(output) == before


def test_where_nothing_is_to_be_resumed_it_begins(student, tmp_path):
    life = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", 1]
    life = [*life, "--output", tmp_path / "run", "--resume"]
    assert student(*life, point="while the state is written", number=1)[0] == -9
    assert not list((tmp_path / "run").glob("state.pt"))
    status, said = student(*life)
    assert status == 0
    assert f"train: nothing to resume, there is no {tmp_path / 'run' / 'state.pt'}; begins" in said
    (tmp_path / "run" / "state.pt").unlink()
    status, said = student(*life)  # epochs without a state are of a run that nobody can go on with
    assert status == 1
    assert "holds another run's files" in said
    assert student(*life, "--overwrite")[0] == 0


def test_other_settings_are_another_run(student, finished, tmp_path):
    output, life = finished
    before = files(output)
    status, said = student(*life, "--resume", "--seed", 4, "--learning-rate", 0.2, "--job", "mine")
    assert status == 1
    assert "job was 'train' and is 'mine'; learning_rate was 0.1 and is 0.2; seed was 3 and is 4." in said
    assert files(output) == before
    free = ["--teacher-address", "a:1", "--checkpoint-steps", 7, "--teacher-timeout", 3, "--overwrite", "--tls"]
    status, said = student(*life, "--resume", *free)
    assert status == 0, said
    moved = shutil.copytree(output, tmp_path / "moved")
    assert student(*life, "--resume", "--output", moved)[0] == 0


def test_every_setting_is_known_to_decide_or_not():
    """A new one decides, unless somebody says that it does not: then a run is refused, and not another in silence."""
    assert set(TrainSettings.model_fields) - TrainSettings.free_on_resume == set(TrainSettings().deciding())
    assert TrainSettings.free_on_resume <= set(TrainSettings.model_fields)
    assert {"seed", "job", "threads", "device", "cache_namespace", "dataset"} <= set(TrainSettings().deciding())


def test_a_damaged_state_or_another_versions_is_refused(finished, tmp_path):
    output, _ = finished
    settings = TrainSettings(method="hard", dataset="digits", student="cnn-tiny", epochs=2, seed=3)
    content = (output / "state.pt").read_bytes()
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    assert load_state(path, settings).finished
    for place in (0, 30, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:place])
        with pytest.raises(ValueError, match=r"state\.pt is damaged"):
            load_state(path, settings)
        spoilt = bytearray(content)
        spoilt[place] ^= 255
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"state\.pt is damaged"):
            load_state(path, settings)
    later = io.BytesIO()
    torch.save({"version": 2, "shared": {}, "own": {}}, later)
    path.write_bytes(later.getvalue() + blake3(later.getvalue()).digest(length=16))
    with pytest.raises(ValueError, match="has version 2, this program reads version 1: resume with the program that"):
        load_state(path, settings)


def test_a_run_that_is_under_way_is_nobody_elses(student, finished):
    """Two processes that go on with one run, or one that clears another's folder, would lose each other's answers."""
    output, life = finished
    with held(output):
        before = files(output)
        for options in (["--resume"], ["--overwrite"], []):
            status, said = student(*life, *options)
            assert status == 1
            assert re.search(rf"output: in {output} another run is at work, process \d+ on .*; wait until", said)
        assert files(output) == before
    assert student(*life, "--resume")[0] == 0


HOLDING = "import sys; from pathlib import Path; from student_worker.checkpoints import held\n"
HOLDING += "with held(Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"


def test_what_a_killed_process_held_is_free_and_a_successor_waits_for_it(tmp_path):
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "cwd": ROOT,
        "text": True,
    }
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        said = [process.stdout.readline() for process in (first, second)]
        assert sorted(said) == ["", "here\n"]
        holder, refused = (first, second) if said[0] else (second, first)
        assert refused.wait(20) == 1
        with pytest.raises(ValueError, match=f"process {holder.pid} on "), held(tmp_path):
            pass
        holder.kill()
        with held(tmp_path, patience=20):
            pass
    assert list(tmp_path.iterdir()) == []
