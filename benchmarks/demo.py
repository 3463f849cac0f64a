"""The demo: one shared teacher, four ways to learn from it, at equal student steps.

Claim    with few labels, a student learns more from a teacher's answers than from the labels; UNIX gets there asking
         for three quarters of the samples.
Method   mnist5k (4000 training images, LABELLED of them with a label, 1000 to test). A teacher is trained on all
         labels and served; hard labels, KD, KD + mixup and UNIX are trained one after another, the same steps, the same
         student, one seed. Samples asked and computed are read from the server's own counters.
Machine  two cores, no GPU, no download.
n        one seed here; docs/benchmarks.md has the same with more seeds and intervals.

    python benchmarks/demo.py [--seeds 1 2 3] [--output runs/demo]
"""

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DATASET = "mnist5k"
LABELLED = 100
TEACHER_EPOCHS = 8
EPOCHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", default=["0"], help="one run a method with each")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    began = time.monotonic()
    weights = train_teacher(arguments.output / "teacher")
    with serving(weights) as (grpc_address, http_address):
        student("check", "--dataset", DATASET, "--teacher-address", grpc_address)
        compare(arguments.output, arguments.seeds, grpc_address, http_address)
    print(f"the whole demo took {time.monotonic() - began:.0f} s")


def train_teacher(output: Path) -> Path:
    student(
        "train", "--method", "hard", "--dataset", DATASET, "--student", "wrn-16-2", "--epochs", str(TEACHER_EPOCHS),
        "--job", "teacher", "--output", str(output),
    )  # fmt: skip
    return output / f"epoch-{TEACHER_EPOCHS:04d}.safetensors"


@contextmanager
def serving(weights: Path) -> Iterator[tuple[str, str]]:
    """A teacher server on free ports; yields its gRPC and HTTP addresses, and ends it as an operator would."""
    arguments = '{"name": "wrn-16-2", "channels": 1, "classes": 10, "size": 28}'
    command = [
        sys.executable, "-m", "teacher_server", "serve", "--model", "student_worker.models:build",
        "--model-arguments", arguments, "--weights", str(weights), "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            ready = re.search(r"grpc (\S+), http (\S+),", line)
            if not ready:
                raise SystemExit(f"the server did not start: {line!r}")
            print(line, end="", flush=True)
            yield ready[1], ready[2]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def compare(output: Path, seeds: list[str], grpc_address: str, http_address: str) -> None:
    student(
        "compare", "--methods", "hard,kd,kd+mixup,unix", "--seeds", ",".join(seeds), "--dataset", DATASET,
        "--labelled", str(LABELLED), "--student", "cnn-small", "--epochs", str(EPOCHS), "--crop", "2",
        "--teacher-address", grpc_address, "--metrics-url", f"http://{http_address}/metrics",
        "--job", "demo", "--output", str(output),
    )  # fmt: skip


def student(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "student_worker", *arguments], check=True)


if __name__ == "__main__":
    main()
