"""The way of a query: admit, batch, compute, answer. Knows no transport."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from time import monotonic
from typing import ParamSpec, TypeVar

import numpy as np

from protos import teacher_pb2 as pb
from protos.wire import MalformedMessage, encode_answers
from teacher_server.admission import Admitted, admit, check_envelope
from teacher_server.auth import Caller
from teacher_server.batcher import Batcher, Computed
from teacher_server.errors import (
    Draining,
    ForwardFailed,
    InvalidQuery,
    NotImplementedHere,
    PastDeadline,
    UnknownTeacher,
)
from teacher_server.metrics import Metrics

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

# Looking through this many bytes takes about as long as handing the work to a thread does.
_INLINE_BYTES = 512 * 1024


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
        check_envelope(request)
        if not self._teachers:
            raise Draining(f"this replica describes no teacher yet ({self.not_ready}); ask again, or another one")
        teachers = [self._teacher(request.teacher)] if request.teacher else self._teachers.values()
        return pb.DescribeResponse(
            teachers=[teacher.description for teacher in teachers], server_version=version("preceptor")
        )

    async def label(self, request: pb.LabelRequest, caller: Caller, deadline: float | None) -> pb.LabelResponse:
        """Answers one query. `deadline` is a time.monotonic() moment; past it nothing is computed any more."""
        if self.not_ready:
            raise Draining(f"this replica takes no queries ({self.not_ready}); ask another one")
        size = check_envelope(request)
        teacher = self._teacher(request.teacher)
        description = teacher.description
        admitted = await _beside_the_loop(size, admit, request, description)
        if deadline is not None and deadline <= monotonic():
            raise PastDeadline("the deadline had passed on arrival; give the call more time")

        waiting = teacher.batcher.submit(caller.tenant, caller.job, admitted.inputs, deadline)
        label = self._metrics.job(caller)
        self._metrics.asked.labels(*label).inc(admitted.samples)
        computed = await asyncio.wrap_future(waiting)
        self._metrics.samples.labels(*label, "computed").inc(admitted.samples)
        self._metrics.flops.labels(*label).inc(admitted.samples * description.flops_per_sample)
        self._metrics.device_seconds.labels(*label).inc(computed.device_nanoseconds / 1e9)
        self._metrics.queue_seconds.observe(computed.queue_seconds)
        size = computed.outputs["logits"].nbytes
        return await _beside_the_loop(size, _reply, description, admitted, computed)

    async def lookup(self, request: pb.LookupRequest) -> pb.LookupResponse:
        check_envelope(request)
        raise NotImplementedHere("Lookup: this server keeps no cache of answers; ask Label")

    async def spend(self, request: pb.SpendRequest) -> pb.SpendResponse:
        check_envelope(request)
        raise NotImplementedHere("Spend: this server keeps no ledger; /metrics counts samples by tenant and job")

    def _teacher(self, name: str) -> Served:
        if not name and len(self._teachers) == 1:
            return next(iter(self._teachers.values()))
        try:
            return self._teachers[name]
        except KeyError:
            raise UnknownTeacher(f"teacher: {name!r} is not served here; one of {sorted(self._teachers)}") from None


def _reply(description: pb.TeacherDescription, admitted: Admitted, computed: Computed) -> pb.LabelResponse:
    n = admitted.samples
    outputs = {name: array.astype(np.float32, copy=False) for name, array in computed.outputs.items()}
    for name, array in outputs.items():
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            raise ForwardFailed(f"{name}: the teacher answers NaN or infinity for sample {int(finite.argmin())}")
    try:
        answers = [encode_answers(outputs[spec.name], spec) for spec in admitted.specs]
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
            flops=n * description.flops_per_sample,
            device_nanoseconds=computed.device_nanoseconds,
        ),
    )


async def _beside_the_loop(
    size: int, work: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """Does work whose time grows with `size` bytes; where they are many, in a thread, so that no other caller waits."""
    if size <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
