"""The teacher: a network made by a factory, its weights from a file, and what it says of itself.

    factory + weights -> module          eval mode, no gradients, still on the CPU: the engine moves it
    description JSON  -> description     checked, and completed by one forward pass of one sample

The FLOPs of a sample are counted by torch.utils.flop_counter over that pass: convolutions, matrix products and
attention, a multiply-add as two; element-wise work (normalisation, activation, pooling) is left out, as in papers.
"""

import importlib
import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from protos import teacher_pb2 as pb
from teacher_server.config import EngineConfig, ModelConfig
from teacher_server.description import ModelError, complete_inputs, complete_outputs, parse

__all__ = ["ModelError", "Teacher", "example", "fingerprint", "load", "logits"]

# How far an answer may lie from the same network's direct forward pass (absolute, relative). Measured over batch
# compositions on WRN-16-1 and WRN-40-2 with logits of 3: 1e-6 in fp32; in bf16 none on a CPU, where kernels do not
# change with the batch, but 0.011 between bf16 and fp32, which is what two orders of summation may differ by.
# A description may state its own.
_TOLERANCES = {"fp32": (1e-4, 1e-4), "bf16": (5e-2, 2e-2)}
_METADATA_KEY = "preceptor"


@dataclass(frozen=True)
class Teacher:
    """A network that is ready for an engine, and its description, complete but for `limits`."""

    module: nn.Module
    description: pb.TeacherDescription


def load(config: ModelConfig, engine: EngineConfig) -> Teacher:
    """Makes the network, fills it with its weights and describes it. Raises ModelError."""
    state, metadata = _read_weights(config.weights)
    if config.description is not None:
        where = f"description {config.description}"
        if not config.description.is_file():
            raise ModelError(f"{where}: no such file")
        text: str | None = config.description.read_text()
    else:
        where, text = f"metadata {_METADATA_KEY!r} of {config.weights}", metadata
    description = parse(text, where)
    complete_inputs(description, where)
    module = _make(config)
    _fill(module, state, config)
    module.eval().requires_grad_(False)

    flops, classes = _measure(module, description.inputs)
    complete_outputs(description, classes, where)
    description.name = config.name
    description.fingerprint = fingerprint(
        module, config.model, config.model_arguments, description.inputs, engine.precision
    )
    description.flops_per_sample = flops
    description.price.CopyFrom(pb.Price(nanos_per_sample=config.price_nanos, currency=config.currency))
    description.precision.policy = engine.precision
    if not (description.precision.absolute_tolerance or description.precision.relative_tolerance):
        absolute, relative = _TOLERANCES[engine.precision]
        description.precision.absolute_tolerance = absolute
        description.precision.relative_tolerance = relative
    return Teacher(module, description)


def logits(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """One call of the network, [n, ...] -> floating [n, classes].

    A single input is passed by position, several by their names. The network returns the logits, or a mapping that
    has them under "logits". Raises TypeError for anything else.
    """
    answer = module(*inputs.values()) if len(inputs) == 1 else module(**inputs)
    if isinstance(answer, Mapping):
        answer = answer.get("logits")
    if not (isinstance(answer, Tensor) and answer.dim() == 2 and answer.is_floating_point()):
        got = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise TypeError(f"the network returned {got}; logits are a floating tensor [samples, classes]")
    return answer


def example(described: pb.InputDescription, samples: int) -> NDArray[np.generic]:
    """Valid values of one input, [samples, *shape]: zero, or what the bounds allow nearest to it."""
    floating = {pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_FLOAT32} & set(described.dtypes)
    integer = np.int64 if pb.DATA_TYPE_INT64 in described.dtypes else np.int32
    values = np.zeros((samples, *described.shape), np.float32 if floating else integer)
    if described.minimum:
        ones = (1,) * (len(described.shape) - 1)
        low, high = (np.reshape(bound, (-1, *ones)) for bound in (described.minimum, described.maximum))
        values = np.clip(values, low, high).astype(values.dtype)
    return values


def fingerprint(
    module: nn.Module,
    factory: str,
    arguments: Mapping[str, Any],
    inputs: Iterable[pb.InputDescription],
    precision: str,
) -> str:
    """32 hex digits (BLAKE3-128) over all that decides an answer and can be known without the hardware.

    That is: factory and arguments, every parameter and buffer by name, dtype, shape and bytes, each input's name,
    shape and normalisation, and the precision policy. Each part carries its length, so that no two lists of parts
    read the same. The factory's code is not in it: rename the factory when its arithmetic changes.
    """
    hasher = blake3(b"preceptor.teacher.v1")

    def part(data: bytes | memoryview) -> None:
        hasher.update(struct.pack("<Q", len(data)))
        hasher.update(data)

    part(factory.encode())
    part(json.dumps(arguments, sort_keys=True).encode())
    # A buffer that is not persistent stands in no state dict, but decides answers all the same.
    state = {**module.state_dict(), **dict(module.named_buffers())}
    part(struct.pack("<Q", len(state)))
    for name, tensor in sorted(state.items()):
        part(name.encode())
        part(str(tensor.dtype).encode())
        part(struct.pack(f"<{tensor.dim()}q", *tensor.shape))
        part(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for described in sorted(inputs, key=lambda described: described.name):
        part(described.name.encode())
        part(struct.pack(f"<{len(described.shape)}q", *described.shape))
        for statistics in (described.normalisation.mean, described.normalisation.std):
            part(struct.pack(f"<{len(statistics)}d", *statistics))
    part(precision.encode())
    return hasher.hexdigest(length=16)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict, and the description that a safetensors file may carry in its metadata."""
    if not path.is_file():
        raise ModelError(f"weights: no file at {path}")
    if path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise ModelError(f"weights: {path} is neither .safetensors nor .pt; save the state dict as one of them")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"weights: {path} cannot be read as a state dict ({type(error).__name__}: {error}); "
            "save it with safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        keys = f" with the keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else ""
        raise ModelError(
            f"weights: {path} holds a {type(state).__name__}{keys}, not a state dict; save model.state_dict() alone"
        )
    return state, metadata.get(_METADATA_KEY)


def _make(config: ModelConfig) -> nn.Module:
    """Calls the factory; its module is looked for in the current directory too, as uvicorn does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module_name, _, attribute = config.model.partition(":")
    try:
        factory: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            factory = getattr(factory, name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"model: {config.model} cannot be imported ({error}); it is looked for in {here} and among the "
            "installed packages"
        ) from error
    try:
        module = factory(**config.model_arguments)
    except Exception as error:
        raise ModelError(
            f"model: {config.model} called with --model-arguments {json.dumps(config.model_arguments)} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"model: {config.model} made a {type(module).__name__}, not a torch.nn.Module")
    return module


def _fill(module: nn.Module, state: dict[str, Tensor], config: ModelConfig) -> None:
    own = module.state_dict()
    # safetensors keeps one of several names that share a tensor (tied weights); the others follow it.
    names = {_place(own[name]): name for name in own.keys() & state.keys()}
    for name in own.keys() - state.keys():
        if _place(own[name]) in names:
            state[name] = state[names[_place(own[name])]]
    missing = [f"missing {name!r} {list(own[name].shape)}" for name in own if name not in state]
    unexpected = [f"unexpected {name!r} {list(state[name].shape)}" for name in state if name not in own]
    misshapen = [
        f"{name!r} is {list(state[name].shape)} in the file but {list(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    first = [faults[0] for faults in (missing, unexpected, misshapen) if faults]
    if first:
        more = len(missing) + len(unexpected) + len(misshapen) - len(first)
        raise ModelError(
            f"weights: {config.weights} does not fit {config.model}: {'; '.join(first)}"
            f"{f'; and {more} more such' if more else ''}. "
            "Give the factory and --model-arguments that the weights were trained with"
        )
    module.load_state_dict(state)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _measure(module: nn.Module, inputs: Sequence[pb.InputDescription]) -> tuple[float, int]:
    """FLOPs and number of classes, from a forward pass of one sample."""
    sample = {described.name: torch.from_numpy(example(described, 1)) for described in inputs}
    try:
        with torch.no_grad(), _unfused(), FlopCounterMode(display=False) as counter:
            answer = logits(module, sample)
    except Exception as error:
        shapes = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in sample.items())
        raise ModelError(
            f"model: a forward pass of one sample ({shapes}) raised {type(error).__name__}: {error}; do the inputs in "
            "the description fit the network?"
        ) from error
    if len(answer) != 1 or not math.prod(answer.shape):
        raise ModelError(f"model: one sample was answered by logits {list(answer.shape)} instead of [1, classes]")
    return float(counter.get_total_flops()), answer.shape[1]


@contextmanager
def _unfused() -> Iterator[None]:
    """Fused kernels (transformer fast path, attention, oneDNN's LSTM) hide their products from the counter."""
    backends: Any = torch.backends
    fast_path, onednn = backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled
    backends.mha.set_fastpath_enabled(False)
    backends.mkldnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        backends.mha.set_fastpath_enabled(fast_path)
        backends.mkldnn.enabled = onednn
