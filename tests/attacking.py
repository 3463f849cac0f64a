"""Attacks on a running server, each a function that says what it got. For the tests, and for benchmarks/attacks.py."""

import gzip
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc
from student_worker import TeacherClient
from teacher_server.tokens import add_token, new_token, remove_token
from tests.asking import LARGE, asking, direct, pixels

Got = Counter[str]
ELSEWHERE = "127.0.0.2"
"""An address of the attacker's own, on loopback."""


@dataclass
class Target:
    """A server with tokens, in clear text."""

    grpc_address: str
    http_address: str
    tokens_file: Path
    tokens: dict[str, str] = field(default_factory=dict)
    """By role; `other` is a student of another tenant."""

    def __post_init__(self) -> None:
        for name, tenant, role in (
            ("student", "red", "student"),
            ("other", "blue", "student"),
            ("viewer", "board", "viewer"),
            ("admin", "platform", "admin"),
            ("legit", "white", "student"),
        ):
            self.tokens[name] = self.add(tenant, role)[0]

    def add(self, tenant: str, role: str = "student") -> tuple[str, str]:
        """(token, id) of a new one."""
        secret, token = new_token(tenant, role)  # type: ignore[arg-type]
        add_token(self.tokens_file, token)
        return secret, token.id

    def metadata(self, who: str, job: str = "attack") -> list[tuple[str, str]]:
        token = self.tokens.get(who)
        return [("preceptor-job", job), *([("authorization", f"Bearer {token}")] if token else [])]

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        # A pool of its own: else gRPC shares a connection among channels with the same options.
        with grpc.insecure_channel(self.grpc_address, [*LARGE, ("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield channel

    @contextmanager
    def stub(self) -> Iterator[teacher_pb2_grpc.TeacherStub]:
        with self.channel() as channel:
            yield teacher_pb2_grpc.TeacherStub(channel)

    def http(self, path: str, who: str = "", method: str = "GET", body: bytes | None = None) -> str:
        """The status, as in "HTTP 401"."""
        headers = {"authorization": f"Bearer {self.tokens[who]}"} if who else {}
        headers |= {"content-type": "application/json"} if body else {}
        request = urllib.request.Request(f"http://{self.http_address}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return f"HTTP {reply.status}"
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}"

    def raw(self, from_address: str = ELSEWHERE, receive_bytes: int = 0, port: str = "http") -> socket.socket:
        """A connection to the HTTP port, or the gRPC port."""
        peer = socket.socket()
        if receive_bytes:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        peer.bind((from_address, 0))
        peer.settimeout(60)
        host, _, number = (self.http_address if port == "http" else self.grpc_address).rpartition(":")
        peer.connect((host, int(number)))
        return peer


def code(call: Callable[..., object], *args: object, **options: object) -> str:
    try:
        call(*args, timeout=60, **options)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def flood(calls: Iterable[Callable[[], grpc.Future]], window: int = 64) -> Got:
    """Status codes of calls of which so many are under way at a time."""
    got, waiting = Got(), deque[grpc.Future]()

    def finish() -> None:
        got[waiting.popleft().code().name] += 1

    for call in calls:
        waiting.append(call())
        if len(waiting) >= window:
            finish()
    while waiting:
        finish()
    return got


# ---------------------------------------------------------------- the user beside


class Legit(threading.Thread):
    """A student of tenant white who goes on asking, with deadlines, and checks every answer."""

    def __init__(self, target: Target) -> None:
        super().__init__(name="legit")
        self._target, self._stop_asking = target, threading.Event()
        self.milliseconds: list[float] = []
        self.failures: list[str] = []
        self._x = pixels(4, seed=7)
        self._right = direct(self._x)

    def __enter__(self) -> "Legit":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asking.set()
        self.join(60)

    def run(self) -> None:
        with TeacherClient(self._target.grpc_address, job="legit", token=self._target.tokens["legit"]) as teacher:
            while not self._stop_asking.wait(0.02):
                began = time.perf_counter()
                try:
                    answer = teacher.label(self._x, cache_mode="bypass")
                    np.testing.assert_allclose(answer.logits.numpy(), self._right, rtol=1e-3, atol=1e-3)
                except Exception as error:
                    self.failures.append(repr(error))
                self.milliseconds.append(1000 * (time.perf_counter() - began))


# ---------------------------------------------------------------- who asks


def no_token(target: Target, token: str = "") -> Got:
    """Every call and page, without a token or with a wrong one."""
    target.tokens["nobody"] = token
    metadata = target.metadata("nobody")
    with target.channel() as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        calls = (
            (stub.Describe, pb.DescribeRequest()),
            (stub.Label, asking(pixels(1))),
            (stub.Lookup, pb.LookupRequest(keys=[bytes(16)])),
            (stub.Spend, pb.SpendRequest()),
        )
        got = Got(code(call, request, metadata=metadata) for call, request in calls)
        got[code(reflecting(channel), metadata=metadata)] += 1
    for path in ("/v1/teacher", "/v1/spend", "/v1/budgets", "/metrics"):
        got[target.http(path, "nobody" if token else "")] += 1
    return got


def reflecting(channel: grpc.Channel) -> Callable[..., object]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    return lambda **options: next(stub.ServerReflectionInfo(iter([request]), **options))


def student_on_admin_calls(target: Target, who: str = "student") -> Got:
    body = b'{"unit": "samples", "limit": 1}'
    got = Got()
    for path in ("/v1/budgets/red", "/v1/budgets/red/jobs/a", "/v1/budgets/blue"):
        got[target.http(path, who, "PUT", body)] += 1
        got[target.http(f"{path}?unit=samples", who, "DELETE")] += 1
    if who == "student":
        for path in ("/metrics", "/v1/spend?tenant=*", "/v1/spend?tenant=blue", "/v1/budgets/blue"):
            got[target.http(path, who)] += 1
    return got


def viewer_asks(target: Target) -> Got:
    with target.stub() as stub:
        metadata = target.metadata("viewer")
        requests = ((stub.Label, asking(pixels(1))), (stub.Lookup, pb.LookupRequest(keys=[bytes(16)])))
        return Got(code(call, request, metadata=metadata) for call, request in requests)


def revoked(target: Target) -> list[str]:
    """Codes before and after the token is revoked, of calls on one connection."""
    target.tokens["revoked"], token_id = target.add("red")
    with target.stub() as stub:
        before = code(stub.Label, asking(pixels(1)), metadata=target.metadata("revoked"))
        remove_token(target.tokens_file, token_id)
        return [before, code(stub.Label, asking(pixels(1)), metadata=target.metadata("revoked"))]


def anothers_job(target: Target) -> dict[str, object]:
    """Tenant blue names red's job and request id: what it is told, and what red was charged meanwhile."""
    x = pixels(5, seed=3)
    red, blue = (target.metadata(who, "secret/run") for who in ("student", "other"))
    with target.stub() as stub:

        def charged(metadata: list[tuple[str, str]]) -> int:
            return sum(line.computed for line in stub.Spend(pb.SpendRequest(job="secret/run"), metadata=metadata).lines)

        mine = stub.Label(asking(x, request_id="step-1"), metadata=red)
        before = charged(red)
        seen = charged(blue)
        replayed = stub.Label(asking(x, request_id="step-1"), metadata=blue)
        other_content = code(stub.Label, asking(pixels(2), request_id="step-1"), metadata=red)
        return {
            "red paid for its own": mine.cost.samples,
            "spend of red's job that blue sees": seen,
            "blue paid for the replay": replayed.cost.samples,
            "red paid for blue's": charged(red) - before,
            "red's id with other samples": other_content,
            "red's spend by its name": target.http("/v1/spend?tenant=red", "other"),
        }


# ---------------------------------------------------------------- what is sent


def mutations(count: int, seed: int = 0) -> Iterator[bytes]:
    """Random bytes, and a valid query's with bytes changed, cut out, doubled or inserted."""
    dice = random.Random(seed)
    valid = asking(pixels(2), request_id="r", cache_namespace="n", outputs=[pb.OutputSpec(name="logits", k=2)])
    whole = valid.SerializeToString()
    for _ in range(count):
        if dice.random() < 0.3:
            yield dice.randbytes(dice.randrange(300))
            continue
        message = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            # Where the structure is: before the pixels and behind them.
            at = dice.choice((dice.randrange(30), len(message) - 1 - dice.randrange(40), dice.randrange(len(message))))
            at = max(0, min(at, len(message) - 1))
            match dice.randrange(4):
                case 0:
                    message[at : at + 1] = dice.randbytes(1)
                case 1:
                    del message[at : at + dice.randint(1, 20)]
                case 2:
                    message[at:at] = message[at : at + dice.randint(1, 20)]
                case 3:
                    message[at:at] = dice.randbytes(dice.randint(1, 5))
            if not message:
                break
        yield bytes(message)


def messages(target: Target, contents: Iterable[bytes], call: str = "Label", window: int = 64) -> Got:
    """Sends raw bytes as messages of a student's calls on one connection, so many at a time."""
    with target.channel() as channel:
        send = channel.unary_unary(f"/preceptor.v1.Teacher/{call}")
        metadata = target.metadata("student")
        calls = (lambda m=content: send.future(m, timeout=60, metadata=metadata) for content in contents)
        return flood(calls, window)


def empty_submessages(size: int) -> bytes:
    """Two bytes each, which become seventy in memory."""
    return b"\x12\x00" * (size // 2)


def compressed(target: Target, size: int) -> Got:
    """A query of so many bytes of zeros, that travels as a thousandth."""
    with target.channel() as channel:
        send = channel.unary_unary("/preceptor.v1.Teacher/Label")
        options = {"metadata": target.metadata("student"), "compression": grpc.Compression.Gzip}
        return Got([code(send, bytes(size), **options)])


def zipped_size(size: int) -> int:
    return len(gzip.compress(bytes(size)))


# ---------------------------------------------------------------- without a token, on the gRPC port


def large_health_checks(target: Target, count: int, size: int) -> Got:
    with target.channel() as channel:
        send = channel.unary_unary("/grpc.health.v1.Health/Check")
        content = bytes(size)
        return flood((lambda: send.future(content, timeout=60) for _ in range(count)), window=16)


def watchers(target: Target, count: int) -> Got:
    """So many health streams at once, of several connections."""
    with ExitStack() as stack:
        streams = []
        for _ in range(count // 100 + 1):
            channel = stack.enter_context(target.channel())
            watch = health_pb2_grpc.HealthStub(channel).Watch
            streams += [watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(min(100, count))]
        got = Got(code(lambda s=stream, timeout=0: next(s)) for stream in streams[:count])
        for stream in streams:
            stream.cancel()
        return got


def unauthenticated(target: Target, count: int) -> Got:
    with target.channel() as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        request, metadata = asking(pixels(64)), [("authorization", "Bearer guess")]
        return flood(lambda: stub.Label.future(request, timeout=60, metadata=metadata) for _ in range(count))


def large_metadata(target: Target, size: int) -> Got:
    with target.stub() as stub:
        metadata = [*target.metadata("student"), ("x", "y" * size)]
        return Got([code(stub.Describe, pb.DescribeRequest(), metadata=metadata)])


# ---------------------------------------------------------------- connections


def slowloris(target: Target, count: int, port: str = "http") -> tuple[int, float]:
    """Connections that send a header a byte at a time: how many were ended by the server, after how long at most."""
    began = time.monotonic()
    with ExitStack() as stack:
        peers = []
        for _ in range(count):
            try:
                peers.append(stack.enter_context(target.raw(port=port)))
            except OSError:
                continue
        opening = iter(b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 10_000)
        if port == "grpc":  # the beginning of what a client says first; then silence
            opening = iter(b"PRI * HTTP")
        alive = peers
        while alive and time.monotonic() - began < 60:
            byte = bytes([given]) if (given := next(opening, None)) else b""
            alive = [peer for peer in alive if _lives(peer, byte)]
            time.sleep(0.2)
        return count - len(alive), time.monotonic() - began


def _lives(peer: socket.socket, byte: bytes) -> bool:
    try:
        peer.send(byte)
        peer.settimeout(0)
        try:
            return bool(peer.recv(1))
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        finally:
            peer.settimeout(60)
    except OSError:
        return False


def slow_reader(target: Target, requests: int = 2000) -> tuple[str, float]:
    """Asks for a large page again and again, and reads nothing: how it ended, after how long."""
    began = time.monotonic()
    asked = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
    with target.raw(receive_bytes=4096) as peer:
        try:
            for _ in range(requests):
                peer.sendall(asked)
            while time.monotonic() - began < 60:
                peer.sendall(asked)
                time.sleep(0.2)
        except TimeoutError:
            return "still open", time.monotonic() - began
        except OSError:
            return "closed", time.monotonic() - began
    return "still open", time.monotonic() - began


def header_flood(target: Target, size: int) -> str:
    """A request with so many bytes of headers; the status, or how the connection ended."""
    with target.raw() as peer:
        try:
            peer.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
            for number in range(size // 100):
                peer.sendall(b"x-%08d: %s\r\n" % (number, b"y" * 86))
        except OSError:
            pass
        try:
            return f"HTTP {peer.recv(100).split()[1].decode()}"
        except (OSError, IndexError):
            return "closed"
