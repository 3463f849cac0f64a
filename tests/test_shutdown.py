"""What others see of a server that ends while queries still come, and of a connection that has had its time."""

import signal
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc
from teacher_server.config import ServeOnRaySettings, ServeSettings
from tests.asking import asking, page, pixels, stub_at
from tests.redis_servers import AOF, running
from tests.serving import arguments, free_port, process, serving, until

DELAY, AGE = 1.5, 1.0


def test_for_the_delay_queries_are_taken_while_probes_and_lists_say_no(tmp_path):
    folder, port = tmp_path / "redis", free_port()
    folder.mkdir()
    settings = arguments(tmp_path) | {"ledger_redis_url": f"redis://127.0.0.1:{port}", "shutdown_delay_seconds": DELAY}
    with (
        running(folder, *AOF, "--port", str(port)),
        process(**settings) as (server, address, http),
        stub_at(address) as stub,
        grpc.insecure_channel(address) as channel,
    ):
        assert [replica.address for replica in stub.Describe(pb.DescribeRequest()).replicas] == [address]
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(urllib.error.HTTPError) as unready:
            page(http, "/readyz")
        assert (unready.value.code, unready.value.read()) == (503, b"draining\n")
        assert "preceptor_ready 0.0\n" in page(http)
        told = stub.Describe(pb.DescribeRequest())
        while told.replicas and time.monotonic() < began + DELAY / 2:
            told = stub.Describe(pb.DescribeRequest())
        assert (told.address, list(told.replicas)) == (address, [])
        server.send_signal(signal.SIGTERM)  # whoever is impatient takes another signal
        answered = began
        while (call := stub.Label.future(asking(pixels(2)), timeout=10)).code() is grpc.StatusCode.OK:
            assert len(call.result().sources) == 2
            answered = time.monotonic()
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        assert DELAY - 0.5 < answered - began < DELAY + 1
        with pytest.raises(grpc.RpcError, match="this server ends; watch another one"):  # or closing would wait for it
            next(watch)
        assert server.wait(20) == 0


def test_a_connection_is_renewed_at_its_age_and_no_query_is_lost_over_it(tmp_path):
    with serving(**arguments(tmp_path), max_connection_age_seconds=AGE) as server:
        with grpc.insecure_channel(server.grpc_address) as channel, ThreadPoolExecutor(4) as students:
            states = []
            channel.subscribe(states.append, try_to_connect=True)
            stub, enough = teacher_pb2_grpc.TeacherStub(channel), threading.Event()

            def ask(seed):
                answers = 0
                while not enough.is_set():
                    answers += len(stub.Label(asking(pixels(3, seed)), timeout=10).sources)  # an error fails the test
                return answers

            asked = [students.submit(ask, seed) for seed in range(4)]
            try:
                until(lambda: states.count(grpc.ChannelConnectivity.READY) == 2)
            finally:
                enough.set()
            assert min(answers.result() for answers in asked) > 30


@pytest.mark.parametrize("settings", [ServeSettings, ServeOnRaySettings])
def test_without_balancers_nobody_waits_for_them(settings):
    assert settings.model_fields["shutdown_delay_seconds"].default == 0
