"""A sweep's trials: what each is made of, and what it finds out while it trains; ray_sweep.py says where they run."""

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from pydantic import ValidationError
from torch import nn

from student_worker.config import TrainSettings
from student_worker.data import Dataset, epoch_order
from student_worker.space import points
from student_worker.sweep_settings import SweepSettings
from student_worker.train import Progress, accuracy, normaliser
from student_worker.travel import absolute_paths
from student_worker.unix import Distilled

MARK = "sweep"  # a file in a trial's folder that says whose folder it is
_DIGEST_BYTES = 8  # two of 100 million samples are taken for one with a probability of 0.03 %


@dataclass(frozen=True)
class Trial:
    number: int
    values: dict[str, Any]
    """What the space says of it, by field."""
    settings: TrainSettings

    @property
    def asks(self) -> bool:
        """Whether it has a teacher."""
        return not self.settings.method.startswith("hard")

    @property
    def mixes(self) -> bool:
        """Whether its questions are mixed afresh, so that none ever comes twice."""
        return self.settings.method == "kd+mixup" or (self.settings.method == "unix" and self.settings.mixing != "none")


def trials(settings: SweepSettings) -> list[Trial]:
    """All trials, each a run of train with its own job and folder. Raises ValueError for a value that is out of range.

    They hold no token, and paths that do not depend on the current directory: they are sent to other machines.
    """
    shared: dict[str, Any] = {
        name: getattr(settings, name) for name in TrainSettings.model_fields if name in SweepSettings.model_fields
    }
    shared |= {name: path for name, path in absolute_paths(settings).items() if name in shared}
    if settings.device == "auto" and not settings.gpus_per_trial:
        shared["device"] = "cpu"
    always: dict[str, Any] = {"config": None, "token": None, "overwrite": False, "num_workers": 0}
    always["resume"] = settings.max_failures != 0
    made = []
    for number, values in enumerate(points(settings.space, settings.trials, settings.space_seed)):
        own = {"job": f"{settings.job}-{number:04d}", "output": shared["output"] / f"trial-{number:04d}"}
        try:
            train = TrainSettings(**shared | values | own | always)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise ValueError(f"space: {field}: {problem['msg']}, got {problem['input']!r} (--space)") from None
        made.append(Trial(number, values, train))
    return made


def refuse_earlier(settings: SweepSettings) -> None:
    """Raises ValueError for another sweep's files in the output folder, unless they may be overwritten."""
    output = settings.output
    found = [path for path in (*output.glob("trial-[0-9]*/*"), *output.glob("report.json")) if path.name != MARK]
    if found and not settings.overwrite:
        raise ValueError(f"output: {output} holds another sweep's files; give another --output, or --overwrite")


def prepare(settings: SweepSettings, made: Sequence[Trial]) -> str:
    """Makes the trials' folders anew, and leaves a mark in each, by which a trial knows it for its own; the mark.

    Raises ValueError as `refuse_earlier`.
    """
    refuse_earlier(settings)
    (settings.output / "report.json").unlink(missing_ok=True)
    for path in (*settings.output.glob("trial-[0-9]*"), settings.output / "tune"):
        if path.exists():
            shutil.rmtree(path)
    mark = secrets.token_hex(8)
    for trial in made:
        trial.settings.output.mkdir(parents=True)
        (trial.settings.output / MARK).write_text(mark)
    return mark


@dataclass(frozen=True)
class Outcome:
    """What became of a trial, as it said itself at the end of its last epoch; all None where none ended."""

    progress: Progress | None = None
    validation: float | None = None
    """Accuracy, 0..1, on the half of the test items that trials are chosen by; `test` on the other half."""
    test: float | None = None
    alone: int | None = None
    """Answers that it would have had computed with a cache for itself: the different samples it asked about."""
    error: str = ""
    ended: bool = False
    """Ended by itself or by ASHA, and not since the sweep was interrupted."""

    @property
    def answered(self) -> int:
        """Samples that it had answers for."""
        return self.progress.computed + self.progress.cached + self.progress.coalesced if self.progress else 0

    def status(self, settings: SweepSettings, epochs: int) -> str:
        if self.error:
            return "failed"
        if self.progress is None:
            return "unfinished"
        if self.progress.budget_spent:
            return "budget spent" if settings.on_budget_spent == "stop" else "finished on labels"
        if self.progress.epoch < epochs:
            return "pruned" if settings.asha and self.ended else "unfinished"
        return "finished"


class Distinct:
    """How many different samples a trial has asked about: as many as it alone would have had computed.

    Given the very values that the student was fed, so views that happen to look the same count once, as in the cache.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._began: int | None = None

    @property
    def known(self) -> int | None:
        """None where the trial was resumed: what it had asked about before is not known."""
        return len(self._seen) if self._began in (None, 1) else None

    def add(self, step: int, b: Distilled) -> None:
        """`step`: the batch's, from 1."""
        self._began = self._began or step
        if b.source:  # else it was learnt from labels alone
            for row in b.x.detach().contiguous().cpu().numpy():
                digest = blake3(row.tobytes()).digest(length=_DIGEST_BYTES)
                self._seen.add(int.from_bytes(digest, "little"))


def halves(items: int) -> tuple[Sequence[int], Sequence[int]]:
    """The test items' places, dealt into those to choose a trial by and those to report; the same for every sweep."""
    order = epoch_order(items, 0, 0)
    return np.sort(order[: items // 2]).tolist(), np.sort(order[items // 2 :]).tolist()


def split_accuracy(whole: float, student: nn.Module, data: Dataset) -> tuple[float, float]:
    """Top-1, 0..1, on either of the `halves`, of a student whose accuracy on both together is `whole`.

    Leaves the student in eval mode.
    """
    device = next(student.parameters()).device
    chosen, reported = halves(len(data.test_x))
    validation = accuracy(student, normaliser(data, device), data.test_x[chosen], data.test_y[chosen], device)
    right = round(whole * len(data.test_x)) - round(validation * len(chosen))
    return validation, right / len(reported)
