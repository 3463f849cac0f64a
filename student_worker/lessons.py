"""What a run learns from, batch by batch: a teacher's answers, or the labels alone."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from student_worker.config import DataConfig, Method, TrainSettings
from student_worker.data import UNLABELLED, Dataset, Labels, epoch_order, labelled_subset
from student_worker.errors import BudgetSpent
from student_worker.losses import distillation_loss, mixed_cross_entropy
from student_worker.mixup import mix
from student_worker.ranks import ALONE, Ranks, learnt
from student_worker.selection import scoring
from student_worker.unix import Distilled, Observer, Teacher, Unix
from student_worker.views import Augmentation, augment, view_number


class Lessons:
    """Each epoch's batches, from the teacher; where its budget is spent, from the labels alone, or no more of them.

    Counts batches in `steps`, those of them with a teacher's answers in `taught`, samples in `asked`, `scored` and
    `learnt`, answers by where they came from in `sources`. `budget_spent` is what the server said, empty before.
    With several `ranks` these are this rank's samples and answers: it has its part of every batch, asks about that
    alone, and is in step with the others; where one of them finds the budget spent, all do. `observer` is that of Unix.
    Raises ValueError where the method needs a teacher, or labels, that are not there.
    """

    def __init__(
        self,
        settings: TrainSettings,
        teacher: Teacher | None,
        data: Dataset,
        labels: Labels,
        *,
        normalised: Callable[[Tensor], Tensor],
        device: torch.device,
        budget_spent: str = "",
        ranks: Ranks = ALONE,
        observer: Observer | None = None,
    ) -> None:
        hard = _is_hard(settings.method)
        if (hard or settings.on_budget_spent == "hard-labels") and (labels == UNLABELLED).all():
            needing = f"method {settings.method}" if hard else "on_budget_spent hard-labels"
            raise ValueError(f"{needing} needs labels, and none of the {len(labels)} training items has one")
        if not hard and teacher is None:
            raise ValueError(f"method {settings.method} needs a teacher")
        self._settings = settings
        self._data, self._labels, self._device = data, labels, device
        self._normalised, self._ranks, self._part = normalised, ranks, (ranks.rank, ranks.world)
        self._count = -(-len(labels) // settings.batch_size)  # batches of an epoch
        self._scores = settings.method == "unix" and settings.strategy != "random"
        self._weight = 1.0  # of the mean loss of the batch in hand, among the ranks
        self._generator = torch.Generator().manual_seed(ranks.seed(settings.seed))
        self._unix = None if hard or teacher is None else _unix(settings, teacher, normalised, self._generator)
        if self._unix:
            self._unix.observer = observer
        self._alone = HardLabels(
            mixing=settings.method == "hard+mixup", to_student=normalised, generator=self._generator
        )
        self.budget_spent = budget_spent
        self.steps = self.taught = self.learnt = 0
        self.sources = Counter[str]()

    @property
    def over(self) -> bool:
        """The run ends here, for its budget is spent."""
        return bool(self.budget_spent) and self._settings.on_budget_spent == "stop"

    @property
    def asked(self) -> int:
        return self._unix.asked if self._unix else 0

    @property
    def scored(self) -> int:
        return self._unix.scored if self._unix else 0

    def epoch(self, number: int, student: nn.Module, first: int = 0) -> Generator[Distilled, None, None]:
        """The epoch's batches, each once, whether the teacher or its label teaches it; fewer where the run is over.

        `first` is how many of them a resumed run has learnt already. From the moment when the budget is spent the run
        is one of method `hard`: batches whose answers had not come are learnt with their labels. Close it
        (contextlib.closing): queries may be in flight.
        """
        before = self.steps - first
        if self._unix and not self.budget_spent:
            batches = self._batches(self._settings, number, first, student)
            try:
                with closing(self._unix.batches(batches, student, self._settings.depth)) as answered:
                    for b in self._in_step(answered, first):
                        self.taught += 1
                        yield b
            except BudgetSpent as error:
                self.budget_spent = str(error)
            else:
                return
        if not self.over:
            settings = self._settings if self._unix is None else self._settings.model_copy(update={"method": "hard"})
            first = self.steps - before
            yield from self._in_step(self._alone.batches(self._batches(settings, number, first)), first)

    def criterion(self, student_logits: Tensor, b: Distilled) -> Tensor:
        """The loss, a scalar, on the batch that `epoch` gave last; its mean over the ranks is the mean of all parts."""
        if not learnt(b):
            return student_logits.sum() * 0.0
        if self._unix and not self.budget_spent:
            return self._unix.criterion(student_logits, b) * self._weight
        return self._alone.criterion(student_logits, b) * self._weight

    def state_dict(self) -> dict[str, Any]:
        """Counters, random state and what Unix keeps, in plain values and tensors; within `epoch`, as Unix's."""
        return {
            "steps": self.steps,
            "taught": self.taught,
            "learnt": self.learnt,
            "sources": dict(self.sources),
            "budget_spent": self.budget_spent,
            "generator": self._generator.get_state(),
            "unix": self._unix.state_dict() if self._unix else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, in the epoch and behind the batch where it was taken."""
        self.steps, self.taught, self.learnt = state["steps"], state["taught"], state["learnt"]
        self.sources = Counter(state["sources"])
        self.budget_spent = state["budget_spent"]
        if self._unix:
            self._unix.load_state_dict(state["unix"])
        self._generator.set_state(state["generator"])

    def _in_step(self, batches: Iterable[Distilled], first: int) -> Iterator[Distilled]:
        """The epoch's batches from `first` on, counted, each when all ranks have theirs."""
        for b, weight in self._ranks.in_step(self._filled(batches, first)):
            self._weight = weight
            self.steps += 1
            self.learnt += learnt(b)
            self.sources.update(b.source)
            yield b

    def _filled(self, batches: Iterable[Distilled], first: int) -> Iterator[Distilled]:
        """With a stand-in at the end for a rank that has no sample of the last batch: it learns nothing from it, but
        takes part in the step.
        """
        yield from batches
        if self._without_last(first):
            nothing = torch.empty(0)
            yield Distilled(
                x=self._stand_in(), answer=nothing, share=nothing, y=None, y_partner=None, index=None, source=(), lag=0
            )

    def _batches(
        self, settings: TrainSettings, number: int, first: int, student: nn.Module | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's parts of an epoch's batches, but for an empty one.

        Instead of that, `student` scores a stand-in, at the very step at which the others score their parts: layers
        such as SyncBatchNorm wait for all ranks at each forward pass.
        """
        yield from epoch_batches(settings, self._data, self._labels, number, self._device, first=first, part=self._part)
        scored = first and first + settings.depth >= self._count  # by the run that this one resumes
        if student is not None and self._scores and self._without_last(first) and not scored:
            with scoring(student, settings.score_mode):
                student(self._stand_in())

    def _without_last(self, first: int) -> bool:
        """Has this rank no sample of the epoch's last batch, and is that among the batches from `first` on?"""
        rank, _ = self._part
        return first < self._count and rank > (len(self._labels) - 1) % self._settings.batch_size

    def _stand_in(self) -> Tensor:
        """[2, ...], as the student takes it: batch norm over flat features refuses a single sample."""
        return self._normalised(torch.from_numpy(self._data.train_x[:2]).to(self._device))


class HardLabels:
    """Labels alone, plain or with mixup, in the shape of what Unix gives."""

    def __init__(self, *, mixing: bool, to_student: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
        self._mixing, self._to_student, self._generator = mixing, to_student, generator

    def batches(self, loader: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Generator[Distilled, None, None]:
        for x, y, index in loader:
            n = len(x)
            own, partner, share = torch.arange(n), torch.arange(n), torch.zeros(n)
            if self._mixing:
                partner = torch.randperm(n, generator=self._generator)
                share = torch.rand(1, generator=self._generator).expand(n)
            mixed = mix(x, own, partner, share)
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
    *,
    first: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch's (x uint8 [n, c, h, w], y int64 [n] with -1 for unlabelled, item int64 [n]), from batch `first` on.

    Methods without a teacher see labelled items only, each several times an epoch where few are labelled, every time
    in another view: as many batches as the others. Where all are labelled, they are the others' batches.
    `part` (rank, world): of each batch every world-th sample from the rank-th on, so that all ranks' parts are the
    batch. A part without a sample, which only the last batch can have, is not given.
    """
    rank, world = part
    items = np.flatnonzero(labels != UNLABELLED) if _is_hard(settings.method) else np.arange(len(labels))
    rounds = -(-len(labels) // len(items))
    numbers = [epoch * rounds + r for r in range(rounds)]
    order = np.concatenate([items[epoch_order(len(items), settings.seed, number)] for number in numbers])
    views = np.repeat([view_number(number, settings.views) for number in numbers], len(items))
    augmentation = Augmentation(settings.crop, settings.flip, settings.erase)
    for start in range(first * settings.batch_size, len(labels), settings.batch_size):
        batch = slice(start + rank, min(start + settings.batch_size, len(labels)), world)
        item = order[batch]
        if not len(item):
            return
        x = augment(
            data.train_x[item], seed=settings.view_seed, items=item, view=views[batch], augmentation=augmentation
        )
        yield tuple(torch.from_numpy(part).to(device) for part in (x, labels[item], item))  # type: ignore[misc]


def _unix(
    settings: TrainSettings, teacher: Teacher, normalised: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Unix:
    """The method as settings of Unix."""

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


def _is_hard(method: Method) -> bool:
    return method in ("hard", "hard+mixup")
