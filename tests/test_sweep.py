"""A sweep without its cluster: what may be swept, what each trial is made of, and what the report says of them."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from protos import teacher_pb2 as pb
from student_worker import TeacherClient
from student_worker.__main__ import main
from student_worker.config import TrainSettings
from student_worker.data import load
from student_worker.errors import InvalidQuery
from student_worker.models import build
from student_worker.sweep import Distinct, Outcome, halves, prepare, refuse_earlier, split_accuracy, trials
from student_worker.sweep_report import SweepReport
from student_worker.sweep_settings import SweepSettings
from student_worker.sweep_spend import Books
from student_worker.train import Progress, accuracy, normaliser
from student_worker.unix import Distilled
from tests.asking import pixels
from tests.serving import ROOT

DATA = load("digits")
N = len(DATA.train_x)


def settings(**changes):
    given = {"dataset": "digits", "space": {"seed": [0, 1]}, "epochs": 4, "views": 4, "crop": 1, "mixing": "none"}
    return SweepSettings(**given | changes)


# ---------------------------------------------------------------- what may be swept


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ('{"output": ["a"]}', "space: output is each trial's own, made of --output and its number (--space)"),
        ('{"job": ["a"]}', "space: job is each trial's own, made of --job and its number"),
        ('{"token": ["secret-1"]}', "space: token is a secret; put it into a file for --token-file"),
        ('{"token_file": ["a"]}', "space: token_file is one for all: the students share a teacher; give --token-file"),
        ('{"teacher_address": ["a"]}', "space: teacher_address is one for all: the students share a teacher"),
        ('{"cache_namespace": ["a"]}', "space: cache_namespace is one for all"),
        ('{"view_seed": [1, 2]}', "space: view_seed is one for all: the students share a bank of views"),
        ('{"dataset": ["digits"]}', "space: dataset is one for all"),
        ('{"num_workers": [2]}', "space: num_workers is not of what is learnt, or how; it cannot be swept"),
        ('{"learning_rat": [1]}', "space: learning_rat is no knob of train; did you mean learning_rate?"),
        ('{"keep": {"uniform": [1, 0]}}', "space: keep: uniform takes [low, high] with low < high, got [1, 0]"),
        ("{}", "space: nothing to try; give for example --space '{\"seed\": [0, 1, 2]}'"),
    ],
)
def test_what_cannot_be_swept_is_named_with_the_fix(space, words, capsys):
    assert main(["sweep", "--space", space]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "secret-1" not in said


def test_epochs_are_not_swept_with_asha(capsys):
    assert main(["sweep", "--space", '{"epochs": [1, 2]}', "--asha"]) == 2
    assert "give --epochs, or --no-asha" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "tables"),
    [
        ("[space]\nseed = [0, 1]\nkeep = {uniform = [0.1, 0.3]}", 1),
        ("[[space]]\nseed = 0\n[[space]]\nseed = 1\nstudent = 'mlp'", 2),
    ],
)
def test_a_space_comes_from_toml_or_json(file, tables, tmp_path, monkeypatch):
    (tmp_path / "sweep.toml").write_text(file)
    assert len(SweepSettings(config=tmp_path / "sweep.toml").space) == tables
    monkeypatch.setenv("STUDENT_SPACE", '[{"seed": 0}, {"seed": 1}]')
    assert SweepSettings().space == ({"seed": 0}, {"seed": 1})


def test_a_value_out_of_its_range_is_told_before_anything_begins(tmp_path, capsys):
    command = ["sweep", "--dataset", "digits", "--space", '{"keep": [0.5, 1.5]}', "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "space: keep: Input should be less than or equal to 1, got 1.5 (--space)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_token_in_the_environment_is_not_sent_to_a_cluster(monkeypatch, capsys):
    monkeypatch.setenv("STUDENT_TOKEN", "secret-1")
    assert main(["sweep", "--space", '{"seed": [0]}']) == 1
    said = capsys.readouterr().err
    assert "put it in a file that all nodes can read" in said
    assert "secret-1" not in said


# ---------------------------------------------------------------- a trial


def test_each_trial_is_a_run_with_its_own_job_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUDENT_TOKEN", "secret-1")
    given = settings(space=[{"seed": [3, 4]}, {"method": "kd+mixup"}], job="many", token_file=Path("token"))
    made = trials(given)
    assert [(trial.number, trial.settings.job, trial.settings.seed) for trial in made] == [
        (0, "many-0000", 3),
        (1, "many-0001", 4),
        (2, "many-0002", 0),
    ]
    assert [trial.mixes for trial in made] == [False, False, True]
    for trial in made:
        assert trial.settings.output == tmp_path / "runs/sweep" / f"trial-{trial.number:04d}"
        assert trial.settings.token_file == tmp_path / "token"
        assert trial.settings.token is None, "a token is not sent"
        assert (trial.settings.views, trial.settings.view_seed) == (4, 0)
        assert trial.settings.device == "cpu"
        assert trial.settings.resume
    assert trials(settings(gpus_per_trial=0.5))[0].settings.device == "auto"
    assert not trials(settings(max_failures=0))[0].settings.resume


def test_a_knob_of_train_and_sweep_has_one_default():
    shared = SweepSettings.model_fields.keys() & TrainSettings.model_fields.keys() - {"config", "output", "job"}
    for name in shared:
        assert SweepSettings.model_fields[name].default == TrainSettings.model_fields[name].default, name


def test_another_sweeps_files_are_neither_mixed_nor_lost(tmp_path):
    given = settings(output=tmp_path, space={"seed": [0, 1, 2]})
    first = prepare(given, trials(given))
    assert prepare(given, trials(given)) != first, "folders in which nothing was trained are nobody's"
    (tmp_path / "trial-0002" / "epoch-0001.json").touch()
    (tmp_path / "tune").mkdir()
    (tmp_path / "trial-notes.md").touch()
    with pytest.raises(ValueError, match="holds another sweep's files; give another --output, or --overwrite"):
        refuse_earlier(given)
    smaller = settings(output=tmp_path, overwrite=True)
    prepare(smaller, trials(smaller))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial-0000", "trial-0001", "trial-notes.md"]


def test_a_node_that_does_not_see_the_output_says_so(tmp_path):
    program = (
        "import sys; from pathlib import Path; from student_worker import ray_sweep, sweep, sweep_settings\n"
        "given = sweep_settings.SweepSettings(space={'seed': [0]}, output=Path(sys.argv[1]))\n"
        "run_trial = ray_sweep._trial; made = sweep.trials(given); sweep.prepare(given, made)\n"
        "run_trial({'trial': {'number': 0}}, made=made, run=None, mark='of another sweep')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"ValueError: output: {tmp_path}/trial-0000 is not there on" in done.stderr
    assert done.stderr.rstrip().endswith("give an --output that all nodes share")


def test_the_halves_of_the_test_items_are_apart_and_add_up():
    chosen, reported = halves(len(DATA.test_x))
    assert sorted([*chosen, *reported]) == list(range(360))
    assert len(chosen) == 180
    student = build("cnn-tiny", channels=1, classes=10, size=8)
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    x, y = DATA.test_x, DATA.test_y
    whole, first, second = (
        accuracy(student, normaliser(DATA, cpu), x[places], y[places], cpu)
        for places in (slice(None), chosen, reported)
    )
    assert split_accuracy(whole, student, DATA) == pytest.approx((first, second))


def distilled(x, source):
    empty = torch.empty(0)
    return Distilled(
        x=x, answer=empty, share=empty, y=None, y_partner=None, index=None, source=(source,) * len(x), lag=0
    )


def test_the_same_sample_counts_once_and_what_was_not_asked_not_at_all():
    x = torch.arange(12.0).reshape(4, 3)
    distinct = Distinct()
    distinct.add(1, distilled(x, "computed"))
    distinct.add(2, distilled(x.flip(0).clone(), "cached"))
    distinct.add(3, distilled(torch.cat([x[:1], x[:1] + 100]), "computed"))
    assert distinct.known == 5
    labels_alone = distilled(x + 1000, "cached")
    distinct.add(4, replace(labels_alone, source=()))
    assert distinct.known == 5
    resumed = Distinct()
    resumed.add(24, distilled(x, "computed"))
    assert resumed.known is None


# ---------------------------------------------------------------- the ledger


def test_a_client_reads_what_the_ledger_says_of_its_job(server):
    with TeacherClient(server.grpc_address, job="spender") as teacher:
        assert not teacher.spend().lines
        teacher.label(pixels(30, seed=901))
        teacher.label(pixels(40, seed=901))
        (line,) = teacher.spend().lines
        assert (line.job, line.asked, line.computed) == ("spender", 70, 40)
        assert line.cached + line.coalesced == 30  # on its way into the cache, an answer is shared already
        assert line.fingerprint == teacher.describe().fingerprint
        with TeacherClient(server.grpc_address, job="other-spender") as other:
            assert not other.spend().lines
            assert other.spend("spender").lines[0].computed == 40
            assert "spender" in {line.job for line in other.spend("").lines}
        today = datetime.now(UTC)
        assert teacher.spend(since=today - timedelta(days=1), until=today + timedelta(days=1)).lines[0].asked == 70
        assert not teacher.spend(since=today + timedelta(days=2)).lines
        assert not teacher.spend(until=today - timedelta(days=2)).lines
        with pytest.raises(InvalidQuery, match="a b"):
            teacher.spend("a b")


def line(job, asked, computed, cached=0, coalesced=0, **rest):
    return pb.SpendLine(
        job=job, asked=asked, computed=computed, cached=cached, coalesced=coalesced, **{"flops": 1e3 * computed} | rest
    )


def test_an_earlier_sweeps_spend_under_the_same_names_is_not_this_ones():
    before = Books([line("s-0000", 10, 10, currency="EUR", money_nanos=5), line("s-0001", 7, 7)])
    after = Books(
        [
            line("s-0000", 10, 10, currency="EUR", money_nanos=5, day="2026-01-01"),
            line("s-0000", 30, 20, 8, 2, currency="EUR", money_nanos=15, day="2026-01-02"),
            line("s-0000", 1, 1, currency="USD", money_nanos=9, day="2026-01-02"),
            line("s-0001", 7, 7),
        ]
    )
    spent = after.since(before, "s-0000")
    assert (spent["asked"], spent["computed"], spent["cached"], spent["coalesced"]) == (31, 21, 8, 2)
    assert (spent["nanos EUR"], spent["nanos USD"], spent["flops"]) == (15, 9, 21_000)
    assert after.since(before, "s-0001")["asked"] == 0
    assert after.since(before, "s-0002")["asked"] == 0


# ---------------------------------------------------------------- the report


def outcome(epoch=4, *, test=0.9, alone=4000, asked=5000, budget_spent="", error="", ended=True):
    progress = Progress(
        epoch=epoch, steps=23 * epoch, of_steps=92, loss=1.0, accuracy=0.9, taught=23 * epoch, asked=asked,
        computed=asked, cached=0, coalesced=0, scored=0, learnt=0, seconds=1.0, budget_spent=budget_spent,
    )  # fmt: skip
    return Outcome(progress=progress, validation=0.8, test=test, alone=alone, error=error, ended=ended)


def report(tmp_path, outcomes, lines, *, teacher=None, **changes):
    given = settings(
        **{"space": {"seed": list(range(len(outcomes)))}, "output": tmp_path, "job": "s"} | changes,
    )
    made = trials(given)
    books = Books(lines)
    spent = [books.since(Books(), trial.settings.job) for trial in made]
    described = teacher or pb.TeacherDescription(
        name="t", outputs=[pb.OutputDescription(top1=0.95)], price=pb.Price(nanos_per_sample=1000, currency="EUR")
    )
    made_report = SweepReport(given, trials=made, outcomes=outcomes, spent=spent, teacher=described, data=DATA)
    return made_report, made_report.write(), json.loads((tmp_path / "report.json").read_text())


def test_what_sharing_saved_is_what_each_alone_would_have_had_computed_less_what_was(tmp_path):
    lines = [line("s-0000", 5000, 4000, 1000), line("s-0001", 5000, 500, 4400, 100)]
    made, text, written = report(tmp_path, [outcome(), outcome(test=0.92)], lines)
    assert made.statuses == ["finished", "finished"]
    assert made.exit_status == 0
    assert (
        f"Sharing saved 3,500 answers: of 10,000 asked about, each trial with a cache for itself would have had 8,000 "
        f"computed, all together had 4,500, {4500 / (4 * N):.3f} of the {4 * N:,} in the bank of views; that is "
        "0.0035 EUR."
    ) in text
    assert "All at equal steps, 92." in text
    assert "choose a trial by validation (180), and believe its test (180), by which nothing was chosen" in text
    assert written["total"]["computed"] == 4500
    assert written["total"]["saved_by_sharing"] == 3500
    assert [trial["test"] for trial in written["trials"]] == [0.9, 0.92]
    assert written["trials"][1]["coalesced"] == 100
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_where_everything_is_mixed_afresh_sharing_is_0_and_it_says_why(tmp_path):
    lines = [line("s-0000", 5000, 5000), line("s-0001", 5000, 5000)]
    _, text, written = report(tmp_path, [outcome(alone=5000)] * 2, lines, mixing="adaptive")
    assert "Sharing saved 0 answers: a mixed sample is drawn afresh, partner and share" in text
    assert written["total"]["saved_by_sharing"] == 0


def test_mixing_and_sharing_trials_are_told_apart(tmp_path):
    lines = [line("s-0000", 5000, 4000, 1000), line("s-0001", 5000, 5000)]
    _, text, written = report(
        tmp_path, [outcome(alone=4500), outcome(alone=5000)], lines, space=[{"mixing": "none"}, {"mixing": "adaptive"}]
    )
    assert "Sharing saved 500 answers: of 5,000 asked about" in text
    assert "Of the trials that mix, sharing saved 0" in text
    assert written["total"]["saved_by_sharing"] == 500


def test_what_a_resumed_trial_had_computed_for_all_is_not_saved(tmp_path):
    """The other one has nearly all of its answers from it; the bank of views was computed all the same."""
    lines = [line("s-0000", 5000, 4000, 1000), line("s-0001", 5000, 100, 4900)]
    _, text, written = report(tmp_path, [outcome(alone=None), outcome(alone=4000)], lines)
    assert written["total"]["saved_by_sharing"] == 4000 - 4100
    assert f"{4100 / (4 * N):.3f} of the {4 * N:,} in the bank of views" in text
    assert "the server keeps no cache" not in text


def test_a_server_without_a_cache_is_noticed(tmp_path):
    _, text, _ = report(tmp_path, [outcome()], [line("s-0000", 5000, 5000)])
    assert "Sharing saved -1,000 answers" in text
    assert "the server keeps no cache, or it was too small" in text


def test_trials_that_did_not_end_as_the_others_are_marked(tmp_path):
    outcomes = [
        outcome(),
        outcome(2),
        outcome(1, error="ValueError: no such student", alone=None),
        outcome(3, budget_spent="500 samples in all"),
        outcome(1, ended=False),
        Outcome(error="OutOfMemoryError: killed"),
        Outcome(),
    ]
    lines = [line(f"s-000{number}", 5000, 100) for number in range(7)]
    made, text, written = report(tmp_path, outcomes, lines, asha=True)
    expected = ["finished", "pruned", "failed", "budget spent", "unfinished", "failed", "unfinished"]
    assert made.statuses == expected == [trial["status"] for trial in written["trials"]]
    assert "NOT at equal steps: from 23 to 92." in text
    assert "ASHA ended 1 trials early, by validation" in text
    assert "Trial 2 failed: ValueError: no such student" in text
    assert "Trial 5 failed: OutOfMemoryError: killed" in text
    assert "Trials that failed, were resumed or did not end count with what was computed for them, and not with" in text
    assert "Sharing saved 11,300 answers: of 15,000 asked about" in text
    assert written["total"]["computed"] == 700
    assert made.exit_status == 1
    spent, _, _ = report(tmp_path, [outcomes[0], outcomes[1], outcomes[3]], lines, asha=True)
    assert spent.exit_status == 3
    interrupted, _, _ = report(tmp_path, [outcomes[3], outcomes[4]], lines)
    assert interrupted.exit_status == 1
    labels, _, _ = report(tmp_path, [outcome(budget_spent="all")], lines, on_budget_spent="hard-labels")
    assert labels.statuses == ["finished on labels"]
    assert labels.exit_status == 0


def test_books_that_are_late_are_told(tmp_path):
    _, text, _ = report(tmp_path, [outcome()], [line("s-0000", 4000, 3000)])
    assert "The ledger has 4,000 samples asked by job s-0000, which had 5,000 answered" in text


def test_labels_alone_have_no_spend_to_tell_of(tmp_path):
    _, text, _ = report(tmp_path, [outcome(asked=0, alone=0)], [], method="hard", teacher=pb.TeacherDescription())
    assert "Sharing" not in text
    assert "Spend" not in text
