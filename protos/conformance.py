"""Whether samples are what Describe asks for: the client checks before it sends, the server before it queues."""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from protos import teacher_pb2 as pb
from protos.wire import MalformedMessage, dtype_code

_JOB_NAME = re.compile(r"[A-Za-z0-9._:/+-]{1,128}")


def check_job_name(job: str) -> None:
    """Raises MalformedMessage for a name that could not travel in a header or stand in a label."""
    if not _JOB_NAME.fullmatch(job):
        raise MalformedMessage(f"job {job[:128]!r}: a name is 1 to 128 letters, digits or . _ : / + -")


def check_inputs(inputs: Mapping[str, NDArray[np.generic]], teacher: pb.TeacherDescription) -> None:
    """Raises MalformedMessage where a name, dtype, shape or value of `inputs` (each [n, ...]) contradicts `teacher`."""
    wanted = {described.name: described for described in teacher.inputs}
    if inputs.keys() != wanted.keys():
        raise MalformedMessage(f"inputs: got {sorted(inputs)}, but teacher {teacher.name!r} takes {sorted(wanted)}")
    for name, array in inputs.items():
        _check_input(array, wanted[name])


def _check_input(array: NDArray[np.generic], described: pb.InputDescription) -> None:
    field = f"inputs[{described.name!r}]"
    code = dtype_code(array.dtype)
    if code not in described.dtypes:
        accepted = ", ".join(pb.DataType.Name(dtype) for dtype in described.dtypes)
        raise MalformedMessage(f"{field}.dtype: {pb.DataType.Name(code)} is not accepted; send one of {accepted}")
    if array.shape[1:] != tuple(described.shape):
        raise MalformedMessage(
            f"{field}.shape: samples of {list(array.shape[1:])}, but the teacher takes {list(described.shape)}"
        )
    if code != pb.DATA_TYPE_UINT8:
        _check_values(array, described, field)


def _check_values(array: NDArray[np.generic], described: pb.InputDescription, field: str) -> None:
    """NaN and infinity show in the extremes, so one pass over the data serves finiteness and bounds."""
    bounds = len(described.minimum)
    axes = tuple(axis for axis in range(array.ndim) if axis != 1) if bounds > 1 else None
    lowest = np.atleast_1d(array.min(axis=axes)).astype(np.float64)
    highest = np.atleast_1d(array.max(axis=axes)).astype(np.float64)
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise MalformedMessage(f"{field}: NaN or infinite values; a teacher answers finite samples only")
    if not bounds:
        return
    for channel, (low, high, least, most) in enumerate(
        zip(lowest, highest, described.minimum, described.maximum, strict=True)
    ):
        if low < least or high > most:
            place = f" in channel {channel}" if bounds > 1 else ""
            fix = (
                f"float samples must be normalised exactly once, (x / 255 - mean) / std with mean "
                f"{list(described.normalisation.mean)} and std {list(described.normalisation.std)}; or send raw uint8"
                if described.HasField("normalisation")
                else "see the teacher's Describe"
            )
            raise MalformedMessage(
                f"{field}: values {low:g}..{high:g}{place} leave the teacher's range {least:g}..{most:g}; {fix}"
            )
