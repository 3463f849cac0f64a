"""The server as its callers see it: both ports, every refusal, readiness, draining, exit codes."""

import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from tests.serving import GATE, LOADING, ROOT, Gated, arguments, free_port, process, serving, until
from tests.teachers import TINY, save, save_pair, save_picky, tiny

LARGE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@contextmanager
def stub_at(address):
    with grpc.insecure_channel(address, options=LARGE) as channel:
        yield teacher_pb2_grpc.TeacherStub(channel)


@pytest.fixture
def stub(server):
    with stub_at(server.grpc_address) as stub:
        yield stub


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


def asking(x, **fields):
    return pb.LabelRequest(inputs=[wire.encode_tensor("x", x)], **fields)


NET = tiny()


def direct(x):
    """What the same model answers to raw pixels x without any server."""
    normalisation = TINY["inputs"][0]["normalisation"]
    mean, std = (torch.tensor(normalisation[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return NET((torch.from_numpy(x).float() / 255 - mean) / std).numpy()


def refusal(call, request, **options):
    """(status code, details, reason, seconds to wait) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as failed:
        call(request, timeout=30, **options)
    error = failed.value
    reason, wait = "", None
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "preceptor"
            reason = info.reason
        elif detail.Unpack(retry):
            wait = retry.retry_delay.ToNanoseconds() / 1e9
    return error.code(), error.details(), reason, wait


def page(address, path="/metrics", **headers):
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{address}{path}", headers=headers), timeout=10
    ) as reply:
        return reply.read().decode()


def get(server, path, **headers):
    return page(server.http_address, path, **headers)


def metric(server, name, **labels):
    families = text_string_to_metric_families(get(server, "/metrics"))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


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
        (asking(pixels(1), outputs=[TOP_1] * 20_000), "INVALID_ARGUMENT", "at most 16384 beside the tensors' data"),
        (pb.LabelRequest(inputs=[pb.Tensor()] * 10_000), "INVALID_ARGUMENT", "10000 tensors; a query has at most 16"),
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


def test_calls_of_later_issues_are_unimplemented(stub):
    assert refusal(stub.Lookup, pb.LookupRequest())[0] is grpc.StatusCode.UNIMPLEMENTED
    assert refusal(stub.Spend, pb.SpendRequest())[0] is grpc.StatusCode.UNIMPLEMENTED


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


# ---------------------------------------------------------------- queues, deadlines, cancellation


def test_a_full_queue_refuses_its_own_job_with_a_hint_and_nobody_else(tmp_path):
    with (
        serving(**arguments(tmp_path, "gated"), max_queue_size=100) as server,
        stub_at(server.grpc_address) as stub,
        GATE.shut(),
    ):
        running = stub.Label.future(asking(pixels(1)), metadata=[("preceptor-job", "greedy")])
        assert GATE.reached.acquire(timeout=30)
        waiting = stub.Label.future(asking(pixels(90)), metadata=[("preceptor-job", "greedy")])
        until(lambda: metric(server, "preceptor_queue_samples", job="greedy") == 90)
        code, details, reason, wait = refusal(stub.Label, asking(pixels(20)), metadata=[("preceptor-job", "greedy")])
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert "90 of 100 samples wait" in details
        assert wait > 0
        modest = stub.Label.future(asking(pixels(20, seed=5)), metadata=[("preceptor-job", "modest")])
        GATE.open.set()
        np.testing.assert_allclose(
            wire.decode_answers(modest.result(30).answers[0]), direct(pixels(20, seed=5)), rtol=1e-3, atol=1e-3
        )
        assert len(running.result(30).sources) == 1
        assert len(waiting.result(30).sources) == 90


def test_one_tenants_calls_leave_room_for_the_others(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("".join(f"{hashlib.sha256(t.encode()).hexdigest()} {t}\n" for t in ("greedy", "modest")))
    settings = arguments(tmp_path, "gated") | {"tokens_file": file, "max_concurrent_calls": 8}
    greedy, modest = ([("authorization", f"Bearer {tenant}")] for tenant in ("greedy", "modest"))
    with serving(**settings) as server, stub_at(server.grpc_address) as stub:
        with GATE.shut():
            calls = [stub.Label.future(asking(pixels(1)), metadata=greedy) for _ in range(4)]
            until(lambda: metric(server, "preceptor_asked_samples_total", tenant="greedy") == 4)
            code, details, reason, wait = refusal(stub.Label, asking(pixels(1)), metadata=greedy)
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert "4 calls under way" in details
            assert wait > 0
            other = stub.Label.future(asking(pixels(1)), metadata=modest)
            until(lambda: metric(server, "preceptor_asked_samples_total", tenant="modest") == 1)
        for call in [*calls, other]:
            assert len(call.result(30).sources) == 1


def test_what_is_late_or_cancelled_is_dropped_before_it_is_computed(tmp_path):
    with serving(**arguments(tmp_path, "gated")) as server, stub_at(server.grpc_address) as stub, GATE.shut():
        first = stub.Label.future(asking(pixels(1)))
        assert GATE.reached.acquire(timeout=30)
        before = len(Gated.batches)
        cancelled = stub.Label.future(asking(pixels(7)), metadata=[("preceptor-job", "gone")])
        late = stub.Label.future(asking(pixels(9)), timeout=0.2, metadata=[("preceptor-job", "late")])
        until(lambda: metric(server, "preceptor_queue_samples", job="gone") == 7)
        cancelled.cancel()
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: not metric(server, "preceptor_queue_samples"))
        GATE.open.set()
        first.result(30)
        stub.Label(asking(pixels(5)))
        assert Gated.batches[before:] == [5]
        assert metric(server, "preceptor_samples_total", job="gone") == 0
        for code in ("CANCELLED", "DEADLINE_EXCEEDED"):
            assert metric(server, "preceptor_requests_total", call="Label", code=code) == 1


# ---------------------------------------------------------------- starting and stopping


def test_sigterm_finishes_what_is_queued_refuses_the_rest_and_exits_0(tmp_path):
    with process(**arguments(tmp_path), drain_seconds=30) as (server, address, http), stub_at(address) as stub:
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            metadata = [("preceptor-job", "queued")]
            calls = [stub.Label.future(asking(pixels(4000, seed=i)), metadata=metadata) for i in range(1)]
            until(lambda: "preceptor_asked_samples_total" in page(http) and 'job="queued"' in page(http))
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert [len(call.result(30).sources) for call in calls] == [4000]
            assert server.wait(20) == 0
            assert time.monotonic() - began < 20  # a watcher that stays does not hold it for the whole drain
        assert refusal(stub.Label, asking(pixels(1)))[0] is grpc.StatusCode.UNAVAILABLE


def test_a_drain_ends_in_time_even_when_a_batch_does_not(tmp_path):
    with process(**arguments(tmp_path, "stuck"), drain_seconds=1) as (server, address, _), stub_at(address) as stub:
        call = stub.Label.future(asking(pixels(13)))
        stub.Describe(pb.DescribeRequest())
        until(call.running)
        time.sleep(0.3)  # to be with the device; if it is not yet, the drain is only easier
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert time.monotonic() - began < 10
        assert call.exception(10).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_probes_and_refusals_while_the_teacher_loads(tmp_path):
    """Both ports are open before the weights are read: nobody is left to guess."""
    settings = arguments(tmp_path, "slow") | {"grpc_port": free_port(), "http_port": free_port()}
    with ThreadPoolExecutor(1) as other:
        LOADING.clear()
        loading = other.submit(lambda: serving(**settings).__enter__())
        try:
            address = f"127.0.0.1:{settings['grpc_port']}"
            with stub_at(address) as stub, grpc.insecure_channel(address) as channel:
                code, details, reason, _ = refusal(stub.Describe, pb.DescribeRequest(), wait_for_ready=True)
                assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert "loading the teacher" in details
                assert refusal(stub.Label, asking(pixels(1)))[0] is grpc.StatusCode.UNAVAILABLE
                health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
                with pytest.raises(urllib.error.HTTPError) as unready:
                    page(f"127.0.0.1:{settings['http_port']}", "/readyz")
                assert (unready.value.code, unready.value.read()) == (503, b"loading the teacher\n")
        finally:
            LOADING.set()
        assert loading.result(30).grpc_address == address


def test_a_draining_server_is_not_ready_and_keeps_its_word(tmp_path):
    """Queued before the drain: answered. Asked after it: UNAVAILABLE. Probes say so meanwhile."""
    outcome = {}
    with serving(**arguments(tmp_path, "gated")) as server:
        channel = grpc.insecure_channel(server.grpc_address)
        stub = teacher_pb2_grpc.TeacherStub(channel)
        GATE.open.clear()
        queued = stub.Label.future(asking(pixels(3)))

        def watch():
            while True:
                try:
                    get(server, "/readyz")
                except urllib.error.HTTPError as error:
                    outcome["probe"] = (error.code, error.read().decode())
                    break
            outcome["late"] = stub.Label.future(asking(pixels(1)), timeout=10).code()
            GATE.open.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        until(lambda: metric(server, "preceptor_asked_samples_total"))
    watcher.join(30)
    assert outcome == {"probe": (503, "draining\n"), "late": grpc.StatusCode.UNAVAILABLE}
    assert len(queued.result(10).sources) == 3
    channel.close()


def test_a_lost_device_ends_the_process_with_1_and_its_callers_with_unavailable(tmp_path):
    with process(**arguments(tmp_path, "doomed")) as (server, address, _), stub_at(address) as stub:
        stub.Label(asking(pixels(12)))
        code, details, reason, _ = refusal(stub.Label, asking(pixels(13)))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DEVICE_LOST")
        assert "illegal memory access" in details
        assert server.wait(30) == 1


def test_nobody_is_let_in_from_outside_without_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"host: 0\.0\.0\.0 can be reached from outside.*--tokens-file"):
        with serving(**arguments(tmp_path), host="0.0.0.0"):
            pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"model": "tests.teachers:missing"}, "missing"),
        ({"model": "no_such_package:factory"}, "no_such_package"),
        ({"model_arguments": '{"classes": 7}'}, "7.weight"),
        ({"tokens_file": "pyproject.toml"}, "pyproject.toml:1: expected"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path, change, words):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (arguments(tmp_path) | change).items()]
    command = [sys.executable, "-m", "teacher_server", "serve", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_an_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for key, words in (("grpc_port", "--grpc-port"), ("http_port", "in use")):
            with pytest.raises(OSError, match=words), serving(**arguments(tmp_path) | {key: port}):
                pass


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback: sysctl net.ipv6.conf.lo.disable_ipv6=0")
def test_ipv6_loopback_is_served(tmp_path):
    with serving(**arguments(tmp_path), host="::1") as server, stub_at(server.grpc_address) as stub:
        assert len(stub.Label(asking(pixels(2))).sources) == 2
        assert get(server, "/readyz") == "ok\n"


def test_describe_lists_weights_of_another_shape_before_serving(tmp_path):
    weights = save(tiny(classes=7), tmp_path / "seven.safetensors", TINY)
    settings = arguments(tmp_path) | {"weights": weights}
    with pytest.raises(Exception, match=r"seven\.safetensors"), serving(**settings):
        pass
