"""Runs of several ranks for the tests, without a cluster: `main` in a process for each, `watched` for a run of one."""

import threading
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from student_worker.answer import Answer
from student_worker.config import TrainSettings
from student_worker.data import load
from student_worker.errors import BudgetSpent, FingerprintChanged
from student_worker.ranks import ALONE, joined
from student_worker.train import train

TAIL = 359  # 1437 digits are four batches of so many, and one of a single digit
DIGITS = {"dataset": "digits", "epochs": 1, "depth": 0, "learning_rate": 0.01, "threads": 1}
KD = DIGITS | {"method": "kd", "student": "tests.ranking:grouped"}
TALKING = DIGITS | {"method": "unix", "student": "tests.ranking:Talking", "batch_size": TAIL, "epochs": 2}
BUDGET = 700  # answers for rank 1, which asks about 537 an epoch: it ends in the second
RUNS = {
    "kd": KD,
    "talking": TALKING,
    "talking-ahead": TALKING | {"depth": 2},
    "talking-hard": TALKING | {"method": "hard+mixup"},
    "stop": TALKING | {"depth": 1},
    "hard-labels": TALKING | {"depth": 1, "on_budget_spent": "hard-labels"},
    "changed": TALKING,
}
ON_GPU = {"synchronised": KD | {"student": "tests.ranking:normalised_by_batch", "sync_batch_norm": True}}
MADE = []  # every student that was built here


def grouped(channels, classes):
    """A student whose every answer depends on its own sample alone."""
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, classes),
    )  # fmt: skip
    MADE.append(net)
    return net


def normalised_by_batch(channels, classes):
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, classes),
    )  # fmt: skip
    MADE.append(net)
    return net


class Talking(nn.Module):
    """As SyncBatchNorm does on GPUs: no forward pass ends before all ranks have made it, and of the same kind."""

    def __init__(self, channels, classes):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes)
        )
        self.passes = []
        MADE.append(self)

    def forward(self, x):
        if self.training:
            kinds = [torch.is_grad_enabled()]
            if dist.is_initialized():
                kinds = [None] * dist.get_world_size()
                dist.all_gather_object(kinds, torch.is_grad_enabled())
            if len(set(kinds)) > 1:
                raise AssertionError(f"{kinds}: some ranks score where others learn")
            self.passes.append("learn" if kinds[0] else "score")
        return self.net(x)


class Drawn:
    """Answers each sample by itself, the same way each time; after so many answers with the error it was given."""

    def __init__(self, budget=10**9, error=None):
        self.left, self.error, self.lock = budget, error, threading.Lock()
        digits = load("digits")
        x, y = torch.from_numpy(digits.train_x).float().flatten(1) / 255, torch.from_numpy(digits.train_y)
        self.weights = torch.linalg.lstsq(x.T @ x + torch.eye(64), x.T @ (10 * F.one_hot(y).float())).solution

    def label(self, x, *, request_id, cache_mode, candidates):
        with self.lock:
            if len(x) > self.left:
                raise self.error
            self.left -= len(x)
        return Answer(logits=x.cpu().float().flatten(1) / 255 @ self.weights, sources=("computed",) * len(x))


def watched(name, ranks=ALONE, **changes):
    """All that a run did: its steps, its gradients, how it ended."""
    steps = []

    def on_step(step, steps_in_all, loss, b):
        gradients = [parameter.grad.flatten().cpu() for parameter in MADE[-1].parameters()]
        steps.append({"loss": loss, "items": b.index, "taught": bool(b.source), "gradient": torch.cat(gradients)})

    teacher = Drawn()
    if ranks.rank == 1 and name in ("stop", "hard-labels"):
        teacher = Drawn(BUDGET, BudgetSpent("all gone"))
    if ranks.rank == 1 and name == "changed":
        teacher = Drawn(BUDGET, FingerprintChanged("another one"))
    seen = {"steps": steps, "error": ""}
    try:
        seen["end"] = asdict(
            train(TrainSettings(**(RUNS | ON_GPU)[name] | changes), teacher, ranks=ranks, on_step=on_step)
        )
    except FingerprintChanged as error:
        seen["error"] = f"{error}; {' '.join(error.__notes__)}"
    passes = getattr(MADE[-1], "passes", [])
    weights = {name: value.cpu() for name, value in MADE[-1].state_dict().items()}
    return seen | {"passes": passes, "weights": weights}


def main(folder, rank, world, device):
    """All RUNS in turn, as one rank of `world`; what it saw is left in the folder."""
    rank, world = int(rank), int(world)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    names = RUNS if device == "cpu" else ON_GPU
    with joined() as ranks:
        seen = {name: watched(name, ranks, device=device) for name in names}
    torch.save(seen, Path(folder) / f"seen-{rank}.pt")
    dist.destroy_process_group()
