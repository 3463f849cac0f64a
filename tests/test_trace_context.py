"""The trace id of a call: who makes it, where it travels, where a person finds it."""

import re
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from opentelemetry import trace

from protos import teacher_pb2 as pb
from student_worker import TeacherClient
from student_worker.errors import InvalidQuery, TeacherUnavailable
from tests.asking import pixels

TRACEPARENT = re.compile(r"00-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})")
SPAN = trace.SpanContext(
    trace_id=0x4BF92F3577B34DA6A3CE929D0E0E4736,
    span_id=0x00F067AA0BA902B7,
    is_remote=False,
    trace_flags=trace.TraceFlags(0),
    trace_state=trace.TraceState([("vendor", "x")]),
)


class Postbox(grpc.GenericRpcHandler):
    """A server of any call: keeps the metadata, answers with what `replies` gives."""

    def __init__(self, *replies):
        self.metadata = []
        self._replies = list(replies)

    def service(self, details):
        self.metadata.append(dict(details.invocation_metadata))
        reply = self._replies.pop(0)

        def answer(_, context):
            return reply if isinstance(reply, bytes) else context.abort(reply, "because")

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def posted(*replies, **options):
    """A postbox, and a client that writes to it."""
    postbox = Postbox(*replies)
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[postbox])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with TeacherClient(f"127.0.0.1:{port}", **options) as client:
            yield postbox, client
    finally:
        server.stop(None).wait()


def traces(postbox):
    return [TRACEPARENT.fullmatch(metadata["traceparent"]) for metadata in postbox.metadata]


DESCRIPTION = pb.DescribeResponse(
    teachers=[
        pb.TeacherDescription(
            fingerprint="f",
            inputs=[pb.InputDescription(name="x", shape=[3, 8, 8], dtypes=[pb.DATA_TYPE_UINT8])],
            outputs=[pb.OutputDescription(name="logits", shape=[10])],
            limits=pb.Limits(max_message_bytes=2**20, max_samples_per_query=64, max_batch_size=64),
        )
    ]
).SerializeToString()


def test_every_call_has_a_trace_of_its_own_and_its_attempts_share_it():
    with posted(grpc.StatusCode.UNAVAILABLE, DESCRIPTION, grpc.StatusCode.INVALID_ARGUMENT) as (postbox, client):
        client.describe()
        with pytest.raises(InvalidQuery) as refused:
            client.label(pixels(2))
    first, again, label = traces(postbox)
    assert first["trace"] == again["trace"] != label["trace"]
    assert (first["flags"], label["flags"]) == ("01", "01")
    assert str(refused.value).endswith(f"because (trace {label['trace']})")


def test_giving_up_names_the_trace():
    refusals = [grpc.StatusCode.UNAVAILABLE] * 100
    with posted(*refusals, timeout=0.3) as (postbox, client), pytest.raises(TeacherUnavailable) as gave_up:
        client.describe()
    assert {found["trace"] for found in traces(postbox)} == {str(gave_up.value)[-33:-1]}
    assert "gave up" in str(gave_up.value)


def test_a_span_of_the_users_own_is_continued_in_the_threads_that_ask():
    with posted(DESCRIPTION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT) as (postbox, client):
        with trace.use_span(trace.NonRecordingSpan(SPAN)):
            client.describe()
            answer = client.submit(pixels(2))
        with pytest.raises(InvalidQuery, match=r"\(trace 4bf92f3577b34da6a3ce929d0e0e4736\)$"):
            answer.result(30)
        with pytest.raises(InvalidQuery):
            client.label(pixels(2))
    assert [metadata["traceparent"] for metadata in postbox.metadata[:2]] == [
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
    ] * 2
    assert postbox.metadata[1]["tracestate"] == "vendor=x"
    assert "4bf92f" not in postbox.metadata[2]["traceparent"]
