"""Views: deterministic augmentations, each named by (view seed, item, view number).

Everything is integer arithmetic on uint8 pixels, and every draw is a BLAKE2b hash of the name, so a view is the same
bytes on every platform, with every version of numpy and torch, and whatever else is in the batch. That is what lets
several students, and a resumed run, ask a teacher the very same question.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PERSON = b"preceptor.view.1"  # BLAKE2's domain tag; raise the number when the stream of draws changes
_DRAWS = 7  # crop y, crop x, flip, erased height, erased width, erased top, erased left: 56 of BLAKE2b's 64 bytes


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may happen to an item, in this order. The default changes nothing."""

    crop: int = 0
    """Pixels of zero padding on every side, of which a window of the image's own size is cut at random."""
    flip: bool = False
    """Mirror left and right, every other view."""
    erase: int = 0
    """Fill with 0 a rectangle whose height and width are drawn from 0..erase pixels, wholly inside the image."""

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"crop is {self.crop}, must be 0 or more pixels")
        if self.erase < 0:
            raise ValueError(f"erase is {self.erase}, must be 0 or more pixels")


def view_number(epoch: int, views: int) -> int:
    """The view that an epoch (from 0) shows: a fresh one each epoch where `views` is 0, else one of `views` in turn."""
    if epoch < 0:
        raise ValueError(f"epoch is {epoch}, must be 0 or more")
    if views < 0:
        raise ValueError(f"views is {views}, must be 0 (a fresh view each epoch) or more")
    return epoch % views if views else epoch


def augment(
    x: npt.NDArray[np.uint8],
    *,
    seed: int,
    items: Sequence[int] | npt.NDArray[np.integer],
    view: int | npt.NDArray[np.integer],
    augmentation: Augmentation,
) -> npt.NDArray[np.uint8]:
    """View number `view` of each item.

    x: uint8[n, c, h, w], raw pixels. items: n indices into the data set (not into the batch). view: one number for all,
    or n of them. seed, items and view are 64-bit. Returns a new uint8[n, c, h, w]; `x` stays as it is.
    Raises TypeError for pixels that are not uint8, ValueError for a shape or a rectangle that does not fit.
    """
    if x.dtype != np.uint8:
        raise TypeError(f"pixels are {x.dtype}, must be uint8: views are exact only on raw pixels")
    if x.ndim != 4 or len(items) != len(x):
        raise ValueError(f"pixels have shape {x.shape} for {len(items)} items, must be [n, c, h, w] with n items")
    n, _, height, width = x.shape
    if augmentation.erase > min(height, width):
        raise ValueError(f"erase is {augmentation.erase} pixels, but the images have only {height} x {width}")

    views = np.broadcast_to(view, n)
    crop_y, crop_x, flip, erase_h, erase_w, erase_y, erase_x = _draws(seed, items, views).T
    out = x.copy()
    if pad := augmentation.crop:
        padded = np.zeros((*x.shape[:2], height + 2 * pad, width + 2 * pad), np.uint8)
        padded[:, :, pad:-pad, pad:-pad] = x
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        out = windows[np.arange(n), :, _below(crop_y, 2 * pad + 1), _below(crop_x, 2 * pad + 1)]
    if augmentation.flip:
        flipped = _below(flip, 2) == 1
        out[flipped] = out[flipped, ..., ::-1]
    if augmentation.erase:
        rows = _interval(erase_h, erase_y, augmentation.erase, height)
        columns = _interval(erase_w, erase_x, augmentation.erase, width)
        out *= ~(rows[:, None, :, None] & columns[:, None, None, :])
    return out


def _draws(
    seed: int, items: Sequence[int] | npt.NDArray[np.integer], views: npt.NDArray[np.integer]
) -> npt.NDArray[np.uint64]:
    """uint64[n, _DRAWS], uniform: BLAKE2b of the view's name as three little-endian int64."""
    pack, blake2b = struct.Struct("<qqq").pack, hashlib.blake2b
    digests = b"".join(
        blake2b(pack(seed, int(item), int(view)), digest_size=8 * _DRAWS, person=_PERSON).digest()
        for item, view in zip(items, views, strict=True)
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64).reshape(-1, _DRAWS)


def _below(draws: npt.NDArray[np.uint64], bound: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Integers in 0..bound-1 by multiply and shift of the upper 32 bits; bias below bound / 2**32."""
    return ((draws >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def _interval(
    sizes: npt.NDArray[np.uint64], starts: npt.NDArray[np.uint64], most: int, length: int
) -> npt.NDArray[np.bool_]:
    """bool[n, length]: for each item an interval of 0..most places that lies wholly inside."""
    size = _below(sizes, most + 1)
    start = _below(starts, length - size + 1)
    places = np.arange(length)
    return (places >= start[:, None]) & (places < (start + size)[:, None])
