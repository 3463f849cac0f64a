"""The device: one forward pass at a time, the same numbers whatever the batch.

    numpy -> staging memory, padded -> device -> normalise -> network -> host -> float32 logits

On CUDA the copies are pinned and asynchronous on one stream, and batches are padded to powers of two, so that few
sizes exist: the allocator's blocks fit again and kernels are chosen once. The padding repeats the last sample, which
is valid wherever the query was, and is cut from the answer. A CPU runs the sizes as they come.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from teacher_server.config import EngineConfig
from teacher_server.description import ModelError
from teacher_server.errors import DeviceLost
from teacher_server.model import example, logits

_log = logging.getLogger(__name__)
_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, which pinned host memory raises as a plain AcceleratorError


class Engine:
    """Runs one network, which it takes over and moves to its device. `forward` is for one thread at a time.

    largest_batch: samples of one pass; starts at max_batch_size and is halved when memory runs out.
    busy_nanoseconds: time spent in `forward` so far, warm-up included, from the first copy in to the last one out.
    """

    def __init__(
        self,
        module: nn.Module,
        description: pb.TeacherDescription,
        config: EngineConfig,
        max_batch_size: int,
        *,
        pad: bool | None = None,
        on_out_of_memory: Callable[[], object] = lambda: None,
    ) -> None:
        """`pad` forces or forbids padding; None pads on CUDA. `on_out_of_memory` is called each time memory runs out.

        Raises ModelError where the device is not there.
        """
        self.device = _device(config.device)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pad = pad if pad is not None else self._stream is not None
        self._bf16 = config.precision == "bf16"
        self._channels_last = config.channels_last
        self.largest_batch = max_batch_size
        self.busy_nanoseconds = 0
        if config.threads:
            torch.set_num_threads(config.threads)
        if not self._bf16:
            _keep_fp32_exact()

        self._on_out_of_memory = on_out_of_memory
        self._module = module.eval().to(self.device)
        if config.channels_last:
            for tensor in chain(module.parameters(), module.buffers()):
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        self._inputs = description.inputs
        # Of pixels 0..255, so that (x / 255 - mean) / std is one subtraction and one division.
        self._statistics = {
            described.name: [
                255
                * torch.tensor(values, dtype=torch.float32, device=self.device).reshape(
                    -1, *(1,) * (len(described.shape) - 1)
                )
                for values in (described.normalisation.mean, described.normalisation.std)
            ]
            for described in self._inputs
            if described.HasField("normalisation")
        }
        if self._stream is not None:
            torch.cuda.synchronize(self.device)  # the weights were copied on another stream than the forward's

    def warm_up(self, forward: Callable[[dict[str, NDArray[np.generic]]], object] | None = None) -> None:
        """Runs the sizes that will come, largest first: memory is laid out once, and what does not fit is known.

        `forward` is this engine's own, or one that counts and calls it.
        """
        forward = forward or self.forward
        sizes = {self._bucket(1 << power) for power in range(self.largest_batch.bit_length() + 1)}
        for size in sorted(sizes if self._pad else {1, self.largest_batch}, reverse=True):
            if size <= self.largest_batch:
                try:
                    forward({described.name: example(described, size) for described in self._inputs})
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise

    def forward(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """[n, ...] of each input -> {"logits": float32 [n, classes]}, finite or not.

        uint8 is normalised here, (x / 255 - mean) / std a channel at a time; float16 becomes float32; integers are
        passed on. When memory runs out the batch is halved, once a call, and stays so; a second time raises
        torch.OutOfMemoryError. Raises DeviceLost for a device that only a new process gets back, and whatever the
        network raises.
        """
        started = time.perf_counter_ns()
        try:
            with (
                _device_loss(self._stream),
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16),
                torch.cuda.stream(self._stream),
            ):
                answers: list[NDArray[np.generic]] = []
                for last in (False, True):
                    try:
                        self._in_passes(inputs, answers)
                        break
                    except torch.OutOfMemoryError as error:
                        if last:
                            raise
                        _log.warning("out of device memory, batches of %d from here on: %s", self.largest_batch, error)
                    # Outside the handler, whose traceback keeps the failed pass's tensors alive.
                    if self._stream is not None:
                        torch.cuda.empty_cache()
                return {"logits": answers[0] if len(answers) == 1 else np.concatenate(answers)}
        finally:
            self.busy_nanoseconds += time.perf_counter_ns() - started

    def _in_passes(self, inputs: Mapping[str, NDArray[np.generic]], answers: list[NDArray[np.generic]]) -> None:
        """Appends the answers to all samples that `answers` does not hold yet: none is computed twice."""
        samples, size = len(next(iter(inputs.values()))), self.largest_batch
        done = sum(map(len, answers))
        try:
            for start in range(done, samples, size):
                piece = {name: array[start : start + size] for name, array in inputs.items()}
                answers.append(self._pass(piece))  # at once: what came before a failure stays
        except torch.OutOfMemoryError:
            self.largest_batch = max(1, self._bucket(min(samples - done, size)) // 2)
            self._on_out_of_memory()
            raise

    def _pass(self, inputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        samples = len(next(iter(inputs.values())))
        rows = self._bucket(samples) if self._pad else samples
        answer = logits(self._module, {name: self._upload(name, array, rows) for name, array in inputs.items()})
        if len(answer) != rows:
            raise ValueError(f"the network answered {rows} samples with {len(answer)} rows of logits")
        host = torch.empty((samples, answer.shape[1]), pin_memory=self._stream is not None)
        host.copy_(answer[:samples], non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return host.numpy().copy()  # pinned memory is scarce and answers live on: not theirs to keep

    def _upload(self, name: str, array: NDArray[np.generic], rows: int) -> Tensor:
        """One input on the device as the network takes it, [rows, ...]: float32, or integers as they are."""
        staging = torch.empty(
            (rows, *array.shape[1:]),
            dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype,
            pin_memory=self._stream is not None,
        )
        view = staging.numpy()
        view[: len(array)] = array
        view[len(array) :] = array[-1]
        x = staging.to(self.device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = x.float()
            if name in self._statistics:
                mean, std = self._statistics[name]
                x = x.sub_(mean).div_(std)
        elif x.dtype == torch.float16:
            x = x.float()
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last and x.dim() == 4 else x

    def _bucket(self, samples: int) -> int:
        return min(1 << (samples - 1).bit_length(), self.largest_batch)


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("device: cuda is not there for this torch; give --device cpu, or install a CUDA build")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _keep_fp32_exact() -> None:
    """No TF32 and no bf16 inside "fp32" products, whatever was set before, here or in the factory's module."""
    backends: Any = torch.backends
    for operations in (
        backends,
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ):
        operations.fp32_precision = "ieee"


@contextmanager
def _device_loss(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Tells a device that is gone from a pass that failed: a sticky CUDA error comes back at every later call."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        lost = isinstance(error, torch.AcceleratorError)
        if getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY:
            lost = False
        elif not lost and stream is not None:
            try:
                stream.synchronize()
            except RuntimeError:
                lost = True
        if lost:
            raise DeviceLost(f"the device failed and only a new process gets it back: {error}") from error
        raise
