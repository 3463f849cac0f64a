"""Does the teacher understand the data? Asked before a run, on labelled samples as they are."""

from collections.abc import Callable

import numpy as np
import torch

from student_worker.client import TeacherClient
from student_worker.data import UNLABELLED, Dataset, Labels, Pixels, epoch_order
from student_worker.errors import TeacherError, TeacherMisunderstands
from student_worker.understanding import Understanding, binomial_tail

_BY_LUCK = 1e-3  # below this chance of guessing as many right, the teacher is said to understand

_VARIANTS: dict[str, Callable[[Pixels], Pixels]] = {
    "with its channels in reverse order": lambda x: x[:, ::-1],
    "with height and width swapped": lambda x: x.swapaxes(2, 3),
    "with dark and bright swapped": lambda x: 255 - x,
}


def check(teacher: TeacherClient, data: Dataset, labels: Labels, samples: int) -> str:
    """Asks about at most `samples` of the labelled training samples; returns a sentence with the teacher's top-1.

    Raises TeacherMisunderstands where the teacher's classes have other names or its answers do not fit the labels;
    it then asks about variants of the same samples, and the error names one that fits better.
    """
    description = teacher.describe()
    output = description.outputs[0]
    names = tuple(output.class_names)
    if names and names != data.class_names:
        raise TeacherMisunderstands(
            f"class order: the teacher's classes are {list(names)}, those of {data.name} are {list(data.class_names)}"
        )
    order = epoch_order(len(labels), seed=0, epoch=0)
    items = order[labels[order] != UNLABELLED][:samples]
    x, y = data.train_x[items], labels[items]
    predicted = _predicted(teacher, x)
    top1 = float((predicted == y).mean())
    understanding = Understanding(
        data.classes,
        declared=output.top1,
        class_names=names or data.class_names,
        promise=0.9,  # nothing was selected here, neither mixed nor augmented
        enough=len(y),
        limit=len(y),
    )
    understanding.observe(torch.from_numpy(predicted), torch.from_numpy(y))
    try:
        understanding.verify()
    except TeacherMisunderstands as error:
        try:
            culprit = _better_variant(teacher, x, y, top1)
        except TeacherError:  # such as a budget that is spent now: what was found out is so all the same
            culprit = ""
        raise TeacherMisunderstands(f"{error}{culprit}") from None
    declared = f"; it declares {output.top1:.1%}" if output.top1 else ""
    chance = max(1 / data.classes, float(np.bincount(y).max()) / len(y))
    hits = int((predicted == y).sum())
    # Neither verdict is forced: too few samples to be contradicted are no proof of understanding.
    by_luck = 1 - binomial_tail(hits - 1, len(y), min(chance, 0.999)) if hits else 1.0
    verdict = "understands" if by_luck < _BY_LUCK else "may or may not understand (too few labelled samples to tell)"
    return (
        f"teacher {description.name} ({description.fingerprint}) {verdict} {data.name}: top-1 {top1:.1%} "
        f"on {len(y)} labelled training samples (chance {chance:.1%}{declared})"
    )


def _predicted(teacher: TeacherClient, x: Pixels) -> Labels:
    logits = teacher.label(np.ascontiguousarray(x)).logits
    top = logits.argmax(1) if isinstance(logits, torch.Tensor) else logits.indices[:, 0]
    return top.numpy()


def _better_variant(teacher: TeacherClient, x: Pixels, y: Labels, top1: float) -> str:
    """What would explain it, if another reading of the same pixels does far better."""
    found = []
    for what, variant in _VARIANTS.items():
        changed = variant(x)
        if changed.shape == x.shape and not np.array_equal(changed, x):
            found.append((float((_predicted(teacher, changed) == y).mean()), what))
    best, what = max(found, default=(0.0, ""))
    return f". Likely culprit: {what} the same samples give {best:.1%}" if best > top1 + 0.2 else ""
