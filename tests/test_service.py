"""What the server answers, refuses, counts and tells of itself."""

import hashlib
import json
import re
import urllib.error

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import teacher_pb2 as pb
from protos import wire
from tests.asking import asking, direct, get, metric, pixels, refusal, stub_at
from tests.serving import arguments, serving
from tests.teachers import TINY, save_pair, save_picky

# ---------------------------------------------------------------- answers


def test_describe_says_all_that_a_client_needs(stub, server):
    (teacher,) = stub.Describe(pb.DescribeRequest()).teachers
    assert teacher.name == "teacher"
    assert re.fullmatch("[0-9a-f]{32}", teacher.fingerprint)
    (x,) = teacher.inputs
    assert list(x.shape) == [3, 8, 8]
    assert pb.DATA_TYPE_UINT8 in x.dtypes
    assert x.normalisation.mean[:] == TINY["inputs"][0]["normalisation"]["mean"]
    assert len(x.minimum) == 3
    assert list(teacher.outputs[0].shape) == [10]
    assert teacher.flops_per_sample > 0
    assert teacher.limits.max_batch_size == 64
    assert teacher.precision.policy == "fp32"
    assert stub.Describe(pb.DescribeRequest(teacher="teacher")).teachers[0] == teacher
    assert json.loads(get(server, "/v1/teacher"))["teachers"][0]["fingerprint"] == teacher.fingerprint


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
def test_answers_are_the_direct_forward_pass(stub, server, n):
    x = pixels(n)
    reply = stub.Label(asking(x))
    precision = server.description.precision
    np.testing.assert_allclose(
        wire.decode_answers(reply.answers[0]),
        direct(x),
        rtol=precision.relative_tolerance,
        atol=precision.absolute_tolerance,
    )
    assert list(reply.sources) == [pb.SOURCE_COMPUTED] * n
    assert reply.cost.samples == n
    assert reply.cost.flops == n * server.description.flops_per_sample
    assert reply.cost.device_nanoseconds > 0


def test_several_outputs_of_one_query_come_in_their_order(stub):
    x = pixels(5)
    top = pb.OutputSpec(name="logits", encoding=pb.ENCODING_TOP_K, k=3, temperature=4)
    half = pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT16)
    first, second = (wire.decode_answers(answers) for answers in stub.Label(asking(x, outputs=[top, half])).answers)
    assert first.values.shape == (5, 3)
    assert first.temperature == 4
    np.testing.assert_allclose(second, direct(x), rtol=1e-3, atol=1e-2)


def test_normalised_floats_and_raw_pixels_agree(stub, server):
    x = pixels(4)
    normalisation = server.description.inputs[0].normalisation
    mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (normalisation.mean, normalisation.std))
    normalised = ((x / 255 - mean) / std).astype(np.float32)
    raw, floats = (wire.decode_answers(stub.Label(asking(value)).answers[0]) for value in (x, normalised))
    np.testing.assert_allclose(raw, floats, rtol=1e-4, atol=1e-4)


def test_several_named_inputs_are_served(tmp_path):
    with (
        serving(model="tests.teachers:pair", weights=save_pair(tmp_path), grpc_port=0, http_port=0) as server,
        stub_at(server.grpc_address) as stub,
    ):
        x, tokens = np.zeros((2, 4), np.float32), np.array([[0, 1, 2, 3, 6]] * 2, np.int64)
        inputs = [wire.encode_tensor("tokens", tokens), wire.encode_tensor("x", x)]
        assert wire.decode_answers(stub.Label(pb.LabelRequest(inputs=inputs)).answers[0]).shape == (2, 3)
        tokens[1, 1] = 7
        inputs[0] = wire.encode_tensor("tokens", tokens)
        code, details, *_ = refusal(stub.Label, pb.LabelRequest(inputs=inputs))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "inputs['tokens']: values 0..7 leave the teacher's range 0..6" in details


# ---------------------------------------------------------------- refusals

TOP_1 = pb.OutputSpec(name="logits", encoding=pb.ENCODING_TOP_K, k=1)


def changed(x, where, value):
    x = x.astype(np.float32) * 0
    x[where] = value
    return x


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (asking(pixels(2)[:, :, :7]), "INVALID_ARGUMENT", "samples of [3, 7, 8], but the teacher takes [3, 8, 8]"),
        (asking(pixels(2).astype(np.int32)), "INVALID_ARGUMENT", "DATA_TYPE_INT32 is not accepted; send one of"),
        (asking(changed(pixels(2), (1, 2, 3, 4), np.nan)), "INVALID_ARGUMENT", "NaN or infinite"),
        (asking(changed(pixels(2), (1, 2, 3, 4), np.inf)), "INVALID_ARGUMENT", "NaN or infinite"),
        (asking(changed(pixels(2), (0, 1, 0, 0), 200)), "INVALID_ARGUMENT", "in channel 1 leave the teacher's range"),
        (asking(pixels(4097)), "INVALID_ARGUMENT", "4097 samples; at most 4096"),
        (pb.LabelRequest(), "INVALID_ARGUMENT", "inputs: none given"),
        (pb.LabelRequest(inputs=[wire.encode_tensor("image", pixels(1))]), "INVALID_ARGUMENT", "takes ['x']"),
        (
            pb.LabelRequest(inputs=[pb.Tensor(name="x", dtype=1, shape=[0, 3, 8, 8])]),
            "INVALID_ARGUMENT",
            "at least one sample",
        ),
        (
            pb.LabelRequest(inputs=[pb.Tensor(name="x", dtype=1, shape=[2**40, 3, 8, 8], data=b"x")]),
            "INVALID_ARGUMENT",
            "1 bytes, but shape",
        ),
        (asking(pixels(1), teacher="other"), "NOT_FOUND", "'other' is not served here; one of ['teacher']"),
        (asking(pixels(1), expected_fingerprint="0" * 32), "FAILED_PRECONDITION", "begin a new run"),
        (asking(pixels(1), outputs=[pb.OutputSpec(name="features.3")]), "UNIMPLEMENTED", "'features.3' is not served"),
        (asking(pixels(1), outputs=[pb.OutputSpec(name="logits", encoding=9)]), "UNIMPLEMENTED", "Encoding 9"),
        (asking(pixels(1), outputs=[pb.OutputSpec(name="logits", encoding=3)]), "INVALID_ARGUMENT", "k: 0 is outside"),
        (
            asking(pixels(1), outputs=[pb.OutputSpec(name="logits")] * 5),
            "INVALID_ARGUMENT",
            "5 given; ask for at most 4",
        ),
        (asking(pixels(1), outputs=[TOP_1] * 20_000), "INVALID_ARGUMENT", "more than 16384 bytes of names"),
        (pb.LabelRequest(inputs=[pb.Tensor()] * 10_000), "INVALID_ARGUMENT", "more than 16384 bytes of names"),
        (pb.LabelRequest(inputs=[pb.Tensor()] * 1_000), "INVALID_ARGUMENT", "1000 tensors; a query has at most 16"),
        (asking(pixels(1), teacher="漢" * 4000), "NOT_FOUND", "characters)"),
        (asking(pixels(1), teacher="x" * 10_000), "NOT_FOUND", "characters)"),
        (asking(pixels(1), expected_fingerprint="x" * 10_000), "FAILED_PRECONDITION", "teacher 'teacher' is"),
        (asking(pixels(1), cache_mode=7), "UNIMPLEMENTED", "CacheMode 7"),
        (pb.LabelRequest(inputs=[pb.Tensor(name="x", dtype=9, shape=[1])]), "UNIMPLEMENTED", "DataType 9"),
        (pb.LabelRequest.FromString(bytes([0xF8, 0x07, 0x01])), "UNIMPLEMENTED", "field number 127"),
    ],
)
def test_bad_queries_get_the_thing_the_value_and_the_code_and_are_not_asked(stub, server, request_, code, words):
    job = [("preceptor-job", "bad")]
    given, details, reason, _ = refusal(stub.Label, request_, metadata=job)
    assert metric(server, "preceptor_asked_samples_total", job="bad") == 0
    assert given.name == code
    assert words in details
    assert reason
    assert len(details) < 2000
    stub.Label(asking(pixels(1)))  # and the server goes on


def test_a_query_that_makes_the_network_fail_harms_no_other_in_its_batch(tmp_path):
    weights = save_picky(tmp_path)
    with (
        serving(model="tests.teachers:picky", weights=weights, grpc_port=0, http_port=0) as server,
        stub_at(server.grpc_address) as stub,
    ):
        good = np.zeros((3, 3, 8, 8), np.float32)
        magic, nan = good.copy(), good.copy()
        magic[1, 0, 0, 0], nan[2, 0, 0, 0] = 1.25, -1.25
        calls = [stub.Label.future(asking(x), timeout=30) for x in (good, magic, good, nan, good)]
        for call in (calls[0], calls[2], calls[4]):
            assert np.isfinite(wire.decode_answers(call.result().answers[0])).all()
        for call, words in ((calls[1], "the magic value"), (calls[3], "NaN or infinity for sample 2")):
            assert call.code() is grpc.StatusCode.INTERNAL
            assert words in call.details()


def test_messages_beyond_grpcs_default_pass_and_those_beyond_the_limit_do_not(tmp_path):
    settings = arguments(tmp_path) | {"max_message_bytes": 8 * 2**20, "max_samples_per_query": 100_000}
    with serving(**settings, max_queue_size=100_000, max_tenant_queue_size=100_000) as server:
        with stub_at(server.grpc_address) as stub:
            assert len(stub.Label(asking(pixels(25_000))).sources) == 25_000  # 4.8 MB
            assert refusal(stub.Label, asking(pixels(50_000)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            # A reply would be too large: told before anything is computed.
            outputs = [pb.OutputSpec(name="logits", encoding=pb.ENCODING_TOP_K, k=10)] * 4
            code, details, *_ = refusal(
                stub.Label, asking(pixels(40_000), outputs=outputs), metadata=[("preceptor-job", "large")]
            )
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "the reply to 40000 samples would take" in details
            assert metric(server, "preceptor_asked_samples_total", job="large") == 0


def test_an_error_of_any_length_keeps_its_code(tmp_path):
    with (
        serving(**arguments(tmp_path, "wordy")) as server,
        stub_at(server.grpc_address) as stub,
    ):
        code, details, reason, _ = refusal(stub.Label, asking(np.full((13, 3, 8, 8), 0, np.uint8)))
        assert (code, reason) == (grpc.StatusCode.INTERNAL, "FORWARD_FAILED")
        assert "(25" in details
        assert "characters)" in details


# ---------------------------------------------------------------- who asks


def test_tokens_name_the_tenant_and_without_one_nobody_gets_in(tmp_path):
    tokens = {hashlib.sha256(token.encode()).hexdigest(): tenant for token, tenant in (("t1", "red"), ("t2", "blue"))}
    file = tmp_path / "tokens"
    file.write_text("# who\n" + "".join(f"{digest} {tenant}\n" for digest, tenant in tokens.items()))
    with serving(**arguments(tmp_path), tokens_file=file) as server, stub_at(server.grpc_address) as stub:
        for token, tenant in (("t1", "red"), ("t2", "blue")):
            stub.Label(asking(pixels(3)), metadata=[("authorization", f"Bearer {token}"), ("preceptor-job", "j")])
            assert metric(server, "preceptor_asked_samples_total", tenant=tenant, job="j") == 3
        for metadata in ([], [("authorization", "Bearer t3")], [("authorization", "Basic t1")]):
            code, details, *_ = refusal(stub.Label, asking(pixels(1)), metadata=metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert "t3" not in details
        assert refusal(stub.Describe, pb.DescribeRequest())[0] is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(server, "/v1/teacher")
        assert (refused.value.code, json.load(refused.value)["reason"]) == (401, "UNAUTHENTICATED")
        page = urllib.request.Request(
            f"http://{server.http_address}/v1/teacher", headers={"Authorization": "Bearer t1"}
        )
        with urllib.request.urlopen(page, timeout=10) as reply:
            assert json.load(reply)["teachers"]
        assert metric(server, "preceptor_requests_total", call="Label", code="UNAUTHENTICATED") == 3


def test_a_job_name_that_could_break_a_label_is_refused(stub):
    metadata = [("preceptor-job", 'x"} 1')]
    code, details, *_ = refusal(stub.Label, asking(pixels(1)), metadata=metadata)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "preceptor-job" in details


def test_jobs_beyond_the_bound_share_a_label(tmp_path):
    with serving(**arguments(tmp_path)) as server, stub_at(server.grpc_address) as stub:
        for i in range(203):
            stub.Label(asking(pixels(1)), metadata=[("preceptor-job", f"job-{i}")])
        assert metric(server, "preceptor_asked_samples_total", job="job-199") == 1
        assert metric(server, "preceptor_asked_samples_total", job="job-200") == 0
        assert metric(server, "preceptor_asked_samples_total", job="other") == 3


# ---------------------------------------------------------------- metrics, probes, discovery


def test_metrics_count_to_the_sample(stub, server):
    job = [("preceptor-job", "counted")]
    for n in (3, 64, 70):
        stub.Label(asking(pixels(n)), metadata=job)
    assert metric(server, "preceptor_asked_samples_total", job="counted") == 137
    assert metric(server, "preceptor_samples_total", job="counted", source="computed") == 137
    assert metric(server, "preceptor_flops_total", job="counted") == 137 * server.description.flops_per_sample
    assert metric(server, "preceptor_device_seconds_total", job="counted") > 0
    assert metric(server, "preceptor_requests_total", call="Label", code="OK") >= 3
    assert metric(server, "preceptor_batch_size_sum") >= 137
    assert metric(server, "preceptor_batch_size_count") == metric(server, "preceptor_compute_seconds_count")
    assert metric(server, "preceptor_queue_seconds_count") >= 3


def test_probes_and_docs(server):
    assert get(server, "/livez") == get(server, "/readyz") == "ok\n"
    paths = json.loads(get(server, "/openapi.json"))["paths"]
    assert {"/livez", "/readyz", "/metrics", "/v1/teacher"} <= paths.keys()
    assert "<html" in get(server, "/docs")


def test_health_and_reflection(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "preceptor.v1.Teacher"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=10)
        names = {service.name for service in reply.list_services_response.service}
        assert {"preceptor.v1.Teacher", "grpc.health.v1.Health"} <= names
