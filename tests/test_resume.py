"""A run that is killed with SIGKILL, wherever that is, and resumed ends with the weights of one that was not."""

import json
import re
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest
from redis import Redis
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_worker.__main__ import main
from tests.asking import put
from tests.dying import POINTS, mortals
from tests.redis_servers import AOF, running
from tests.serving import ROOT, free_port, process, until

pytestmark = pytest.mark.timeout(300)  # the first one trains a teacher and starts its server

BUILD = {"name": "cnn-tiny", "channels": 1, "classes": 10, "size": 8}
STEP = "between the reply and the optimiser's step"
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
    last = max(output.glob("epoch-*.safetensors"))
    record = json.loads(last.with_suffix(".json").read_text())
    counted = {key: record[key] for key in ("steps", "loss", "accuracy", "asked", "taught", "scored", "learnt")}
    return last.read_bytes(), counted


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
        (STEP, 28),
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
    assert "understands" not in said  # the check of a run's beginning, which would cost answers
    assert ended(output) == whole


@pytest.mark.parametrize("number", [3, 4])
def test_killed_where_a_step_that_keeps_a_state_ends_an_epoch(server, student, undisturbed, tmp_path, number):
    """Before the state behind the epoch's last step, and between that and the epoch's own."""
    output = tmp_path / f"boundary-{number}"
    put(server, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=ASKED)
    life = [*command(server, output, "--depth", 1), "--checkpoint-steps", 23]
    assert student(*life, point="before an epoch's state", number=number - 1)[0] == -9
    status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == undisturbed("--depth", 1)


def test_a_cache_that_forgets_changes_nothing(server, student, undisturbed, tmp_path):
    """Clean views, each asked about twice: by themselves, such answers come from the cache."""
    options = ("--mixing", "none", "--views", 1, "--depth", 1)
    server.forget_answers()
    whole = undisturbed(*options)
    server.forget_answers()
    output = tmp_path / "forgotten"
    life = command(server, output, *options)
    assert student(*life, point=STEP, number=39)[0] == -9
    server.forget_answers()
    status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == whole


def test_killed_again_and_again(server, student, undisturbed, tmp_path):
    """While it replays, too."""
    whole = undisturbed("--depth", 1)
    output = tmp_path / "again"
    put(server, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=ASKED)
    life = command(server, output, "--depth", 1)
    assert student(*life, point="while the state is written", number=1)[0] == -9
    assert not (output / "state.pt").exists()
    deaths = [(STEP, 8), (STEP, 5), (STEP, 9), ("while an answer is written", 1), ("while the state is written", 1)]
    for point, number in [*deaths, ("while the log is rotated", 2), (STEP, 12)]:
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
@pytest.mark.parametrize(
    ("every", "point", "number", "learnt", "resumed_from"),
    [
        (0, STEP, 20, 19, 0),
        (10, STEP, 20, 19, 10),
        (10, "while the state is written", 3, 20, 10),
        (0, "before an epoch's state", 2, 23, 0),
    ],
)
def test_what_was_learnt_before_the_kill_is_learnt_again_whoever_answers_now(
    noisy, student, tmp_path, depth, every, point, number, learnt, resumed_from
):
    """Asked again, this teacher gives other answers: so what is the same in the end was kept, and not asked again."""
    output = tmp_path / f"run-{depth}-{every}-{number}"
    put(noisy, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=ASKED)
    life = command(noisy, output, "--depth", depth, "--checkpoint-steps", every)
    assert student(*life, trace=tmp_path / "first", point=point, number=number)[0] == -9
    status, said = student(*life, "--resume", trace=tmp_path / "second")
    assert status == 0, said
    first, second = ((tmp_path / name).read_text().split() for name in ("first", "second"))
    assert (len(first), len(second)) == (learnt, STEPS - resumed_from)
    assert second[: learnt - resumed_from] == first[resumed_from:]


def test_without_its_answers_a_run_would_be_another_and_cost_more(noisy, student, tmp_path):
    """The control: this teacher does give other answers, and they do change what is learnt."""
    output = tmp_path / "forgetful"
    life = command(noisy, output, "--depth", 0)
    assert student(*life, trace=tmp_path / "first", point=STEP, number=16)[0] == -9
    (output / "answers.log").unlink()
    assert student(*life, "--resume", trace=tmp_path / "second", point=STEP, number=6)[0] == -9
    first, second = ((tmp_path / name).read_text().split() for name in ("first", "second"))
    assert (len(first), len(second)) == (15, 5)
    assert second[0] != first[10]


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
            assert student(*life, point=STEP, number=9)[0] == -9  # the teacher's
            assert student(*life, "--resume", point=STEP, number=20)[0] == -9  # the labels'
            put(server, budget, unit="samples", limit=10**6)
            life.append("--resume")
        status, said = student(*life)
        assert status == 0, said
        runs.append(ended(output))
    assert runs[0] == runs[1]
    assert runs[0][1]["taught"] < 16


# ---------------------------------------------------------------- what else stays as it was


def test_another_teacher_is_refused_and_the_state_stays(server, noisy, student, undisturbed, tmp_path):
    output = tmp_path / "constant"
    life = command(server, output, "--depth", 1)
    assert student(*life, point=STEP, number=28)[0] == -9
    kept = {name: (output / name).read_bytes() for name in ("state.pt", "answers.log", "epoch-0001.safetensors")}
    status, said = student(*life, "--resume", "--teacher-address", noisy.address)
    assert status == 1
    assert re.search(r"fingerprint: this run began with \w+, .* serves \w+; bring that teacher back", said)
    assert {name: (output / name).read_bytes() for name in kept} == kept
    status, said = student(*life, "--resume")
    assert status == 0, said
    assert ended(output) == undisturbed("--depth", 1)


def test_the_curves_have_each_step_once(server, student, tmp_path):
    output = tmp_path / "curves"
    life = command(server, output, "--depth", 1)
    assert student(*life, point="between the state and the log's rotation", number=2)[0] == -9  # none is lost
    _next_second()
    assert student(*life, "--resume", point=STEP, number=28)[0] == -9  # seven are drawn again
    _next_second()
    assert student(*life, "--resume")[0] == 0
    events = EventAccumulator(str(output)).Reload()
    for curve, steps in (("train/loss", range(1, 47)), ("test/accuracy", (23, 46)), ("unix/share", range(1, 47))):
        assert [event.step for event in events.Scalars(curve)] == [*steps]


def _next_second():
    """Event files are read in the order of their names, which begin with the second in which they were opened."""
    now = int(time.time())
    until(lambda: int(time.time()) > now)


def test_killed_from_outside_whenever_that_is(server, student, undisturbed, tmp_path):
    """A process as users start it; whoever kills it knows nothing of what it is doing."""
    options = ("--depth", 1, "--epochs", 8)  # enough that it is still learning when the signal comes
    output = tmp_path / "outside"
    put(server, f"/v1/budgets/default/jobs/{output.name}", unit="samples", limit=4 * ASKED)
    words = [str(word) for word in command(server, output, *options)]
    log = output / "answers.log"
    with subprocess.Popen([sys.executable, "-m", "student_worker", *words], cwd=ROOT) as training:
        until(lambda: training.poll() is not None or (log.exists() and log.stat().st_size > 12_000))
        training.kill()
    assert training.returncode == -9
    status, said = student(*words, "--resume")
    assert status == 0, said
    assert ended(output) == undisturbed(*options)
