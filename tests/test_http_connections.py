"""HTTP connections that take their time, and many of them, against a real uvicorn."""

import asyncio
import socket
import threading
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn

from teacher_server.http_connections import _MAX_OF_A_PEER, BoundedConnection

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Impatient(BoundedConnection):
    REQUEST_SECONDS = 0.3


async def reply(scope, receive, send):
    """As many bytes as the path says."""
    size = int(scope["path"].lstrip("/") or 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"x" * size})


@contextmanager
def server(connection):
    """Its port."""
    server = uvicorn.Server(
        uvicorn.Config(reply, http=connection, port=0, lifespan="off", log_config=None, timeout_keep_alive=30)
    )
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def closed(connection):
    """Whether the server ends it, having said nothing more."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def serves(connection):
    connection.sendall(REQUEST)
    answer = b""
    while not answer.endswith(b"xx"):
        answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", REQUEST.replace(b"\r\n\r\n", b"\r\ncontent-")])
def test_a_request_that_does_not_come_is_not_waited_for(sent):
    with server(Impatient) as port, connect(port) as slow:
        slow.sendall(sent)
        assert closed(slow)


def test_a_byte_now_and_then_buys_no_time():
    with server(Impatient) as port, connect(port) as slow:
        stop = threading.Event()

        def drip():
            for byte in REQUEST[:-4] * 1000:
                if stop.wait(0.02):
                    return
                try:
                    slow.sendall(bytes([byte]))
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert closed(slow)
        finally:
            stop.set()
            dripping.join()


def test_a_reply_that_is_not_read_is_not_kept():
    with server(Impatient) as port, connect(port) as slow:
        slow.sendall(REQUEST.replace(b"/ ", b"/200000000 "))
        threading.Event().wait(1.0)  # it does not read for longer than it may take
        assert sum(iter(lambda: len(slow.recv(2**20)), 0)) < 200_000_000


def test_one_connection_serves_many_requests_for_longer_than_one_may_take():
    with server(Impatient) as port, connect(port) as patient:
        for _ in range(4):
            serves(patient)
            threading.Event().wait(0.15)


def test_one_address_has_so_many_connections_and_the_others_go_on():
    with server(BoundedConnection) as port, ExitStack() as stack:
        first = stack.enter_context(connect(port))
        serves(first)
        crowd = [stack.enter_context(connect(port)) for _ in range(_MAX_OF_A_PEER)]
        assert closed(crowd[-1])
        serves(first)
