"""numpy <-> messages: the one place for every dtype and encoding.

Whatever arrives may be hostile: names, counts and lengths are checked against each other before anything is
allocated, and decoded tensors are read-only views of the message's own bytes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from protos import teacher_pb2 as pb

Array = NDArray[np.generic]

MAX_AXES = 8

_DTYPES: dict[pb.DataType, np.dtype[np.generic]] = {
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
}
_ENCODINGS = {pb.ENCODING_UNSPECIFIED, pb.ENCODING_FLOAT32, pb.ENCODING_FLOAT16, pb.ENCODING_TOP_K}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class MalformedMessage(ValueError):
    """The message contradicts itself; the text names the field, its value and the fix."""


class UnknownValue(MalformedMessage):
    """A field or an enum value that this version does not know: UNIMPLEMENTED, not a guess."""


class TopK(NamedTuple):
    """The k largest logits of each answer, and how much probability lies elsewhere."""

    values: NDArray[np.float32]  # [n, k], falling
    indices: NDArray[np.int32]  # [n, k], the classes they belong to
    tail_mass: NDArray[np.float32]  # [n], share of softmax(logits / temperature) outside the k
    temperature: float
    classes: int


def refuse_unknown_fields(message: Message) -> None:
    """Raises UnknownValue when a newer client set a field that this version would silently ignore.

    Its time grows with the number of fields: bound the message's size first.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise UnknownValue(f"{message.DESCRIPTOR.name}: field number {number} is not known here; ask a newer server")
    for field in message.DESCRIPTOR.fields:  # ListFields would copy the tensors' bytes
        if field.message_type is None:
            continue
        value = getattr(message, field.name)
        if not isinstance(value, Message):
            for part in value:
                refuse_unknown_fields(part)
        elif message.HasField(field.name):
            refuse_unknown_fields(value)


# ---------------------------------------------------------------- tensors


def dtype_of(code: pb.DataType, field: str = "dtype") -> np.dtype[np.generic]:
    """The numpy dtype of a message's code. Raises UnknownValue, naming `field`."""
    if code not in _DTYPES:
        raise UnknownValue(f"{field}: DataType {code} is not known here; one of {_names(pb.DataType)}")
    return _DTYPES[code]


def dtype_code(dtype: np.dtype[np.generic]) -> pb.DataType:
    """The message's code of a numpy dtype. Raises MalformedMessage for one that the contract does not have."""
    try:
        return _DTYPE_CODES[dtype.newbyteorder("<")]
    except KeyError:
        raise MalformedMessage(
            f"dtype {dtype} has no place in the contract; one of {', '.join(map(str, _DTYPE_CODES))}"
        ) from None


def encode_tensor(name: str, array: Array) -> pb.Tensor:
    """`array` [n, ...] as a message; copied once, made little-endian and row-major where it was not."""
    code = dtype_code(array.dtype)
    little = np.ascontiguousarray(array, dtype=_DTYPES[code])
    return pb.Tensor(name=name, dtype=code, shape=little.shape, data=little.tobytes())


def decode_tensor(tensor: pb.Tensor) -> Array:
    """The tensor [n, ...] as a read-only view of the message's bytes.

    Raises MalformedMessage when shape and bytes disagree, UnknownValue for an unknown dtype.
    """
    field = f"inputs[{tensor.name!r}]"
    dtype = dtype_of(tensor.dtype, f"{field}.dtype")
    shape = _shape(tensor.shape, f"{field}.shape")
    return _view(tensor.data, dtype, shape, f"{field}.data")


def decode_inputs(tensors: Sequence[pb.Tensor]) -> dict[str, Array]:
    """A query's inputs by name, all with the same count n >= 1 of samples on axis 0."""
    if not tensors:
        raise MalformedMessage("inputs: none given; a query needs at least one tensor")
    inputs: dict[str, Array] = {}
    for tensor in tensors:
        if tensor.name in inputs:
            raise MalformedMessage(f"inputs[{tensor.name!r}]: given twice; every input has one tensor")
        inputs[tensor.name] = decode_tensor(tensor)
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) > 1:
        raise MalformedMessage(f"inputs: sample counts on axis 0 differ: {counts}; they must be equal")
    return inputs


# ---------------------------------------------------------------- answers


def check_spec(spec: pb.OutputSpec, classes: int) -> None:
    """Raises UnknownValue for an unknown encoding, MalformedMessage for an unusable k or temperature."""
    if _encoding(spec.encoding) == pb.ENCODING_TOP_K:
        if not 1 <= spec.k <= classes:
            raise MalformedMessage(f"outputs.k: {spec.k} is outside 1..{classes}, the teacher's classes")
        _positive_temperature(spec.temperature or 1.0, "outputs.temperature")


def answers_bytes(spec: pb.OutputSpec, samples: int, classes: int) -> int:
    """What the answers to so many samples take in a reply, with their sources; at most."""
    each = {pb.ENCODING_TOP_K: 8 * spec.k + 4, pb.ENCODING_FLOAT16: 2 * classes}.get(spec.encoding, 4 * classes)
    return samples * (each + 1) + 1024


def encode_answers(logits: NDArray[np.float32], spec: pb.OutputSpec) -> pb.Answers:
    """`logits` [n, classes], finite, in the encoding of `spec`, which has passed check_spec.

    Raises MalformedMessage where float16 cannot hold a value.
    """
    answers = pb.Answers(name=spec.name, encoding=_encoding(spec.encoding), shape=logits.shape)
    if answers.encoding == pb.ENCODING_TOP_K:
        top = top_k(logits, spec.k, spec.temperature or 1.0)
        answers.k, answers.temperature = spec.k, top.temperature
        answers.values = _bytes(top.values, "<f4")
        answers.indices = _bytes(top.indices, "<i4")
        answers.tail_mass = _bytes(top.tail_mass, "<f4")
    elif answers.encoding == pb.ENCODING_FLOAT16:
        largest = float(np.abs(logits).max())
        if largest > float(np.finfo(np.float16).max):
            raise MalformedMessage(f"outputs[{spec.name!r}].encoding: FLOAT16 cannot hold {largest:g}; ask for FLOAT32")
        answers.values = _bytes(logits, "<f2")
    else:
        answers.values = _bytes(logits, "<f4")
    return answers


def decode_answers(answers: pb.Answers) -> NDArray[np.float32] | TopK:
    """What `encode_answers` made: dense float32 logits [n, classes], or TopK. Raises MalformedMessage."""
    field = f"answers[{answers.name!r}]"
    encoding = _encoding(answers.encoding)
    shape = _shape(answers.shape, f"{field}.shape")
    if len(shape) != 2:
        raise MalformedMessage(f"{field}.shape: {list(shape)} is not [n, classes]")
    n, classes = shape
    if encoding == pb.ENCODING_TOP_K:
        if not 1 <= answers.k <= classes:
            raise MalformedMessage(f"{field}.k: {answers.k} is outside 1..{classes}")
        _positive_temperature(answers.temperature, f"{field}.temperature")
        indices = _view(answers.indices, _DTYPES[pb.DATA_TYPE_INT32], (n, answers.k), f"{field}.indices")
        if indices.min() < 0 or indices.max() >= classes:
            raise MalformedMessage(f"{field}.indices: a class outside 0..{classes - 1}")
        return TopK(
            values=_floats(answers.values, "<f4", (n, answers.k), f"{field}.values"),
            indices=indices.astype(np.int32),
            tail_mass=_floats(answers.tail_mass, "<f4", (n,), f"{field}.tail_mass"),
            temperature=answers.temperature,
            classes=classes,
        )
    return _floats(answers.values, "<f2" if encoding == pb.ENCODING_FLOAT16 else "<f4", shape, f"{field}.values")


def top_k(logits: NDArray[np.float32], k: int, temperature: float) -> TopK:
    """The k largest of `logits` [n, classes], 1 <= k <= classes, and the rest's share of softmax(logits / temperature).

    Equal values keep the order of their classes; which of those that tie for the last place are taken is not said.
    """
    _, classes = logits.shape
    chosen = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    chosen.sort(axis=1)
    falling = np.argsort(-np.take_along_axis(logits, chosen, axis=1), axis=1, kind="stable")
    indices = np.take_along_axis(chosen, falling, axis=1)
    mass = np.exp((logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperature)
    total = mass.sum(axis=1)
    np.put_along_axis(mass, indices, 0.0, axis=1)  # summing the rest itself: 1 - sum(top) would cancel
    return TopK(
        values=np.take_along_axis(logits, indices, axis=1),
        indices=indices.astype(np.int32),
        tail_mass=(mass.sum(axis=1) / total).astype(np.float32),
        temperature=temperature,
        classes=classes,
    )


# ---------------------------------------------------------------- parts


def _encoding(code: pb.Encoding) -> pb.Encoding:
    if code not in _ENCODINGS:
        raise UnknownValue(f"encoding: Encoding {code} is not known here; one of {_names(pb.Encoding)}")
    return code or pb.ENCODING_FLOAT32


def _positive_temperature(temperature: float, field: str) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise MalformedMessage(f"{field}: {temperature} is not a finite number above 0")


def _shape(shape: Sequence[int], field: str) -> tuple[int, ...]:
    if not 1 <= len(shape) <= MAX_AXES:
        raise MalformedMessage(f"{field}: {len(shape)} axes; 1 to {MAX_AXES} are allowed, samples on axis 0")
    if min(shape) < 1:
        raise MalformedMessage(f"{field}: {list(shape)} has an axis below 1; a query holds at least one sample")
    return tuple(shape)


def _view(data: bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...], field: str) -> Array:
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise MalformedMessage(f"{field}: {len(data)} bytes, but shape {list(shape)} of {dtype.name} needs {needed}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _floats(data: bytes, dtype: str, shape: tuple[int, ...], field: str) -> NDArray[np.float32]:
    return _view(data, np.dtype(dtype), shape, field).astype(np.float32)


def _bytes(array: Array, dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=np.dtype(dtype)).tobytes()


def _names(enum: EnumTypeWrapper) -> str:
    return ", ".join(name for name, code in enum.items() if code)


_unserved = {*pb.DataType.values()} - {pb.DATA_TYPE_UNSPECIFIED, *_DTYPES} | {*pb.Encoding.values()} - _ENCODINGS
if _unserved:
    raise ImportError(f"teacher.proto has values without a codec in wire.py: {_unserved}")
