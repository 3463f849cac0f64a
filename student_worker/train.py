"""Training a student, to be read top to bottom. It knows no cluster and no command line."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from student_worker.config import TrainSettings
from student_worker.data import Dataset, Labels, Pixels, load
from student_worker.lessons import Lessons, known_labels
from student_worker.models import build
from student_worker.ranks import ALONE, Ranks
from student_worker.state import Run, State
from student_worker.unix import Distilled, Observer, Teacher


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an epoch, or where its teacher's budget ended."""

    epoch: int
    """From 1."""
    steps: int
    of_steps: int
    """In the whole run."""
    loss: float | None
    """Mean over the epoch's steps; None where it had none, for the budget was spent."""
    accuracy: float
    """On the test set, of the student as it is now; never the best of several."""
    taught: int
    """Of the steps, those that learnt from the teacher's answers; the others learnt from labels alone."""
    asked: int
    """Samples that the teacher was asked about since the run began, even if it did not answer."""
    computed: int
    """Answers that a forward pass ran for, since the run began; `cached` and `coalesced` likewise."""
    cached: int
    coalesced: int
    scored: int
    """Samples since the run began; `learnt` likewise."""
    learnt: int
    seconds: float
    """Of training, without the time between a run's end and its resumption."""
    budget_spent: str = ""
    """What the server said when the teacher's budget was spent; empty while it is not."""


OnStep = Callable[[int, int, float, Distilled], None]
OnEpoch = Callable[[Progress, nn.Module, Dataset], None]


def train(
    settings: TrainSettings,
    teacher: Teacher | None,
    *,
    budget_spent: str = "",
    fingerprint: str = "",
    resumed: State | None = None,
    ranks: Ranks = ALONE,
    on_step: OnStep = lambda *_: None,
    on_epoch: OnEpoch = lambda *_: None,
    on_checkpoint: Callable[[State], None] = lambda _: None,
    observer: Observer | None = None,
) -> Progress:
    """One run; returns where it ended. `teacher` may be None for the methods that need none.

    Every method takes the same number of optimiser steps: one per batch of the whole training set and epoch. Only a
    spent budget ends a run sooner, as `settings.on_budget_spent` says; `budget_spent` is the server's word where that
    is known before. `on_step` gets the step's number, of how many, its loss and what was learnt from; `on_epoch` the
    progress, student and data. With several `ranks` each calls this, and the calls are one run: each asks about its
    part of every batch, all learn from the mean over all parts, and Progress is the whole run's; but `on_step` gets the
    rank's own loss and batch. Raises what the data, the student's factory and the teacher raise, and ValueError for
    settings that do not fit.

    `on_checkpoint` gets the run's state before its first step, every `settings.checkpoint_steps` steps and after each
    epoch that was learnt whole. `resumed` is such a state: the run goes on from there as if it had never stopped, if
    the settings are the same and the teacher gives the same answers (AnswerLog sees to those that were given before).
    A run that ended in any other way than with its last epoch, a spent budget among them, is resumed from its last
    state. `fingerprint`, the teacher's, is kept in the state. `observer` is told what its Unix does.
    """
    if resumed and resumed.finished:
        return Progress(**resumed.progress)
    began = perf_counter()
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    data = load(settings.dataset, settings.data_directory)
    labels = known_labels(settings, data)
    device = _device(settings.device)
    channels, size, _ = data.shape
    student = build(settings.student, channels=channels, classes=data.classes, size=size, **settings.student_arguments)
    if settings.sync_batch_norm:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
    student = student.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalised = normaliser(data, device)
    learning = ranks.wrap(student)
    if ranks.rank:  # all ranks have made the same student; what it draws while it learns is each one's own
        torch.manual_seed(ranks.seed(settings.seed))
    lessons = Lessons(
        settings,
        teacher,
        data,
        labels,
        normalised=normalised,
        device=device,
        budget_spent=budget_spent,
        ranks=ranks,
        observer=observer,
    )

    steps = settings.epochs * -(-len(labels) // settings.batch_size)
    optimizer = torch.optim.SGD(
        student.parameters(), settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    run = Run(settings, fingerprint, student, optimizer, schedule, lessons)
    if resumed:
        began -= run.restore(resumed)
    else:
        on_checkpoint(run.state(perf_counter() - began))
    for epoch in range(run.epoch, settings.epochs):
        student.train()
        with closing(lessons.epoch(epoch, student, first=len(run.losses))) as batches:
            for b in batches:
                loss = lessons.criterion(learning(b.x), b)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                run.losses.append(loss.item())
                if not np.isfinite(run.losses[-1]):
                    raise FloatingPointError(
                        f"the loss is {run.losses[-1]} at step {lessons.steps}; lower --learning-rate"
                    )
                on_step(lessons.steps, steps, run.losses[-1], b)
                if run.due():
                    on_checkpoint(run.state(perf_counter() - began))
        # Rank 0 evaluates; the others wait for it where the counts are summed.
        right = accuracy(student, normalised, data.test_x, data.test_y, device) if ranks.rank == 0 else 0.0
        progress = _progress(run, ranks, steps, right, perf_counter() - began)
        on_epoch(progress, student, data)
        if lessons.over:
            break
        run.end_epoch(asdict(progress))
        on_checkpoint(run.state(progress.seconds))
    return progress


def _progress(run: Run, ranks: Ranks, of_steps: int, right: float, seconds: float) -> Progress:
    """Of the whole run, at an epoch's end. `right` is the accuracy on rank 0, 0 on the others."""
    lessons = run.lessons
    loss, accuracy, *counts = ranks.sums(
        sum(run.losses) / ranks.world,
        right,
        lessons.asked,
        *(lessons.sources[source] for source in ("computed", "cached", "coalesced")),
        lessons.scored,
        lessons.learnt,
    )
    asked, computed, cached, coalesced, scored, learnt = map(int, counts)
    return Progress(
        epoch=run.epoch + 1,
        steps=lessons.steps,
        of_steps=of_steps,
        loss=loss / len(run.losses) if run.losses else None,
        accuracy=accuracy,
        taught=lessons.taught,
        asked=asked,
        computed=computed,
        cached=cached,
        coalesced=coalesced,
        scored=scored,
        learnt=learnt,
        seconds=seconds,
        budget_spent=lessons.budget_spent,
    )


def normaliser(data: Dataset, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Takes raw pixels uint8 [n, c, h, w] to what the student is fed: (x / 255 - mean) / std, a channel at a time."""
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (data.mean, data.std))

    def normalised(x: Tensor) -> Tensor:
        return ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    return normalised


@torch.no_grad()
def accuracy(
    student: nn.Module,
    normalised: Callable[[Tensor], Tensor],
    x: Pixels,
    y: Labels,
    device: torch.device,
) -> float:
    """Top-1 on raw pixels x [n, c, h, w] with labels y [n], 0..1; leaves the student in eval mode."""
    student.eval()
    right = 0
    for start in range(0, len(x), 500):
        logits = student(normalised(torch.from_numpy(x[start : start + 500]).to(device)))
        right += int((logits.argmax(1).cpu().numpy() == y[start : start + 500]).sum())
    return right / len(x)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is none; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there, torch sees {torch.cuda.device_count()} CUDA devices; give cpu")
    return device
