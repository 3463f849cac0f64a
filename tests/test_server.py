"""Queues, deadlines and cancellation on a running server; how it starts, drains and ends."""

import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from tests.asking import asking, direct, get, metric, page, pixels, refusal, stub_at
from tests.serving import GATE, LOADING, ROOT, Gated, arguments, free_port, process, serving, until
from tests.teachers import TINY, save, tiny

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
    words = {"greedy": "greedy", "modest": "modest", "v": "board viewer"}
    file.write_text("".join(f"{hashlib.sha256(t.encode()).hexdigest()} {who}\n" for t, who in words.items()))
    settings = arguments(tmp_path, "gated") | {"tokens_file": file, "max_concurrent_calls": 8}
    greedy, modest = ([("authorization", f"Bearer {tenant}")] for tenant in ("greedy", "modest"))
    with serving(**settings) as server, stub_at(server.grpc_address) as stub:
        with GATE.shut():
            calls = [stub.Label.future(asking(pixels(1)), metadata=greedy) for _ in range(4)]
            until(lambda: metric(server, "preceptor_asked_samples_total", token="v", tenant="greedy") == 4)
            code, details, reason, wait = refusal(stub.Label, asking(pixels(1)), metadata=greedy)
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert "4 calls under way" in details
            assert wait > 0
            other = stub.Label.future(asking(pixels(1)), metadata=modest)
            until(lambda: metric(server, "preceptor_asked_samples_total", token="v", tenant="modest") == 1)
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
            queued = stub.Label.future(asking(pixels(4000)), metadata=metadata)
            until(lambda: "preceptor_asked_samples_total" in page(http) and 'job="queued"' in page(http))
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert len(queued.result(30).sources) == 4000
            assert server.wait(20) == 0
            assert time.monotonic() - began < 20  # a watcher that stays does not hold it for the whole drain
        assert refusal(stub.Label, asking(pixels(1)))[0] is grpc.StatusCode.UNAVAILABLE


def test_a_drain_ends_in_time_even_when_a_batch_does_not(tmp_path):
    with process(**arguments(tmp_path, "stuck"), drain_seconds=1) as (server, address, http), stub_at(address) as stub:
        call = stub.Label.future(asking(pixels(13)))
        until(lambda: "preceptor_asked_samples_total{" in page(http) and "preceptor_queue_samples{" not in page(http))
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
                assert "preceptor_ready 0.0\n" in page(f"127.0.0.1:{settings['http_port']}")
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
    settings = arguments(tmp_path, "doomed") | {"shutdown_delay_seconds": 60}  # for which nobody has a use then
    with process(**settings) as (server, address, _), stub_at(address) as stub:
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
