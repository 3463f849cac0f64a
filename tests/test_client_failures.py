"""What a TeacherClient does when servers are full, gone, hung, others, or lie; and how it ends."""

import gc
import itertools
import signal
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import torch

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc
from student_worker import TeacherClient, answer
from student_worker import client as client_module
from student_worker.errors import (
    BudgetSpent,
    FingerprintChanged,
    TeacherFailed,
)
from student_worker.threads import DaemonPool
from tests.asking import direct, metric, pixels, put
from tests.serving import GATE, ROOT, Gated, arguments, free_port, process, serving, until
from tests.teachers import TINY, save, tiny

JOBS = itertools.count()


@pytest.fixture
def job():
    return f"client-{next(JOBS)}"


@pytest.fixture
def client(server, job):
    with TeacherClient(server.grpc_address, job=job) as client:
        yield client


# ---------------------------------------------------------------- retries, failover, fingerprints


def test_a_full_queue_is_waited_for(tmp_path):
    settings = arguments(tmp_path, "gated") | {"max_queue_size": 8, "max_batch_size": 8}
    with serving(**settings) as server, TeacherClient(server.grpc_address, job="patient", window=6) as client:
        client.describe()
        with GATE.shut():
            futures = [client.submit(pixels(8, seed=i)) for i in range(6)]
            until(lambda: metric(server, "preceptor_requests_total", call="Label", code="RESOURCE_EXHAUSTED"))
        for i, future in enumerate(futures):
            np.testing.assert_allclose(
                future.result(30).logits.numpy(), direct(pixels(8, seed=i)), rtol=1e-4, atol=1e-4
            )
        assert metric(server, "preceptor_samples_total", job="patient") == 48
        assert metric(server, "preceptor_asked_samples_total", job="patient") == 48  # what was refused was not asked


@pytest.mark.parametrize("raised", [True, False])
def test_a_budget_that_queries_under_way_hold_is_waited_for(tmp_path, raised):
    """Until they have spent it, or there is more of it."""
    with serving(**arguments(tmp_path, "gated")) as server, TeacherClient(server.grpc_address, job="short") as client:
        put(server, "/v1/budgets/default/jobs/short", unit="samples", limit=100)
        client.describe()
        with GATE.shut():
            first = client.submit(pixels(60))
            assert GATE.reached.acquire(timeout=10)
            second = client.submit(pixels(60, seed=1))
            until(lambda: metric(server, "preceptor_requests_total", call="Label", code="RESOURCE_EXHAUSTED") >= 2)
            assert not second.done()
            if raised:
                put(server, "/v1/budgets/default/jobs/short", unit="samples", limit=120)
        assert len(first.result(30).sources) == 60
        if raised:
            assert second.result(30).budgets[0].left == 0
        else:
            with pytest.raises(BudgetSpent, match="40 samples are left, and this query needs 60"):
                second.result(30)


def test_the_next_address_takes_over(tmp_path):
    settings = arguments(tmp_path)
    with serving(**settings) as second:
        with serving(**settings) as first:
            client = TeacherClient(f"127.0.0.1:{free_port()},{first.grpc_address},{second.grpc_address}", job="moved")
            x = pixels(3)
            np.testing.assert_allclose(client.label(x).logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
            assert metric(first, "preceptor_asked_samples_total", job="moved") == 3
        with client:
            np.testing.assert_allclose(client.label(x).logits.numpy(), direct(x), rtol=1e-4, atol=1e-4)
            assert metric(second, "preceptor_asked_samples_total", job="moved") == 3


def test_a_server_that_hangs_is_left_for_the_next(tmp_path, server):
    with serving(**arguments(tmp_path, "gated")) as hung:
        with TeacherClient([hung.grpc_address, server.grpc_address], job="hung", timeout=4) as client:
            client.describe()
            before = len(Gated.batches)
            with GATE.shut(), pytest.raises(FingerprintChanged, match="begin a new run"):  # they differ by name
                client.label(pixels(2))
            assert Gated.batches[before:] == [2]


def test_a_server_that_comes_back_is_found_again(tmp_path):
    settings = arguments(tmp_path) | {"grpc_port": free_port()}
    with serving(**settings) as server:
        client = TeacherClient(server.grpc_address, timeout=30)
        client.label(pixels(1))
    with client, ThreadPoolExecutor(1) as other:
        with socket.create_server(("127.0.0.1", settings["grpc_port"])) as nobody:
            answer = other.submit(client.label, pixels(2))
            nobody.accept()[0].close()  # an attempt has come, and has met no server
        with serving(**settings):
            assert len(answer.result(30).sources) == 2


def test_a_run_stops_when_another_teacher_answers(tmp_path):
    port = free_port()
    with serving(**arguments(tmp_path) | {"grpc_port": port}) as server:
        client = TeacherClient(server.grpc_address)
        client.label(pixels(1))
    other = tiny()
    with torch.no_grad():
        other[0].weight.mul_(1.01)
    weights = save(other, tmp_path / "other.safetensors", TINY)
    with serving(**arguments(tmp_path) | {"grpc_port": port, "weights": weights}), client:
        with pytest.raises(FingerprintChanged, match="precision changed; bring that teacher back, or begin a new run"):
            client.label(pixels(1))


def test_every_source_and_cache_mode_has_a_name_here():
    assert set(answer.SOURCES) == set(pb.Source.values()) - {pb.SOURCE_UNSPECIFIED}
    assert set(client_module._CACHE_MODES.values()) == set(pb.CacheMode.values()) - {pb.CACHE_MODE_UNSPECIFIED}
    assert set(client_module._ENCODINGS.values()) == set(pb.Encoding.values()) - {pb.ENCODING_UNSPECIFIED}


class Liar(teacher_pb2_grpc.TeacherServicer):
    """A server whose replies contradict themselves."""

    def __init__(self, description, reply):
        self.description, self.reply = description, reply

    def Describe(self, request, context):
        return pb.DescribeResponse(teachers=[self.description])

    def Label(self, request, context):
        return self.reply


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (pb.LabelResponse(fingerprint="f"), TeacherFailed, "cannot be read"),
        (pb.LabelResponse(fingerprint="g"), FingerprintChanged, "answered by g"),
        (
            pb.LabelResponse(fingerprint="f", answers=[pb.Answers(shape=[2**40, 2**40], values=b"1234")]),
            TeacherFailed,
            "4 bytes, but shape",
        ),
        (
            pb.LabelResponse(fingerprint="f", answers=[pb.Answers(encoding=1, shape=[1, 1], values=b"1234")]),
            TeacherFailed,
            r"shape \(1, \[1, 1\]\), asked were \(1, \[2, 10\]\)",
        ),
        (
            pb.LabelResponse(
                fingerprint="f", answers=[pb.Answers(encoding=1, shape=[2, 10], values=bytes(80))], sources=[9, 9]
            ),
            TeacherFailed,
            r"sources \{9\}",
        ),
        (
            pb.LabelResponse(fingerprint="f", answers=[pb.Answers(encoding=2, shape=[2, 10], values=bytes(40))]),
            TeacherFailed,
            "has encoding and shape",
        ),
    ],
)
def test_a_reply_that_makes_no_sense_is_an_error_of_the_teacher(reply, error, words, server):
    description = pb.TeacherDescription()
    description.CopyFrom(server.description)
    description.fingerprint = "f"
    liar = grpc.server(ThreadPoolExecutor(2))
    teacher_pb2_grpc.add_TeacherServicer_to_server(Liar(description, reply), liar)
    port = liar.add_insecure_port("127.0.0.1:0")
    liar.start()
    try:
        with TeacherClient(f"127.0.0.1:{port}") as client, pytest.raises(error, match=words):
            client.label(pixels(2))
    finally:
        liar.stop(0).wait()


FIVE_LINES = """
import sys
import torch
from student_worker import TeacherClient, Unix

student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
teacher = TeacherClient(sys.argv[1])
unix = Unix(teacher, to_student=lambda x: x.float())
for b in unix.batches([torch.zeros(8, 3, 8, 8, dtype=torch.uint8)] * 1_000_000, student):
    unix.criterion(student(b.x), b).backward()
    print("step", flush=True)
"""


def test_ctrl_c_ends_a_loop_whose_teacher_hangs(tmp_path):
    with process(**arguments(tmp_path)) as (server, address, _):
        command = [sys.executable, "-c", FIVE_LINES, address]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as loop:
            try:
                assert loop.stdout.readline() == "step\n"
                server.send_signal(signal.SIGSTOP)
                loop.send_signal(signal.SIGINT)
                _, errors = loop.communicate(timeout=15)
            finally:
                loop.kill()
        assert "KeyboardInterrupt" in errors
        assert loop.returncode in {1, 130, -signal.SIGINT}


def test_a_failing_part_settles_the_whole_while_others_wait(server):
    """Its failure drops the parts that have not begun, whose callbacks come back to the same query."""
    with TeacherClient(server.grpc_address, window=2) as client:
        client.describe()
        release = threading.Event()
        slow = client.submit(pixels(1))
        slow.add_done_callback(lambda _: release.wait(10))  # keeps one of the two threads
        client._description.fingerprint = "0" * 32
        failing = client.submit(pixels(100))
        with pytest.raises(FingerprintChanged):
            failing.result(10)
        release.set()


def test_answers_are_let_go_without_the_collector(server):
    with TeacherClient(server.grpc_address) as client:
        client.label(pixels(1))
        gc.collect()
        gc.disable()
        try:
            alive = [weakref.ref(client.label(pixels(2)).logits) for _ in range(20)]
            until(lambda: sum(ref() is not None for ref in alive) <= 2)
        finally:
            gc.enable()


def test_a_pool_that_is_closed_or_forked_leaves_nobody_waiting():
    pool = DaemonPool(1, "teacher-client-test")
    assert pool.submit(lambda: 7).result(10) == 7
    pool.close()
    pool.close()
    assert pool.submit(lambda: 7).cancelled()
    pool._process = -1
    with pytest.raises(RuntimeError, match="forked"):
        pool.submit(lambda: 7)
