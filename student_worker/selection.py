"""Which samples of a batch are asked about, and what is mixed into them (docs/unix.md, steps 1 to 3)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from student_worker.mixup import Mixed, adaptive_mixup, mix, ranking, uniform_mixup
from student_worker.uncertainty import STRATEGIES, Strategy, uncertainty

Mixing = Literal["adaptive", "none", "uniform"]
ScoreMode = Literal["train", "eval"]
Transform = Callable[[Tensor], Tensor]

_SEED_OFFSET = 0x756E6978  # "unix": the generator must not repeat the numbers that initialised the weights


class Recipe(NamedTuple):
    """All that was decided about a batch, on the CPU: from the same samples it makes the same query again."""

    n: int  # samples in the batch
    lam: float
    kept: Tensor  # [k] int64, batch positions, as partner
    partner: Tensor  # [k] int64
    share: Tensor  # [k]


class Selected(NamedTuple):
    recipe: Recipe
    x: Tensor  # [k, ...], mixed
    logits: Tensor | None  # [n, c], the student's own of the whole batch, where it was scored
    scores: Tensor  # [n], of the whole batch


class Selection:
    """Scores, selects and mixes, as `Unix` describes its arguments. Draws from `generator`: scores, lam, partners."""

    def __init__(
        self,
        *,
        keep: float,
        clean: float,
        sharpness: float,
        strategy: Strategy,
        mixing: Mixing,
        score_mode: ScoreMode,
        generator: torch.Generator | None,
    ) -> None:
        for name, choice, choices in (
            ("strategy", strategy, STRATEGIES),
            ("mixing", mixing, get_args(Mixing)),
            ("score_mode", score_mode, get_args(ScoreMode)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}: choose one of {', '.join(choices)}")
        for name, value, valid, expected in (
            ("keep", keep, 0 < keep <= 1, "a share of the batch, above 0 and at most 1"),
            ("clean", clean, 0 <= clean <= 1, "a share of the batch, 0 to 1"),
            ("sharpness", sharpness, 0 <= sharpness < math.inf, "a finite number >= 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}: give {expected}")
        if generator is None:
            generator = torch.Generator().manual_seed((torch.initial_seed() + _SEED_OFFSET) % 2**63)
        elif generator.device.type != "cpu":
            raise ValueError(f"generator is on {generator.device}: give a CPU one, so that runs agree on any device")
        self._keep = keep
        self._clean = clean
        self._sharpness = sharpness
        self._strategy = strategy
        self._mixing = mixing
        self._score_mode = score_mode
        self.generator = generator

    def select(self, student: nn.Module, x: Tensor, to_student: Transform) -> Selected:
        """Of a batch x [n, ...]; the student is scored on to_student(x)."""
        n = len(x)
        scores, logits = self._score(student, x, to_student)
        if self._mixing == "none":
            # In batch order: with all of it kept, this is the plain loop, to the last bit.
            kept = ranking(scores)[: _count(self._keep, n)].sort().values.cpu()
            return Selected(Recipe(n, 0.0, kept, kept, torch.zeros(len(kept))), x[kept.to(x.device)], logits, scores)
        lam = torch.rand((), generator=self.generator, dtype=torch.float64).item()  # Beta(1, 1)
        mixed = self._mix(x, scores, lam)
        recipe = Recipe(n, lam, mixed.kept.cpu(), mixed.partner.cpu(), mixed.share.cpu())
        return Selected(recipe, mixed.x, logits, scores)

    def again(self, x: Tensor, recipe: Recipe) -> Tensor:
        """The samples [k, ...] that were selected from the batch x [n, ...], bit for bit."""
        if self._mixing == "none":
            return x[recipe.kept.to(x.device)]
        return mix(x, recipe.kept, recipe.partner, recipe.share)

    def _score(self, student: nn.Module, x: Tensor, to_student: Transform) -> tuple[Tensor, Tensor | None]:
        if self._strategy == "random":
            return torch.rand(len(x), generator=self.generator), None
        with scoring(student, self._score_mode):
            logits: Tensor = student(to_student(x))
        return uncertainty(logits, self._strategy), logits

    def _mix(self, x: Tensor, scores: Tensor, lam: float) -> Mixed:
        n = len(x)
        keep, clean = _count(self._keep, n), _count(self._clean, n)
        partner = torch.randperm(n, generator=self.generator)
        if self._mixing == "uniform":
            return uniform_mixup(x, scores, keep=keep, lam=lam, partner=partner)
        return adaptive_mixup(x, scores, keep=keep, clean=clean, sharpness=self._sharpness, lam=lam, partner=partner)


def _count(share: float, n: int) -> int:
    """A share of n samples as a count, rounded half up, 1..n."""
    return min(max(math.floor(share * n + 0.5), 1), n)


@contextmanager
def scoring(student: nn.Module, mode: ScoreMode) -> Iterator[None]:
    """No gradients, the student in `mode`, and afterwards every submodule as it was: a user may have frozen some."""
    training = {module: module.training for module in student.modules()}
    if mode == "eval":
        student.eval()
    elif not student.training:
        student.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
