"""What a teacher's owner says of it: read, checked and completed, so that everyone after can take it as it stands."""

import math
from collections.abc import Sequence

from google.protobuf import json_format

from protos import teacher_pb2 as pb

_EXAMPLE = """{
  "inputs": [{"name": "x", "shape": [3, 32, 32],
              "normalisation": {"mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}}],
  "outputs": [{"name": "logits", "class_names": ["cat", "dog"], "top1": 0.93}]
}"""
_PIXELS_AND_FLOATS = (pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_FLOAT32)
_INTEGERS = {pb.DATA_TYPE_INT32, pb.DATA_TYPE_INT64}
# Room for float16's rounding beyond what a pixel of 0 or 255 becomes, as a share of the range; a second
# normalisation leaves it by far.
_MARGIN = 0.01


class ModelError(Exception):
    """The teacher cannot be served as configured; the message names the file or knob, the value and the fix."""


def parse(text: str | None, where: str) -> pb.TeacherDescription:
    """Reads protobuf JSON. `where` names its source in errors. Raises ModelError."""
    if text is None:
        raise ModelError(
            f"{where}: not there, so nothing says what the teacher takes; give --description FILE.json, or save the "
            f'same JSON as the safetensors metadata "preceptor". For example:\n{_EXAMPLE}'
        )
    try:
        return json_format.Parse(text, pb.TeacherDescription())
    except json_format.ParseError as error:
        raise ModelError(f"{where}: {error}. For example:\n{_EXAMPLE}") from error


def complete_inputs(description: pb.TeacherDescription, where: str) -> None:
    """Checks the inputs; gives each its dtypes, one mean and std a channel, and bounds. Raises ModelError."""
    names = [described.name for described in description.inputs]
    if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise ModelError(f"{where}: inputs are named {names}; name at least one, each an identifier of its own")
    for described in description.inputs:
        field = f"{where}: input {described.name!r}"
        if not described.shape or min(described.shape) < 1:
            raise ModelError(
                f"{field}: shape {list(described.shape)}; give the shape of one sample, like [3, 32, 32], without the "
                "batch axis"
            )
        if described.HasField("normalisation"):
            _complete_normalisation(described, field)
        _complete_dtypes(described, field)
        _complete_bounds(described, field)


def complete_outputs(description: pb.TeacherDescription, classes: int, where: str) -> None:
    """Checks the one output against the `classes` that the network was seen to answer. Raises ModelError."""
    if not description.outputs:
        description.outputs.add()
    output = description.outputs[0]
    if len(description.outputs) > 1 or output.name not in {"", "logits"}:
        names = [output.name for output in description.outputs]
        raise ModelError(f'{where}: outputs {names}; a teacher has one output, "logits"')
    if output.shape and list(output.shape) != [classes]:
        raise ModelError(f"{where}: logits have shape {list(output.shape)}, but the network answers [{classes}]")
    if output.class_names and len(output.class_names) != classes:
        raise ModelError(
            f"{where}: {len(output.class_names)} class_names, but the network answers {classes} logits; name each in "
            "the order of the logits, or none"
        )
    if not 0 <= output.top1 <= 1:
        raise ModelError(f"{where}: top1 {output.top1:g}; it is a share, 0..1, with 0 for unknown")
    output.name = "logits"
    output.shape[:] = [classes]


def _complete_normalisation(described: pb.InputDescription, field: str) -> None:
    channels = described.shape[0]
    normalisation = described.normalisation
    for name, values in (("mean", normalisation.mean), ("std", normalisation.std)):
        if len(values) not in {1, channels}:
            raise ModelError(
                f"{field}: {len(values)} values of {name} for {channels} channels (axis 0 of shape "
                f"{list(described.shape)}); give one a channel, or one for all"
            )
        if not all(map(math.isfinite, values)):
            raise ModelError(f"{field}: {name} {list(values)} is not finite")
        if len(values) < channels:
            values[:] = [values[0]] * channels
    if min(normalisation.std) <= 0:
        raise ModelError(f"{field}: std {list(normalisation.std)}; every std is above 0")
    if max(normalisation.mean) > 1:
        raise ModelError(
            f"{field}: mean {list(normalisation.mean)} is on the scale 0..255; pixels are divided by 255 first, so "
            "divide mean and std by 255"
        )


def _complete_dtypes(described: pb.InputDescription, field: str) -> None:
    if not described.dtypes:
        described.dtypes[:] = _PIXELS_AND_FLOATS if described.HasField("normalisation") else _PIXELS_AND_FLOATS[1:]
    names = [pb.DataType.Name(dtype) if dtype in pb.DataType.values() else str(dtype) for dtype in described.dtypes]
    if not set(described.dtypes) <= {*_PIXELS_AND_FLOATS, *_INTEGERS}:
        raise ModelError(f"{field}: dtypes {names}; known are {[*pb.DataType.keys()][1:]}")
    if not (_INTEGERS.issuperset(described.dtypes) or _INTEGERS.isdisjoint(described.dtypes)):
        raise ModelError(f"{field}: dtypes {names}; an input takes integers, or pixels and floats, not both")
    if described.HasField("normalisation") and not _INTEGERS.isdisjoint(described.dtypes):
        raise ModelError(f"{field}: dtypes {names} cannot be normalised; drop `normalisation`")


def _complete_bounds(described: pb.InputDescription, field: str) -> None:
    low, high = described.minimum, described.maximum
    if not low and not high:
        if not _INTEGERS.isdisjoint(described.dtypes):
            # An index out of range is a device-side assertion on CUDA: one bad query would end the whole server.
            raise ModelError(f"{field}: integers need `minimum` and `maximum`, such as 0 and vocabulary size - 1")
        for mean, std in zip(described.normalisation.mean, described.normalisation.std, strict=True):
            low.append((0 - mean - _MARGIN) / std)
            high.append((1 - mean + _MARGIN) / std)
        return
    if len(low) != len(high) or len(low) not in {1, described.shape[0]}:
        raise ModelError(
            f"{field}: {len(low)} values of minimum and {len(high)} of maximum for {described.shape[0]} channels; give "
            "both, one a channel or one for all"
        )
    if not _ordered(low, high):
        raise ModelError(f"{field}: minimum {list(low)} and maximum {list(high)}; each minimum is below its maximum")


def _ordered(low: Sequence[float], high: Sequence[float]) -> bool:
    return all(math.isfinite(a) and math.isfinite(b) and a < b for a, b in zip(low, high, strict=True))
