"""How many connections, and how long they may take: mostly HTTP, on a server in this process with little patience."""

import time
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest

from teacher_server.accounts import Books
from teacher_server.auth import Authenticator
from teacher_server.config import NetworkConfig
from teacher_server.http_app import HttpApp
from teacher_server.http_connections import Patience
from teacher_server.metrics import Metrics
from teacher_server.places import Places
from teacher_server.service import Service
from teacher_server.tls import Certificates
from tests import attacking
from tests.certificates import Authority
from tests.serving import arguments, http_serving, serving, until

SHORT = Patience(request_seconds=0.5, reading_seconds=0.3)


class Http:
    """An HttpApp's address, and what it counts."""

    def __init__(self, address, metrics):
        self.http_address, self._metrics = address, metrics

    def dropped(self, reason):
        return self._metrics.registry.get_sample_value("preceptor_http_connections_dropped_total", {"reason": reason})

    raw = attacking.Target.raw
    grpc_address = ""


@contextmanager
def http(*, patience=SHORT, max_connections=16, certificates=None):
    metrics = Metrics()

    def app():
        books = Books(None)
        config = NetworkConfig(http_port=0, max_connections=max_connections)
        service = Service(metrics, books)
        return HttpApp(service, Authenticator(), metrics, config, books, certificates=certificates, patience=patience)

    with http_serving(app) as port:
        yield Http(f"127.0.0.1:{port}", metrics)


def page(server, path="/livez"):
    with urllib.request.urlopen(f"http://{server.http_address}{path}", timeout=10) as reply:
        return reply.status, reply.headers, reply.read()


def asked(peer):
    """Whether a request gets its whole reply."""
    reply = b""
    try:
        peer.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        while not reply.endswith(b"ok\n") and (part := peer.recv(1000)):
            reply += part
    except ConnectionError:
        return False
    return reply.startswith(b"HTTP/1.1 200")


def closed(peer):
    """Whether the server has ended the connection, within the peer's timeout."""
    try:
        return peer.recv(1) == b""
    except ConnectionError:
        return True


# ---------------------------------------------------------------- how long


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /livez HTTP/1.1\r\nhost: x\r\nx: ",
        b"PUT /v1/budgets/a HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_arrive_is_not_waited_for(sent):
    with http() as server, server.raw() as peer:
        peer.sendall(sent)
        assert closed(peer)
        assert server.dropped("slow_request") == 1


def test_nor_is_one_that_comes_a_byte_at_a_time():
    with http() as server:
        ended, seconds = attacking.slowloris(server, 3)
        assert ended == 3
        assert 0.4 < seconds < 30
        assert server.dropped("slow_request") == 3


def test_after_a_reply_the_next_request_has_its_own_time():
    with http() as server, server.raw() as peer:
        began = time.monotonic()
        while time.monotonic() - began < 1.5:  # each alone is in time; all together are not
            assert asked(peer)
        peer.sendall(b"GET /livez HT")
        assert closed(peer)


def test_who_reads_no_reply_is_cut_off_and_his_neighbour_is_served():
    with http(patience=Patience(request_seconds=60, reading_seconds=0.3)) as server:
        how, seconds = attacking.slow_reader(server)
        assert how == "closed"
        assert seconds < 30
        assert server.dropped("slow_reader") == 1
        assert page(server)[0] == 200


def test_who_reads_slowly_but_steadily_gets_all_of_it():
    asked = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
    with http(patience=Patience(request_seconds=60, reading_seconds=0.5, reading_bytes=1000)) as server:
        whole = len(page(server, "/openapi.json")[2])
        with server.raw(receive_bytes=4096) as peer:
            for _ in range(300):
                peer.sendall(asked)
            got = 0
            while got < 300 * whole:
                part = peer.recv(200_000)
                assert part, f"cut off after {got} bytes"
                got += len(part)
                time.sleep(0.002)
        assert server.dropped("slow_reader") == 0


# ---------------------------------------------------------------- how many


def test_one_address_may_have_a_quarter_of_the_connections():
    with http(max_connections=16, patience=Patience()) as server, ExitStack() as stack:
        greedy = [stack.enter_context(server.raw()) for _ in range(8)]
        assert [closed(peer) for peer in greedy[4:]] == [True] * 4
        assert server.dropped("address") == 4
        assert page(server)[0] == 200, "from another address"
        greedy[0].close()
        until(lambda: asked(stack.enter_context(server.raw())))


def test_beyond_all_of_them_nobody_gets_one_until_one_is_free():
    with http(max_connections=8, patience=Patience()) as server, ExitStack() as stack:
        peers = [stack.enter_context(server.raw(f"127.0.0.{n // 2 + 2}")) for n in range(8)]
        assert closed(stack.enter_context(server.raw("127.0.0.9")))
        assert server.dropped("full") == 1
        peers[0].close()

        def served():
            try:
                return page(server)[0] == 200
            except OSError:
                return False

        until(served)


def test_a_tls_handshake_that_does_not_go_on_has_its_place_and_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr("teacher_server.http_app._HANDSHAKE_SECONDS", 0.5)
    certificates = Certificates(*Authority(tmp_path, "ca").issue("127.0.0.1"))
    with http(max_connections=4, patience=Patience(), certificates=certificates) as server, ExitStack() as stack:
        first, second = (stack.enter_context(server.raw()) for _ in range(2))
        assert closed(second)
        assert server.dropped("address") == 1
        assert closed(first)


def test_places_are_counted_for_each_address_and_in_all():
    places = Places(5, 2)
    assert [places.take("a") for _ in range(3)] == ["", "", "address"]
    assert [places.take("b") for _ in range(2)] == ["", ""]
    assert [places.take("c") for _ in range(2)] == ["", "full"]
    places.leave("a")
    assert places.take("b") == "address"
    assert places.take("a") == ""


def test_of_ipv6_whoever_has_one_address_has_its_neighbours_too():
    places = Places(9, 2)
    assert [places.take(f"2001:db8::{n}") for n in range(3)] == ["", "", "address"]
    assert places.take("2001:db8:0:1::1") == ""
    assert [places.take(f"fe80::{n}%eth0") for n in range(3)] == ["", "", "address"]


# ---------------------------------------------------------------- how large, and what is told


def test_headers_are_bounded_and_say_nothing_of_the_server():
    with http(patience=Patience()) as server:
        assert attacking.header_flood(server, 100_000) in ("HTTP 400", "closed")
        status, headers, _ = page(server)
        assert status == 200
        assert "server" not in {name.lower() for name in headers}


def test_the_grpc_port_ends_who_does_not_begin_and_takes_no_more_than_it_has(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("teacher_server.grpc_app").grpc_app._LIMITS, "grpc.server_handshake_timeout_ms", 500)
    (tmp_path / "tokens").touch()
    with serving(**arguments(tmp_path), tokens_file=tmp_path / "tokens", max_connections=8) as server:
        target = attacking.Target(server.grpc_address, server.http_address, tmp_path / "tokens")
        ended, seconds = attacking.slowloris(target, 20, "grpc")
        assert ended == 20
        assert seconds < 30
        assert attacking.viewer_asks(target) == {"PERMISSION_DENIED": 2}, "there is room again"


def test_a_connection_has_any_number_of_calls_one_after_another(tmp_path):
    """gRPC's own overload protection counted those that had ended, and refused a connection's after some thousands."""
    (tmp_path / "tokens").touch()
    with serving(**arguments(tmp_path), tokens_file=tmp_path / "tokens", max_concurrent_calls=8) as server:
        target = attacking.Target(server.grpc_address, server.http_address, tmp_path / "tokens")
        assert attacking.messages(target, [b""] * 2000, "Describe", window=2) == {"OK": 2000}
