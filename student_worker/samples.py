"""The samples of a query, as a caller gives them and as they travel."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from protos import teacher_pb2 as pb
from protos.conformance import check_inputs
from protos.wire import Array, MalformedMessage
from student_worker.errors import InvalidQuery

Samples = Tensor | Array | Mapping[str, Tensor | Array]


def named_arrays(x: Samples, description: pb.TeacherDescription) -> dict[str, Array]:
    """`x` as arrays [n, ...] by input name, n >= 1. Raises InvalidQuery where they contradict the description."""
    if not isinstance(x, Mapping):
        if len(description.inputs) != 1:
            names = [described.name for described in description.inputs]
            raise InvalidQuery(f"inputs: the teacher takes {names}; give a mapping from these names")
        x = {description.inputs[0].name: x}
    inputs: dict[str, Array] = {}
    for name, value in x.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise InvalidQuery(f"inputs[{name!r}]: a {type(value).__name__} cannot be sent; give a tensor or an array")
        try:
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        except TypeError as error:
            raise InvalidQuery(f"inputs[{name!r}]: {value.dtype} cannot be sent; use .float() or uint8") from error
        if array.ndim == 0 or len(array) == 0:
            raise InvalidQuery(f"inputs[{name!r}]: shape {list(array.shape)} holds no sample; axis 0 counts samples")
        inputs[name] = array
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) != 1:
        raise InvalidQuery(f"inputs: sample counts on axis 0 differ: {counts}; they must be equal")
    try:
        check_inputs(inputs, description)
    except MalformedMessage as error:
        raise InvalidQuery(str(error)) from error
    return inputs


def count(inputs: Mapping[str, Array]) -> int:
    """n, of arrays [n, ...] by name."""
    return len(next(iter(inputs.values())))
