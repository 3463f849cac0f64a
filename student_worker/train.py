"""Training a student, to be read top to bottom. It knows no cluster and no command line."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from student_worker.config import DataConfig, Method, TrainSettings
from student_worker.data import UNLABELLED, Dataset, Labels, Pixels, epoch_order, labelled_subset, load
from student_worker.losses import distillation_loss, mixed_cross_entropy
from student_worker.mixup import mix
from student_worker.models import build
from student_worker.unix import Distilled, Teacher, Unix
from student_worker.views import Augmentation, augment, view_number


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an epoch."""

    epoch: int
    """From 1."""
    steps: int
    loss: float
    """Mean over the epoch's steps."""
    accuracy: float
    """On the test set, of the student as it is now; never the best of several."""
    asked: int
    """Samples that the teacher was asked about since the run began; `scored` and `learnt` likewise."""
    scored: int
    learnt: int
    seconds: float
    """Since the run began."""


def train(
    settings: TrainSettings,
    teacher: Teacher | None,
    *,
    on_step: Callable[[int, int, float, Distilled], None] = lambda *_: None,
    on_epoch: Callable[[Progress, nn.Module, Dataset], None] = lambda *_: None,
) -> Progress:
    """One run; returns where it ended. `teacher` may be None for the methods that need none.

    Every method takes the same number of optimiser steps: one per batch of the whole training set and epoch. `on_step`
    gets the step's number, of how many, its loss and what was learnt from; `on_epoch` the progress, student and data.
    Raises what the data, the student's factory and the teacher raise, and ValueError for settings that do not fit.
    """
    began = perf_counter()
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    data = load(settings.dataset, settings.data_directory)
    labels = known_labels(settings, data)
    device = _device(settings.device)
    channels, size, _ = data.shape
    student = build(settings.student, channels=channels, classes=data.classes, size=size, **settings.student_arguments)
    student = student.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalised = normaliser(data, device)
    source = _source(settings, teacher, normalised)

    steps = settings.epochs * -(-len(labels) // settings.batch_size)
    optimizer = torch.optim.SGD(
        student.parameters(), settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    for epoch in range(settings.epochs):
        student.train()
        losses = []
        loader = epoch_batches(settings, data, labels, epoch, device)
        with closing(source.batches(loader, student, settings.depth)) as batches:
            for b in batches:
                loss = source.criterion(student(b.x), b)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss is {losses[-1]} at step {source.steps}; lower --learning-rate")
                on_step(source.steps, steps, losses[-1], b)
        progress = Progress(
            epoch=epoch + 1,
            steps=source.steps,
            loss=float(np.mean(losses)),
            accuracy=accuracy(student, normalised, data.test_x, data.test_y, device),
            asked=source.asked,
            scored=source.scored,
            learnt=source.learnt,
            seconds=perf_counter() - began,
        )
        on_epoch(progress, student, data)
    return progress


def known_labels(settings: DataConfig, data: Dataset) -> Labels:
    """The training labels int64 [n] that a run may use; -1 for the others."""
    if not settings.labelled:
        return data.train_y
    return labelled_subset(data.train_y, settings.labelled, settings.view_seed)


def epoch_batches(
    settings: TrainSettings,
    data: Dataset,
    labels: Labels,
    epoch: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch's (x uint8 [n, c, h, w], y int64 [n] with -1 for unlabelled, item int64 [n]).

    Methods without a teacher see labelled items only, each several times an epoch where few are labelled, every time
    in another view: as many batches as the others.
    """
    items = np.flatnonzero(labels != UNLABELLED) if _is_hard(settings.method) else np.arange(len(labels))
    rounds = -(-len(labels) // len(items))
    numbers = [epoch * rounds + r for r in range(rounds)]
    order = np.concatenate([items[epoch_order(len(items), settings.seed, number)] for number in numbers])
    views = np.repeat([view_number(number, settings.views) for number in numbers], len(items))
    augmentation = Augmentation(settings.crop, settings.flip, settings.erase)
    for start in range(0, len(labels), settings.batch_size):
        batch = slice(start, min(start + settings.batch_size, len(labels)))
        item = order[batch]
        x = augment(
            data.train_x[item], seed=settings.view_seed, items=item, view=views[batch], augmentation=augmentation
        )
        yield tuple(torch.from_numpy(part).to(device) for part in (x, labels[item], item))  # type: ignore[misc]


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


def _source(
    settings: TrainSettings, teacher: Teacher | None, normalised: Callable[[Tensor], Tensor]
) -> "Unix | HardLabels":
    generator = torch.Generator().manual_seed(settings.seed)
    if _is_hard(settings.method):
        return HardLabels(mixing=settings.method == "hard+mixup", to_student=normalised, generator=generator)
    if teacher is None:
        raise ValueError(f"method {settings.method} needs a teacher")

    def criterion(logits: Tensor, b: Distilled) -> Tensor:
        loss = distillation_loss(logits, b.answer, settings.temperature, reduction="none")
        if settings.label_weight and b.y is not None and b.y_partner is not None:
            loss = loss + settings.label_weight * mixed_cross_entropy(logits, b.y, b.y_partner, b.share)
        return loss

    unix = partial(Unix, teacher, criterion=criterion, to_student=normalised, generator=generator)
    match settings.method:
        case "kd":
            return unix(keep=1.0, strategy="random", mixing="none")
        case "kd+mixup":
            return unix(keep=1.0, strategy="random", mixing="uniform")
        case _:
            return unix(
                keep=settings.keep,
                clean=settings.clean,
                sharpness=settings.sharpness,
                strategy=settings.strategy,
                mixing=settings.mixing,
                score_mode=settings.score_mode,
            )


class HardLabels:
    """The control without a teacher: labels alone, plain or with mixup, behind the same two calls as Unix."""

    def __init__(self, *, mixing: bool, to_student: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
        self._mixing, self._to_student, self._generator = mixing, to_student, generator
        self.asked = self.scored = self.learnt = self.steps = 0

    def batches(
        self,
        loader: Iterable[tuple[Tensor, Tensor, Tensor]],
        student: nn.Module,  # noqa: ARG002
        depth: int,  # noqa: ARG002
    ) -> Generator[Distilled, None, None]:
        for x, y, index in loader:
            n = len(x)
            own, partner, share = torch.arange(n), torch.arange(n), torch.zeros(n)
            if self._mixing:
                partner = torch.randperm(n, generator=self._generator)
                share = torch.rand(1, generator=self._generator).expand(n)
            mixed = mix(x, own, partner, share)
            self.learnt += n
            self.steps += 1
            yield Distilled(
                x=self._to_student(mixed),
                answer=torch.empty(0),
                share=share.to(x.device),
                y=y,
                y_partner=y[partner.to(y.device)],
                index=index,
                source=(),
                lag=0,
            )

    def criterion(self, student_logits: Tensor, b: Distilled) -> Tensor:
        if b.y is None or b.y_partner is None:
            raise ValueError("hard labels need labels: the loader must give (x, y, index)")
        return mixed_cross_entropy(student_logits, b.y, b.y_partner, b.share).mean()


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


def _is_hard(method: Method) -> bool:
    return method in ("hard", "hard+mixup")
