"""Small students, teachers and data for the tests of Unix, all in this process."""

import threading

import torch
from torch import nn

from protos import teacher_pb2 as pb
from student_worker.answer import Answer
from student_worker.losses import TopK

CLASSES, FEATURES = 5, 12


def net(seed, width=16, classes=CLASSES):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
        )


class LocalTeacher:
    """Answers with a network's outputs and remembers what it was asked."""

    def __init__(self, classes=CLASSES, description=None):
        self.network = net(99, width=64, classes=classes).eval().requires_grad_(False)
        self.description = description or pb.TeacherDescription()
        self.asked = {}
        self.candidates = 0

    def answer(self, x):
        return self.network(x.float())

    def label(self, x, *, request_id, cache_mode, candidates):
        assert request_id not in self.asked
        self.candidates += candidates
        self.asked[request_id] = (x.clone(), cache_mode)
        return Answer(logits=self.answer(x), sources=("computed",) * len(x), description=self.description)


class TopKTeacher(LocalTeacher):
    def label(self, x, **how):
        logits = super().label(x, **how).logits
        values, indices = logits.topk(2, dim=1)
        tail = 1 - (logits / 4).softmax(1).gather(1, indices).sum(1)
        return Answer(logits=TopK(values, indices, tail, 4.0), description=self.description)


class Watched(nn.Module):
    """A student that notes the mode it is called in, and what it is called on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = []

    def forward(self, x):
        self.calls.append((self.inner.training, torch.is_grad_enabled(), x.clone()))
        return self.inner(x.float())


def data(batches=6, n=16, last=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [n] * batches if last is None else [n] * (batches - 1) + [last]
    return [torch.randn(size, FEATURES, generator=generator) for size in sizes]


def with_labels(loader):
    start = 0
    for x in loader:
        index = torch.arange(start, start + len(x))
        yield x, index % CLASSES, index
        start += len(x)


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def train(unix, loader, student, depth=1, after=lambda b: None, *, momentum=0.9):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=momentum)
    losses = []
    for b in unix.batches(loader, student, depth):
        loss = unix.criterion(student(b.x), b)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(b)
    return losses


class GatedTeacher(LocalTeacher):
    """Holds every answer until the gate opens, and counts the calls that have begun."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def label(self, x, **how):
        self.begun.release()
        assert self.gate.wait(30)
        return super().label(x, **how)
