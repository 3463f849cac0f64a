"""Which samples are kept, and how much of a partner is mixed into each (docs/unix.md, steps 2 and 3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mixed(NamedTuple):
    """The k kept samples, in rank order: the least certain first.

    Sample r is (1 - share[r]) * x[kept[r]] + share[r] * x[partner[r]], of the batch x of n samples it was made from.
    """

    x: Tensor  # [k, ...], dtype of the batch
    kept: Tensor  # [k] int64, batch positions
    partner: Tensor  # [k] int64, batch positions
    share: Tensor  # [k], in the dtype that was computed in


def mixing_coefficients(n: int, clean: int, sharpness: float) -> Tensor:
    """c_r = sigmoid(sharpness * (r/n - (2*clean - 1)/(2n))) for the ranks r = 0..n-1 (docs/unix.md, step 2).

    `clean` is a count, the rank at which c crosses 1/2. Returns [n], float64, rising.
    Raises ValueError for n < 1, clean outside 0..n, or a sharpness that is negative or not finite.
    """
    if n < 1:
        raise ValueError(f"n is {n}: a batch holds at least one sample")
    if not 0 <= clean <= n:
        raise ValueError(f"clean is {clean}: it counts samples of a batch of {n}, so give 0..{n}")
    if not (math.isfinite(sharpness) and sharpness >= 0):
        raise ValueError(f"sharpness is {sharpness}: give a finite number >= 0 (published: 10)")
    rank = torch.arange(n, dtype=torch.float64)
    return torch.sigmoid(sharpness * (rank / n - (2 * clean - 1) / (2 * n)))


def ranking(scores: Tensor) -> Tensor:
    """Batch positions by falling score, ties by batch position. [n] -> [n] int64."""
    return scores.sort(descending=True, stable=True).indices


def mix(x: Tensor, kept: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """(1 - share) * x[kept] + share * x[partner] (docs/unix.md, step 3). x is [n, ...], the others [k]; gives [k, ...].

    Computed in x's dtype where that is floating. Integers (pixels) are mixed in float32 and rounded back, half to even:
    teacher and student must see the same values, so quantisation comes before either.
    """
    dtype = _arithmetic(x)
    weight = share.to(dtype).to(x.device).reshape(-1, *[1] * (x.dim() - 1))
    own, other = x[kept.to(x.device)].to(dtype), x[partner.to(x.device)].to(dtype)
    mixed = (1 - weight) * own + weight * other
    return mixed if x.is_floating_point() else mixed.round().to(x.dtype)


def adaptive_mixup(
    x: Tensor, scores: Tensor, *, keep: int, clean: int, sharpness: float, lam: float, partner: Tensor
) -> Mixed:
    """Rank by falling score, mix rank r with share lam * c_r of its partner, keep the first (docs/unix.md, 2 and 3).

    x is [n, ...], scores [n], `keep` and `clean` are counts, lam in [0, 1], `partner` [n] a permutation of the whole
    batch: partner[r] is the batch position that goes into rank r. Raises ValueError for anything else.
    """
    share = float(lam) * mixing_coefficients(len(x), clean, sharpness)
    return _mixup(x, scores, share, keep=keep, lam=lam, partner=partner)


def uniform_mixup(x: Tensor, scores: Tensor, *, keep: int, lam: float, partner: Tensor) -> Mixed:
    """Plain mixup: as adaptive_mixup, but the every share is lam: the control "KD + mixup", not in the paper."""
    share = torch.full((len(x),), float(lam), dtype=torch.float64)
    return _mixup(x, scores, share, keep=keep, lam=lam, partner=partner)


def _mixup(x: Tensor, scores: Tensor, share: Tensor, *, keep: int, lam: float, partner: Tensor) -> Mixed:
    n = len(x)
    if not 1 <= keep <= n:
        raise ValueError(f"keep is {keep}: it counts samples of a batch of {n}, so give 1..{n}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}: a share lies in [0, 1]")
    if scores.shape != (n,) or bool(scores.isnan().any()):
        raise ValueError(f"scores have shape {tuple(scores.shape)}: give {n} numbers, one a sample, none of them NaN")
    if not torch.equal(partner.sort().values, torch.arange(n, dtype=partner.dtype, device=partner.device)):
        raise ValueError(
            f"partner is no permutation of the batch: give each of 0..{n - 1} once, as torch.randperm({n}) does"
        )
    kept = ranking(scores)[:keep].to(x.device)
    partner = partner[:keep].long().to(x.device)
    share = share[:keep].to(_arithmetic(x)).to(x.device)
    return Mixed(mix(x, kept, partner, share), kept, partner, share)


def _arithmetic(x: Tensor) -> torch.dtype:
    if x.dtype == torch.bool or x.is_complex():
        raise ValueError(f"x is {x.dtype}: give floats or integers, other values cannot be mixed")
    return x.dtype if x.is_floating_point() else torch.float32
