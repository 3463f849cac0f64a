"""OpenTelemetry spans as a real OTLP collector gets them: its own small gRPC server."""

import os
import subprocess
import sys
import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider

from protos import teacher_pb2 as pb
from student_worker import TeacherClient
from tests.asking import asking, metric, pixels, refusal, stub_at
from tests.serving import GATE, ROOT, arguments, free_port, process, serving, until
from tests.traces import TRACE, TRACEPARENT, tokens


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent, once its gate is open."""

    def __init__(self):
        self.resources = []
        self.spans = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.url = ""

    def Export(self, request, context):
        self.asked.set()
        self.gate.wait(60)
        for resource in request.resource_spans:
            self.resources.append({entry.key: entry.value.string_value for entry in resource.resource.attributes})
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name, trace_id=None):
        return [
            span for span in self.spans if span.name == name and (trace_id is None or span.trace_id.hex() == trace_id)
        ]


@contextmanager
def collecting():
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        collector.gate.set()
        server.stop(None).wait()


@contextmanager
def traced(folder, teacher="tiny", **settings):
    """A server whose spans have all been sent once it was left, its stub, and the collector."""
    with collecting() as collector:
        with serving(**arguments(folder, teacher) | settings, otlp_endpoint=collector.url) as server:
            with stub_at(server.grpc_address) as stub:
                yield server, stub, collector


def attributes(span):
    kinds = {entry.key: entry.value for entry in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in kinds.items()}


def parenthood(*spans):
    return [(span.trace_id.hex(), span.parent_span_id.hex()) for span in spans]


CALL = "preceptor.v1.Teacher/Label"


def test_a_query_is_a_trace_from_its_caller_to_the_books(tmp_path):
    file = tokens(tmp_path, red="secret")
    with traced(tmp_path, tokens_file=file) as (_, stub, collector):
        metadata = [("traceparent", TRACEPARENT), ("preceptor-job", "sweep/7"), ("authorization", "Bearer secret")]
        stub.Label(asking(pixels(6), pb.CACHE_MODE_USE), metadata=metadata)
    (call,) = collector.named(CALL)
    inner = [collector.named(name)[0] for name in ("cache lookup", "queue", "compute", "settle")]
    assert len(collector.spans) == 5
    assert parenthood(call) == [(TRACE, "00f067aa0ba902b7")]
    assert parenthood(*inner) == [(TRACE, call.span_id.hex())] * 4
    assert call.kind == Span.SPAN_KIND_SERVER
    moments = [call.start_time_unix_nano]
    for span in inner:
        moments += [span.start_time_unix_nano, span.end_time_unix_nano]
    assert moments == sorted(moments)
    assert moments[-1] <= call.end_time_unix_nano <= time.time_ns()
    told = attributes(call)
    assert told.pop("network.peer.address").startswith("127.0.0.1:")
    assert told.pop("preceptor.request_bytes") > 6 * 192
    assert told.pop("preceptor.reply_bytes") > 0
    assert told == {
        "rpc.system": "grpc",
        "rpc.service": "preceptor.v1.Teacher",
        "rpc.method": "Label",
        "rpc.grpc.status_code": 0,
        "preceptor.tenant": "red",
        "preceptor.job": "sweep/7",
        "preceptor.computed": 6,
        "preceptor.cached": 0,
        "preceptor.coalesced": 0,
        "preceptor.charged": 6,
        "preceptor.cost": 0.0,
        "preceptor.currency": "USD",
    }
    lookup, _, compute, _ = map(attributes, inner)
    assert lookup == {"preceptor.samples": 6, "preceptor.found": 0}
    assert compute.pop("preceptor.batch") > 0
    assert compute == {"preceptor.batch_size": 6, "preceptor.samples": 6}
    assert collector.resources[0]["service.name"] == "preceptor-teacher"
    assert "secret" not in str(collector.spans)


def test_the_callers_wish_not_to_be_recorded_is_followed_and_who_says_nothing_is(tmp_path, caplog):
    with caplog.at_level("DEBUG"), traced(tmp_path) as (_, stub, collector):
        stub.Describe(pb.DescribeRequest(), metadata=[("traceparent", f"{TRACEPARENT[:-2]}00")])
        stub.Describe(pb.DescribeRequest())
    (call,) = collector.spans
    # It is in the log under the same trace.
    _, logged = [record for record in caplog.records if record.name == "teacher_server.access"]
    assert parenthood(call) == [(logged.trace_id, "")]


@pytest.mark.parametrize(("ratio", "spans"), [("0", 0), ("1", 1)])
def test_opentelemetrys_own_variables_hold(ratio, spans, tmp_path):
    environment = os.environ | {
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": ratio,
        "OTEL_SERVICE_NAME": "ours",
    }
    with collecting() as collector:
        with process(environment=environment, **arguments(tmp_path), otlp_endpoint=collector.url) as started:
            server, address, _ = started
            with stub_at(address) as stub:
                stub.Describe(pb.DescribeRequest(), metadata=[("traceparent", TRACEPARENT)])
            server.terminate()
            assert server.wait(30) == 0
    assert len(collector.spans) == spans
    assert [resource["service.name"] for resource in collector.resources] == ["ours"] * spans


def test_a_students_own_span_is_the_parent_of_what_its_query_costs(tmp_path):
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("a student's")
    with traced(tmp_path) as (server, _, collector), TeacherClient(server.grpc_address) as client:
        client.describe()
        with tracer.start_as_current_span("step") as step:
            client.label(pixels(3))
    context = step.get_span_context()
    (call,) = collector.named(CALL)
    assert parenthood(call) == [(f"{context.trace_id:032x}", f"{context.span_id:016x}")]


def test_who_waits_for_anothers_computation_is_linked_to_it(tmp_path):
    with traced(tmp_path, "gated") as (server, stub, collector), GATE.shut():
        query = asking(pixels(4), pb.CACHE_MODE_USE)
        first = stub.Label.future(query, metadata=[("traceparent", TRACEPARENT)])
        assert GATE.reached.acquire(timeout=30)
        second = stub.Label.future(query, metadata=[("preceptor-job", "second")])
        until(lambda: metric(server, "preceptor_asked_samples_total", job="second") == 4)
        GATE.open.set()
        assert list(first.result(30).sources) == [pb.SOURCE_COMPUTED] * 4
        assert list(second.result(30).sources) == [pb.SOURCE_COALESCED] * 4
    (host,) = collector.named(CALL, TRACE)
    (other,) = [span for span in collector.named(CALL) if span is not host]
    (link,) = other.links
    assert (link.trace_id, link.span_id) == (host.trace_id, host.span_id)
    assert len(collector.named("compute")) == 1


def test_calls_that_share_a_batch_are_linked(tmp_path):
    with traced(tmp_path, "gated") as (server, stub, collector), GATE.shut():
        running = stub.Label.future(asking(pixels(1)), metadata=[("preceptor-job", "running")])
        assert GATE.reached.acquire(timeout=30)
        calls = [stub.Label.future(asking(pixels(3, seed)), metadata=[("preceptor-job", "both")]) for seed in (1, 2)]
        until(lambda: metric(server, "preceptor_queue_samples", job="both") == 6)
        GATE.open.set()
        for call in (running, *calls):
            call.result(30)
    one, two = [span for span in collector.named("compute") if attributes(span)["preceptor.batch_size"] == 6]
    assert attributes(one)["preceptor.batch"] == attributes(two)["preceptor.batch"]
    assert [link.span_id for link in one.links] == [two.parent_span_id]
    assert [link.span_id for link in two.links] == [one.parent_span_id]


def test_a_fault_is_the_spans_status_and_a_refusal_its_error_type(tmp_path):
    with traced(tmp_path, "wordy") as (_, stub, collector):
        refusal(stub.Label, asking(pixels(13)))
        refusal(stub.Label, asking(pixels(1)[:, :1]))
    fault, refused = collector.named(CALL)
    assert (fault.status.code, fault.status.message) == (Status.STATUS_CODE_ERROR, "FORWARD_FAILED")
    assert attributes(fault)["rpc.grpc.status_code"] == 13
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert attributes(refused)["error.type"] == "INVALID_QUERY"


def test_a_collector_that_hangs_harms_nobody(tmp_path):
    with collecting() as collector:
        collector.gate.clear()
        with process(**arguments(tmp_path), otlp_endpoint=collector.url) as (server, address, _):
            with stub_at(address) as stub:
                for _ in range(600):  # more than one export's worth, so that it is asked at once
                    stub.Describe(pb.DescribeRequest(), timeout=10)
                assert collector.asked.wait(30)
                stub.Label(asking(pixels(3)), timeout=10)
            began = time.monotonic()
            server.terminate()
            _, said = server.communicate(timeout=30)
            assert server.returncode == 0
            assert time.monotonic() - began < 15
    assert "the last spans are lost" in said


def test_without_a_collector_calls_are_answered_and_it_is_said_once_in_a_while(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    with process(**arguments(tmp_path), otlp_endpoint=url) as (server, address, _):
        with stub_at(address) as stub:
            stub.Label(asking(pixels(3)), timeout=10)
        server.terminate()
        _, said = server.communicate(timeout=30)
        assert server.returncode == 0
    assert "Failed to export" in said or "Transient error" in said or "the last spans are lost" in said


@pytest.mark.parametrize(
    ("endpoint", "status", "message"),
    [
        ("http://127.0.0.1:4317", 1, "needs OpenTelemetry"),
        ("127.0.0.1:4317", 2, "otlp_endpoint: String should match pattern"),
    ],
)
def test_an_endpoint_that_cannot_be_served_is_an_error_with_a_fix(endpoint, status, message, tmp_path):
    settings = arguments(tmp_path) | {"state_directory": tmp_path / "state", "otlp_endpoint": endpoint}
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    program = (
        "import sys\nsys.modules['opentelemetry.sdk'] = None\n"  # as where the extra is not installed
        "from teacher_server.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert message in done.stderr
    if status == 1:
        assert "install Preceptor with its [tracing] extra" in done.stderr


def test_without_an_endpoint_nothing_that_makes_spans_is_imported(tmp_path):
    settings = arguments(tmp_path) | {"state_directory": tmp_path / "state", "host": "0.0.0.0"}
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    program = (
        "import sys\nfrom teacher_server.__main__ import main\nmain(sys.argv[1:])\n"
        "print('teacher_server.server' in sys.modules, 'teacher_server.spans' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True False\n"
    assert "there are no tokens" in done.stderr
