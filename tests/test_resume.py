"""A run that is killed with SIGKILL, wherever that is, and resumed ends with the weights of one that was not."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
import torch
from blake3 import blake3
from redis import Redis
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_worker.__main__ import main
from student_worker.config import TrainSettings
from student_worker.state import load_state
from tests.asking import put
from tests.dying import POINTS, mortals
from tests.redis_servers import AOF, running
from tests.serving import ROOT, free_port, process, until

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


def test_a_cache_that_forgets_changes_nothing(server, student, undisturbed, tmp_path):
    """Clean views, each asked about twice: by themselves, such answers come from the cache."""
    options = ("--mixing", "none", "--views", 1, "--depth", 1)
    server.forget_answers()
    whole = undisturbed(*options)
    server.forget_answers()
    output = tmp_path / "forgotten"
    life = command(server, output, *options)
    assert student(*life, point="between the reply and the optimiser's step", number=39)[0] == -9
    server.forget_answers()
    status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == whole


def test_killed_again_and_again(server, student, undisturbed, tmp_path):
    """While it replays, too."""
    whole = undisturbed("--depth", 1)
    output = tmp_path / "again"
    put(server, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=ASKED)
    life, step = command(server, output, "--depth", 1), "between the reply and the optimiser's step"
    assert student(*life, point="while the state is written", number=1)[0] == -9
    assert not (output / "state.pt").exists()
    deaths = [(step, 8), (step, 5), (step, 9), ("while an answer is written", 1), ("while the state is written", 1)]
    for point, number in [*deaths, ("while the log is rotated", 2), (step, 12)]:
        status, said = student(*life, "--resume", point=point, number=number)
        assert status == -9, said
    status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == whole


def test_a_student_that_draws_at_random_and_learns_from_labels_alone(student, tmp_path):
    plain = ["train", "--method", "hard+mixup", "--dataset", "digits", "--student", "tests.dying:Drawing"]
    # The second epoch: numpy's and Python's own generators are seeded by nobody, so only the same run can be compared.
    life = [*plain, "--epochs", 2, "--threads", 1, "--output", tmp_path / "run"]
    assert student(*life, trace=tmp_path / "first", point="before an epoch's state", number=3)[0] == -9
    assert student(*life, "--resume", trace=tmp_path / "second")[0] == 0
    first, second = ((tmp_path / name).read_text().split() for name in ("first", "second"))
    assert (len(first), len(second)) == (46, 23)
    assert second == first[23:]
    assert not (tmp_path / "run" / "answers.log").exists()


# ---------------------------------------------------------------- a teacher that never says the same twice


@pytest.fixture(scope="module")
def noisy(weights, tmp_path_factory):
    with served(tmp_path_factory.mktemp("noisy"), weights, "tests.dying:noisy") as server:
        yield server


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("every", [0, 10])
def test_what_was_learnt_before_the_kill_is_learnt_again_whoever_answers_now(noisy, student, tmp_path, depth, every):
    """Asked again, this teacher gives other answers: so what is the same in the end was kept, and not asked again."""
    output = tmp_path / f"run-{depth}-{every}"
    life = command(noisy, output, "--depth", depth, "--checkpoint-steps", every)
    point = {"point": "between the reply and the optimiser's step", "number": 20}
    assert student(*life, trace=tmp_path / "first", **point)[0] == -9
    shutil.copytree(output, tmp_path / "forgetful")
    status, said = student(*life, "--resume", trace=tmp_path / "second")
    assert status == 0, said
    first, second = ((tmp_path / name).read_text().split() for name in ("first", "second"))
    assert (len(first), len(second)) == (19, STEPS - every)
    assert second[: 19 - every] == first[every:]

    # The control: without the answers it would not be so.
    (tmp_path / "forgetful" / "answers.log").unlink()
    life = command(noisy, tmp_path / "forgetful", "--depth", depth, "--checkpoint-steps", every, "--job", output.name)
    assert student(*life, "--resume", trace=tmp_path / "third", point=point["point"], number=6)[0] == -9
    third = (tmp_path / "third").read_text().split()
    assert len(third) == 5
    assert third[-1] != first[every + 4]


# ---------------------------------------------------------------- a budget that is spent on the way


def test_stopped_for_want_of_budget_and_resumed_with_more(server, student, undisturbed, tmp_path):
    """Nothing that was paid for is paid again: the budget that is left is what an undisturbed run would need."""
    whole = undisturbed("--depth", 1)
    output = tmp_path / "poor"
    life = command(server, output, "--depth", 1)
    budget = f"/v1/budgets/default/jobs/{output.name}"
    put(server, budget, unit="samples", limit=ASKED // 2 + 11 * 48)
    status, said = student(*life)
    assert status == 3, said
    assert "and --resume goes on once there is budget" in said
    status, said = student(*life, "--resume")
    assert status == 3, said
    assert "goes on after step 30" in said
    put(server, budget, unit="samples", limit=ASKED)
    status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == whole


def test_a_run_that_went_over_to_labels_stays_with_them(server, student, tmp_path):
    """Else it would be another run than the one that was killed, which may have learnt from labels for days."""
    runs = []
    for name in ("whole", "killed"):
        output = tmp_path / name
        budget = f"/v1/budgets/default/jobs/{name}"
        put(server, budget, unit="samples", limit=15 * 48)
        life = command(server, output, "--depth", 1, "--on-budget-spent", "hard-labels", "--checkpoint-steps", 0)
        if name == "killed":
            step = "between the reply and the optimiser's step"
            assert student(*life, point=step, number=9)[0] == -9  # the teacher's
            assert student(*life, "--resume", point=step, number=20)[0] == -9  # the labels'
            put(server, budget, unit="samples", limit=10**6)
            life.append("--resume")
        status, said = student(*life)
        assert status == 0, said
        runs.append(ended(output))
    assert runs[0] == runs[1]
    assert runs[0][1]["taught"] < 16


# ---------------------------------------------------------------- what can be resumed, and what not


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


def test_another_teacher_is_refused_and_the_state_stays(server, noisy, student, undisturbed, tmp_path):
    output = tmp_path / "constant"
    life = command(server, output, "--depth", 1)
    assert student(*life, point="between the reply and the optimiser's step", number=28)[0] == -9
    kept = {name: (output / name).read_bytes() for name in ("state.pt", "answers.log", "epoch-0001.safetensors")}
    status, said = student(*life, "--resume", "--teacher-address", noisy.address)
    assert status == 1
    assert re.search(r"fingerprint: this run began with \w+, .* serves \w+; bring that teacher back", said)
    assert {name: (output / name).read_bytes() for name in kept} == kept
    status, said = student(*life, "--resume", "--teacher-address", f"{noisy.address},{server.address}")
    if status:  # which of two addresses answers first is not ours to say; the first teacher's alone will do
        status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == undisturbed("--depth", 1)


def test_the_curves_have_each_step_once(server, student, tmp_path):
    output = tmp_path / "curves"
    life = command(server, output, "--depth", 1)
    assert student(*life, point="between the reply and the optimiser's step", number=36)[0] == -9
    assert student(*life, "--resume")[0] == 0
    events = EventAccumulator(str(output)).Reload()
    for curve, steps in (("train/loss", range(1, 47)), ("test/accuracy", (23, 46)), ("unix/share", range(1, 47))):
        assert [event.step for event in events.Scalars(curve)] == [*steps]


def test_killed_from_outside_whenever_that_is(server, student, undisturbed, tmp_path):
    """A process as users start it; whoever kills it knows nothing of what it is doing."""
    output = tmp_path / "outside"
    put(server, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=ASKED)
    words = [str(word) for word in command(server, output, "--depth", 1)]
    log = output / "answers.log"
    with subprocess.Popen([sys.executable, "-m", "student_worker", *words], cwd=ROOT) as training:
        until(lambda: training.poll() is not None or (log.exists() and log.stat().st_size > 12_000))
        training.kill()
    assert training.returncode == -9
    status, said = student(*words, "--resume")
    assert status == 0, said
    assert ended(output) == undisturbed("--depth", 1)
