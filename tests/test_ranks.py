"""Several ranks train one student: the parts are the batch, the gradients one worker's, and nobody waits for ever."""

import subprocess
import sys

import pytest
import torch

from student_worker.config import TrainSettings
from student_worker.data import load
from student_worker.lessons import epoch_batches
from student_worker.ranks import Group
from tests import ranking
from tests.serving import ROOT

WORLD = 2
N, STEPS = 1437, 10  # digits; steps of the runs whose batches are of TAIL


def ranks_of(folder, device):
    """What each rank saw. A rank that waits for ever is killed, and fails the test."""
    program = "import sys; from tests.ranking import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", program, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(WORLD), device], cwd=ROOT, **pipes) for rank in range(WORLD)]
    try:
        said = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, said
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return ranks_of(tmp_path_factory.mktemp("ranks"), "cpu")


def error(gradient, expected):
    return ((gradient - expected).norm() / expected.norm()).item()


def test_ranks_learn_one_workers_gradients(seen):
    """Tolerance 2e-5 of the gradient's norm, at each of 23 steps: sums in float32 in another order, and their effect
    on the steps after. The last batch has 29 samples, parts of 15 and 14, so equal weights would miss it by far.
    """
    alone = ranking.watched("kd")
    first, second = (rank["kd"] for rank in seen)
    assert len(alone["steps"]) == 23
    for one, ours, theirs in zip(alone["steps"], first["steps"], second["steps"], strict=True):
        assert error(ours["gradient"], one["gradient"]) < 2e-5
        assert torch.equal(ours["gradient"], theirs["gradient"])
        # The batch is the same, each sample with one rank.
        assert torch.equal(ours["items"], one["items"][::2])
        assert torch.equal(theirs["items"], one["items"][1::2])
    assert len(second["steps"][-1]["items"]) == 14
    counts = ("asked", "computed", "learnt", "scored", "steps")
    assert [first["end"][name] for name in counts] == [alone["end"][name] for name in counts] == [N, N, N, 0, 23]
    assert first["end"]["loss"] == pytest.approx(alone["end"]["loss"], rel=1e-5)
    assert first["end"]["accuracy"] == second["end"]["accuracy"] == pytest.approx(alone["end"]["accuracy"], abs=0.003)
    assert first["end"]["loss"] == second["end"]["loss"]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_parts_are_the_batch(world):
    data = load("digits")
    settings = TrainSettings(dataset="digits", batch_size=ranking.TAIL, crop=2)

    def batches(part):
        return list(epoch_batches(settings, data, data.train_y, 3, torch.device("cpu"), part=part))

    whole = batches((0, 1))
    parts = [batches((rank, world)) for rank in range(world)]
    assert [len(part) for part in parts] == [5] + [4] * (world - 1)  # the last batch is of one sample
    for number, (x, y, item) in enumerate(whole):
        for rank, part in enumerate(parts):
            for all_of_it, ours in zip((x, y, item), part[number] if number < len(part) else (), strict=False):
                assert torch.equal(ours, all_of_it[rank::world])


@pytest.mark.parametrize("run", ["talking", "talking-ahead"])
def test_a_rank_without_a_sample_takes_part_in_every_forward_pass(seen, run):
    """The student's passes wait for each other as SyncBatchNorm's do, and fail where one learns and another scores."""
    first, second = (rank[run] for rank in seen)
    assert first["passes"] == second["passes"]
    assert sorted(first["passes"]) == ["learn"] * STEPS + ["score"] * STEPS
    if run == "talking":
        assert first["passes"] == ["score", "learn"] * STEPS
    assert first["end"]["steps"] == STEPS
    assert first["end"]["scored"] == 2 * N  # stand-ins count as nothing
    assert first["end"]["learnt"] == 2 * (4 * (135 + 134) + 1)  # three quarters of parts of 180, 179 and 1
    assert first["end"]["asked"] == first["end"]["computed"] == first["end"]["learnt"]
    assert len(first["steps"][4]["items"]) == 1
    assert second["steps"][4]["items"] is None
    assert all(torch.equal(a["gradient"], b["gradient"]) for a, b in zip(first["steps"], second["steps"], strict=True))


def test_a_stand_in_that_was_scored_before_a_resumption_is_not_scored_again(seen):
    """Else the ranks would be out of step: the pending parts of the others are not scored again either."""
    first, second = (rank["resumed"] for rank in seen)
    assert first["passes"] == second["passes"]
    assert first["passes"][0] == "learn"
    assert [first["passes"].count(kind) for kind in ("score", "learn")] == [5, 6]
    for run in (first, second):
        assert all(torch.equal(run["weights"][name], value) for name, value in run["undisturbed"].items())


def test_ranks_select_and_mix_by_draws_of_their_own(seen):
    hard = [rank["talking-hard"] for rank in seen]
    assert [run["end"]["steps"] for run in hard] == [STEPS, STEPS]
    assert hard[0]["passes"] == hard[1]["passes"] == ["learn"] * STEPS
    ranks = [Numbered(rank).seed(7) for rank in range(3)]
    assert ranks[0] == 7
    assert len(set(ranks)) == 3


class Numbered(Group):
    def __init__(self, rank):
        self.rank = rank


def test_where_one_ranks_budget_is_spent_all_stop_at_the_same_step(seen):
    first, second = (rank["stop"] for rank in seen)
    assert first["end"]["budget_spent"] == second["end"]["budget_spent"] == "all gone"
    assert 5 < len(first["steps"]) == len(second["steps"]) == first["end"]["steps"] < STEPS
    weights = [
        {name: value for name, value in run["weights"].items() if "running" not in name} for run in (first, second)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_where_one_ranks_budget_is_spent_all_go_on_with_labels(seen):
    first, second = (rank["hard-labels"] for rank in seen)
    taught = [[step["taught"] for step in run["steps"]] for run in (first, second)]
    count = first["end"]["taught"]
    assert 5 < count == second["end"]["taught"] < STEPS
    assert taught[0] == [True] * count + [False] * (STEPS - count)
    assert taught[1] == [True] * 4 + [False] + [True] * (count - 5) + [False] * (STEPS - count)  # no part of the fifth
    assert first["passes"] == second["passes"]
    assert first["end"]["budget_spent"] == second["end"]["budget_spent"] == "all gone"


def test_what_one_ranks_teacher_raises_all_ranks_raise(seen):
    assert {rank["changed"]["error"] for rank in seen} == {"another one; rank 1 of 2"}
    steps = [len(rank["changed"]["steps"]) for rank in seen]
    assert 5 < steps[0] == steps[1] < STEPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm takes CUDA tensors only")
def test_synchronised_batch_norm_learns_one_workers_gradients(tmp_path):
    """Both ranks on one GPU, hence gloo: NCCL wants a GPU for each. Plain batch norm over halves would miss by far."""
    ranks = ranks_of(tmp_path, "cuda:0")
    first, second = (rank["synchronised"] for rank in ranks)
    alone = ranking.watched("synchronised", device="cuda:0", sync_batch_norm=False)
    for one, ours, theirs in zip(alone["steps"], first["steps"], second["steps"], strict=True):
        assert error(ours["gradient"], one["gradient"]) < 1e-3
        assert torch.equal(ours["gradient"], theirs["gradient"])
    assert error(first["steps"][0]["gradient"], alone["steps"][0]["gradient"]) < 1e-4
    for name, value in alone["weights"].items():
        if "running" in name:
            torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(first["weights"][name], second["weights"][name])


APART = """
import sys
from pathlib import Path
import torch.distributed as dist
from student_worker import checkpoints
from student_worker.config import TrainSettings
from student_worker.ranks import joined
from student_worker.state import State, state_path

folder, rank = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
settings = TrainSettings(method="hard", output=Path(folder) / f"of-rank-{rank}")
checkpoints.PATIENCE = 0.5
state = State({"settings": settings.deciding(), "epoch": 0}, {"lessons": {"steps": 0, "unix": None}})
with joined() as ranks:
    for act in (lambda kept: kept.save(state, None), lambda kept: kept.load()):
        try:
            act(checkpoints.Checkpoints(settings, ranks))
        except ValueError as error:
            print(error, flush=True)
"""


def test_ranks_that_do_not_share_a_folder_say_so(tmp_path):
    """Else the run would seem to be safe, and where it is resumed some ranks would go on while others begin."""
    command = [sys.executable, "-c", APART, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}  # gloo may have its say on the latter
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, **pipes) for rank in range(2)]
    try:
        told = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    first, second = (out.splitlines() for out, _ in told)
    assert len(first) == 1, told
    (apart,) = first
    assert apart == f"output: 1 of 2 workers see {tmp_path}/of-rank-0/state.pt; give an --output that all nodes share"
    assert second[0].startswith(f"output: rank 0 wrote {tmp_path}/of-rank-1/state.pt, which is not there on ")
    assert second[1].startswith("output: 1 of 2 workers see ")
