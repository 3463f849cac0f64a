"""What `launch` takes, what it lets travel to a cluster, and how it shows a log; the cluster itself: test_ray_jobs."""

import json
import os
import pty
import subprocess
import sys
import termios

import pytest

from protos.settings import run_command
from student_worker.__main__ import main
from student_worker.config import CompareSettings, LaunchSettings, StatusSettings, StopSettings, TrainSettings
from student_worker.job_log import JobLog
from student_worker.travel import variables
from tests.serving import ROOT


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("STUDENT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def launch(capsys):
    """Runs `student-worker launch ...`; (status, settings that the command got, standard error)."""

    def run(*arguments):
        got = []
        commands = {
            "train": (TrainSettings, got.append),
            "launch": (LaunchSettings, got.append),
            "launch status": (StatusSettings, got.append),
            "launch stop": (StopSettings, got.append),
        }
        status = run_command("student-worker", commands, ["launch", *map(str, arguments)])
        return status, *got, capsys.readouterr().err

    return run


# ---------------------------------------------------------------- a command that is a group


def test_launch_is_a_command_and_a_group(launch, capsys):
    status, settings, _ = launch("--output", "/runs/a")
    assert (status, type(settings)) == (0, LaunchSettings)
    for word, kind in (("stop", StopSettings), ("status", StatusSettings)):
        status, settings, _ = launch(word, "raysubmit_1")
        assert (status, type(settings), settings.submission_id) == (0, kind, "raysubmit_1")
    assert launch("stpo", "raysubmit_1") == (
        2,
        "student-worker: unknown command 'launch stpo'; one of launch status, launch stop\n",
    )
    with pytest.raises(SystemExit) as left:
        launch("--help")
    assert left.value.code == 0
    assert "--entrypoint-num-gpus" in capsys.readouterr().out


# ---------------------------------------------------------------- what travels


def test_what_was_set_travels_by_whatever_way_it_came_and_means_the_same_there(launch, tmp_path, monkeypatch):
    config = tmp_path / "run.toml"
    config.write_text('student_arguments = {width = 8, act = "relu"}\nlearning_rate = 1e-3\nflip = true\nepochs = 9\n')
    monkeypatch.setenv("STUDENT_EPOCHS", "4")
    monkeypatch.setenv("STUDENT_JOB", 'a "quoted" name, 50 % ä')
    given = ["--output", "/runs/a", "--no-tls", "--teacher-address", "teacher:8001", "--seed", "-3"]
    status, settings, _ = launch("--config", config, *given, "--token-file", "/etc/token", "--address", "http://x:1")
    assert status == 0
    travelling = variables(settings)
    assert travelling == {
        "STUDENT_EPOCHS": "4",
        "STUDENT_FLIP": "true",
        "STUDENT_JOB": 'a "quoted" name, 50 % ä',
        "STUDENT_LEARNING_RATE": "0.001",
        "STUDENT_OUTPUT": "/runs/a",
        "STUDENT_SEED": "-3",
        "STUDENT_STUDENT_ARGUMENTS": '{"width": 8, "act": "relu"}',
        "STUDENT_TEACHER_ADDRESS": "teacher:8001",
        "STUDENT_TLS": "false",
        "STUDENT_TOKEN_FILE": "/etc/token",
    }
    monkeypatch.delenv("STUDENT_EPOCHS")
    for name, value in travelling.items():
        monkeypatch.setenv(name, value)
    there = []
    assert run_command("student-worker", {"train": (TrainSettings, there.append)}, ["train"]) == 0
    ours = settings.model_dump(include=set(TrainSettings.model_fields) - {"config"})
    assert there[0].model_dump(exclude={"config"}) == ours


def test_each_field_of_train_survives_the_journey(monkeypatch):
    """Set to what it is by default, so that a field added later is tried as well."""
    defaults = TrainSettings(_cli_parse_args=[])
    everything = TrainSettings(**{name: getattr(defaults, name) for name in TrainSettings.model_fields})
    for name, value in variables(everything).items():
        monkeypatch.setenv(name, value)
    assert TrainSettings(_cli_parse_args=[]).model_dump() == defaults.model_dump()


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        ([], {}, "output: give a folder on the cluster, by its absolute path"),
        (["--output", "runs/a"], {}, "output: runs/a would be looked for wherever the cluster runs the job"),
        (["--output", "/r", "--token-file", "a.token"], {}, "token_file: a.token would be looked for"),
        (["--output", "/r", "--token", "secret-1"], {}, "a process list shows every flag"),
        (["--output", "/r"], {"STUDENT_TOKEN": "secret-1"}, "token: STUDENT_TOKEN would stand in the job's descrip"),
        (["--output", "/r", "--token-file", "/w/a", "--working-dir", "/w"], {}, "/w holds /w/a, which would be upl"),
        (["--output", "/r", "--epochs", "0"], {}, "epochs: Input should be greater than or equal to 1"),
    ],
)
def test_what_would_go_wrong_there_is_refused_here(given, environment, words, launch, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, said = launch(*given)
    assert status == 2
    assert words in said
    assert "secret-1" not in said


def test_the_token_does_not_travel_even_where_it_is_known(launch, monkeypatch):
    monkeypatch.setenv("STUDENT_TOKEN", "secret-1")
    status, settings, _ = launch("--output", "/r", "--token-file", "/etc/token")
    assert status == 0
    assert "secret-1" not in str(variables(settings))
    assert set(variables(settings)) == {"STUDENT_OUTPUT", "STUDENT_TOKEN_FILE"}


def test_a_secret_is_kept_from_every_settings_that_inherit_it():
    assert "token" in LaunchSettings.never_flags
    assert "token" in CompareSettings.never_flags


def test_a_token_that_came_with_the_jobs_description_is_not_used(monkeypatch, capsys):
    """As Ray tells it a job's process (seen with Ray 2.60); test_ray_jobs has it from Ray itself."""
    told = {"runtime_env": {"env_vars": {"STUDENT_TOKEN": "secret-1", "STUDENT_EPOCHS": "0"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    assert main(["train", "--epochs", "0"]) == 2
    said = capsys.readouterr().err
    assert "revoke that token, and give --token-file" in said
    assert "secret-1" not in said
    for harmless in ({"env_vars": {"STUDENT_TOKEN_FILE": "/etc/token"}}, None, {}):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": harmless}))
        assert main(["train", "--epochs", "0"]) == 2
        assert "epochs: Input should be" in capsys.readouterr().err


# ---------------------------------------------------------------- its log


def test_a_log_that_begins_again_is_shown_once_and_by_whole_lines(capsys):
    with JobLog("a") as log:
        assert log.read(0, "one\ntw") == 6
        assert capsys.readouterr().out == "one\n"
        assert log.read(6, "o\nthr") == 11
        assert log.read(0, "one\ntwo\n") == 8
        assert log.read(8, "three\nfour\nfi") == 21
        assert log.read(21, "ve") == 23
        assert capsys.readouterr().out == "two\nthree\nfour\n"
    said = capsys.readouterr()
    assert said.out == "five\n"
    assert said.err == ""


def test_a_terminal_gets_a_bar_of_epochs():
    program = (
        "from student_worker.job_log import JobLog\n"
        "with JobLog('run-7') as log:\n"
        "    log.read(0, '(RayTrainWorker pid=7) run-7: epoch 2/5, step 46, loss 0.1, accuracy 0.9321, 3 s\\n')\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "run-7:  40%" in shown
    assert "2/5" in shown
    assert "accuracy=0.9321" in shown
    assert done.stdout.endswith("accuracy 0.9321, 3 s\n")
