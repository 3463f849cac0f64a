"""One name that leads to several replicas, as a headless Service of Kubernetes does, by a nameserver of our own."""

import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest
import trustme

from protos import teacher_pb2_grpc
from student_worker import TeacherClient
from tests.asking import pixels
from tests.serving import until
from tests.test_replica_calls import Small

NAME = "teacher-headless.preceptor.svc"


class Names:
    """Answers every question for an IPv4 address with `addresses`; other questions with none (RFC 1035, 4.1)."""

    def __init__(self):
        self.addresses = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join(10)
        self._socket.close()

    def _run(self):
        while question := self._socket.recvfrom(512):
            asked, sender = question
            if not asked:
                return
            end = asked.index(0, 12) + 5
            (kind,) = struct.unpack(">H", asked[end - 4 : end - 2])
            answers = self.addresses if kind == 1 else []
            reply = asked[:2] + struct.pack(">HHHHH", 0x8180, 1, len(answers), 0, 0) + asked[12:end]
            for address in answers:
                reply += struct.pack(">HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(address)
            self._socket.sendto(reply, sender)


@pytest.fixture
def pods():
    """Starts Small servers at one port of 127.0.0.1, 127.0.0.2, ..., as pods are; all are in the name from then on."""
    with Names() as names, ExitStack() as stack:
        running = {}

        def start(number, port, credentials=None):
            small = Small(number)
            server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
            teacher_pb2_grpc.add_TeacherServicer_to_server(small, server)
            address = f"127.0.0.{number}:{port}"
            bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
            small.address = f"127.0.0.{number}:{bound}"
            server.start()
            stack.callback(server.stop, None)
            names.addresses.append(f"127.0.0.{number}")
            running[number] = server
            return small, bound

        def name(port):
            return f"dns://127.0.0.1:{names.port}/{NAME}:{port}"

        yield names, start, running, name


def who(client):
    return int(client.label(pixels(1)).logits[0, 0])


def test_a_name_is_enough_to_find_replicas_that_tell_of_one_another(pods):
    _, start, _, name = pods
    first, port = start(1, 0)
    others = [start(number, port)[0] for number in (2, 3)]
    for small in (first, *others):
        small.known = [first, *others]
    with TeacherClient(name(port), job="student") as client:
        until(lambda: len({who(client) for _ in range(3)}) == 3)
        assert sorted(who(client) for _ in range(9)) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_replicas_of_a_name_that_tell_of_nobody_take_turns_and_a_new_one_is_found(pods):
    names, start, running, name = pods
    _, port = start(1, 0)
    start(2, port)
    with TeacherClient(name(port), job="student") as client:
        until(lambda: {who(client) for _ in range(2)} == {1, 2})
        assert sorted(who(client) for _ in range(6)) == [1, 1, 1, 2, 2, 2]
        start(3, port)
        names.addresses.remove("127.0.0.1")
        running[1].stop(5)  # no new calls; what is under way is finished, as when a connection's time is over
        until(lambda: {who(client) for _ in range(4)} == {2, 3})


def test_an_address_of_a_name_where_nobody_is_is_asked_nothing(pods):
    """As of localhost, which is ::1 too, where the server may not be."""
    names, start, _, name = pods
    names.addresses.append("127.0.0.9")
    _, port = start(1, 0)
    with TeacherClient(name(port), job="student", timeout=5) as client:
        assert {who(client) for _ in range(100)} == {1}


def test_one_certificate_that_has_the_name_is_enough_for_all(pods, tmp_path):
    _, start, _, name = pods
    ca = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(ca.cert_pem.bytes())
    certificate = ca.issue_cert(NAME)
    key, chain = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    credentials = grpc.ssl_server_credentials([(key, chain)])
    _, port = start(1, 0, credentials)
    start(2, port, credentials)
    with TeacherClient(name(port), job="student", ca_file=tmp_path / "ca.pem") as client:
        until(lambda: {who(client) for _ in range(2)} == {1, 2})
