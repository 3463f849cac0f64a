"""A run whose teacher is replaced by another on the way ends, says why, and goes on once that teacher is back."""

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest

from protos import teacher_pb2 as pb
from student_worker.__main__ import main
from tests.asking import stub_at
from tests.redis_servers import AOF, running
from tests.serving import ROOT, free_port, process, until

pytestmark = pytest.mark.timeout(180)
EPOCHS, STEPS = 8, 8 * 23


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of two teachers that differ in nothing else."""
    found = []
    for seed in (0, 1):
        output = tmp_path_factory.mktemp("teacher")
        command = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "1"]
        assert main([*command, "--seed", str(seed), "--output", str(output)]) == 0
        found.append(output / "epoch-0001.safetensors")
    return found


def fingerprint_at(address):
    with stub_at(address) as stub:
        return stub.Describe(pb.DescribeRequest(), timeout=10).teachers[0].fingerprint


@pytest.mark.parametrize("listed", [False, True], ids=["at an address", "in a list"])
def test_a_run_whose_teacher_is_replaced_ends_keeps_its_state_and_goes_on_when_it_is_back(weights, tmp_path, listed):
    address = f"127.0.0.1:{free_port()}"
    output = tmp_path / "run"
    state, log = output / "state.pt", output / "answers.log"
    words = ["train", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", EPOCHS, "--checkpoint-steps", 20]
    words += ["--threads", 1, "--teacher-address", address, "--teacher-timeout", 12, "--output", output]
    command = [sys.executable, "-m", "student_worker", *map(str, words)]
    shared = {}

    def serving(number):
        return process(
            model="student_worker.models:build",
            model_arguments=json.dumps({"name": "cnn-tiny", "channels": 1, "classes": 10, "size": 8}),
            weights=weights[number],
            grpc_port=address.rpartition(":")[2],
            http_port=0,
            threads=1,
            **shared,
        )

    with ExitStack() as stack:
        if listed:  # as replicas that share a ledger are
            port = free_port()
            stack.enter_context(running(tmp_path, *AOF, "--port", str(port)))
            shared["ledger_redis_url"] = f"redis://127.0.0.1:{port}"
        with serving(0) as (first, _, _):
            fingerprints = [fingerprint_at(address)]
            training = stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(training.kill)
            until(lambda: training.poll() is not None or (state.exists() and log.stat().st_size > 12_000))
            first.kill()
            first.wait(10)
        with serving(1):
            fingerprints.append(fingerprint_at(address))
            said = training.communicate(timeout=60)[1]
        assert training.returncode == 1, said
        ours, theirs = fingerprints
        last = said.splitlines()[-1]
        assert all(word in last for word in (ours, theirs, address, "bring that teacher back, or begin a new run")), (
            last
        )
        assert "Traceback" not in said
        assert state.exists()
        with serving(0):
            subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True, timeout=120)
        assert json.loads((output / f"epoch-{EPOCHS:04}.json").read_text())["steps"] == STEPS
