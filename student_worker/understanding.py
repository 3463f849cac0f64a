"""Does the teacher understand the data? A teacher fed wrongly still answers, and a student would learn its nonsense."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from student_worker.errors import TeacherMisunderstands

# A run verifies once a step, some fifteen times: with four bounds at this level each, a right teacher is stopped in
# fewer than one run in a thousand, even if it stood exactly on a bound; it stands far off.
_LEVEL: Final = 1e-5
_RELATED: Final = 3.0  # standard deviations above independence from which answers have to do with the labels
_TOO_UNEVEN: Final = 0.9  # of the labels in one class
_NEAR_CHANCE: Final = 1 / 4  # of the way from chance to perfect
_SHOWN: Final = 5


class Understanding:
    """Compares the teacher's top-1 with the labels of (nearly) clean samples, and stops a run that would be in vain.

    `classes` is their number; `declared` the teacher's top-1 accuracy on its own held-out samples, 0..1, 0 if unknown;
    `class_names` those of the teacher's outputs, for the message. `promise` is how much of what it declares is held to:
    not all, for a student asks about its hard samples. `verify` keeps silent below `enough` samples; from `limit`
    samples on `done` holds and further ones are not looked at. Not thread-safe.
    """

    def __init__(
        self,
        classes: int,
        *,
        declared: float = 0.0,
        class_names: Sequence[str] = (),
        promise: float = 3 / 4,
        enough: int = 64,
        limit: int = 512,
    ) -> None:
        if classes < 2:
            raise ValueError(f"classes is {classes}: understanding is measured on at least two")
        self._classes = classes
        self._declared = declared
        self._names = class_names if len(class_names) == classes else [str(c) for c in range(classes)]
        self._promise = promise
        self._enough = enough
        self._limit = limit
        self._teacher: list[int] = []
        self._labels: list[int] = []
        self._student: list[int | None] = []

    @property
    def n(self) -> int:
        """Labelled samples seen."""
        return len(self._labels)

    @property
    def done(self) -> bool:
        return self.n >= self._limit

    def observe(self, teacher: Tensor, labels: Tensor, student: Tensor | None = None) -> None:
        """Add m samples, [m] each: the teacher's top-1, the true class (-1 = unlabelled), the student's own top-1."""
        if (
            teacher.dim() != 1
            or teacher.shape != labels.shape
            or (student is not None and student.shape != labels.shape)
        ):
            shapes = [tuple(t.shape) for t in (teacher, labels, student) if t is not None]
            raise ValueError(f"predictions and labels have shapes {shapes}: give one class a sample in each")
        own: list[int | None] = [None] * len(labels) if student is None else student.tolist()
        for t, y, s in zip(teacher.tolist(), labels.tolist(), own, strict=True):
            if y >= 0 and not self.done:
                self._teacher.append(t)
                self._labels.append(y)
                self._student.append(s)

    def verify(self) -> None:
        """Raise TeacherMisunderstands if the labels contradict the teacher. One-sided bounds, each at 1e-5:

        - near chance: its answers are not related to the labels. Chance is the agreement of independent answers with
          the same class counts; accuracy is less than 3 standard deviations above it (permutation variance), and below
          a quarter of the way from it to perfect (binomial bound). Not judged while one class has over 90 % of the
          labels: a right teacher cannot be told there from one that always says the same.
        - below the student's own accuracy (paired sign test over the samples that only one of them gets right).
        - below `promise` of the way from 1/c to what it declares (binomial bound).
        - a relabelling, fitted to one half of the samples, gets more of the other half right than the teacher's own
          classes do (paired sign test), and gets most of them: its classes are in another order.
        """
        if self.n < self._enough:
            return
        right = [t == y for t, y in zip(self._teacher, self._labels, strict=True)]
        relabelled = self._relabelled()
        reordered = _beats(relabelled, right)
        reasons = []
        if self._near_chance(sum(right)):
            reasons.append("which is near chance")
        both = [(s == y, r) for s, y, r in zip(self._student, self._labels, right, strict=True) if s is not None]
        if _beats([s for s, _ in both], [r for _, r in both]):
            reasons.append("which is below the student's own accuracy")
        if self._declared > (floor := 1 / self._classes):
            bound = floor + self._promise * (self._declared - floor)
            if binomial_tail(sum(right), self.n, bound) < _LEVEL:
                reasons.append("which is far below what it declares")
        if reordered and 2 * sum(relabelled) > self.n:
            reasons.append("and more with its classes in another order")
        if reasons:
            raise TeacherMisunderstands(self._message(right, both, relabelled if reordered else None, reasons))

    def _near_chance(self, hits: int) -> bool:
        if self._chance() > _TOO_UNEVEN:
            return False
        n, predicted, labelled = self.n, Counter(self._teacher), Counter(self._labels)
        # Hits of two independent lists with these class counts: mean and variance over all permutations.
        products = {c: predicted[c] * labelled[c] for c in predicted.keys() & labelled.keys()}
        total = sum(products.values())
        spread = sum(product * (n - predicted[c] - labelled[c]) for c, product in products.items())
        deviation = math.sqrt(max(0.0, (n * spread + total**2) / (n**2 * (n - 1))))
        if hits > total / n + _RELATED * deviation:
            return False
        chance = total / n**2
        return binomial_tail(hits, n, chance + _NEAR_CHANCE * (1 - chance)) < _LEVEL

    def _chance(self) -> float:
        """What the best guess that does not look at the samples would get."""
        return max(1 / self._classes, max(Counter(self._labels).values()) / self.n)

    def _relabelled(self) -> list[bool]:
        """Whether each sample would be right under the matching fitted to the half that it is not in."""
        matchings = [_matching(self._teacher[half::2], self._labels[half::2]) for half in (1, 0)]
        return [
            matchings[i % 2].get(t, t) == y for i, (t, y) in enumerate(zip(self._teacher, self._labels, strict=True))
        ]

    def _message(
        self, right: list[bool], both: list[tuple[bool, bool]], relabelled: list[bool] | None, reasons: list[str]
    ) -> str:
        facts = [f"chance {self._chance():.1%}"]
        if both:
            facts.append(f"the student's own {sum(s for s, _ in both) / len(both):.1%}")
        if self._declared > 0:
            facts.append(f"declared by the teacher {self._declared:.1%}")
        message = (
            f"the teacher does not understand this data: of n={self.n} labelled, nearly clean samples it gets "
            f"{sum(right) / self.n:.1%} right, {', '.join(reasons)} ({', '.join(facts)}). "
            "Suspects: normalisation (left out, applied twice, other constants), class order, "
            "layout (channel order RGB or BGR, channels first or last)"
        )
        if relabelled is not None:
            pairs = sorted((t, y) for t, y in _matching(self._teacher, self._labels).items() if t != y)
            shown = ", ".join(f"its {self._names[t]} is labelled {self._name(y)}" for t, y in pairs[:_SHOWN])
            message += (
                f". Likely culprit: class order, for a one-to-one relabelling, found on half of the samples, gets "
                f"{sum(relabelled) / self.n:.1%} of the others right "
                f"({shown}{', ...' if len(pairs) > _SHOWN else ''})"
            )
        return message

    def _name(self, label: int) -> str:
        return self._names[label] if label < self._classes else str(label)


def _matching(predicted: Sequence[int], labels: Sequence[int]) -> dict[int, int]:
    """One-to-one from predicted to true classes: greedy on the confusion matrix, a class to itself where counts tie."""
    counts = Counter(zip(predicted, labels, strict=True))
    matching: dict[int, int] = {}
    taken: set[int] = set()
    for (t, y), _ in sorted(counts.items(), key=lambda cell: (-cell[1], cell[0][0] != cell[0][1], cell[0])):
        if t not in matching and y not in taken:
            matching[t] = y
            taken.add(y)
    return matching


def _beats(these: Sequence[bool], those: Sequence[bool]) -> bool:
    """Whether these hits outnumber those beyond noise: one-sided paired sign test (McNemar, exact)."""
    only_these = sum(a and not b for a, b in zip(these, those, strict=True))
    only_those = sum(b and not a for a, b in zip(these, those, strict=True))
    return binomial_tail(only_those, only_these + only_those, 0.5) < _LEVEL


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p), 0 < p < 1."""
    log_n = math.lgamma(n + 1)
    log_p, log_q = math.log(p), math.log1p(-p)
    return math.fsum(
        math.exp(log_n - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q)
        for i in range(k + 1)
    )
