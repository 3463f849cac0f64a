"""A TeacherClient and several replicas: small gRPC servers that list one another, hang, leave and turn into others."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import numpy as np
import pytest

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc
from student_worker import TeacherClient
from student_worker.errors import FingerprintChanged, NotAllowed, TeacherUnavailable
from student_worker.replicas import LEAST_PATIENCE
from tests.asking import pixels
from tests.serving import until


class Small(teacher_pb2_grpc.TeacherServicer):
    """Answers a number of its own to each sample, once its gate is open, and remembers the request ids."""

    def __init__(self, number, fingerprint="f"):
        self.number, self.fingerprint = number, fingerprint
        self.known = []  # replicas that it lists
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)
        self.ids, self.cancelled = [], threading.Semaphore(0)
        self.refusal = None
        self.token = None
        self.address = ""

    def replica(self):
        return pb.Replica(address=self.address, teacher="t", fingerprint=self.fingerprint)

    def _check(self, context):
        if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

    def Describe(self, request, context):
        self._check(context)
        description = pb.TeacherDescription(name="t", fingerprint=self.fingerprint)
        description.inputs.add(name="x", shape=[3, 8, 8], dtypes=[pb.DATA_TYPE_UINT8])
        description.outputs.add(name="logits", shape=[10])
        description.limits.CopyFrom(pb.Limits(max_message_bytes=2**22, max_samples_per_query=100, max_batch_size=1))
        return pb.DescribeResponse(teachers=[description], replicas=[one.replica() for one in self.known])

    def Label(self, request, context):
        self._check(context)
        if request.expected_fingerprint != self.fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"serves {self.fingerprint}")
        if self.refusal:
            context.abort(self.refusal, "Concurrent RPC limit exceeded!")  # in gRPC's own words
        self.ids.append(request.request_id)
        context.add_callback(lambda: context.code() is None and self.cancelled.release())
        self.waiting.release()
        assert self.gate.wait(60)
        n = request.inputs[0].shape[0]
        values = np.full((n, 10), self.number, np.float32).tobytes()
        answers = pb.Answers(name="logits", encoding=pb.ENCODING_FLOAT32, shape=[n, 10], values=values)
        return pb.LabelResponse(
            fingerprint=request.expected_fingerprint,
            answers=[answers],
            sources=[pb.SOURCE_COMPUTED] * n,
            cost=pb.Cost(samples=n),
        )


@pytest.fixture
def fleet():
    """Starts Small servers; they are stopped at the end, their gates opened."""
    with ExitStack() as stack:

        def start(small, port=0):
            server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
            teacher_pb2_grpc.add_TeacherServicer_to_server(small, server)
            small.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
            server.start()
            small.stop = lambda: (small.gate.set(), server.stop(0).wait())
            stack.callback(small.stop)
            return small

        yield start


@pytest.fixture
def pair(fleet):
    """Two replicas that list one another."""
    first, second = fleet(Small(1)), fleet(Small(2))
    first.known = second.known = [first, second]
    return first, second


def who(client, n=1):
    """The number of the replica that answered."""
    (number,) = set(client.label(pixels(n)).logits.flatten().tolist())
    return number


def test_one_address_is_enough_and_load_is_spread(pair):
    first, second = pair
    with TeacherClient(first.address) as client:
        assert who(client) == 1
        until(lambda: who(client) == 2)
        assert [who(client) for _ in range(6)] == [1, 2] * 3
        assert all(first.ids[-2:]), "a query that may be moved is charged once, whoever sent it"
        assert len(set(first.ids + second.ids)) == len(first.ids + second.ids)


def test_another_name_of_the_same_replica_is_not_counted_twice(pair):
    first, second = pair
    with TeacherClient(f"localhost:{first.address.rpartition(':')[2]}") as client:
        until(lambda: who(client) == 2)
        until(lambda: len(client._call._replicas.in_rotation) == 2)
        assert sorted(who(client) for _ in range(30)) == [1] * 15 + [2] * 15
        second.stop()
        assert {who(client) for _ in range(5)} == {1}


def test_what_is_in_flight_at_one_that_hangs_is_moved_at_once_under_the_same_ids(pair):
    first, second = pair
    with TeacherClient(first.address, window=8, timeout=60) as client:
        until(lambda: who(client) == 2)
        first.ids.clear()
        second.ids.clear()
        first.gate.clear()
        futures = [client.submit(pixels(1, seed=i), request_id=f"q{i}") for i in range(8)]
        for _ in range(4):
            assert first.waiting.acquire(timeout=10)
        began = time.monotonic()
        assert {future.result(30).logits[0, 0].item() for future in futures} == {2}
        assert time.monotonic() - began < LEAST_PATIENCE + 3, "not one after another"
        for _ in range(4):
            assert first.cancelled.acquire(timeout=10)
        assert sorted(second.ids) == sorted({one for one in second.ids if one.startswith("q")})
        assert set(first.ids) < set(second.ids)
        assert len(second.ids) == 8
        first.gate.set()
        until(lambda: who(client) == 1)


def test_a_query_that_began_when_there_was_one_alone_is_charged_once_when_it_is_moved(fleet):
    first, second = fleet(Small(1)), fleet(Small(2))
    first.known = second.known = [first]
    with TeacherClient(first.address) as client:
        first.gate.clear()
        answer = client.submit(pixels(1))
        assert first.waiting.acquire(timeout=10)
        first.known = second.known = [first, second]
        assert answer.result(30).logits[0, 0].item() == 2
        assert first.ids[0] == second.ids[0] != ""


def test_one_added_mid_run_takes_its_share_and_one_that_refuses_loses_it(fleet):
    first, second = fleet(Small(1)), fleet(Small(2))
    first.known = second.known = [first]
    with TeacherClient(first.address) as client:
        assert [who(client) for _ in range(3)] == [1] * 3
        first.known = second.known = [first, second]
        until(lambda: who(client) == 2)
        first.refusal = grpc.StatusCode.UNAVAILABLE
        assert [who(client) for _ in range(4)] == [2] * 4
        first.refusal = None
        until(lambda: who(client) == 1)
        first.stop()
        assert [who(client) for _ in range(4)] == [2] * 4


def test_a_full_queue_is_no_reason_to_leave(pair):
    first, _ = pair
    with TeacherClient(first.address) as client:
        until(lambda: who(client) == 2)
        until(lambda: len(client._call._replicas.in_rotation) == 2)
        first.refusal = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {who(client) for _ in range(5)} == {2}
        assert len(client._call._replicas.in_rotation) == 2


def test_only_replicas_of_the_runs_own_fingerprint_are_asked(fleet):
    ours, theirs = fleet(Small(1)), fleet(Small(2, "g"))
    ours.known = theirs.known = [ours, theirs]
    with TeacherClient([theirs.address, ours.address], fingerprint="f", timeout=30) as client:
        assert {who(client) for _ in range(5)} == {1}
    with TeacherClient(theirs.address, fingerprint="f", timeout=30) as client:
        assert {who(client) for _ in range(5)} == {1}, "it is found in the other's list"
    with TeacherClient(theirs.address) as client:
        assert {who(client) for _ in range(5)} == {2}
    with pytest.raises(FingerprintChanged, match=f"began with h, {theirs.address} serves g"):
        TeacherClient(theirs.address, fingerprint="h", timeout=30).describe()


def test_when_the_runs_teacher_is_gone_and_others_answer_the_run_ends_and_says_who(pair, fleet):
    first, second = pair
    with TeacherClient(first.address, timeout=6) as client:
        until(lambda: who(client) == 2)
        first.stop()
        second.fingerprint = "g"
        with pytest.raises(FingerprintChanged) as error:
            client.label(pixels(1))
        assert "began with f" in str(error.value)
        assert f"{second.address} serves g" in str(error.value)
        assert "bring that teacher back" in str(error.value)
        second.fingerprint = "f"
        assert who(client) == 2


def test_when_nobody_answers_that_is_said_instead(pair):
    first, second = pair
    with TeacherClient(first.address, timeout=2) as client:
        until(lambda: who(client) == 2)
        first.stop()
        second.stop()
        with pytest.raises(TeacherUnavailable, match="gave up after"):
            client.label(pixels(1))


def test_a_replica_that_does_not_know_the_token_is_left_out(pair, caplog):
    first, second = pair
    first.token, second.token = "right", "wrong"
    with TeacherClient(first.address, token="right") as client:
        assert who(client) == 1
        until(lambda: "is listed as a replica, but cannot be used: no token" in caplog.text)
        assert {who(client) for _ in range(5)} == {1}
    with pytest.raises(NotAllowed, match="no token"):
        TeacherClient(first.address, token="wrong").describe()


def test_close_ends_calls_at_one_that_hangs_and_all_threads(pair):
    client = TeacherClient(pair[0].address, timeout=60)
    until(lambda: who(client) == 2)
    for small in pair:
        small.gate.clear()
    futures = [client.submit(pixels(1)) for _ in range(4)]
    for small in pair:
        assert small.waiting.acquire(timeout=10)
    client.close()
    for future in futures:
        with pytest.raises(TeacherUnavailable):
            future.result(10)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("teacher-client")])


def test_one_alone_is_not_watched(fleet):
    with TeacherClient(fleet(Small(1)).address) as client:
        assert who(client) == 1
        assert not [thread for thread in threading.enumerate() if thread.name == "teacher-client-keeper"]


def test_a_server_that_starts_late_is_looked_for_all_the_while():
    """Left to itself, gRPC waits ever longer between attempts (these take it 15 s, and 8 s here), failing all calls."""
    with socket.create_server(("127.0.0.1", 0)) as nobody, ThreadPoolExecutor(1) as other:
        client = TeacherClient(f"127.0.0.1:{nobody.getsockname()[1]}", timeout=60)
        described = other.submit(client.describe)
        nobody.accept()[0].close()
        began = time.monotonic()
        for _ in range(5):
            nobody.accept()[0].close()
        assert time.monotonic() - began < 11.5
        client.close()
        with pytest.raises(TeacherUnavailable):
            described.result(10)
