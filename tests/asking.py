"""How the tests ask a server: raw messages over gRPC, pages over HTTP, and what the answers must be."""

import json
import urllib.request
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from tests.teachers import TINY, tiny

LARGE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@contextmanager
def stub_at(address):
    with grpc.insecure_channel(address, options=LARGE) as channel:
        yield teacher_pb2_grpc.TeacherStub(channel)


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


def asking(x, cache_mode=pb.CACHE_MODE_BYPASS, **fields):
    """A query to be computed afresh, unless it says otherwise: tests share servers and samples."""
    return pb.LabelRequest(inputs=[wire.encode_tensor("x", x)], cache_mode=cache_mode, **fields)


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


def put(server, path, *, token="", **body):
    """A budget, set over HTTP. A server with tokens wants an admin's."""
    authorization = {"authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(
        f"http://{server.http_address}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json"} | authorization,
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


def get(server, path, **headers):
    return page(server.http_address, path, **headers)


def metric(server, name, *, token="", **labels):
    """The sum of a metric's samples with these labels. A server with tokens shows it to a viewer's."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    families = text_string_to_metric_families(get(server, "/metrics", **headers))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
