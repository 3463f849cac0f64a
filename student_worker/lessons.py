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
from student_worker.unix import Distilled, Teacher, Unix
from student_worker.views import Augmentation, augment, view_number


class Lessons:
    """Each epoch's batches, from the teacher; where its budget is spent, from the labels alone, or no more of them.

    Counts batches in `steps`, those of them with a teacher's answers in `taught`, samples in `asked`, `scored` and
    `learnt`, answers by where they came from in `sources`. `budget_spent` is what the server said, empty before.
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
    ) -> None:
        hard = _is_hard(settings.method)
        if (hard or settings.on_budget_spent == "hard-labels") and (labels == UNLABELLED).all():
            needing = f"method {settings.method}" if hard else "on_budget_spent hard-labels"
            raise ValueError(f"{needing} needs labels, and none of the {len(labels)} training items has one")
        if not hard and teacher is None:
            raise ValueError(f"method {settings.method} needs a teacher")
        self._settings = settings
        self._data, self._labels, self._device = data, labels, device
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._unix = None if hard or teacher is None else _unix(settings, teacher, normalised, self._generator)
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
            batches = self._batches(self._settings, number, first)
            try:
                with closing(self._unix.batches(batches, student, self._settings.depth)) as answered:
                    for b in answered:
                        self.taught += 1
                        yield self._counted(b)
            except BudgetSpent as error:
                self.budget_spent = str(error)
            else:
                return
        if not self.over:
            settings = self._settings if self._unix is None else self._settings.model_copy(update={"method": "hard"})
            for b in self._alone.batches(self._batches(settings, number, self.steps - before)):
                yield self._counted(b)

    def criterion(self, student_logits: Tensor, b: Distilled) -> Tensor:
        """The loss, a scalar, on the batch that `epoch` gave last."""
        if self._unix and not self.budget_spent:
            return self._unix.criterion(student_logits, b)
        return self._alone.criterion(student_logits, b)

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

    def _batches(self, settings: TrainSettings, number: int, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return epoch_batches(settings, self._data, self._labels, number, self._device, first=first)

    def _counted(self, b: Distilled) -> Distilled:
        self.steps += 1
        self.learnt += len(b.x)
        self.sources.update(b.source)
        return b


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
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch's (x uint8 [n, c, h, w], y int64 [n] with -1 for unlabelled, item int64 [n]), from batch `first` on.

    Methods without a teacher see labelled items only, each several times an epoch where few are labelled, every time
    in another view: as many batches as the others. Where all are labelled, they are the others' batches.
    """
    items = np.flatnonzero(labels != UNLABELLED) if _is_hard(settings.method) else np.arange(len(labels))
    rounds = -(-len(labels) // len(items))
    numbers = [epoch * rounds + r for r in range(rounds)]
    order = np.concatenate([items[epoch_order(len(items), settings.seed, number)] for number in numbers])
    views = np.repeat([view_number(number, settings.views) for number in numbers], len(items))
    augmentation = Augmentation(settings.crop, settings.flip, settings.erase)
    for start in range(first * settings.batch_size, len(labels), settings.batch_size):
        batch = slice(start, min(start + settings.batch_size, len(labels)))
        item = order[batch]
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
