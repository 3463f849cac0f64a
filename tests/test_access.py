"""The access log of a server in its own process: what stands in a line, what never does."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from urllib.error import HTTPError

import grpc
import pytest
import torch
from torch import nn

from protos import teacher_pb2 as pb
from student_worker import TeacherClient
from student_worker.errors import InvalidQuery
from teacher_server.batcher import Batcher
from teacher_server.config import BatcherConfig, EngineConfig, ModelConfig
from teacher_server.engine import Engine
from teacher_server.log_lines import logging_to
from teacher_server.model import load
from teacher_server.trails import Trail
from tests.asking import asking, page, pixels, refusal, stub_at
from tests.redis_servers import running
from tests.serving import ROOT, arguments, free_port, process, until
from tests.teachers import TINY, save, tiny
from tests.traces import TRACE, TRACEPARENT, tokens


def logged_calls(caplog, number=1):
    """So many lines of a server in this process, which come when the reply is on its way."""

    def found():
        return [record for record in caplog.records if record.name == "teacher_server.access"]

    until(lambda: len(found()) >= number)
    return found()


class Written:
    """What a server has written on standard error, once it has ended."""

    def __init__(self):
        self.text = ""

    @property
    def lines(self):
        return [json.loads(line) for line in self.text.splitlines()]

    def calls(self, **fields):
        return [
            line for line in self.lines if line["logger"] == "teacher_server.access" and fields.items() <= line.items()
        ]


@contextmanager
def logged(**settings):
    """A server in a process of its own: its addresses, and what it wrote, which is there after it was left."""
    written = Written()
    with process(**settings) as (server, address, http):
        yield address, http, written
        server.send_signal(signal.SIGTERM)
        written.text = server.communicate(timeout=60)[1]
        assert server.returncode == 0


def test_a_call_has_one_line_that_says_who_what_and_how_long(tmp_path):
    with logged(**arguments(tmp_path), price_nanos=1_000_000, currency="EUR") as (address, _, written):
        with stub_at(address) as stub:
            metadata = [("traceparent", TRACEPARENT), ("preceptor-job", "sweep/7")]
            query = asking(pixels(6), pb.CACHE_MODE_USE)
            reply = stub.Label(query, metadata=metadata)
            again = stub.Label(query, metadata=[("preceptor-job", "again")])
            refusal(stub.Label, asking(pixels(6), expected_fingerprint="other"))
            stub.Describe(pb.DescribeRequest())  # as all students do every 2 s
            refusal(stub.Describe, pb.DescribeRequest(teacher="nobody"))
            stub.Lookup(pb.LookupRequest(keys=[b"k" * 16], outputs=[pb.OutputSpec(name="logits")]))
            stub.Spend(pb.SpendRequest())
    assert [line["call"] for line in written.calls()] == ["Label"] * 3 + ["Describe", "Lookup", "Spend"]
    (line,) = written.calls(call="Describe")
    assert line["code"] == "NOT_FOUND"
    (line,) = written.calls(job="sweep/7")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line.pop("peer"))
    queue, compute, total = (line.pop(f"{name}_ms") for name in ("queue", "compute", "total"))
    assert 0 <= queue < total
    assert 0 < compute < total
    assert line == {
        "level": "INFO",
        "logger": "teacher_server.access",
        "message": "call",
        "trace_id": TRACE,
        "call": "Label",
        "code": "OK",
        "tenant": "default",
        "job": "sweep/7",
        "request_bytes": query.ByteSize(),
        "reply_bytes": reply.ByteSize(),
        "computed": 6,
        "cached": 0,
        "coalesced": 0,
        "charged": 6,
        "cost": 0.006,
        "currency": "EUR",
    }
    (line,) = written.calls(job="again")
    assert (line["cached"] + line["coalesced"], line["charged"], line["compute_ms"]) == (6, 0, 0)
    assert line["trace_id"] not in ("", TRACE)
    assert len(again.sources) == 6
    (line,) = written.calls(code="FAILED_PRECONDITION")
    assert line["reason"] == "OTHER_FINGERPRINT"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "4bf92f",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"{TRACEPARENT}-more",
    ],
)
def test_a_traceparent_that_cannot_be_used_counts_as_none(header, server, stub, caplog):
    with caplog.at_level("DEBUG"):
        stub.Describe(pb.DescribeRequest(), metadata=[("traceparent", header)])
        (line,) = logged_calls(caplog)
    assert re.fullmatch(r"[0-9a-f]{32}", line.trace_id)
    assert line.trace_id != TRACE


def test_a_later_version_of_traceparent_may_say_more(stub, caplog):
    with caplog.at_level("DEBUG"):
        stub.Describe(pb.DescribeRequest(), metadata=[("traceparent", f"01-{TRACE}-00f067aa0ba902b7-01-more")])
        (line,) = logged_calls(caplog)
    assert line.trace_id == TRACE


def test_a_clients_error_names_the_trace_that_stands_in_the_log(server, caplog):
    with TeacherClient(server.grpc_address) as client, caplog.at_level("INFO"):
        with pytest.raises(InvalidQuery) as refused:
            client.label(pixels(1), request_id="x" * 1000)
        (line,) = logged_calls(caplog)
    assert line.trace_id == str(refused.value)[-33:-1]
    assert (line.code, line.reason) == ("INVALID_ARGUMENT", "INVALID_QUERY")


def test_requests_have_a_line_each_and_probes_that_go_well_none(tmp_path):
    file = tokens(tmp_path, red="secret")
    with logged(**arguments(tmp_path), tokens_file=file) as (_, http, written):
        for path in ("/livez", "/readyz", "/metrics"):
            page(http, path, authorization="Bearer secret")
        page(http, "/v1/spend?job=j", authorization="Bearer secret", traceparent=TRACEPARENT)
        for path in ("/v1/spend", "/nothing"):
            with pytest.raises(HTTPError):
                page(http, path)
    spend, refused, nothing = written.calls(message="request")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", spend.pop("peer"))
    assert spend.pop("reply_bytes") > 10
    assert spend.pop("total_ms") > 0
    del spend["time"]
    assert spend == {
        "level": "INFO",
        "logger": "teacher_server.access",
        "message": "request",
        "trace_id": TRACE,
        "call": "GET /v1/spend",
        "code": 200,
        "tenant": "red",
        "request_bytes": 0,
    }
    assert (refused["code"], refused["tenant"], refused["reason"]) == (401, "", "UNAUTHENTICATED")
    assert (nothing["code"], nothing["call"], nothing["reason"]) == (404, "GET /nothing", "NOT_FOUND")


def test_a_query_that_fails_is_an_error_and_names_its_trace(tmp_path):
    with logged(**arguments(tmp_path, "wordy")) as (address, _, written), stub_at(address) as stub:
        code, _, _, _ = refusal(stub.Label, asking(pixels(13)), metadata=[("traceparent", TRACEPARENT)])
        assert code is grpc.StatusCode.INTERNAL
    (line,) = written.calls(code="INTERNAL")
    assert (line["level"], line["reason"]) == ("ERROR", "FORWARD_FAILED")
    assert line["compute_ms"] > 0
    (failed,) = [line for line in written.lines if line["logger"] == "teacher_server.batcher"]
    assert failed["trace_id"] == TRACE
    assert "ValueError: no no" in failed["exc_info"]


class Fickle(nn.Module):
    """Answers NaN to its third sample; has no memory for more than 16."""

    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        if len(x) > 16:
            raise torch.OutOfMemoryError("out of memory")
        answers = self.net(x)
        answers[2:3] = torch.nan
        return answers


def test_what_a_device_says_and_answers_that_are_not_finite_name_their_traces(tmp_path):
    weights = save(Fickle(), tmp_path / "fickle.safetensors", TINY)
    settings = arguments(tmp_path) | {"model": f"{__name__}:Fickle", "weights": weights, "max_batch_size": 32}
    with logged(**settings) as (address, _, written), stub_at(address) as stub:
        # Warm-up has found out already that 32 are too many; what it says is about no query.
        assert refusal(stub.Label, asking(pixels(3)), metadata=[("traceparent", TRACEPARENT)])[2] == "FORWARD_FAILED"
        stub.Label(asking(pixels(2)))
    (memory,) = [line for line in written.lines if line["logger"] == "teacher_server.engine"]
    assert not {"trace_id", "trace_ids"} & memory.keys()
    (line,) = [line for line in written.lines if line["logger"] == "teacher_server.settlement"]
    assert line["message"].endswith(
        "the teacher answers NaN or infinity for 1 of 3 samples of job 'default' of tenant 'default'"
    )
    assert line["trace_ids"] == [TRACE]


def test_a_device_that_runs_out_of_memory_in_a_batch_names_the_traces(tmp_path):
    weights = save(Fickle(), tmp_path / "fickle.safetensors", TINY)
    teacher = load(ModelConfig(model=f"{__name__}:Fickle", weights=weights), EngineConfig(device="cpu"))
    engine = Engine(teacher.module, teacher.description, EngineConfig(device="cpu"), 32)
    stream, trail = io.StringIO(), Trail()
    with logging_to(stream), Batcher(BatcherConfig(max_batch_size=32), engine.forward) as batcher:
        batcher.submit("red", "j", {"x": pixels(20)}, tag=trail).result(30)
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert line["logger"] == "teacher_server.engine"
    assert line["trace_id"] == trail.mark.trace_id


# ---------------------------------------------------------------- what never stands there

TOKEN, WRONG, ADMIN, PASSWORD = "tok3n-of-red", "wr0ng-token", "adm1n-token", "redis-passw0rd"
SECRETS = (TOKEN, WRONG, ADMIN, PASSWORD, "Bearer")


def odd_http(address, *requests):
    """Raw bytes to an HTTP port, and whatever comes back is not looked at."""
    host, port = address.split(":")
    for request in requests:
        with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass


def test_secrets_and_samples_are_in_nothing_that_a_server_writes(tmp_path):
    file = tokens(tmp_path, red=TOKEN, boss=ADMIN)
    sample = pixels(13)
    with running(tmp_path, "--appendonly", "yes", "--requirepass", PASSWORD) as redis:
        path = (tmp_path / "redis.sock").resolve()
        url = f"unix://:{PASSWORD}@{path}"
        settings = arguments(tmp_path, "wordy") | {"tokens_file": file, "ledger_redis_url": url, "cache_redis_url": url}
        with logged(**settings) as (address, http, written), stub_at(address) as stub:
            right, wrong = ([("authorization", f"Bearer {token}")] for token in (TOKEN, WRONG))
            stub.Label(asking(pixels(2)), metadata=right)
            refusal(stub.Label, asking(sample), metadata=right)  # the teacher's own code raises
            for metadata in (wrong, [("authorization", f"Basic {TOKEN}")], [("authorization", TOKEN)]):
                assert refusal(stub.Label, asking(sample), metadata=metadata)[0] is grpc.StatusCode.UNAUTHENTICATED
            refusal(stub.Label, asking(sample), metadata=[*right, ("preceptor-job", "no such name!")])
            refusal(stub.Label, asking(sample[:, :1]), metadata=right)
            page(http, "/v1/spend", authorization=f"Bearer {TOKEN}")
            for headers in ({"authorization": f"Bearer {WRONG}"}, {"authorization": TOKEN}):
                with pytest.raises(HTTPError):
                    page(http, f"/v1/spend?token={TOKEN}", **headers)
            odd_http(
                http,
                f"GET / HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode(),  # no host
                f"GET / HTTP/1.1\r\nhost: x\r\nauthorization : Bearer {TOKEN}\r\n\r\n".encode(),
                f"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\x00\r\n\r\n".encode(),
                f"Bearer {TOKEN}\r\n\r\n".encode(),
                f"GET /preceptor_{TOKEN} HTTP/1.1\r\nhost: x\r\n\r\n".encode(),
                f"PUT /v1/budgets/red HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
                "content-length: 5\r\n\r\n{bad}".encode(),
            )
            redis.kill()
            refusal(stub.Spend, pb.SpendRequest(), metadata=right)
        assert len(written.calls(code="UNAUTHENTICATED")) == 3
        assert len(written.calls(call="GET /preceptor_...", code=404)) == 1
        assert written.calls(code="INTERNAL")
        assert [line for line in written.lines if line["logger"] == "uvicorn.error"]
        assert [line for line in written.lines if line["logger"] == "teacher_server.pipeline"]
    found = [secret for secret in (*SECRETS, *map(str, sample[0, 0, :2].tolist())) if secret in written.text]
    assert found == []


def test_a_password_is_not_in_what_a_failed_start_says(tmp_path):
    settings = arguments(tmp_path) | {
        "ledger_redis_url": f"rediss://user:{PASSWORD}@127.0.0.1:{free_port()}",
        "state_directory": tmp_path / "state",
    }
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "teacher_server", "serve", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (fatal,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert fatal.startswith("teacher-server: ledger: no answer from rediss://127.0.0.1:")
    assert PASSWORD not in done.stdout + done.stderr
