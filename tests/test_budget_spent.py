"""What a run does when its teacher's budget is spent: it ends cleanly, or goes on with the labels alone."""

import json
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protos import teacher_pb2 as pb
from student_worker.__main__ import main
from student_worker.answer import Answer
from student_worker.config import TrainSettings
from student_worker.data import UNLABELLED, load
from student_worker.errors import BudgetSpent
from student_worker.lessons import Lessons, epoch_batches
from student_worker.train import train

N, BATCH, STEPS = 1437, 64, 23  # of the digits: samples, of a batch, batches of an epoch
WORDS = "the budget of job 'poor' of tenant 'team', 600 samples in all: 0 samples are left"


class Poor:
    """Answers with the labels' classes while the samples asked about are within the budget."""

    def __init__(self, budget):
        self.left, self.calls = budget, 0
        self.lock = threading.Lock()
        data = load("digits")
        self.known = {x.tobytes(): y for x, y in zip(data.train_x, data.train_y, strict=True)}

    def describe(self):
        description = pb.TeacherDescription(name="poor", fingerprint="f", flops_per_sample=1.0)
        description.outputs.add(name="logits", shape=[10])
        return description

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def label(self, x, *, request_id="", cache_mode="use", candidates=0):
        with self.lock:
            self.calls += 1
            if len(x) > self.left:
                raise BudgetSpent(WORDS)
            self.left -= len(x)
            left = self.left
        samples = x.numpy() if isinstance(x, torch.Tensor) else x
        logits = torch.zeros(len(x), 10)
        for row, sample in zip(logits, samples, strict=True):
            row[self.known.get(sample.tobytes(), 0)] = 9.0
        kinds = ("computed", "cached", "coalesced")
        return Answer(
            logits,
            tuple(kinds[place % 3] for place in range(len(x))),
            budgets=(
                pb.Budget(owner=2, name="poor", unit=1, period=1, limit=600, left=left),
                pb.Budget(owner=1, name="team", unit=2, period=3, limit=9999, left=left * 5),
            ),
            description=self.describe(),
        )


def settings(**changes):
    plain = {"dataset": "digits", "student": "cnn-tiny", "epochs": 2, "method": "kd", "depth": 0}
    return TrainSettings(**plain | changes)


def watched(teacher, **changes):
    """Where the run ended, the batches it learnt, and the progress and weights after each epoch."""
    batches, epochs = [], []

    def on_step(step, steps, loss, b):
        assert (step, steps) == (len(batches) + 1, 2 * STEPS)
        batches.append(b)

    def on_epoch(progress, student, data):
        epochs.append((progress, {name: value.clone() for name, value in student.state_dict().items()}))

    return train(settings(**changes), teacher, on_step=on_step, on_epoch=on_epoch), batches, epochs


# ---------------------------------------------------------------- stop


@pytest.mark.parametrize("depth", [0, 2])
def test_a_run_stops_where_the_budget_ends_and_keeps_what_it_learnt(depth):
    # At temperature 1, where these answers are clear: at 4 what 30 steps teach is too little to be sure of.
    end, batches, epochs = watched(Poor(30 * BATCH), depth=depth, temperature=1.0)
    # 22 batches of 64 and one of 29 are an epoch, so the budget holds for eight more.
    taken = 30 if depth == 0 else len(batches)
    assert STEPS < len(batches) == taken <= 30
    assert (end.epoch, end.steps, end.of_steps, end.taught) == (2, taken, 2 * STEPS, taken)
    assert end.budget_spent == WORDS
    assert [progress.epoch for progress, _ in epochs] == [1, 2]
    first, last = epochs
    assert first[0].budget_spent == ""
    assert last[0] == end
    assert any(not torch.equal(first[1][name], last[1][name]) for name in first[1])
    assert end.accuracy > 0.5


def test_a_budget_that_ends_with_an_epoch_leaves_the_next_one_empty():
    end, batches, epochs = watched(Poor(N))
    assert len(batches) == STEPS
    assert (end.epoch, end.steps, end.loss) == (2, STEPS, None)
    assert end.accuracy == epochs[0][0].accuracy
    end, batches, epochs = watched(Poor(0))
    assert (end.epoch, end.steps, end.learnt, len(epochs)) == (1, 0, 0, 1)


def test_a_budget_that_lasts_changes_nothing():
    ample, plain = watched(Poor(2 * N)), watched(Poor(10**9), on_budget_spent="hard-labels")
    assert ample[0].budget_spent == plain[0].budget_spent == ""
    assert ample[0].taught == ample[0].steps == 2 * STEPS
    assert ample[0].loss == plain[0].loss


def test_answers_are_counted_by_where_they_came_from():
    end, _, _ = watched(Poor(2 * N))
    thirds = [-(-(BATCH - k) // 3) * 22 + -(-(29 - k) // 3) for k in range(3)]
    assert [end.computed, end.cached, end.coalesced] == [2 * each for each in thirds]
    assert end.asked == end.learnt == sum(thirds) * 2 == 2 * N


# ---------------------------------------------------------------- hard labels


@pytest.mark.parametrize("method", ["kd", "unix"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_rest_is_learnt_from_labels_each_batch_once(method, depth):
    """Batches drawn from the loader that have no answer yet are neither lost nor learnt twice."""
    teacher = Poor(600)
    end, batches, _ = watched(teacher, method=method, depth=depth, on_budget_spent="hard-labels")
    assert (end.steps, len(batches), end.epoch) == (2 * STEPS, 2 * STEPS, 2)
    assert end.budget_spent == WORDS
    taught = end.taught
    assert 0 < taught < STEPS
    assert [bool(b.source) for b in batches] == [True] * taught + [False] * (2 * STEPS - taught)
    data, config = load("digits"), settings(method=method)
    for epoch in range(2):
        own = epoch_batches(config, data, data.train_y, epoch, torch.device("cpu"))
        for number, (_, y, item) in enumerate(own, start=epoch * STEPS):
            b = batches[number]
            if number < taught:
                assert set(b.index.tolist()) <= set(item.tolist())
            else:
                assert torch.equal(b.index, item)
                assert torch.equal(b.y, y)
                assert torch.equal(b.y_partner, y)
                assert (b.share == 0).all()
    assert end.asked <= 600 + (depth + 1) * BATCH
    assert end.accuracy > 0.8 or method == "unix"  # the teacher here knows no mixed samples


def test_nobody_is_asked_once_the_budget_is_spent():
    teacher = Poor(600)
    watched(teacher, on_budget_spent="hard-labels")
    assert teacher.calls == 600 // BATCH + 1


def test_few_labels_are_learnt_as_method_hard_would():
    end, batches, _ = watched(Poor(600), labelled=50, on_budget_spent="hard-labels")
    assert end.steps == 2 * STEPS
    for b in batches[end.taught :]:
        assert (b.y != UNLABELLED).all()
    assert len(torch.cat([b.index for b in batches[STEPS:]]).unique()) == 50
    assert end.learnt == 2 * N


def test_a_budget_known_to_be_spent_leaves_the_labels_alone_from_the_start():
    teacher = Poor(10**9)
    end = train(settings(on_budget_spent="hard-labels"), teacher, budget_spent=WORDS)
    control = train(settings(method="hard"), None)
    assert teacher.calls == end.taught == end.asked == 0
    assert (end.loss, end.accuracy, end.budget_spent) == (control.loss, control.accuracy, WORDS)


def test_hard_labels_without_a_label_are_refused_before_anything_is_asked():
    data = load("digits")
    none = torch.full((N,), UNLABELLED).numpy()
    rest = {"normalised": lambda x: x, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match="on_budget_spent hard-labels needs labels, and none of the 1437"):
        Lessons(settings(on_budget_spent="hard-labels"), Poor(0), data, none, **rest)
    with pytest.raises(ValueError, match="method hard needs labels"):
        Lessons(settings(method="hard"), None, data, none, **rest)
    Lessons(settings(), Poor(0), data, none, **rest)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `train` with teachers of these budgets for its check and its run, instead of a server's client."""

    def run(check, run, *options, name="train"):
        purses = {"poor-check": Poor(check)}
        for user in ("commands", "run"):
            monkeypatch.setattr(
                f"student_worker.{user}.client_of", lambda _, job, *__: purses.setdefault(job, Poor(run))
            )
        fixed = ["--dataset", "digits", "--student", "cnn-tiny", "--epochs", "2", "--job", "poor"]
        return main([name, *fixed, "--output", str(tmp_path), *options])

    return run


KD = ["--method", "kd", "--depth", "0"]


def test_stopping_is_exit_status_3_with_a_checkpoint_and_one_line(command, tmp_path, capsys):
    assert command(256, 30 * BATCH, *KD) == 3
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "budget is spent" in line]
    assert line == (
        f"poor: stopped after 30 of 46 steps, checkpoint in {tmp_path / 'epoch-0002.safetensors'}, "
        f"and --resume goes on once there is budget; "
        f"the teacher's budget is spent: {WORDS}"
    )
    assert "Traceback" not in told.err
    assert (tmp_path / "epoch-0002.safetensors").exists()
    record = json.loads((tmp_path / "epoch-0002.json").read_text())
    assert (record["steps"], record["of_steps"], record["budget_spent"]) == (30, 46, WORDS)


def test_going_on_with_labels_is_exit_status_0_and_says_from_where(command, tmp_path, capsys):
    assert command(256, 600, *KD, "--on-budget-spent", "hard-labels") == 0
    assert f"poor: learnt from the labels alone from step 10 of 46 on; the teacher's budget is spent: {WORDS}" in (
        capsys.readouterr().err
    )
    record = json.loads((tmp_path / "epoch-0002.json").read_text())
    assert (record["taught"], record["steps"], record["settings"]["method"]) == (9, 46, "kd")


def test_a_budget_that_is_spent_before_the_run_stops_it(command, tmp_path, capsys):
    assert command(0, 0, *KD) == 3
    assert capsys.readouterr().err == f"poor: no step was taken, the teacher's budget is spent: {WORDS}\n"
    assert list(tmp_path.iterdir()) == []


def test_or_leaves_it_to_the_labels(command, tmp_path, capsys):
    assert command(0, 10**9, *KD, "--on-budget-spent", "hard-labels") == 0
    told = capsys.readouterr().err
    assert f"poor: goes on with the labels alone from the first step, the budget is spent: {WORDS}" in told
    assert "from step 1 of 46 on" in told
    assert json.loads((tmp_path / "epoch-0002.json").read_text())["taught"] == 0


def test_tensorboard_shows_what_is_left_of_each_budget(command, tmp_path):
    assert command(256, 30 * BATCH, *KD) == 3
    events = EventAccumulator(str(tmp_path)).Reload()
    left = [event.value for event in events.Scalars("teacher/budget_left/job_samples_total")]
    assert left[:3] == [29 * BATCH, 28 * BATCH, 27 * BATCH]
    assert len(left) == 30
    money = [event.value for event in events.Scalars("teacher/budget_left/tenant_money_nanos_month")]
    assert money == [5 * each for each in left]


def test_compare_does_not_go_on_with_labels(capsys):
    assert main(["compare", "--on-budget-spent", "hard-labels"]) == 2
    assert "none of its method any more" in capsys.readouterr().err
    assert main(["compare", "--cache-namespace", "mine"]) == 2
    assert "a namespace of its own" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    offered = capsys.readouterr().out
    assert "--teacher-timeout" in offered
    assert "--on-budget-spent" not in offered
    assert "--cache-namespace" not in offered
