"""What Ray Serve's gRPC ingress would cost between students and the teacher, and what it loses: why there is none.

Claim    a query through Serve's proxy takes longer than one to our server in a Ray actor, which takes as long as one to
         our server without Ray; and calls that are under way when Serve is shut down are lost, when our server is told
         to end they are answered. (A redeployment and a scale-down lose none in either.)
Method   `benchmarks.serving:trivial` answers one 224 x 224 x 3 uint8 sample (150,528 bytes), in four places: a bare
         gRPC asyncio server that decodes, computes and encodes and does nothing else; the same code as a Serve
         deployment behind its gRPC proxy; our server (`teacher-server serve`: checks, queue, batcher, cache bypassed,
         ledger in Valkey); and our server as `serve-on-ray` places it. So Serve's own cost is the first against the
         second, and Ray's to us the third against the fourth. Rounds are interleaved; of each round the median and the
         99th percentile of all latencies, then median and range over rounds.
         Then 8 callers ask a network that takes 20 ms, without retrying: a Serve deployment is redeployed, scaled from
         2 replicas to 1, and shut down; `serve-on-ray` is told to end. Failures are counted by status.
Machine  stated by the output. All of Ray runs on it too, on the same cores.
n        ROUNDS rounds of QUERIES queries for each number of callers; DRAINS times each of the endings.

Needs ray[serve] beside our [server,ray] extras, and a Ray of its own, which RAY_ADDRESS names. Serve's proxy binds all
interfaces, so (as root, on a machine with no other Ray, since `ray stop` ends all):

    unshare --net sh -c 'ip link set lo up
        export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_MODE=disabled RAY_ADDRESS=127.0.0.1:6379 PYTHONPATH=.
        ray start --head --node-ip-address=127.0.0.1 --num-cpus=8 && python benchmarks/ray_serve.py; ray stop'
"""

import asyncio
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import ray
import torch
from ray import serve
from ray.serve.config import gRPCOptions
from safetensors.torch import save_file

from benchmarks.serving import DESCRIPTION, UNLIMITED, Trivial, trivial
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from teacher_server.embedded import valkey_binary

ROUNDS, QUERIES, DRAINS, SECONDS = 7, {1: 100, 8: 240}, 2, 0.02
ROOT = Path(__file__).parent.parent
CALLER = (("application", "default"), ("preceptor-job", "benchmark"))
Result = tuple[float, float]


class Slow(Trivial):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS)
        return super().forward(x)


def slow() -> torch.nn.Module:
    return Slow()


class Thin:
    """The least that answers a query."""

    def __init__(self, seconds: float = 0.0) -> None:
        torch.set_num_threads(1)
        self.net, self.seconds = trivial(), seconds

    async def Label(self, request: pb.LabelRequest, _: Any = None) -> pb.LabelResponse:  # noqa: N802 - the contract's
        await asyncio.sleep(self.seconds)
        with torch.inference_mode():
            x = torch.from_numpy(wire.decode_tensor(request.inputs[0]).copy()).float() / 255
            logits = self.net(x).numpy()
        answers = wire.encode_answers(logits, pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT32))
        return pb.LabelResponse(answers=[answers], sources=[pb.SOURCE_COMPUTED] * len(logits))


class Bare(Thin, teacher_pb2_grpc.TeacherServicer):
    pass


async def bare() -> None:
    server = grpc.aio.server(options=UNLIMITED)
    teacher_pb2_grpc.add_TeacherServicer_to_server(Bare(), server)
    print(f"grpc 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')},", flush=True)
    await server.start()
    await server.wait_for_termination()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of ours that says where its gRPC port is; ended by SIGTERM."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if "grpc " not in line:
                log.seek(0)
                raise RuntimeError(line + log.read())
            yield process, line.split("grpc ")[1].split(",")[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def measured(call: Callable[[], Awaitable[object]], callers: int) -> Result:
    """(p50, p99) in ms of so many queries by so many callers at once."""
    latencies: list[float] = []

    async def caller() -> None:
        for _ in range(QUERIES[callers] // callers):
            began = time.perf_counter()
            await call()
            latencies.append(1000 * (time.perf_counter() - began))

    await asyncio.gather(*(caller() for _ in range(callers)))
    return statistics.median(latencies), float(np.percentile(latencies, 99))


def query() -> pb.LabelRequest:
    x = np.zeros((1, 3, 224, 224), np.uint8)
    return pb.LabelRequest(inputs=[wire.encode_tensor("x", x)], cache_mode=pb.CACHE_MODE_BYPASS)


async def compare(addresses: dict[str, str]) -> None:
    request, results = query(), dict[tuple[int, str], list[Result]]()
    async with AsyncStubs(addresses) as stubs:
        for round_ in range(ROUNDS + 1):  # the first one warms up
            for callers in QUERIES:
                for name, stub in stubs.items():
                    result = await measured(lambda stub=stub: stub.Label(request, metadata=CALLER), callers)
                    if round_:
                        results.setdefault((callers, name), []).append(result)
    for (callers, name), rounds in sorted(results.items(), key=lambda item: item[0][0]):
        shown = (f"{statistics.median(v):6.2f} ({min(v):.2f} - {max(v):.2f})" for v in zip(*rounds, strict=True))
        print(f"{callers} callers  {name:24} p50, p99 ms: {'   '.join(shown)}")


class AsyncStubs:
    def __init__(self, addresses: dict[str, str]) -> None:
        self._channels = {name: grpc.aio.insecure_channel(at, options=UNLIMITED) for name, at in addresses.items()}

    async def __aenter__(self) -> dict[str, Any]:
        return {name: teacher_pb2_grpc.TeacherStub(channel) for name, channel in self._channels.items()}

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()


async def endured(address: str, change: Callable[[], object]) -> Counter[str]:
    """How calls end by 8 callers that ask until `change()` has returned or nobody answers, and never retry."""
    request, outcomes, over = query(), Counter[str](), asyncio.Event()

    async def caller(stub: Any) -> None:
        while not over.is_set():
            try:
                await stub.Label(request, metadata=CALLER, timeout=30)
                outcomes["answered"] += 1
            except grpc.aio.AioRpcError as error:
                words = " ".join((error.details() or "").split())[:48]
                outcomes[f"{error.code().name}: {words}"] += 1
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    return  # a student would ask another replica

    async with AsyncStubs({"": address}) as stubs:
        callers = [asyncio.create_task(caller(stubs[""])) for _ in range(8)]
        await asyncio.sleep(1)
        await asyncio.to_thread(change)
        await asyncio.sleep(0.3)
        over.set()
        await asyncio.gather(*callers)
    return outcomes


def deploy(name: str, seconds: float, replicas: int = 1) -> None:
    options = {"name": name, "num_replicas": replicas, "max_ongoing_requests": 100}
    serve.run(serve.deployment(**options)(Thin).bind(seconds), name="default")


def start_serve(port: int, http_port: int) -> None:
    functions = ["protos.teacher_pb2_grpc.add_TeacherServicer_to_server"]
    serve.start(
        http_options={"host": "127.0.0.1", "port": http_port},
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=functions),
    )


def endings(on_ray: Callable[..., Any], grpc_port: int) -> None:
    address = f"127.0.0.1:{grpc_port}"
    for _ in range(DRAINS):
        start_serve(grpc_port, free_port())
        deploy("thin", SECONDS, 2)
        print("Serve, redeployed:", dict(asyncio.run(endured(address, lambda: deploy("thin", SECONDS * 1.001, 2)))))
        print("Serve, 2 -> 1:", dict(asyncio.run(endured(address, lambda: deploy("thin", SECONDS * 1.001, 1)))))
        print("Serve, shut down:", dict(asyncio.run(endured(address, serve.shutdown))))
    for _ in range(DRAINS):
        with on_ray("slow") as (process, at):

            def end(process: subprocess.Popen[str] = process) -> None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)

            print("serve-on-ray, told to end:", dict(asyncio.run(endured(at, end))))


def main() -> None:
    if sys.argv[1:] == ["bare"]:
        asyncio.run(bare())
        return
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    print(
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, Ray {ray.__version__}, "
        f"grpcio {grpc.__version__}, torch {torch.__version__}, {ROUNDS} rounds of {QUERIES} queries"
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        redis_port, grpc_port = free_port(), free_port()
        redis = [str(valkey_binary()), "--port", str(redis_port), "--appendonly", "yes", "--maxmemory", "500mb"]
        valkey = subprocess.Popen([*redis, "--dir", folder, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL)
        stack.callback(valkey.wait)
        stack.callback(valkey.terminate)

        @contextmanager
        def teacher(command: str, factory: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
            weights = Path(folder) / f"{factory}.safetensors"
            save_file(trivial().state_dict(), weights, {"preceptor": DESCRIPTION})
            model = "benchmarks.serving:trivial" if factory == "trivial" else "benchmarks.ray_serve:slow"
            url = f"redis://127.0.0.1:{redis_port}"
            options = ["--model", model, "--weights", str(weights), "--threads", "1", "--state-directory"]
            options += [f"{folder}/{command}-{factory}", "--cache-redis-url", url, "--ledger-redis-url", url]
            with started("-m", "teacher_server", command, "--grpc-port=0", "--http-port=0", *options) as ours:
                yield ours

        start_serve(grpc_port, free_port())
        deploy("thin", 0.0)
        with (
            started(__file__, "bare") as (_, bare_at),
            teacher("serve", "trivial") as (_, plain),
            teacher("serve-on-ray", "trivial") as (_, actor),
        ):
            places = {"bare gRPC server": bare_at, "behind Serve": f"127.0.0.1:{grpc_port}"}
            asyncio.run(compare(places | {"our server": plain, "our server in an actor": actor}))
        serve.shutdown()
        endings(lambda factory: teacher("serve-on-ray", factory), grpc_port)


if __name__ == "__main__":
    main()
