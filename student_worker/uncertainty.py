"""How unsure a student is of each sample (Xu, Liu, Loy, arXiv 2012.09413; docs/unix.md, step 1)."""

import math
from collections.abc import Callable
from typing import Final, Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["random", "confidence", "margin", "entropy"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)


def _confidence(logits: Tensor) -> Tensor:
    return 1 - logits.softmax(1).amax(1)


def _margin(logits: Tensor) -> Tensor:
    first, second = logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return second - first


def _entropy(logits: Tensor) -> Tensor:
    # p log p with p = 0 is NaN when log p is -inf: logits further apart than the dtype's range would do that.
    log_p = logits.log_softmax(1).clamp_min(torch.finfo(logits.dtype).min)
    return -(log_p.exp() * log_p).sum(1)


_SCORES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "confidence": _confidence,
    "margin": _margin,
    "entropy": _entropy,
}


def uncertainty(logits: Tensor, strategy: Strategy, *, generator: torch.Generator | None = None) -> Tensor:
    """Score samples: the higher, the less certain (docs/unix.md, step 1), at temperature 1.

    `logits` is [n, c] with c >= 2; the result is [n], float32 whatever the autocast state (float64 stays float64).

        random      uniform in [0, 1), drawn from `generator` (default: torch's own)
        confidence  1 - max p, in [0, 1 - 1/c]
        margin      -(p1 - p2) of the two largest, in [-1, 0]
        entropy     -sum p log p in nats, in [0, log c]

    Raises ValueError for an unknown strategy, another shape, or logits that are not finite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}: give [n, c], one row a sample, at least two classes"
        )
    if bad := int((~logits.isfinite()).any(1).sum()):
        raise ValueError(
            f"logits of {bad} of {len(logits)} samples are not finite: has the student diverged? "
            "Lower its learning rate, or look for NaN in its input"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if strategy == "random":
        source = generator.device if generator is not None else torch.device("cpu")
        return torch.rand(len(logits), generator=generator, device=source, dtype=dtype).to(logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        return _SCORES[strategy](logits.to(dtype))


def as_ratio(scores: Tensor, strategy: Strategy, classes: int) -> Tensor:
    """Scores [n] of `uncertainty` over c classes on one scale: 0 for sure, 1 for the most unsure that there is.

    entropy / log c; confidence * c / (c - 1); margin + 1, which is 1 - (p1 - p2); random as drawn.
    """
    match strategy:
        case "entropy":
            ratio = scores / math.log(classes)
        case "confidence":
            ratio = scores * classes / (classes - 1)
        case "margin":
            ratio = scores + 1
        case _:
            ratio = scores
    return ratio.clamp(0, 1)
