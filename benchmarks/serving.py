"""What a query costs beside the network: latency and throughput of the server with a network that takes no time.

Claim    one caller's query of one 224 x 224 x 3 uint8 sample (150,528 bytes) takes little more than a gRPC echo of
         as many bytes, and throughput grows with the callers because batches form.
Method   a server in a process of its own serves `trivial` (a mean of each channel, 3 classes). Rounds are interleaved:
         in each, an echo server (gRPC asyncio, no work) and the teacher answer the same bytes; the median of a round's
         latencies and its queries per second are taken, then the median and the range over rounds.
Machine  stated by the output.
n        ROUNDS rounds of QUERIES queries.

    python benchmarks/serving.py
"""

import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire

ROUNDS, QUERIES = 7, 400
CALLERS = (1, 8, 32)
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
DESCRIPTION = '{"inputs": [{"name": "x", "shape": [3, 224, 224], "normalisation": {"mean": [0], "std": [1]}}]}'


class Trivial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, :8].mean(dim=2) * self.scale


def trivial() -> nn.Module:
    return Trivial()


async def echo() -> None:
    async def answer(request: bytes, _: grpc.aio.ServicerContext) -> bytes:
        return request[:400]

    server = grpc.aio.server(options=UNLIMITED)
    method = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", {"Echo": method}),))
    print(f"grpc 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')},", flush=True)
    await server.start()
    await server.wait_for_termination()


async def measured(call: Callable[[], Awaitable[object]], callers: int) -> tuple[float, float]:
    """(median latency in ms, queries per second) of QUERIES queries by so many callers at once."""
    latencies: list[float] = []

    async def caller(queries: int) -> None:
        for _ in range(queries):
            began = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller(QUERIES // callers) for _ in range(callers)))
    return 1000 * statistics.median(latencies), len(latencies) / (time.perf_counter() - began)


async def compare(echo_address: str, teacher_address: str) -> None:
    request = pb.LabelRequest(inputs=[wire.encode_tensor("x", np.zeros((1, 3, 224, 224), np.uint8))])
    body = request.SerializeToString()
    async with (
        grpc.aio.insecure_channel(echo_address, options=UNLIMITED) as echoing,
        grpc.aio.insecure_channel(teacher_address, options=UNLIMITED) as teaching,
    ):
        stub, bare = teacher_pb2_grpc.TeacherStub(teaching), echoing.unary_unary("/echo/Echo")
        calls = {"echo": lambda: bare(body), "teacher": lambda: stub.Label(request)}
        results: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for round_ in range(ROUNDS + 1):  # the first one warms up
            for callers in CALLERS:
                for name, call in calls.items():
                    result = await measured(call, callers)
                    if round_:
                        results.setdefault((name, callers), []).append(result)
    print(f"{'':8} {'callers':>7}  {'p50 ms (range over rounds)':>28}  {'queries/s (range)':>26}")
    for (name, callers), rounds in sorted(results.items(), key=lambda item: item[0][1]):
        (p50, low, high), (rate, slow, fast) = (
            (statistics.median(v), min(v), max(v)) for v in zip(*rounds, strict=True)
        )
        print(f"{name:8} {callers:7}  {p50:10.2f} ({low:.2f} - {high:.2f})  {rate:10.0f} ({slow:.0f} - {fast:.0f})")


def main() -> None:
    if sys.argv[1:] == ["echo"]:
        asyncio.run(echo())
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "trivial.safetensors"
        save_file(trivial().state_dict(), weights, {"preceptor": DESCRIPTION})
        serve = ["-m", "teacher_server", "serve", "--model", "benchmarks.serving:trivial", "--weights", str(weights)]
        ports = ["--grpc-port", "0", "--http-port", "0", "--state-directory", folder]
        commands = [[__file__, "echo"], [*serve, *ports, "--threads", "1"]]
        root = Path(__file__).parent.parent
        servers = [
            subprocess.Popen([sys.executable, *command], cwd=root, stdout=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            addresses = [
                server.stdout.readline().split("grpc ")[1].split(",")[0] for server in servers if server.stdout
            ]
            print(
                f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, "
                f"grpcio {grpc.__version__}, torch {torch.__version__}, {ROUNDS} rounds of {QUERIES} queries"
            )
            asyncio.run(compare(*addresses))
        finally:
            for server in servers:
                server.terminate()
                server.wait(30)


if __name__ == "__main__":
    main()
