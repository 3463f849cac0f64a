"""What a query must be before anything is queued for it; every refusal names the thing, the value and the fix."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

from protos import teacher_pb2 as pb
from protos.conformance import check_inputs, check_job_name
from protos.keys import KEY_BYTES
from protos.wire import (
    Array,
    MalformedMessage,
    UnknownValue,
    answers_bytes,
    check_spec,
    decode_inputs,
    dtype_of,
    refuse_unknown_fields,
)
from teacher_server.errors import InvalidQuery, NotImplementedHere, OtherFingerprint

# All of a request but its tensors' bytes: names, shapes, specs. It bounds the work of looking through them.
_MAX_ENVELOPE_BYTES = 16 * 1024
_MAX_LOOKUP_BYTES = 2 * 2**20  # far more keys than one lookup may have
_MAX_INPUTS = 16
_MAX_OUTPUTS = 4
_MAX_CANDIDATES = 10**6  # larger than any batch; the ledger counts exactly to 2^53
_MAX_TENSOR_FIELDS = 16  # a name, a dtype, data, and axes, which may come one by one
_KNOWN_OUTPUTS = ("logits",)
_INPUTS = pb.LabelRequest.DESCRIPTOR.fields_by_name["inputs"].number
_DATA = pb.Tensor.DESCRIPTOR.fields_by_name["data"].number

Request = pb.DescribeRequest | pb.LabelRequest | pb.LookupRequest | pb.SpendRequest


class Admitted(NamedTuple):
    inputs: dict[str, Array]  # [n, ...] each
    samples: int  # n
    specs: list[pb.OutputSpec]
    unasked: int  # candidates without these


class AdmittedLookup(NamedTuple):
    keys: list[bytes]  # 16 bytes each
    specs: list[pb.OutputSpec]
    unasked: int


def check_message(kind: type[Request], message: bytes) -> None:
    """Bounds what parsing may make of a message that is not parsed yet: two bytes of it can become seventy in memory.

    Raises InvalidQuery for more names, shapes and the like than the envelope of a request may have.
    """
    most = _MAX_LOOKUP_BYTES if kind is pb.LookupRequest else _MAX_ENVELOPE_BYTES
    try:
        size = _envelope_bytes(message, most) if kind is pb.LabelRequest else len(message)
    except (IndexError, ValueError) as error:
        raise InvalidQuery(f"{kind.DESCRIPTOR.name}: this is no such message ({error})") from error
    if size > most:
        raise InvalidQuery(
            f"{kind.DESCRIPTOR.name}: more than {most} bytes of names, shapes and the like, the most that there may be "
            "beside the tensors' data"
        )


def _envelope_bytes(message: bytes, most: int) -> int:
    """Bytes of a LabelRequest beside its tensors' data; it stops counting beyond `most`."""
    size, at = 0, 0
    for number, start, stop in _fields(message, 0, len(message)):
        size += stop - at
        at = stop
        if number == _INPUTS:
            some = islice(_fields(message, start, stop), _MAX_TENSOR_FIELDS)
            size -= sum(end - begin for field, begin, end in some if field == _DATA)
        if size > most:
            break
    return size


def _fields(message: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of each field's content. Protocol Buffers encoding: a tag, then by its last three bits."""
    while at < end:
        tag, at = _varint(message, at)
        start = at
        match tag & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 2:
                size, start = _varint(message, at)
                at = start + size
            case 5:
                at += 4
            case kind:
                raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("truncated")
        yield tag >> 3, start, at


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def check_fields(request: Request) -> None:
    """Raises NotImplementedHere for a field that is not known here, InvalidQuery for too many tensors."""
    if isinstance(request, pb.LabelRequest) and len(request.inputs) > _MAX_INPUTS:
        raise InvalidQuery(f"inputs: {len(request.inputs)} tensors; a query has at most {_MAX_INPUTS}")
    with _refusals():
        refuse_unknown_fields(request)


def claimed_bytes(request: pb.LabelRequest) -> int:
    """What the tensors' shapes say that their data take; asking for the data themselves would copy them."""
    with _refusals():
        return sum(
            math.prod(tensor.shape) * dtype_of(tensor.dtype, "inputs.dtype").itemsize for tensor in request.inputs
        )


def admit(request: pb.LabelRequest, description: pb.TeacherDescription) -> Admitted:
    """The inputs and outputs of a query to the teacher of that description, all checked."""
    _check_teacher_and_namespace(request, description)
    if request.cache_mode not in pb.CacheMode.values():
        raise NotImplementedHere(f"cache_mode: CacheMode {request.cache_mode} is not known here")
    with _refusals():
        specs = _specs(request, description)
        inputs = decode_inputs(request.inputs)
        samples = len(next(iter(inputs.values())))
        _check_size("inputs", "samples", samples, specs, description)
        check_inputs(inputs, description)
    return Admitted(inputs, samples, specs, _unasked(request, "samples", samples))


def admit_lookup(request: pb.LookupRequest, description: pb.TeacherDescription) -> AdmittedLookup:
    """The keys and outputs of a lookup in the cache of the teacher of that description, all checked."""
    _check_teacher_and_namespace(request, description)
    with _refusals():
        specs = _specs(request, description)
        if not request.keys:
            raise MalformedMessage("keys: none given; a lookup has at least one")
        _check_size("keys", "keys", len(request.keys), specs, description)
        for number, key in enumerate(request.keys):
            if len(key) != KEY_BYTES:
                raise MalformedMessage(
                    f"keys[{number}]: {len(key)} bytes; a key has {KEY_BYTES}, as protos/keys.py makes it"
                )
    return AdmittedLookup(list(request.keys), specs, _unasked(request, "keys", len(request.keys)))


def _unasked(request: pb.LabelRequest | pb.LookupRequest, what: str, asked: int) -> int:
    """Those from which the student chose, without those that it asks about."""
    if not request.candidates:
        return 0
    if not asked <= request.candidates <= _MAX_CANDIDATES:
        raise InvalidQuery(
            f"candidates: {request.candidates}, and asked about are {asked} {what} of them; give the size of the batch "
            f"that these were chosen from, {asked} to {max(asked, _MAX_CANDIDATES)}, or 0 where none were left out"
        )
    return request.candidates - asked


def _check_teacher_and_namespace(
    request: pb.LabelRequest | pb.LookupRequest, description: pb.TeacherDescription
) -> None:
    if request.expected_fingerprint not in ("", description.fingerprint):
        raise OtherFingerprint(
            f"expected_fingerprint: teacher {description.name!r} is {description.fingerprint}, not "
            f"{request.expected_fingerprint}; its weights, factory, preprocessing or precision changed; bring "
            "that teacher back, or begin a new run"
        )
    if request.cache_namespace:
        try:
            check_job_name(request.cache_namespace)
        except MalformedMessage:
            raise InvalidQuery(
                f"cache_namespace: {request.cache_namespace[:128]!r}; a name is 1 to 128 letters, digits or "
                ". _ : / + -, as a job's"
            ) from None


def _specs(request: pb.LabelRequest | pb.LookupRequest, description: pb.TeacherDescription) -> list[pb.OutputSpec]:
    specs = list(request.outputs) or [pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT32)]
    if len(specs) > _MAX_OUTPUTS:
        raise MalformedMessage(f"outputs: {len(specs)} given; ask for at most {_MAX_OUTPUTS}")
    (classes,) = description.outputs[0].shape
    for spec in specs:
        if spec.name not in _KNOWN_OUTPUTS:
            raise UnknownValue(f"outputs.name: {spec.name!r} is not served; one of {list(_KNOWN_OUTPUTS)}")
        check_spec(spec, classes)
    return specs


def _check_size(
    field: str, what: str, samples: int, specs: list[pb.OutputSpec], description: pb.TeacherDescription
) -> None:
    limits = description.limits
    if samples > limits.max_samples_per_query:
        raise MalformedMessage(f"{field}: {samples} {what}; at most {limits.max_samples_per_query} make a query")
    (classes,) = description.outputs[0].shape
    reply = sum(answers_bytes(spec, samples, classes) for spec in specs)
    if reply > limits.max_message_bytes:
        raise MalformedMessage(
            f"{field}: the reply to {samples} {what} would take {reply} bytes, a message holds "
            f"{limits.max_message_bytes}; send fewer {what}, or ask for TOP_K"
        )


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except UnknownValue as error:
        raise NotImplementedHere(str(error)) from error
    except MalformedMessage as error:
        raise InvalidQuery(str(error)) from error
