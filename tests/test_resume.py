"""A run that is killed with SIGKILL, wherever that is, and resumed ends with the weights of one that was not."""

import json
from contextlib import ExitStack, contextmanager

import pytest
from redis import Redis
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_worker.__main__ import main
from tests.asking import put
from tests.dying import POINTS, mortals
from tests.redis_servers import AOF, running
from tests.serving import free_port, process

BUILD = {"name": "cnn-tiny", "channels": 1, "classes": 10, "size": 8}
STEPS = 46  # two epochs of 23
ASKED = 2 * (22 * 48 + 22)  # samples of an undisturbed run


class Server:
    """A teacher's server in a process of its own, with Redis servers of the tests'."""

    def __init__(self, address, http_address, cache, ledger):
        self.address, self.http_address = address, http_address
        self.cache, self.ledger = cache, ledger

    def forget_answers(self):
        with Redis.from_url(self.cache) as cache:
            cache.flushall()


@contextmanager
def served(folder, weights, model="student_worker.models:build"):
    # One forward thread, and batches as large as a query: one query is one batch, whoever else asks, so that a query
    # that is asked again, for its answer never arrived, gets the same bits. What a run does with the answers that it
    # got is ours to show, and does not depend on this (see the noisy teacher).
    settings = {"max_batch_size": 64, "threads": 1, "grpc_port": 0, "http_port": 0}
    with ExitStack() as stack:
        urls = []
        for name, options in (("cache", ()), ("ledger", AOF)):
            (folder / name).mkdir()
            port = free_port()
            stack.enter_context(running(folder / name, "--port", str(port), *options))
            urls.append(f"redis://127.0.0.1:{port}")
        cache, ledger = urls
        _, address, http_address = stack.enter_context(
            process(
                model=model,
                model_arguments=json.dumps(BUILD),
                weights=weights,
                **settings,
                environment=None,
                cache_redis_url=cache,
                ledger_redis_url=ledger,
            )
        )
        yield Server(address, http_address, cache, ledger)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    command = ["train", "--method", "hard", "--dataset", "digits", "--student", "cnn-tiny", "--epochs", "6"]
    assert main([*command, "--output", str(output)]) == 0
    return output / "epoch-0006.safetensors"


@pytest.fixture(scope="module")
def server(weights, tmp_path_factory):
    with served(tmp_path_factory.mktemp("server"), weights) as server:
        yield server


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    with mortals(tmp_path_factory.mktemp("mortals")) as student:
        yield student


def command(server, output, *options):
    plain = ["--dataset", "digits", "--student", "cnn-tiny", "--epochs", 2, "--threads", 1, "--checkpoint-steps", 10]
    return ["train", *plain, "--teacher-address", server.address, "--job", output.name, "--output", output, *options]


def ended(output):
    """The weights of the last epoch, to the last bit, and what was counted on the way."""
    record = json.loads((output / "epoch-0002.json").read_text())
    counted = {key: record[key] for key in ("steps", "loss", "accuracy", "asked", "taught", "scored", "learnt")}
    return (output / "epoch-0002.safetensors").read_bytes(), counted


@pytest.fixture(scope="module")
def undisturbed(server, student, tmp_path_factory):
    """What a run with these options ends with; each is run once."""
    known = {}

    def run(*options):
        if options not in known:
            output = tmp_path_factory.mktemp("undisturbed")
            status, said = student(*command(server, output, *options))
            assert status == 0, said
            known[options] = ended(output)
        return known[options]

    return run


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("when an answer has come, before it is kept", 28),
        ("while an answer is written", 28),
        ("between the reply and the optimiser's step", 28),
        ("between the step and its end", 34),
        ("while the state is written", 3),
        ("between the state and the log's rotation", 3),
        ("while the log is rotated", 4),
        ("while an epoch's weights are written", 1),
        ("before an epoch's state", 4),
    ],
)
def test_killed_and_resumed_is_never_killed(server, student, undisturbed, tmp_path, point, number, depth):
    options = ("--depth", depth)
    whole = undisturbed(*options)
    # Exactly what an undisturbed run costs: were a single answer charged twice, the run could not end.
    output = tmp_path / f"killed-{depth}-{list(POINTS).index(point)}"
    put(server, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=ASKED)
    status, said = student(*command(server, output, *options), point=point, number=number)
    assert status == -9, said
    server.forget_answers()
    status, said = student(*command(server, output, *options, "--resume"))
    assert status == 0, said
    assert f"{output.name}: goes on after step" in said
    assert ended(output) == whole
