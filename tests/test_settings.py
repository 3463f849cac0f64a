"""One definition is flag, environment variable and TOML key; whatever is unknown or out of range is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protos.settings import run_command
from student_worker.config import CompareSettings, TrainSettings
from teacher_server.config import ServeOnRaySettings, ServeSettings
from teacher_server.ledger_settings import ShowSettings

COMMANDS = {
    "train": (TrainSettings, lambda settings: sys.stdout.write(f"{settings.epochs} {settings.crop}\n") and 0),
    "compare": (CompareSettings, lambda settings: sys.stdout.write(f"{settings.methods} {settings.seeds}\n") and 0),
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("STUDENT_")]:
        monkeypatch.delenv(name)


def run(*arguments):
    return run_command("student-worker", COMMANDS, list(arguments))


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.toml"
    config.write_text("epochs = 3\ncrop = 1\n")
    assert run("train", "--config", str(config)) == 0
    monkeypatch.setenv("STUDENT_EPOCHS", "4")
    assert run("train", "--config", str(config)) == 0
    assert run("train", "--config", str(config), "--epochs", "5") == 0
    monkeypatch.setenv("STUDENT_CONFIG", str(config))
    assert run("train") == 0
    assert capsys.readouterr().out.splitlines() == ["3 1", "4 1", "5 1", "4 1"]


@pytest.mark.parametrize("given", [["--methods", "hard,kd"], ["--methods", "hard", "--methods", "kd"]])
def test_lists_are_given_with_commas_or_repeated(given, capsys):
    assert run("compare", *given, "--seeds", "1,2") == 0
    assert capsys.readouterr().out == "('hard', 'kd') (1, 2)\n"


@pytest.mark.parametrize(
    ("arguments", "variables", "file", "message"),
    [
        (["--epochs", "0"], {}, "", "epochs: Input should be greater than or equal to 1, got '0' (--epochs)"),
        (["--method", "kld"], {}, "", "method: Input should be 'hard'"),
        ([], {"STUDENT_EPOCH": "3"}, "", "unknown environment variable: STUDENT_EPOCH; did you mean STUDENT_EPOCHS?"),
        ([], {"STUDENT_EPOCHS": "many"}, "", "epochs: Input should be a valid integer"),
        ([], {}, "epoch = 3", "did you mean epochs?"),
        ([], {}, "[unix]\nkeep = 1", "unknown key in"),
        ([], {}, "epochs = ", "cannot be read"),
        (["--config", "nowhere.toml"], {}, "", "no file at nowhere.toml"),
    ],
)
def test_what_is_wrong_is_named_with_its_value(arguments, variables, file, message, tmp_path, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        (tmp_path / "run.toml").write_text(file)
        arguments = ["--config", str(tmp_path / "run.toml")]
    assert run("train", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_password_in_a_url_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEACHER_OTLP_ENDPOINT", "http://user:secret-1@127.0.0.1:4317")
    config = tmp_path / "serve.toml"
    config.write_text('model = "m:m"\nweights = "w"\nledger_redis_url = ["redis://:secret-2@127.0.0.1"]\n')
    assert run_command("teacher-server", {"serve": (ServeSettings, print)}, ["serve", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "'http://...@127.0.0.1:4317' (--otlp-endpoint)" in said
    assert "--ledger-redis-url" in said
    assert "secret" not in said


SERVE = {"model": "m:m", "weights": "w"}


def test_replicas_have_ports_of_their_own():
    assert (ServeOnRaySettings(**SERVE).grpc_port, ServeOnRaySettings(**SERVE).http_port) == (0, 0)
    assert ServeOnRaySettings(**SERVE, grpc_port=8001, advertise_address="a:8001").grpc_port == 8001, "there is one"
    for wrong, said in (
        ({"min_replicas": 2, "grpc_port": 8001}, "grpc_port: 8001 can be one replica's alone"),
        ({"max_replicas": 2, "http_port": 8000}, "http_port: 8000 can be one replica's alone"),
        ({"max_replicas": 2, "advertise_address": "a:8001"}, "advertise_address: a:8001 can be one replica's alone"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas: 2 is less than --min-replicas 3"),
    ):
        with pytest.raises(ValueError, match=said):
            ServeOnRaySettings(**SERVE, **wrong)
    assert ServeOnRaySettings(**SERVE, max_replicas=2, advertise_address="a").advertise_address == "a"


def test_one_file_serves_all_of_the_servers_commands(tmp_path, capsys):
    file = tmp_path / "teacher.toml"
    file.write_text('model = "m:m"\nweights = "w"\nmax_replicas = 4\nledger_redis_url = "redis://127.0.0.1:1"\n')
    commands = {
        "serve": (ServeSettings, lambda settings: sys.stdout.write(f"{settings.model} ") and 0),
        "serve-on-ray": (ServeOnRaySettings, lambda settings: sys.stdout.write(f"{settings.max_replicas} ") and 0),
        "ledger show": (ShowSettings, lambda settings: sys.stdout.write(f"{settings.audit} ") and 0),
    }
    for words in (["serve"], ["serve-on-ray"], ["ledger", "show"]):
        assert run_command("teacher-server", commands, [*words, "--config", str(file)]) == 0
    assert capsys.readouterr().out.split() == ["m:m", "4", "False"]


def test_an_unknown_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as left:
        run("train", "--epoch-count", "3")
    assert left.value.code == 2
    assert "unrecognized arguments: --epoch-count" in capsys.readouterr().err


def test_what_kubernetes_adds_to_the_environment_is_not_ours(monkeypatch, capsys):
    monkeypatch.setenv("STUDENT_PORT", "tcp://10.0.0.1:8001")
    monkeypatch.setenv("STUDENT_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("STUDENT_PORT_8001_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("STUDENT_GRPC_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("STUDENT_METRICS_PORT_9090_TCP_ADDR", "10.0.0.1")
    assert run("train", "--epochs", "2") == 0
    assert capsys.readouterr().out == "2 0\n"


def test_a_port_of_no_service_is_a_typo(monkeypatch, capsys):
    monkeypatch.setenv("STUDENT_PORT", "9000")
    assert run("train") == 2
    assert "unknown environment variable: STUDENT_PORT" in capsys.readouterr().err


def test_no_command_and_unknown_commands_list_what_there_is(capsys):
    assert run() == 2
    assert run("--help") == 0
    assert "train    Train a student" in capsys.readouterr().out
    assert run("trian") == 2
    assert "unknown command 'trian'; one of train, compare" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["teacher_server", "student_worker"])
def test_both_programs_answer_help(program):
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "commands:" in done.stdout


@pytest.mark.parametrize("given", [["--token", "secret-1"], ["--token=secret-1"]])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_token_is_no_flag(command, given, capsys):
    assert run(command, *given) == 2
    said = capsys.readouterr().err
    assert "a process list shows every flag, so this is none; set STUDENT_TOKEN, or give --token-file" in said
    assert "secret-1" not in said
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert "--token " not in capsys.readouterr().out


def test_a_token_comes_from_the_environment_or_from_a_file_which_wins(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("from-file\n")
    got = []
    commands = {"train": (TrainSettings, lambda settings: got.append(settings) or 0)}
    assert run_command("student-worker", commands, ["train"]) == 0
    monkeypatch.setenv("STUDENT_TOKEN", "from-environment")
    assert run_command("student-worker", commands, ["train"]) == 0
    assert run_command("student-worker", commands, ["train", "--token-file", str(tmp_path / "token")]) == 0
    assert [settings.bearer_token() for settings in got] == [None, "from-environment", "from-file"]
    for settings in got:  # as checkpoints and reports keep them
        assert "from-" not in repr(settings) + str(settings.model_dump(mode="json"))
