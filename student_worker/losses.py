"""What a student learns from the teacher's answers (arXiv 2012.09413; docs/unix.md, step 5)."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
UNLABELLED = -1


class TopK(NamedTuple):
    """The k largest of a teacher's logits, and how much probability the others hold."""

    values: Tensor  # [n, k] logits, float32, falling
    indices: Tensor  # [n, k] classes, int64
    tail_mass: Tensor  # [n], share of softmax(logits / temperature) outside the k
    temperature: float  # that of tail_mass

    def to(self, device: torch.device) -> "TopK":
        return TopK(self.values.to(device), self.indices.to(device), self.tail_mass.to(device), self.temperature)


def distillation_loss(
    student_logits: Tensor, answer: Tensor | TopK, temperature: float, *, reduction: Reduction = "mean"
) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), in nats (docs/unix.md, step 5).

    `student_logits` is [n, c]; `answer` is [n, c] logits, or their top k, of which the KL is taken over k + 1 buckets:
    the k classes, and all others as one (never more than the whole KL, and equal to it at k = c). "mean" and "sum" go
    over samples and give a scalar, "none" gives [n]. Computed in float32 whatever the autocast state, in float64 where
    either side is. No gradient flows to the answer.

    Raises ValueError for shapes that do not fit, an unknown reduction, a temperature that is not positive and finite,
    or a top-k answer whose tail mass was taken at another temperature.
    """
    _check(student_logits, answer, temperature, reduction)
    values = answer.values if isinstance(answer, TopK) else answer
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, values.dtype), torch.float32)
    device = student_logits.device
    with torch.autocast(device.type, enabled=False):
        student = (student_logits.to(dtype) / temperature).log_softmax(1)
        teacher = (values.detach().to(device, dtype) / temperature).log_softmax(1)
        if isinstance(answer, TopK):
            indices, tail_mass = answer.indices.to(device), answer.tail_mass.detach().to(device, dtype)
            divergence = _bucket_divergence(student, teacher, indices, tail_mass)
        else:
            divergence = _divergence(student, teacher)
        loss = temperature**2 * divergence
    return _reduce(loss, reduction)


def mixed_cross_entropy(student_logits: Tensor, y: Tensor, y_partner: Tensor, share: Tensor) -> Tensor:
    """(1 - share) * CE(own label) + share * CE(partner's label), in nats (docs/unix.md, step 5).

    `student_logits` is [n, c], the others [n]; the result is [n], float32 whatever the autocast state (float64 stays
    float64). A label of -1 stands for "unlabelled" and its term for 0: a sample counts by what is known of it.
    Raises ValueError for shapes that do not fit.
    """
    n = len(student_logits)
    for name, value in (("y", y), ("y_partner", y_partner), ("share", share)):
        if value.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: give one for each of the {n} samples")
    with torch.autocast(student_logits.device.type, enabled=False):
        logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
        own = F.cross_entropy(logits, y.long(), reduction="none", ignore_index=UNLABELLED)
        other = F.cross_entropy(logits, y_partner.long(), reduction="none", ignore_index=UNLABELLED)
        weight = share.to(logits.dtype)
        return (1 - weight) * own + weight * other


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities [n, c] -> [n]."""
    return _terms(student, teacher).sum(1)


def _terms(student: Tensor, teacher: Tensor) -> Tensor:
    """What each class adds to KL(teacher || student); no term is negative. Log-probabilities in, of any shape.

    p (d + e^-d - 1) with d = log p - log q sums to the same as p d, since p and q both sum to 1; but at high
    temperature, where d is small, p d would cancel to nothing but rounding. Where p is 0, the term is q.
    """
    p, gap = teacher.exp(), teacher - student
    near = gap.abs() < 1
    small = torch.where(near, gap, 0)
    large = torch.where(near | (p == 0), 0, gap)
    return torch.where(near, p * (small + torch.expm1(-small)), p * large + student.exp() - p)


def _bucket_divergence(student: Tensor, teacher: Tensor, indices: Tensor, tail_mass: Tensor) -> Tensor:
    """KL over k classes and one bucket for the rest.

    `student` is log p [n, c], `teacher` log p within the k [n, k], `indices` [n, k], `tail_mass` [n] -> [n].
    """
    top = student.gather(1, indices)
    if indices.shape[1] == student.shape[1]:  # no class is left for the tail; whatever mass it claims is rounding
        return _divergence(top, teacher)
    tail = tail_mass.clamp(0, 1 - torch.finfo(teacher.dtype).eps)
    # Finite, for a student that excludes all other classes: the gradient of a log-sum-exp over -inf alone is NaN.
    student_tail = student.scatter(1, indices, -torch.inf).clamp(min=torch.finfo(student.dtype).min).logsumexp(1)
    return _divergence(top, teacher + torch.log1p(-tail).unsqueeze(1)) + _terms(student_tail, tail.log())


def _reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    match reduction:
        case "mean":
            return loss.mean()
        case "sum":
            return loss.sum()
        case "none":
            return loss


def _check(student_logits: Tensor, answer: Tensor | TopK, temperature: float, reduction: str) -> None:
    if reduction not in {"mean", "sum", "none"}:
        raise ValueError(f"reduction is {reduction!r}: choose mean, sum or none")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}: give a finite number above 0 (published: 4)")
    if student_logits.dim() != 2:
        raise ValueError(f"student_logits have shape {tuple(student_logits.shape)}: give [n, c], one row a sample")
    n, c = student_logits.shape
    if isinstance(answer, TopK):
        k = answer.indices.shape[-1]
        shapes = tuple(tuple(part.shape) for part in answer[:3])
        if shapes != ((n, k), (n, k), (n,)) or not 1 <= k <= c:
            raise ValueError(
                f"the top-k answer has values, indices and tail mass of shapes {shapes}: "
                f"for {n} samples of {c} classes give [{n}, k], [{n}, k] and [{n}], 1 <= k <= {c}"
            )
        # The contract carries the temperature as float32.
        if not math.isclose(answer.temperature, temperature, rel_tol=1e-6):
            raise ValueError(
                f"the loss's temperature is {temperature}, but the answer's tail mass was taken at "
                f"{answer.temperature}: ask for a top-k answer at temperature {temperature}"
            )
    elif answer.shape != (n, c):
        raise ValueError(f"the answer has shape {tuple(answer.shape)}, the student's logits {(n, c)}: they must agree")
