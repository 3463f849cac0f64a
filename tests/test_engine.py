import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from teacher_server.config import EngineConfig
from teacher_server.description import ModelError, complete_inputs
from teacher_server.engine import Engine
from teacher_server.errors import DeviceLost
from tests import teachers

MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.25, 0.2, 0.3])
TOLERANCE = {"fp32": {"atol": 1e-4, "rtol": 1e-4}, "bf16": {"atol": 5e-2, "rtol": 2e-2}}

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])


@pytest.fixture(autouse=True)
def _keep_global_settings() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.backends.fp32_precision
    torch.set_num_threads(1)  # nets this small only wait for a second thread
    yield
    torch.set_num_threads(threads)
    torch.backends.fp32_precision = precision


def description(message: Any) -> pb.TeacherDescription:
    parsed = json_format.ParseDict(message, pb.TeacherDescription())
    complete_inputs(parsed, "this test")
    return parsed


TINY = description(teachers.TINY)
PLAIN = description({"inputs": [{"name": "x", "shape": [2]}]})


def engine(
    module: nn.Module,
    described: pb.TeacherDescription = TINY,
    max_batch_size: int = 16,
    *,
    pad: bool | None = None,
    on_out_of_memory: Callable[[], object] = lambda: None,
    **config: Any,
) -> Engine:
    settings = EngineConfig(**{"device": "cpu", **config})
    return Engine(module, described, settings, max_batch_size, pad=pad, on_out_of_memory=on_out_of_memory)


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)


class Watched(nn.Module):
    """Answers the sums of its samples, keeps the batches that it saw, and has memory for `room` samples."""

    def __init__(self, room: int = 10**9) -> None:
        super().__init__()
        self.room = room
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"no memory for {len(x)} samples")
        return x.flatten(1).sum(1, keepdim=True)

    @property
    def sizes(self) -> list[int]:
        return [len(x) for x in self.seen]


class Raising(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


# ------------------------------------------------------------ numerics


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_an_answer_is_the_direct_forward_whatever_its_batch(device: str, precision: str, channels_last: bool) -> None:
    x = images(24)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        direct = teachers.tiny().to(device)(torch.from_numpy(x).to(device)).float().cpu().numpy()
    for pad in (True, False):
        served = engine(teachers.tiny(), pad=pad, device=device, precision=precision, channels_last=channels_last)
        for size in (1, 3, 5, 8, 13, 16, 24):
            for start in range(0, 24, size):
                logits = served.forward({"x": x[start : start + size]})["logits"]
                assert logits.dtype == np.float32
                np.testing.assert_allclose(logits, direct[start : start + size], **TOLERANCE[precision])


def test_bf16_is_not_fp32() -> None:
    exact, coarse = (
        engine(teachers.tiny(), precision=precision).forward({"x": images(4)}) for precision in ("fp32", "bf16")
    )
    difference = np.abs(exact["logits"] - coarse["logits"]).max()
    assert 1e-4 < difference < 5e-2


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_uint8_is_normalised_here_and_floats_are_taken_as_normalised(device: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    floats = (pixels.astype(np.float32) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    served = engine(teachers.tiny(), device=device)
    from_pixels, from_floats, from_halves = (
        served.forward({"x": x})["logits"] for x in (pixels, floats, floats.astype(np.float16))
    )
    np.testing.assert_allclose(from_pixels, from_floats, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(from_halves, from_floats, atol=2e-2)
    assert np.any(from_halves != from_floats)


def test_normalisation_is_hand_computed_and_channel_by_channel() -> None:
    watched = Watched()
    pixels = np.zeros((1, 3, 8, 8), np.uint8)
    pixels[0, :, 0, 0] = [255, 51, 102]
    engine(watched).forward({"x": pixels})
    # (1 - .5) / .25, (.2 - .4) / .2, (.4 - .3) / .3; black is -mean / std
    np.testing.assert_allclose(watched.seen[0][0, :, 0, 0], [2, -1, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(watched.seen[0][0, :, 1, 1], [-2, -2, -1], rtol=1e-6)


def test_without_a_normalisation_values_are_taken_as_they_are() -> None:
    watched = Watched()
    engine(watched, PLAIN).forward({"x": np.uint8([[0, 255]])})
    assert torch.equal(watched.seen[0], torch.tensor([[0.0, 255.0]]))


def test_several_inputs_and_integers() -> None:
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 7, (5, 5))
    served = engine(teachers.pair(), description(teachers.PAIR), pad=True)
    expected = teachers.pair()(tokens=torch.from_numpy(tokens), x=torch.from_numpy(x))["logits"].detach()
    for integers in (tokens, tokens.astype(np.int32)):
        logits = served.forward({"x": x, "tokens": integers})["logits"]
        np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_views_of_a_message_are_read_only_and_that_is_fine() -> None:
    x = np.frombuffer(images(4).tobytes(), np.float32).reshape(4, 3, 8, 8)[::2]
    served = engine(teachers.tiny())
    np.testing.assert_array_equal(served.forward({"x": x})["logits"], served.forward({"x": x.copy()})["logits"])


def test_answers_that_are_not_finite_are_the_services_business() -> None:
    x = images(3)
    x[1, 0, 0, 0] = -teachers.MAGIC
    logits = engine(teachers.picky()).forward({"x": x})["logits"]
    assert np.isnan(logits).all(axis=1).tolist() == [False, True, False]


def test_fp32_means_no_tf32_whatever_was_set_before() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    engine(teachers.tiny())
    for operations in (torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        assert operations.fp32_precision == "ieee"


# ------------------------------------------------------------ sizes and memory


def test_padding_fills_powers_of_two_with_the_last_sample_and_is_cut_away() -> None:
    watched = Watched()
    served = engine(watched, PLAIN, max_batch_size=12, pad=True)
    for n in range(1, 14):
        x = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
        np.testing.assert_array_equal(served.forward({"x": x})["logits"], x.sum(1, keepdims=True))
    assert watched.sizes == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 12, 1]
    assert watched.seen[2].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]


def test_a_cpu_runs_the_sizes_as_they_come() -> None:
    watched = Watched()
    served = engine(watched, PLAIN, max_batch_size=12)
    served.forward({"x": np.zeros((5, 2), np.float32)})
    assert watched.sizes == [5]


@pytest.mark.parametrize("pad", [True, False])
def test_out_of_memory_halves_the_bucket_once_and_for_good(pad: bool) -> None:
    watched = Watched(room=8)
    served = engine(watched, PLAIN, max_batch_size=16, pad=pad)
    x = np.arange(26, dtype=np.float32).reshape(13, 2)
    for _ in range(2):
        np.testing.assert_array_equal(served.forward({"x": x})["logits"], x.sum(1, keepdims=True))
    refused, rest = (16, 8) if pad else (13, 5)
    assert watched.sizes == [refused, 8, rest, 8, rest]
    assert served.largest_batch == 8


class Shrinking(Watched):
    """Has less memory after its first batch."""

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        self.room = 4
        return answer


def test_what_was_computed_before_memory_ran_out_is_not_computed_again() -> None:
    watched = Shrinking(room=8)
    served = engine(watched, PLAIN, max_batch_size=16)
    served.largest_batch = 8
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    np.testing.assert_array_equal(served.forward({"x": x})["logits"], x.sum(1, keepdims=True))
    assert watched.sizes == [8, 8, 4, 4]


def test_out_of_memory_again_is_raised_and_the_next_call_is_smaller() -> None:
    watched, told = Watched(room=4), []
    served = engine(watched, PLAIN, max_batch_size=16, on_out_of_memory=lambda: told.append(served.largest_batch))
    x = np.zeros((16, 2), np.float32)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 8"):
        served.forward({"x": x})
    assert len(served.forward({"x": x})["logits"]) == 16
    assert told == [8, 4]
    assert watched.sizes == [16, 8, 4, 4, 4, 4]


def test_warm_up_runs_the_sizes_to_come_and_learns_what_fits() -> None:
    padded, plain, small, none = Watched(), Watched(), Watched(room=2), Watched(room=0)
    engine(padded, PLAIN, max_batch_size=12, pad=True).warm_up()
    assert padded.sizes == [12, 8, 4, 2, 1]
    engine(plain, PLAIN, max_batch_size=12).warm_up()
    assert plain.sizes == [12, 1]
    served = engine(small, PLAIN, max_batch_size=16, pad=True)
    served.warm_up()
    assert served.largest_batch == 2
    assert small.sizes == [16, 8, 4, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        engine(none, PLAIN).warm_up()


def test_warm_up_stays_within_the_bounds_of_integers() -> None:
    described = description(teachers.PAIR)
    described.inputs[1].minimum[:] = [3]
    engine(teachers.pair(), described).warm_up()


# ------------------------------------------------------------ failures


def test_a_sticky_device_error_is_a_lost_device() -> None:
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(DeviceLost, match="device-side assert"):
        engine(Raising(error), PLAIN).forward({"x": np.zeros((1, 2), np.float32)})


@pytest.mark.parametrize("error", [ValueError("its own"), RuntimeError("its own"), IndexError("its own")])
def test_the_networks_own_errors_are_its_own(error: Exception) -> None:
    with pytest.raises(type(error), match="its own"):
        engine(Raising(error), PLAIN).forward({"x": np.zeros((1, 2), np.float32)})


def test_a_network_that_loses_samples_is_caught() -> None:
    class Lossy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1]

    with pytest.raises(ValueError, match="answered 3 samples with 1 rows"):
        engine(Lossy(), PLAIN).forward({"x": np.zeros((3, 2), np.float32)})


def test_busy_time_counts_every_forward_failed_ones_too() -> None:
    served = engine(teachers.picky())
    x = images(2)
    served.forward({"x": x})
    first = served.busy_nanoseconds
    x[0, 0, 0, 0] = teachers.MAGIC
    with pytest.raises(ValueError, match="magic"):
        served.forward({"x": x})
    assert served.busy_nanoseconds > first > 0


def test_threads_are_set() -> None:
    engine(teachers.tiny(), threads=2)
    assert torch.get_num_threads() == 2


def test_an_absent_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device: cuda is not there"):
        engine(teachers.tiny(), device="cuda")


@pytest.mark.gpu
@no_cuda
def test_an_index_out_of_range_on_cuda_is_a_lost_device() -> None:
    """In a process of its own, since nothing else can use the device afterwards."""
    program = """
import numpy as np
from teacher_server.config import EngineConfig
from teacher_server.engine import Engine
from teacher_server.errors import DeviceLost
from tests import test_engine, teachers
served = Engine(teachers.pair(), test_engine.description(teachers.PAIR), EngineConfig(device="cuda"), 4)
served.warm_up()
for _ in range(2):
    try:
        served.forward({"x": np.zeros((1, 4), np.float32), "tokens": np.full((1, 5), 10**6)})
    except DeviceLost:
        print("lost")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "lost\nlost\n", done.stderr


@pytest.mark.gpu
@no_cuda
def test_real_memory_running_out_on_cuda_makes_batches_smaller() -> None:
    class Greedy(nn.Module):
        """Wants an eighth of the device's memory for each sample."""

        def forward(self, x: Tensor) -> Tensor:
            total = torch.cuda.get_device_properties(x.device).total_memory
            torch.empty((len(x), total // 8), dtype=torch.uint8, device=x.device)
            return x

    served = engine(Greedy(), PLAIN, device="cuda")
    served.warm_up()
    assert served.largest_batch in {2, 4}
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    np.testing.assert_array_equal(served.forward({"x": x})["logits"], x)
