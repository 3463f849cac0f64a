"""What a student's books on its replicas cost: nothing that can be seen where there is one, microseconds a call.

Claim    a query to a single server takes as long through TeacherClient's books as it did without them; with several
         replicas the books stay far below the call.
Method   1. The books alone: take() and answered() for 1, 2 and 16 replicas, with no call between; the median and range
            over ROUNDS of CALLS pairs.
         2. The whole call: a server in a process of its own serves `trivial` (benchmarks/serving.py). In each round the
            same Label message goes ROUND_QUERIES times through a bare stub and as often through the client's Calls, by
            turns; the median of the round's paired differences is taken, then the median and range over rounds.
            --other PATH does the same for the student_worker of another checkout, round by round in turn.
Machine  stated by the output.

    python -m benchmarks.replicas [--other PATH]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
from safetensors.torch import save_file

from benchmarks.serving import DESCRIPTION, UNLIMITED, trivial
from protos import teacher_pb2 as pb
from protos import teacher_pb2_grpc, wire

ROUNDS, CALLS, ROUND_QUERIES = 9, 20_000, 400
ROOT = Path(__file__).parent.parent


def books(replicas: int) -> list[float]:
    """Microseconds of one call's entries, a round each."""
    from student_worker.replicas import Replicas  # noqa: PLC0415 - another checkout may not have it

    addresses = [f"127.0.0.1:{number + 1}" for number in range(replicas)]
    entries = Replicas(addresses, grpc.insecure_channel, 60)
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            flight = entries.take(48, ())
            if flight is not None:
                entries.answered(flight)
        rounds.append(1e6 * (time.perf_counter() - began) / CALLS)
    entries.close()
    return rounds


def ask(address: str) -> None:
    """A line of standard input begins a round: (bare, through Calls) in ms, and the median of their differences."""
    from student_worker.calls import Calls  # noqa: PLC0415 - whichever checkout's

    request = pb.LabelRequest(inputs=[wire.encode_tensor("x", np.zeros((1, 3, 224, 224), np.uint8))])
    calls = Calls(address, job="bench", token=None, timeout=60)
    channel = grpc.insecure_channel(address, options=UNLIMITED)
    stub = teacher_pb2_grpc.TeacherStub(channel)
    for _ in sys.stdin:
        bare, ours = [], []
        for _ in range(ROUND_QUERIES):
            began = time.perf_counter()
            stub.Label(request, timeout=60)
            between = time.perf_counter()
            calls("Label", request)
            bare.append(between - began)
            ours.append(time.perf_counter() - between)
        difference = statistics.median(b - a for a, b in zip(bare, ours, strict=True))
        print(
            json.dumps([1000 * statistics.median(bare), 1000 * statistics.median(ours), 1000 * difference]), flush=True
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def whole_calls(address: str, checkouts: dict[str, Path]) -> None:
    askers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--ask", address],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])},
            cwd=path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, path in checkouts.items()
    }
    results: dict[str, list[list[float]]] = {name: [] for name in askers}
    for round_ in range(ROUNDS + 1):  # the first one warms up
        for name, asker in askers.items():
            if asker.stdin is None or asker.stdout is None:
                raise RuntimeError("no pipes")
            asker.stdin.write("\n")
            asker.stdin.flush()
            figures = json.loads(asker.stdout.readline())
            if round_:
                results[name].append(figures)
    for asker in askers.values():
        asker.communicate(timeout=30)
    for name, rounds in results.items():
        bare, ours, difference = (list(column) for column in zip(*rounds, strict=True))
        print(f"2. {name:6} ms: bare stub {spread(bare)}, Calls {spread(ours)}, difference {spread(difference)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--other", type=Path, help="another checkout, to compare with")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask:
        ask(given.ask)
        return
    print(
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, grpcio {grpc.__version__}, "
        f"{ROUNDS} rounds"
    )
    for replicas in (1, 2, 16):
        print(f"1. {replicas:2} replicas: {spread(books(replicas))} us a call")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "trivial.safetensors"
        save_file(trivial().state_dict(), weights, {"preceptor": DESCRIPTION})
        serve = ["-m", "teacher_server", "serve", "--model", "benchmarks.serving:trivial", "--weights", str(weights)]
        ports = ["--grpc-port", "0", "--http-port", "0", "--state-directory", folder, "--threads", "1"]
        server = subprocess.Popen(
            [sys.executable, *serve, *ports],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            if server.stdout is None:
                raise RuntimeError("no pipe")
            address = server.stdout.readline().split("grpc ")[1].split(",")[0]
            whole_calls(address, {"this": ROOT} | ({"other": given.other.resolve()} if given.other else {}))
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
