"""Views are a contract between runs: the golden hashes may change only with the version of the stream."""

import hashlib

import numpy as np
import pytest

from student_worker.views import Augmentation, augment, view_number


def pictures(n: int, channels: int = 3, height: int = 12, width: int = 10) -> np.ndarray:
    """uint8[n, c, h, w] without a zero pixel, every one a function of its place alone."""
    places = np.arange(n * channels * height * width, dtype=np.int64)
    return (places * 2654435761 % 2**32 % 255 + 1).astype(np.uint8).reshape(n, channels, height, width)


@pytest.mark.parametrize(
    ("augmentation", "golden"),
    [
        (Augmentation(), "0f215e6081319d4311d67dc514f397fb"),
        (Augmentation(crop=4), "b3901e672d2ece3d642413739efae4c6"),
        (Augmentation(flip=True), "4169342857dd42b3948bfedd6b42a3c5"),
        (Augmentation(erase=6), "21604d58c00229412d6b1fe0ddcf5a89"),
        (Augmentation(crop=2, flip=True, erase=5), "a17da4805376b2f9a3d7c31324ea3c8b"),
    ],
)
def test_golden_hashes(augmentation: Augmentation, golden: str) -> None:
    x = pictures(16)
    views = [augment(x, seed=7, items=range(100, 116), view=view, augmentation=augmentation) for view in (0, 1, 2)]
    assert hashlib.blake2b(np.stack(views).tobytes(), digest_size=16).hexdigest() == golden


def test_a_view_depends_on_its_name_alone() -> None:
    x, everything = pictures(9), Augmentation(crop=3, flip=True, erase=4)
    items = np.array([5, 0, -3, 2**62, 8, 1, 7, 2, 6])
    together = augment(x, seed=-1, items=items, view=4, augmentation=everything)
    backwards = augment(x[::-1], seed=-1, items=items[::-1], view=4, augmentation=everything)
    alone = [augment(x[[i]], seed=-1, items=[int(items[i])], view=4, augmentation=everything)[0] for i in range(9)]
    np.testing.assert_array_equal(together, backwards[::-1])
    np.testing.assert_array_equal(together, np.stack(alone))
    np.testing.assert_array_equal(x, pictures(9))


@pytest.mark.parametrize("name", [{"seed": 8}, {"items": range(64, 128)}, {"view": 1}])
def test_each_part_of_the_name_counts(name: dict[str, object]) -> None:
    x = np.tile(pictures(1), (64, 1, 1, 1))
    first = {"seed": 7, "items": range(64), "view": 0, "augmentation": Augmentation(crop=3, flip=True, erase=4)}
    a, b = augment(x, **first), augment(x, **first | name)  # type: ignore[arg-type]
    assert (a != b).any(axis=(1, 2, 3)).mean() > 0.9


def test_crop_shifts_uniformly_and_pads_with_zeros() -> None:
    n, pad = 9000, 1
    x = np.zeros((n, 1, 5, 5), np.uint8)
    x[:, :, 2, 2] = 255
    _, _, rows, columns = np.nonzero(augment(x, seed=0, items=range(n), view=0, augmentation=Augmentation(crop=pad)))
    counts = np.bincount(rows * 5 + columns, minlength=25).reshape(5, 5)
    assert counts[1:4, 1:4].sum() == n
    # chi-square with 8 degrees of freedom; a uniform stream passes 30 but once in 5000 seeds, and this seed is fixed
    assert ((counts[1:4, 1:4] - n / 9) ** 2 / (n / 9)).sum() < 30
    shifted = augment(np.ones_like(x), seed=0, items=range(n), view=0, augmentation=Augmentation(crop=pad))
    assert set(shifted.sum(axis=(1, 2, 3)).tolist()) == {25, 20, 16}


def test_flip_mirrors_every_other_view() -> None:
    n = 10_000
    x = np.tile(pictures(1), (n, 1, 1, 1))
    flipped = augment(x, seed=0, items=range(n), view=0, augmentation=Augmentation(flip=True))
    mirrored = (flipped == x[..., ::-1]).all(axis=(1, 2, 3))
    untouched = (flipped == x).all(axis=(1, 2, 3))
    assert (mirrored ^ untouched).all()
    assert abs(mirrored.mean() - 0.5) < 0.02


def test_erase_blanks_one_rectangle_of_uniform_size_inside_the_image() -> None:
    n, most = 10_000, 4
    x = np.full((n, 2, 9, 9), 200, np.uint8)
    erased = augment(x, seed=0, items=range(n), view=0, augmentation=Augmentation(erase=most)) == 0
    np.testing.assert_array_equal(erased[:, 0], erased[:, 1])
    heights, widths = erased[:, 0].any(axis=2).sum(axis=1), erased[:, 0].any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(erased[:, 0].sum(axis=(1, 2)), heights * widths)
    sizes = np.bincount(heights[heights > 0], minlength=most + 1)[1:]
    expected = n * most / (most + 1) / (most + 1)  # a rectangle without width hides its height
    assert ((sizes - expected) ** 2 / expected).sum() < 20
    assert erased[:, 0, 0, 0].any()
    assert erased[:, 0, -1, -1].any()


def test_view_numbers_of_epochs() -> None:
    assert [view_number(epoch, 0) for epoch in range(5)] == [0, 1, 2, 3, 4]
    assert [view_number(epoch, 3) for epoch in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: Augmentation(crop=-1), ValueError, "crop is -1"),
        (lambda: Augmentation(erase=-2), ValueError, "erase is -2"),
        (lambda: view_number(-1, 0), ValueError, "epoch is -1"),
        (lambda: view_number(0, -1), ValueError, "views is -1"),
        (lambda: attempt(pictures(2).astype(np.float32)), TypeError, "float32"),
        (lambda: attempt(pictures(2)[0]), ValueError, r"\(3, 12, 10\)"),
        (lambda: attempt(pictures(3)), ValueError, "for 2 items"),
        (lambda: attempt(pictures(2), Augmentation(erase=11)), ValueError, "erase is 11 pixels.*12 x 10"),
    ],
)
def test_errors_name_the_value(call, error: type[Exception], names: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=names):
        call()


def attempt(x: np.ndarray, augmentation: Augmentation = Augmentation(crop=1)) -> None:  # noqa: B008 - frozen
    augment(x, seed=0, items=[0, 1], view=0, augmentation=augmentation)


def test_a_batch_may_hold_different_views():
    x = np.arange(3 * 64, dtype=np.uint8).reshape(3, 1, 8, 8)
    augmentation = Augmentation(crop=2, flip=True, erase=3)
    together = augment(x, seed=1, items=[5, 5, 7], view=np.array([0, 1, 4]), augmentation=augmentation)
    for i, (item, view) in enumerate([(5, 0), (5, 1), (7, 4)]):
        alone = augment(x[i : i + 1], seed=1, items=[item], view=view, augmentation=augmentation)
        np.testing.assert_array_equal(together[i : i + 1], alone)
