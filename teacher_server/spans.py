"""OpenTelemetry spans of each call, made when it has ended and sent to a collector over OTLP (gRPC).

    preceptor.v1.Teacher/Label      the call: who asked, what came from where, how it ended
    ├── cache lookup
    ├── queue                       of what was computed at its charge, once for each batch that it was in
    ├── compute                     linked to the calls that shared the batch
    └── settle                      the books, and the answers delivered

A call whose answers another one had computed is linked to that one. The event loop only hands over a trail; a thread
makes the spans, and the SDK's own sends them. What they cannot keep up with is left out: nobody waits for a collector.
"""

import logging
import threading
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from queue import Empty, SimpleQueue
from time import monotonic, monotonic_ns, time_ns
from types import TracebackType
from typing import Any, Self

from google.rpc import code_pb2
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from protos import teacher_pb2 as pb
from teacher_server.access import Ended
from teacher_server.trails import Mark, Pass, Passage, Trail

_SERVICE = pb.DESCRIPTOR.services_by_name["Teacher"].full_name
_NAME = "preceptor-teacher"
_WAITING_CALLS = 2048
_CLOSE_SECONDS = 3.0
# A server's own failures, as OpenTelemetry's conventions for gRPC have it; the others are the caller's.
_FAULTS = {
    code_pb2.UNKNOWN,
    code_pb2.DEADLINE_EXCEEDED,
    code_pb2.UNIMPLEMENTED,
    code_pb2.INTERNAL,
    code_pb2.UNAVAILABLE,
    code_pb2.DATA_LOSS,
}
_log = logging.getLogger(__name__)


class Spans:
    """`with` until the last call has ended: what there is then is sent, within 3 s or not at all."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._ended: SimpleQueue[Ended | None] = SimpleQueue()
        self._left_out = 0
        self._ids = _Ids()
        # The SDK's default sampler follows the caller's wish, and records what nobody has spoken for.
        self._provider = TracerProvider(resource=_resource(), id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("preceptor", version("preceptor"))
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end = monotonic() + _CLOSE_SECONDS
        self._ended.put(None)
        self._thread.join(_CLOSE_SECONDS)
        # It takes no limit of time, and waits for a collector that hangs.
        closing = threading.Thread(target=self._provider.shutdown, name="spans' end", daemon=True)
        closing.start()
        closing.join(max(0.1, end - monotonic()))
        if closing.is_alive():
            _log.warning("the last spans are lost: the collector at %s does not take them", self._endpoint)

    def ended(self, call: Ended) -> None:
        """Never waits."""
        if self._ended.qsize() < _WAITING_CALLS:
            self._ended.put(call)
        else:
            self._left_out += 1

    def _run(self) -> None:
        while True:
            with suppress(Empty):
                if (call := self._ended.get(timeout=1.0)) is None:
                    return
                try:
                    self._make(call)
                except Exception:  # noqa: BLE001 - the other calls are to have theirs
                    _log.exception("a call of %s has no spans, for a fault of ours", call.call)
                del call
            if self._left_out:
                left_out, self._left_out = self._left_out, 0
                _log.warning("%d calls left out of the traces: they end faster than spans are made", left_out)

    def _make(self, call: Ended) -> None:
        trail = call.trail
        passages = [_seen(passage) for passage in trail.passages]
        offset = time_ns() - monotonic_ns()  # what the clocks say now; a step of the clock moves whole traces only
        self._ids.take(trail.mark)
        root = self._tracer.start_span(
            f"{_SERVICE}/{call.call}",
            context=_context_of(trail),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(call),
            links=_links(one.host for passage in passages for one in passage.passes if one.host is not trail.mark),
            start_time=trail.began + offset,
        )
        if root.is_recording():
            inside = trace.set_span_in_context(root, Context())
            for passage in passages:
                self._make_passage(passage, trail, inside, offset)
            if call.code in _FAULTS:
                root.set_status(trace.Status(trace.StatusCode.ERROR, call.reason or code_pb2.Code.Name(call.code)))
        root.end(call.ended + offset)

    def _make_passage(self, passage: Passage, trail: Trail, inside: Context, offset: int) -> None:
        def span(name: str, began: int, ended: int, links: Iterable[Mark] = (), **attributes: int) -> None:
            named = {f"preceptor.{key}": value for key, value in attributes.items()}
            made = self._tracer.start_span(
                name, context=inside, attributes=named, links=_links(links), start_time=began + offset
            )
            made.end(max(began, ended) + offset)

        if passage.looked_up is not None:
            span("cache lookup", *passage.looked_up, samples=passage.samples, found=passage.found)
        for one in passage.passes:
            if one.host is not trail.mark:
                continue
            span("queue", one.queued, one.began)
            mates = (mark for mark in one.hosts if mark is not trail.mark)
            numbers = {"batch": one.batch, "batch_size": one.size, "samples": one.samples}
            span("compute", one.began, one.ended, mates, **numbers)
            span("settle", one.ended, one.settled)


class _Ids(RandomIdGenerator):
    """Gives the next span, and where it is the first of its trace that trace, the ids that its trail has already."""

    def __init__(self) -> None:
        self._next: Mark | None = None

    def take(self, mark: Mark) -> None:
        self._next = mark

    def generate_trace_id(self) -> int:
        return int(self._next.trace_id, 16) if self._next else super().generate_trace_id()

    def generate_span_id(self) -> int:
        mark, self._next = self._next, None
        return int(mark.span_id, 16) if mark else super().generate_span_id()


def _seen(passage: Passage) -> Passage:
    """As it stands: another call may still go on through it, in another thread."""
    passes: list[Pass] = passage.passes.copy()
    return Passage(passage.samples, passage.looked_up, passage.found, passes)


def _context_of(trail: Trail) -> Context:
    if not trail.parent_id:
        return Context()
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if trail.sampled else trace.TraceFlags.DEFAULT)
    parent = _span_context(Mark(trail.mark.trace_id, trail.parent_id), flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())


def _links(marks: Iterable[Mark]) -> list[trace.Link]:
    return [trace.Link(_span_context(mark)) for mark in dict.fromkeys(marks)]


def _span_context(mark: Mark, flags: trace.TraceFlags | None = None) -> trace.SpanContext:
    return trace.SpanContext(int(mark.trace_id, 16), int(mark.span_id, 16), is_remote=True, trace_flags=flags)


def _attributes(call: Ended) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "rpc.system": "grpc",
        "rpc.service": _SERVICE,
        "rpc.method": call.call,
        "rpc.grpc.status_code": call.code,
        "network.peer.address": call.peer,
        "preceptor.request_bytes": call.request_bytes,
        "preceptor.reply_bytes": call.reply_bytes,
        **{f"preceptor.{name}": value for name, value in call.answered.items()},
    }
    if call.caller is not None:
        attributes |= {"preceptor.tenant": call.caller.tenant, "preceptor.job": call.caller.job}
    if call.reason:
        attributes["error.type"] = call.reason
    return attributes


def _resource() -> Resource:
    """What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, and a name where they do not."""
    ours = {"service.version": version("preceptor")}
    given = Resource.create(ours)
    if str(given.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        return given.merge(Resource({"service.name": _NAME}))
    return given
