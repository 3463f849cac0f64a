"""Workers for the tests of Ray Train: a teacher they may all ask, and the same run without Ray to compare with."""

import itertools
import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from student_worker.checkpoints import Checkpoints
from student_worker.config import TrainSettings
from student_worker.data import load
from student_worker.ranks import joined
from student_worker.run import run
from student_worker.weights import save_checkpoint


class Exact(nn.Module):
    """Gets nine in ten digits right, and gives a sample the same bits whatever batch it is in: in float64, rounded."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10, bias=False)

    def forward(self, x):
        return F.linear(x.flatten(1).double(), self.linear.weight.double()).float()


def save_exact(folder):
    """Its weights, fitted to the digits by least squares: a teacher in no time."""
    digits = load("digits")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (digits.mean, digits.std))
    x = ((torch.from_numpy(digits.train_x) / 255 - mean) / std).flatten(1)
    y = 10 * F.one_hot(torch.from_numpy(digits.train_y)).float()
    teacher = Exact()
    with torch.no_grad():
        teacher.linear.weight.copy_(torch.linalg.solve(x.T @ x + torch.eye(64), x.T @ y).T)
    return save_checkpoint(folder, 1, teacher, digits, {"accuracy": 0.9})


def _mortal(ranks, number):
    """Dies by SIGKILL where it would wait for the others for the `number`th time while a state is saved."""
    calls, wait = itertools.count(1), ranks.wait

    def dangerous():
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        wait()

    ranks.wait = dangerous


def main(settings, folder, rank, world, dies="0"):
    """A worker of a run, with nothing of Ray: `settings` is JSON, `folder` is where the ranks meet."""
    rank, world = int(rank), int(world)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    parsed = TrainSettings.model_validate_json(settings)
    with joined() as ranks:
        _mortal(ranks, int(dies))
        run(parsed, ranks=ranks, resumed=Checkpoints(parsed, ranks).load())
    dist.destroy_process_group()
