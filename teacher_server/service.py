"""The way of a query: admit, batch, compute, answer. Knows no transport."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from time import monotonic

import numpy as np

from protos import teacher_pb2 as pb
from protos.conformance import check_inputs
from protos.wire import MalformedMessage, UnknownValue, decode_inputs, encode_answers, refuse_unknown_fields
from teacher_server.auth import Caller
from teacher_server.batcher import Batcher
from teacher_server.errors import (
    Draining,
    ForwardFailed,
    InvalidQuery,
    NotImplementedHere,
    OtherFingerprint,
    PastDeadline,
    UnknownTeacher,
)
from teacher_server.metrics import Metrics

_KNOWN_OUTPUTS = ("logits",)


@dataclass(frozen=True)
class Served:
    """A teacher and the batcher that feeds it."""

    description: pb.TeacherDescription
    batcher: Batcher


class Service:
    """Every call of the contract, on messages; errors are those of `errors.py`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._teachers: dict[str, Served] = {}
        self.not_ready: str | None = "loading the teacher"

    def serve(self, teacher: Served) -> None:
        self._teachers[teacher.description.name] = teacher
        self._metrics.watch_queue(teacher.batcher.depth)
        self.not_ready = None

    def drain(self, why: str) -> None:
        """From here on queries are refused with UNAVAILABLE; those already queued are finished."""
        self.not_ready = why

    async def describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        _checked(request)
        teachers = [self._teacher(request.teacher)] if request.teacher else self._teachers.values()
        return pb.DescribeResponse(
            teachers=[teacher.description for teacher in teachers], server_version=version("preceptor")
        )

    async def label(self, request: pb.LabelRequest, caller: Caller, deadline: float | None) -> pb.LabelResponse:
        """Answers one query. `deadline` is a time.monotonic() moment; past it nothing is computed any more."""
        if self.not_ready:
            raise Draining(f"this replica takes no queries ({self.not_ready}); ask another one")
        _checked(request)
        teacher = self._teacher(request.teacher)
        description = teacher.description
        specs = _specs(request.outputs)
        if request.expected_fingerprint not in ("", description.fingerprint):
            raise OtherFingerprint(
                f"expected_fingerprint: teacher {description.name!r} is {description.fingerprint}, not "
                f"{request.expected_fingerprint}; its weights or preprocessing changed, so begin a new run with it"
            )
        try:
            inputs = decode_inputs(request.inputs)
            check_inputs(inputs, description)
        except UnknownValue as error:
            raise NotImplementedHere(str(error)) from error
        except MalformedMessage as error:
            raise InvalidQuery(str(error)) from error
        n = len(next(iter(inputs.values())))
        if n > description.limits.max_samples_per_query:
            raise InvalidQuery(f"inputs: {n} samples; at most {description.limits.max_samples_per_query} make a query")
        if deadline is not None and deadline <= monotonic():
            raise PastDeadline("the deadline had passed on arrival; give the call more time")

        label = self._metrics.job(caller)
        self._metrics.asked.labels(*label).inc(n)
        computed = await asyncio.wrap_future(teacher.batcher.submit(caller.tenant, caller.job, inputs, deadline))
        self._metrics.samples.labels(*label, "computed").inc(n)
        flops = n * description.flops_per_sample
        self._metrics.flops.labels(*label).inc(flops)
        self._metrics.device_seconds.labels(*label).inc(computed.device_nanoseconds / 1e9)
        self._metrics.queue_seconds.observe(computed.queue_seconds)

        outputs = {
            name: computed.outputs[name].astype(np.float32, copy=False) for name in {spec.name for spec in specs}
        }
        for name, array in outputs.items():
            finite = np.isfinite(array).all(axis=1)
            if not finite.all():
                raise ForwardFailed(f"{name}: the teacher answers NaN or infinity for sample {int(finite.argmin())}")
        try:
            answers = [encode_answers(outputs[spec.name], spec) for spec in specs]
        except MalformedMessage as error:
            raise InvalidQuery(str(error)) from error
        return pb.LabelResponse(
            fingerprint=description.fingerprint,
            answers=answers,
            sources=[pb.SOURCE_COMPUTED] * n,
            cost=pb.Cost(
                samples=n,
                money_nanos=n * description.price.nanos_per_sample,
                currency=description.price.currency,
                flops=flops,
                device_nanoseconds=computed.device_nanoseconds,
            ),
        )

    async def lookup(self, request: pb.LookupRequest) -> pb.LookupResponse:
        _checked(request)
        raise NotImplementedHere("Lookup: this server keeps no cache of answers; ask Label")

    async def spend(self, request: pb.SpendRequest) -> pb.SpendResponse:
        _checked(request)
        raise NotImplementedHere("Spend: this server keeps no ledger; /metrics counts samples by tenant and job")

    def _teacher(self, name: str) -> Served:
        if not name and len(self._teachers) == 1:
            return next(iter(self._teachers.values()))
        try:
            return self._teachers[name]
        except KeyError:
            raise UnknownTeacher(f"teacher: {name!r} is not served here; one of {sorted(self._teachers)}") from None


def _checked(request: pb.DescribeRequest | pb.LabelRequest | pb.LookupRequest | pb.SpendRequest) -> None:
    try:
        refuse_unknown_fields(request)
    except UnknownValue as error:
        raise NotImplementedHere(str(error)) from error
    if isinstance(request, pb.LabelRequest) and request.cache_mode not in pb.CacheMode.values():
        raise NotImplementedHere(f"cache_mode: CacheMode {request.cache_mode} is not known here")


def _specs(requested: Sequence[pb.OutputSpec]) -> list[pb.OutputSpec]:
    specs = list(requested) or [pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT32)]
    for spec in specs:
        if spec.name not in _KNOWN_OUTPUTS:
            raise NotImplementedHere(f"outputs.name: {spec.name!r} is not served; one of {list(_KNOWN_OUTPUTS)}")
        if spec.encoding not in pb.Encoding.values():
            raise NotImplementedHere(f"outputs.encoding: Encoding {spec.encoding} is not known here")
    return specs
